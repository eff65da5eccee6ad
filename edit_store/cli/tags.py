"""Commands about the history of a tag: history, promote, rollback, withdraw, pin."""

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
    plain,
    show,
)
from vllm_edits.edit_store.compose import conflicts, named
from vllm_edits.edit_store.refs import DEFAULT_TAG
from vllm_edits.edit_store.storage.store import TagEntry


@app.command()
@explained
def history(name: NameArgument, store: StoreOption, tag: TagOption = DEFAULT_TAG, as_json: JsonOption = False) -> None:
    """Show all promotions, rollbacks, withdrawals and pins of a tag, oldest first.

    The chain of hashes over the entries is checked. An error names the first
    entry that does not fit.

    \b
    Example:
      vllm-edits history polite --store ./store --tag prod
    """
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
    """Promote a version under a tag.

    Every server of this store then serves the version under that tag, within
    its poll interval (`poll_seconds`). Requests that run finish on the version
    with which they began.

    \b
    Examples:
      vllm-edits promote polite@4f1c9a --store ./store --reason "milder"
      vllm-edits promote polite@4f1c9a --store ./store --tag staging
    """
    target = opened(store, key)
    entry = target.promote(reference, tag=tag, reason=reason)
    _told(entry, as_json)
    if target.manifest(entry.version).parts:
        for line in named(conflicts(target.bundle(entry.version))):
            plain(f"note: {line}", err=True)


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
    """Return to the version that was promoted before the present one.

    The rollback is a new entry in the history of the tag. Nothing is deleted.
    After a withdrawal, it restores the withdrawn version.

    \b
    Example:
      vllm-edits rollback polite --store ./store --reason "complaints about tone"
    """
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
    """Stop serving a tag.

    Requests that run finish. New requests for it get an error: the model does
    not exist. `rollback` restores the version.

    \b
    Example:
      vllm-edits withdraw polite --store ./store --reason "leaks names"
    """
    _told(opened(store, key).withdraw(name, tag=tag, reason=reason), as_json)


@app.command()
@explained
def pin(
    name: NameArgument,
    *,
    store: StoreOption,
    tag: TagOption = DEFAULT_TAG,
    remove: Annotated[
        bool, typer.Option("--remove", help="Remove the pin: allow promotions and rollbacks again.")
    ] = False,
    reason: ReasonOption = "",
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Pin a tag: refuse promotions and rollbacks until the pin is removed.

    Use it after a rollback, so that an automatic promotion cannot bring the
    fault back. The refusal shows your reason.

    \b
    Examples:
      vllm-edits pin polite --store ./store --reason "incident 7"
      vllm-edits pin polite --store ./store --remove
    """
    _told(opened(store, key).pin(name, tag=tag, remove=remove, reason=reason), as_json)


def _told(entry: TagEntry, as_json: bool) -> None:
    if as_json:
        as_script([entry.model_dump(mode="json")])
    else:
        what = "not served any more" if entry.withdrawn else entry.version[:12]
        plain(f"{entry.name}@{entry.tag} is {what} (entry {entry.sequence}, {entry.operation})")
