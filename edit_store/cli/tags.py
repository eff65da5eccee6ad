"""Commands that read and extend the history of a tag: history, promote, rollback, withdraw, pin."""

from __future__ import annotations

from typing import Annotated

import typer

from vllm_edits.edit_store.cli.common import (
    JsonOption,
    KeyOption,
    NameArgument,
    ReasonOption,
    ReferenceArgument,
    StoreOption,
    TagOption,
    app,
    as_script,
    explained,
    opened,
    show,
)
from vllm_edits.edit_store.compose import conflicts, named
from vllm_edits.edit_store.refs import DEFAULT_TAG
from vllm_edits.edit_store.storage.store import TagEntry


@app.command()
@explained
def history(name: NameArgument, store: StoreOption, tag: TagOption = DEFAULT_TAG, as_json: JsonOption = False) -> None:
    """What was promoted, rolled back, withdrawn and pinned under a tag, oldest first, its chain checked."""
    target = opened(store)
    target.version_digests(name)
    rows = [{**entry.model_dump(mode="json"), "digits": entry.version[:12]} for entry in target.history(name, tag)]
    columns = {
        "sequence": "#", "operation": "operation", "digits": "version", "at": "when", "actor": "who", "reason": "why",
    }  # fmt: skip
    show(rows, columns, as_json)


@app.command()
@explained
def promote(
    reference: ReferenceArgument,
    *,
    store: StoreOption,
    tag: TagOption = DEFAULT_TAG,
    reason: ReasonOption = "",
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a version the promoted one of a tag. Servers follow within their poll interval."""
    target = opened(store, key)
    entry = target.promote(reference, tag=tag, reason=reason)
    _told(entry, as_json)
    if target.manifest(entry.version).parts:
        for line in named(conflicts(target.bundle(entry.version))):
            typer.echo(f"note: {line}", err=True)


@app.command()
@explained
def rollback(
    name: NameArgument,
    *,
    store: StoreOption,
    tag: TagOption = DEFAULT_TAG,
    reason: ReasonOption = "",
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Return to the version promoted before. Appends to the history; nothing is deleted."""
    _told(opened(store, key).rollback(name, tag=tag, reason=reason), as_json)


@app.command()
@explained
def withdraw(
    name: NameArgument,
    *,
    store: StoreOption,
    tag: TagOption = DEFAULT_TAG,
    reason: ReasonOption = "",
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Stop serving a tag. Requests that run end well, new ones find no such variant; `rollback` brings it back."""
    _told(opened(store, key).withdraw(name, tag=tag, reason=reason), as_json)


@app.command()
@explained
def pin(
    name: NameArgument,
    *,
    store: StoreOption,
    tag: TagOption = DEFAULT_TAG,
    remove: Annotated[bool, typer.Option("--remove", help="allow the tag to move again")] = False,
    reason: ReasonOption = "",
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Forbid to move a tag: promotions and rollbacks are refused, with your reason, until the pin is removed.

    After a rollback at night, this keeps an automatic promotion from bringing the fault back.
    """
    _told(opened(store, key).pin(name, tag=tag, remove=remove, reason=reason), as_json)


def _told(entry: TagEntry, as_json: bool) -> None:
    if as_json:
        as_script([entry.model_dump(mode="json")])
    else:
        what = "nothing any more" if entry.withdrawn else entry.version[:12]
        typer.echo(f"{entry.name}@{entry.tag} is {what} (entry {entry.sequence}, {entry.operation})")
