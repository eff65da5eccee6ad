"""Who relies on an object, and what a collection is about to delete: so that no writer builds on what is being swept.

    intents/<nonce>.json      a writer is about to refer to these digests
    condemned/<digest>        a collection is about to delete this object

A writer notes its intent, then looks whether what it needs is condemned. A collector condemns, then looks at the
intents and at the references. Each writes before it looks, so at least one of the two sees the other: the writer is
refused, or the collector leaves the object alone. No clock is part of this.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from vllm_edits.edit_store.backends import Backend, Item, get_or_none
from vllm_edits.edit_store.canonical import canonical_json
from vllm_edits.edit_store.errors import Conflict

INTENTS, CONDEMNED = "intents", "condemned"


@contextmanager
def relying_on(backend: Backend, digests: Sequence[str]) -> Iterator[None]:
    """Hold off collections of these objects while the block refers to them; Conflict when one has begun."""
    key = f"{INTENTS}/{secrets.token_hex(16)}.json"
    backend.create(key, canonical_json(list(digests)))
    try:
        for digest in digests:
            if get_or_none(backend, condemned_key(digest)) is not None:
                raise Conflict(
                    f"object {digest[:12]} is being deleted by `vllm-edits gc`. Try again in a moment. If gc was "
                    "interrupted, finish it first with: vllm-edits gc --run"
                )
        yield
    finally:
        backend.delete(key)


def condemned_key(digest: str) -> str:
    """The mark of an object about to be deleted."""
    return f"{CONDEMNED}/{digest}"


def relied_on(backend: Backend) -> set[str]:
    """Every digest that some writer is about to refer to, or was when it crashed."""
    digests: set[str] = set()
    for item in list(backend.list(INTENTS + "/")):
        data = get_or_none(backend, item.key)
        if data is not None:
            digests.update(json.loads(data))
    return digests


def old_intents(backend: Backend, before: float) -> list[Item]:
    """Intents of writers that must have crashed."""
    return [item for item in backend.list(INTENTS + "/") if item.modified < before]
