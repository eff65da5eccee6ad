"""`vllm-edits` and vLLM's parser of flags, imported once and forked for every command, as documents type many of them.

    python ready.py serve SOCKET        the process that has them imported
    python ready.py NAME WORD...        what stands for the command NAME on the PATH of a document's sandbox

`vllm-edits` is run, but for what would start an engine or ask a server: of that the words are read. Every other command
that has a name here is only noted, with its words and its line of the block, for the test to read.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import struct
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

NOTES, SOCKET, LINE, ONLY_READ = "DOCUMENT_NOTES", "DOCUMENT_SOCKET", "DOCUMENT_LINE", "DOCUMENT_ONLY_READ"
"""Variables: the file for notes, the socket of the process above, the line of a block, and whether nothing is run."""
ELSEWHERE = (
    ("status",),
    ("probe",),
    ("probes", "add"),
    ("evaluate",),
    ("reserve", "show"),
    ("reserve", "grow"),
    ("experiment", "replay"),
    ("hub", "push"),
    ("hub", "pull"),
)
"""Commands that ask a server or the Hub, or want a trained model: their words are parsed, and that is all."""
STARTS_VLLM = (("serve",), ("run-batch",))
BUILD = ("build",)
"""Its methods want a trained model: their words are parsed, and that is all. What lists and explains them is run."""
_LOST, _LOOK_SECONDS = 70, 5


def note(words: list[str], code: int | None = None) -> None:
    """Write down a command: with the code that it ended with, or None where it was not run."""
    line = json.dumps({"words": words, "line": int(os.environ.get(LINE, "0")), "code": code}) + "\n"
    with open(os.environ[NOTES], "a") as file:  # noqa: PTH123  pathlib takes as long to import as all of this
        file.write(line)


def ask(path: str, words: list[str], folder: str, environment: dict[str, str], files: list[int]) -> int:
    """Have the process behind a socket run a command with these standard streams; returns its code."""
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(path)
        told = json.dumps([words, folder, environment]).encode()
        socket.send_fds(asking, [struct.pack("!I", len(told))], files)
        asking.sendall(told)
        answer = asking.recv(1)
    return answer[0] if answer else _LOST


def main(words: list[str]) -> int:
    if words[0] == "serve":
        serve(words[1])
    if words[0] != "vllm-edits" or os.environ.get(ONLY_READ):
        note(words)
        return 0
    return ask(os.environ[SOCKET], words, os.getcwd(), dict(os.environ), [0, 1, 2])  # noqa: PTH109  as above


# -- the process that has everything imported --------------------------------------------------------------------------


def serve(path: str) -> NoReturn:
    """Run one command a connection, each in a fork of this process."""
    import vllm_edits.plugin.cli  # noqa: F401  takes the longest of all

    parser: Any = None
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(f"{path}.soon")
    listening.listen(16)
    os.rename(f"{path}.soon", path)  # noqa: PTH104  once it is there, it answers
    listening.settimeout(_LOOK_SECONDS)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    parent = os.getppid()
    while True:
        try:
            asking, _ = listening.accept()
        except TimeoutError:
            if os.getppid() != parent:  # whoever began this was killed
                sys.exit()
            continue
        head, files, _, _ = socket.recv_fds(asking, 4, 3)
        words, folder, environment = json.loads(_exactly(asking, struct.unpack("!I", head)[0]))
        if words[0] in ("vllm", "fields") and parser is None:
            parser = _parser_of_vllm()
        if not os.fork():
            listening.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            code = _forked(words, folder, environment, files, parser)
            asking.sendall(bytes([code & 255]))
            os._exit(0)
        asking.close()
        for each in files:
            os.close(each)


def _exactly(asking: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        found += asking.recv(size - len(found))
    return found


def _forked(words: list[str], folder: str, environment: dict[str, str], files: list[int], parser: Any) -> int:
    for number, each in enumerate(files):
        os.dup2(each, number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = words
    try:
        if words[0] == "vllm":
            parser.parse_args(words[1:])
        elif words[0] == "fields":
            print(json.dumps(list(getattr(importlib.import_module(words[1]), words[2]).model_fields)))  # noqa: T201
        else:
            run(words)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001  a fork must not go on as its parent
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def run(words: list[str]) -> None:
    """Run a command of `vllm-edits`; of one that needs an engine or a server, note the words and no code."""
    from typer.main import get_command

    from vllm_edits.edit_store.cli import app
    from vllm_edits.plugin.cli import start_commands

    group: Any = get_command(app)
    kind = subcommand(group, words)
    code: int | None = 1

    def leave_out(*told: Any, **_: Any) -> NoReturn:
        """In the place of what would need more; of vLLM it is told (file, words, …) or ([file, *words], …)."""
        nonlocal code
        code = None
        if told:
            note(["vllm", *(told[1] if isinstance(told[0], str) else told[0])[1:]])
        raise SystemExit(0)

    if kind == BUILD:
        from vllm_edits.edit_store.cli import build

        methods: Any = get_command(build.application())
        for method in methods.commands.values():
            method.callback = leave_out
        build.application = lambda: methods
    if kind in ELSEWHERE:
        of(group, kind).callback = leave_out
    if kind in STARTS_VLLM:
        seams: Any = start_commands
        seams._require_free_port = lambda _: None  # a server that listens there is no fault of the page
        seams.os.execve = seams.batch.server = leave_out
    try:
        group(words[1:], prog_name=words[0])
    except SystemExit as ended:
        if code is not None:
            code = ended.code if isinstance(ended.code, int) else 1
        raise
    finally:
        note(words, code)


def subcommand(group: Any, words: list[str]) -> tuple[str, ...]:
    """The names of the command that is meant, without `vllm-edits`."""
    found: list[str] = []
    for word in words[1:]:
        if word not in getattr(group, "commands", {}):
            break
        group = group.commands[word]
        found.append(word)
    return tuple(found)


def of(group: Any, names: tuple[str, ...]) -> Any:
    for name in names:
        group = group.commands[name]
    return group


def _parser_of_vllm() -> Any:
    """The parser of `vllm serve`, without any plugin's part in it. Makes it in seconds."""
    os.environ.update({"VLLM_PLUGINS": "", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"})
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm")
    subparsers = parser.add_subparsers(required=True, dest="subparser")
    for command in cmd_init():
        command.subparser_init(subparsers)
    return parser


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        sys.path[0] = str(Path(__file__).parents[3])
    sys.exit(main(sys.argv[1:]))
