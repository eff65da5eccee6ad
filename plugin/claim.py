"""What the engine gate writes on every request: which slot it may use, and the cache salt that keeps its KV apart."""

from __future__ import annotations

import hashlib

CLAIM = "vllm_edits_claim"
"""Key in a request's extra arguments: absent for the base model, else [slot, version]. Callers cannot set it."""


def cache_salt(version: str | None, caller_salt: str | None) -> str | None:
    """Salt of a request's prefix-cache blocks: sha256 over (version, caller's salt), each with its length before it.

    Without version and salt there is none: the base model shares its cache as if the plugin were not there. The lengths
    make the pair unambiguous, and the hash keeps a caller from writing a salt that is another version's.
    """
    if version is None and caller_salt is None:
        return None
    hasher = hashlib.sha256()
    for part in (version or "", caller_salt or ""):
        data = part.encode()
        hasher.update(len(data).to_bytes(8, "big") + data)
    return hasher.hexdigest()
