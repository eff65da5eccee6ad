"""Connects the API server processes over a Unix socket: the first process owns the slots, the others ask it.

All processes use the same slots, so one process must decide. It runs the reconciler. The others ask it for the lease of
every request, which costs one message each way, and for everything else that a coordinator does. So all processes see a
swap at the same time, and the table of served names is not copied.

Each process sends its requests to the engine itself. So when a lease of another process ends, the owner does not know
whether the request has left the engine. Before it changes a slot, it therefore asks every process to send a call to the
engine (a fence). The answer arrives after the engine has seen all earlier calls of that process.

A message is a length of four bytes and msgpack: {id, call, ...} in one direction, {id, value} or {id, error} back.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from pydantic import TypeAdapter

from vllm_edits.edit_store import errors
from vllm_edits.edit_store.errors import BundleRefused, EditsError, Reason
from vllm_edits.edit_store.private_folder import private_folder
from vllm_edits.plugin.experiments.records import Record
from vllm_edits.plugin.request import Request
from vllm_edits.plugin.serving import coordinator as coordinating
from vllm_edits.plugin.serving.coordinator import CapacityWish, Coordinator, Served, TagChange
from vllm_edits.plugin.serving.lease import Lease
from vllm_edits.plugin.serving.variants import Choice
from vllm_edits.plugin.serving.workers import Workers

logger = logging.getLogger("vllm.edits")

Message = dict[str, Any]
_LENGTH_BYTES = 4
_REQUEST: TypeAdapter[Request] = TypeAdapter(Request)
_CHOICE: TypeAdapter[Choice] = TypeAdapter(Choice)
_ERRORS: Mapping[str, type[EditsError]] = {
    name: kind
    for module in (errors, coordinating)
    for name, kind in vars(module).items()
    if isinstance(kind, type) and issubclass(kind, EditsError)
}
ANSWER_SECONDS = 60.0
"""time limit for the answer of a process to a fence"""
_RETRY_SECONDS = 0.1


def socket_path() -> Path:
    """The path of the socket. It contains the id of the parent process, which the processes of a server share."""
    return private_folder(str(os.getppid())) / "owner.sock"


class CoordinatorServer:
    """Serves a coordinator to other processes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._server: asyncio.Server | None = None
        self._processes: dict[_Process, asyncio.Task[Any] | None] = {}
        self._ended_holding: list[_Process] = []
        """ended processes whose leases are kept, because their requests may still be in the engine"""

    async def start(self, coordinator: Coordinator) -> None:
        """Begin to answer."""
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(partial(self._serve, coordinator), self._path)

    async def close(self) -> None:
        """Stop answering."""
        if self._server is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)
            serving = [task for task in self._processes.values() if task is not None]
            for process in self._processes:
                process.close()
            await asyncio.gather(*serving)

    async def fence(self) -> None:
        """Wait until the engine has seen all earlier calls of other processes. EditsError if one does not answer."""
        if gone := len(self._ended_holding):
            raise EditsError(
                f"{gone} API server process(es) ended, so it is unknown which of their requests are still in the "
                "engine. Restart the server"
            )
        await asyncio.gather(*(process.fence() for process in self._processes))

    async def _serve(
        self, coordinator: Coordinator, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        process = _Process(coordinator, writer)
        self._processes[process] = asyncio.current_task()
        try:
            while (message := await _read(reader)) is not None:
                process.hear(message)
        finally:
            del self._processes[process]
            if process.end():
                self._ended_holding.append(process)
            writer.close()


class _Process:
    """Another process, as seen by the owner of the slots."""

    def __init__(self, coordinator: Coordinator, writer: asyncio.StreamWriter) -> None:
        self._coordinator = coordinator
        self._writer = writer
        self._leases: dict[int, ExitStack] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._fences: dict[int, asyncio.Future[None]] = {}
        self._numbers = itertools.count()

    def hear(self, message: Message) -> None:
        number, call = message["id"], message["call"]
        if call == "release":
            self._leases.pop(number).close()
        elif call == "record":
            self._coordinator.record(msgspec.convert(message["record"], Record))
        elif call == "cancel":
            if number in self._tasks:
                self._tasks[number].cancel()
        elif call == "fenced":
            if number in self._fences:  # else it came too late
                self._fences[number].set_result(None)
        else:
            task = asyncio.get_running_loop().create_task(self._answer(number, call, message))
            self._tasks[number] = task
            task.add_done_callback(lambda _: self._tasks.pop(number, None))

    async def _answer(self, number: int, call: str, message: Message) -> None:
        try:
            value = await self._asked(number, call, message)
        except EditsError as error:
            _write(self._writer, {"id": number, "error": _told(error)})
        except Exception as error:
            logger.exception("call %s of another API server process failed", call)
            _write(self._writer, {"id": number, "error": _told(EditsError(f"{call} failed: {error!r}"))})
        else:
            _write(self._writer, {"id": number, "value": value})

    async def _asked(self, number: int, call: str, message: Message) -> Any:
        if call == "lease":
            return self._kept(number, await self._coordinator.lease(_REQUEST.validate_python(message["request"])))
        if call == "renew":
            choice = message["choice"]
            return self._kept(number, await self._coordinator.renew(choice and _CHOICE.validate_python(choice)))
        if call == "served":
            return asdict(await self._coordinator.served())
        if call == "change":
            return await self._coordinator.change(TagChange(**message["change"]))
        if call == "grow":
            return await self._coordinator.grow(CapacityWish(**message["wish"]))
        if call == "probe":
            return await self._coordinator.probe(message["ref"])
        if call == "feedback":
            return await self._coordinator.feedback(message["request"], message["metric"], message["value"])
        return await (self._coordinator.status() if call == "status" else self._coordinator.sync())

    def _kept(self, number: int, lease: Lease) -> Message:
        self._leases[number] = stack = ExitStack()
        stack.enter_context(lease.hold())
        return {"slot": lease.slot, "choice": _CHOICE.dump_python(lease.choice, mode="json")}

    async def fence(self) -> None:
        number = next(self._numbers)
        answered = self._fences[number] = asyncio.get_running_loop().create_future()
        _write(self._writer, {"id": number, "fence": True})
        try:
            await asyncio.wait_for(answered, ANSWER_SECONDS)
        except TimeoutError:
            raise EditsError(f"another API server process did not answer within {ANSWER_SECONDS:g} s") from None
        finally:
            del self._fences[number]

    def end(self) -> bool:
        """End the process's tasks. True if it still held leases."""
        for task in list(self._tasks.values()):
            task.cancel()
        for fence in self._fences.values():
            if not fence.done():
                fence.set_exception(EditsError("an API server process ended"))
        return bool(self._leases)

    def close(self) -> None:
        self._writer.close()


class RemoteCoordinator:
    """The coordinator in another process."""

    def __init__(self, path: Path, reach_engine: Callable[[], Awaitable[Any]]) -> None:
        """reach_engine: a call to the engine that returns after all earlier calls."""
        self._path = path
        self._reach_engine = reach_engine
        self._writer: asyncio.StreamWriter | None = None
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()

    async def connect(self) -> None:
        """Wait until the owner answers. It may prepare versions first. If it fails, vLLM ends this process too."""
        while self._writer is None:
            try:
                reader, self._writer = await asyncio.open_unix_connection(self._path)
            except (FileNotFoundError, ConnectionRefusedError):
                await asyncio.sleep(_RETRY_SECONDS)
        self._start(self._listen(reader))

    async def close(self) -> None:
        """Close the connection."""
        if self._writer is not None:
            self._writer.close()
        for task in list(self._tasks):
            task.cancel()

    async def lease(self, request: Request) -> Lease:
        return await self._leased("lease", request=asdict(request))

    def record(self, record: Record) -> None:
        with suppress(EditsError):  # the server ends with the coordinator
            self._write({"id": next(self._numbers), "call": "record", "record": msgspec.to_builtins(record)})

    async def renew(self, choice: Choice | None) -> Lease:
        return await self._leased("renew", choice=choice and _CHOICE.dump_python(choice, mode="json"))

    async def served(self) -> Served:
        found = await self._ask("served")
        return Served([tuple(each) for each in found["variants"]], found["base"], tuple(found["experiments"]))

    async def status(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = await self._ask("status")
        return found

    async def sync(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = await self._ask("sync")
        return found

    async def change(self, change: TagChange) -> Mapping[str, Any]:
        found: Mapping[str, Any] = await self._ask("change", change=asdict(change))
        return found

    async def grow(self, wish: CapacityWish) -> Mapping[str, Any]:
        found: Mapping[str, Any] = await self._ask("grow", wish=asdict(wish))
        return found

    async def probe(self, ref: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = await self._ask("probe", ref=ref)
        return found

    async def feedback(self, request: str, metric: str, value: float) -> Mapping[str, Any]:
        found: Mapping[str, Any] = await self._ask("feedback", request=request, metric=metric, value=value)
        return found

    async def _leased(self, call: str, **arguments: Any) -> Lease:
        number = next(self._numbers)
        found = await self._ask(call, number, **arguments)
        choice = _CHOICE.validate_python(found["choice"])
        return Lease(choice, found["slot"], lambda _: self._give_back(number))

    def _give_back(self, number: int) -> None:
        with suppress(EditsError):  # the owner has ended
            self._write({"id": number, "call": "release"})

    async def _ask(self, call: str, number: int | None = None, **arguments: Any) -> Any:
        number = next(self._numbers) if number is None else number
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._write({"id": number, "call": call, **arguments})
            return await answer
        except asyncio.CancelledError:
            if answer.cancelled():
                with suppress(EditsError):
                    self._write({"id": number, "call": "cancel"})
            elif answer.exception() is None:
                self._refuse(number, answer.result())
            raise
        finally:
            del self._waiting[number]

    def _refuse(self, number: int, value: Any) -> None:
        """Release a lease whose request has left."""
        if isinstance(value, dict) and value.keys() == {"slot", "choice"}:
            self._give_back(number)

    def _write(self, message: Message) -> None:
        if self._writer is None or self._writer.is_closing():
            raise EditsError("the API server process that owns the slots has ended")
        _write(self._writer, message)

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        with suppress(ConnectionError):
            while (message := await _read(reader)) is not None:
                self._hear(message)
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(EditsError("the API server process that owns the slots has ended"))
        if self._writer is not None:
            self._writer.close()

    def _hear(self, message: Message) -> None:
        number = message["id"]
        answer = self._waiting.get(number)
        if "fence" in message:
            self._start(self._fenced(number))
        elif answer is None or answer.done():
            self._refuse(number, message.get("value"))
        elif "error" in message:
            answer.set_exception(_error(message["error"]))
        else:
            answer.set_result(message["value"])

    async def _fenced(self, number: int) -> None:
        try:
            await self._reach_engine()
            self._write({"id": number, "call": "fenced"})
        except Exception:
            logger.exception("could not answer the API server process that owns the slots")

    def _start(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class FencedWorkers:
    """`Workers` that fence other processes before they change a slot, so that no request in the engine uses it."""

    def __init__(self, workers: Workers, fence: Callable[[], Awaitable[None]]) -> None:
        self._workers = workers
        self._fence = fence

    async def call(self, method: str, *args: Any) -> list[dict[str, Any]]:
        if method in ("edits_clear", "edits_put_weights") or (method == "edits_install" and args[2] is not None):
            await self._fence()
        return await self._workers.call(method, *args)

    async def abort_all(self) -> None:
        await self._workers.abort_all()


async def _read(reader: asyncio.StreamReader) -> Message | None:
    """The next message, or None at the end of the stream."""
    try:
        length = int.from_bytes(await reader.readexactly(_LENGTH_BYTES))
        message: Message = msgspec.msgpack.decode(await reader.readexactly(length))
    except asyncio.IncompleteReadError:
        return None
    return message


def _write(writer: asyncio.StreamWriter, message: Message) -> None:
    data = msgspec.msgpack.encode(message)
    writer.write(len(data).to_bytes(_LENGTH_BYTES) + data)


def _told(error: EditsError) -> Message:
    reasons = [[reason.code, reason.message] for reason in error.reasons] if isinstance(error, BundleRefused) else []
    what = error.what if isinstance(error, BundleRefused) else str(error)
    return {"kind": type(error).__name__, "what": what, "reasons": reasons}


def _error(told: Message) -> EditsError:
    kind = _ERRORS.get(told["kind"], EditsError)
    if issubclass(kind, BundleRefused):
        return kind(told["what"], [Reason(*reason) for reason in told["reasons"]])
    return kind(told["what"])
