"""Shared parts of all commands: the application, options, tables, progress, completion, and error messages."""

from __future__ import annotations

import json
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from vllm_edits.edit_store.bundle import MANIFEST_FILE, Bundle
from vllm_edits.edit_store.errors import EditsError
from vllm_edits.edit_store.progress import StepDone
from vllm_edits.edit_store.refs import is_bundle_name, is_digest
from vllm_edits.edit_store.signing import SigningKey
from vllm_edits.edit_store.storage.store import EditStore

PROBLEM = 1
STORE_VARIABLE = "VLLM_EDITS_STORE"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    help="Store and serve edited variants of one model. Run a command with --help to see what it does, when to use "
    "it, and examples.",
)
_output = Console()
_errors = Console(stderr=True)
_HIDDEN = ("Cc", "Cs", "Zl", "Zp")
"""Unicode categories of control characters, surrogates, and separators of lines and paragraphs."""
_REORDERING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that make a terminal show the following text in another order."""


def known_store(context: typer.Context) -> EditStore | None:
    """The store for completion of the present command line, or None. A missing store is not an error then."""
    url = context.params.get("store") or os.environ.get(STORE_VARIABLE)
    try:
        return EditStore(url) if url else None
    except EditsError:
        return None


def complete_name(context: typer.Context, incomplete: str) -> list[str]:
    """Names in the store that begin with `incomplete`."""
    store = known_store(context)
    names = store.names() if store else []
    return [name for name in names if name.startswith(incomplete) and is_bundle_name(name)]


def complete_reference(context: typer.Context, incomplete: str) -> list[str]:
    """Names, or after an @ the tags and abbreviated versions of the name."""
    name, at, selector = incomplete.partition("@")
    store = known_store(context)
    if not at or store is None:
        return complete_name(context, incomplete)
    try:
        found = [*store.tags(name), *(digest[:12] for digest in store.version_digests(name) if is_digest(digest))]
    except EditsError:
        return []
    return [f"{name}@{each}" for each in found if each.startswith(selector)]


StoreOption = Annotated[
    str,
    typer.Option(
        "--store", envvar=STORE_VARIABLE, show_default=False, is_eager=True,
        help="The edit store: a folder, or a URL such as s3://bucket/prefix (also gs://, az://).",
    ),
]  # fmt: skip
NameArgument = Annotated[str, typer.Argument(help="Name of a variant.", autocompletion=complete_name)]
ReferenceArgument = Annotated[
    str,
    typer.Argument(
        help="name, name@tag, or name@version. Six digits of the version are enough.", autocompletion=complete_reference
    ),
]
TagOption = Annotated[str, typer.Option("--tag", help="Tag of the variant.")]
ReasonOption = Annotated[str, typer.Option("--reason", help="Why. It is kept in the history.")]
KeyOption = Annotated[
    Path | None,
    typer.Option("--key", envvar="VLLM_EDITS_KEY", help="Private key to sign the change with.", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def opened(url: str, key: Path | None = None) -> EditStore:
    """Open the store. With a key, changes are signed."""
    return EditStore(url, signer=None if key is None else SigningKey.load(key))


def bundle_from(given: str, store: str | None) -> Bundle:
    """A bundle from its folder, or from a store by name, name@tag or name@version."""
    if (Path(given) / MANIFEST_FILE).is_file():
        return Bundle.load(Path(given))
    if store is None:
        raise EditsError(f"{given} is no folder of a bundle. To take one from a store, add --store STORE")
    target = opened(store)
    return target.bundle(target.resolve(given))


@contextmanager
def step_by_step(what: str) -> Iterator[StepDone]:
    """A progress bar whose text is the step that runs."""
    with counted(what) as update:
        yield lambda name, done, total: update(description=name, completed=done, total=total)


def explained(command: Callable[..., None]) -> Callable[..., None]:
    """Print an EditsError as a message and exit with code 1."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except EditsError as error:
            plain(f"vllm-edits: {error}", err=True)
            raise typer.Exit(PROBLEM) from None

    return run


def show(rows: list[dict[str, Any]], columns: dict[str, str], as_json: bool) -> None:
    """Print rows as a table with the given columns (field to heading), or whole as JSON."""
    if as_json:
        as_script(rows)
        return
    # Text, not str: brackets and colons in an author's text are neither markup nor emoji.
    # The first column names the row: it is not broken. In the others nothing is cut off.
    headings = [Column(Text(visible(heading)), no_wrap=not place, overflow="fold")
                for place, heading in enumerate(columns.values())]  # fmt: skip
    table = Table(*headings, box=None, header_style="bold")
    for row in rows:
        table.add_row(*(Text(visible(str(row[field]))) for field in columns))
    _output.print(table)


def plain(line: str, *, err: bool = False) -> None:
    """Print a line, on stderr with `err`. It is not wrapped, and brackets in it are not markup."""
    (_errors if err else _output).print(Text(visible(line)), soft_wrap=True)


def visible(text: str) -> str:
    r"""Escape control characters, e.g. ESC as \x1b, except new lines and tabs. Other Unicode text does not change.

    Texts from stores, servers and the Hub come from other authors. With raw control characters, such a text could clear
    the terminal, change its title, or hide and reorder other text.
    """
    return "".join(each.encode("unicode_escape").decode() if _is_control(each) else each for each in text)


def _is_control(character: str) -> bool:
    return character not in "\n\t" and (unicodedata.category(character) in _HIDDEN or character in _REORDERING)


def as_script(value: Any) -> None:
    """Print JSON."""
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")


@contextmanager
def counted(what: str, *, total: int | None = None, in_bytes: bool = False) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr. Yields a function to call with `advance`, or with `completed` and `total`."""
    amount = DownloadColumn(binary_units=True) if in_bytes else MofNCompleteColumn()
    columns = TextColumn("{task.description}", markup=False), BarColumn(), amount, TimeElapsedColumn()
    with Progress(*columns, console=_errors, transient=True, disable=not _errors.is_terminal) as progress:
        task = progress.add_task(what, total=total)

        def update(*, description: str | None = None, **changes: Any) -> None:
            shown = None if description is None else visible(description)
            progress.update(task, description=shown, **changes)

        yield update


@contextmanager
def moving(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar in bytes. Yields a function to call with the version, the bytes done, and the bytes of all."""
    with counted(what, in_bytes=True) as update:
        yield lambda version, done, total: update(description=abbreviated(version), completed=done, total=total)


def abbreviated(called: str) -> str:
    """A reference with its version abbreviated; any other text unchanged."""
    name, at, selector = called.partition("@")
    return f"{name}{at}{selector[:12] if is_digest(selector) else selector}"
