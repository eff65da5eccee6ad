"""Intents of writers and marks of gc, so that gc never deletes an object that a writer is about to refer to.

    intents/<nonce>.json      a writer is about to refer to these digests
    condemned/<digest>        gc is about to delete this object

A writer writes its intent, then checks that the objects it needs are not condemned. gc marks objects as condemned, then
reads the intents and the references. Each writes before it reads, so at least one of the two sees the other: either the
writer is refused, or gc keeps the object. This needs no clock.
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
    """Keep gc from deleting these objects while the block runs. Conflict if gc has begun to delete one."""
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
    """The key of the mark on an object that is about to be deleted."""
    return f"{CONDEMNED}/{digest}"


def relied_on(backend: Backend) -> set[str]:
    """Every digest in an intent of a writer, crashed writers included."""
    digests: set[str] = set()
    for item in list(backend.list(INTENTS + "/")):
        data = get_or_none(backend, item.key)
        if data is not None:
            digests.update(json.loads(data))
    return digests


def old_intents(backend: Backend, before: float) -> list[Item]:
    """Intents older than `before`. Their writers must have crashed."""
    return [item for item in backend.list(INTENTS + "/") if item.modified < before]
