"""The network between a server and its bucket, which can be cut."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Line:
    """A line to an endpoint; `url` is its near end."""

    def __init__(self, endpoint: str) -> None:
        host, port = endpoint.removeprefix("http://").split(":")
        self._target = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        self._cut = False
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Nothing gets through; what is open breaks."""
        self._cut = True
        for end in list(self._open):
            end.close()
        yield
        self._cut = False

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            if self._cut:
                client.close()
                continue
            server = socket.create_connection(self._target)
            self._open |= {client, server}
            for ends in ((client, server), (server, client)):
                threading.Thread(target=self._carry, args=ends, daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(data)
        except OSError:
            pass
        for end in (source, target):
            end.close()
            self._open.discard(end)
