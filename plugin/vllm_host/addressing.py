"""What the engine gate writes on a request of vLLM's: its claim on a slot, and what keeps its KV cache apart.

The prefix cache shares blocks between requests of equal salt, so the salt is a hash of everything that the edits of a
token depend on: version, strength, and for versions that treat prompt and answer differently the prompt's length. A
version that edits only the prompt's end or what is generated leaves the blocks before as the base model has them: its
request has no salt but the caller's, and says from where on it forks.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vllm_edits.plugin.claim import CLAIM, FORK, Claim, Fork
from vllm_edits.plugin.serving.variants import Choice
from vllm_edits.plugin.version_info import NO_INFO


def address(prompt: Any, sampling_params: Any, choice: Choice, slot: int, *, forks: bool) -> tuple[Any, Any]:
    """Copies of a request's prompt and sampling parameters that say what it is computed with.

    forks: whether the engine's scheduler knows how to fork the cache within a request.
    """
    arguments = {key: value for key, value in (sampling_params.extra_args or {}).items() if key not in (CLAIM, FORK)}
    if choice.version is not None:
        arguments[CLAIM] = list(Claim(slot, choice.version, choice.strength))
        if forks and choice.info.tail is not None and (salt := cache_salt(choice, None, _length(prompt))):
            arguments[FORK] = list(Fork(salt, choice.info.tail))
            choice = replace(choice, version=None, strength=1.0, info=NO_INFO)
    marked = sampling_params.clone()
    marked.extra_args = arguments or None
    return _salted(prompt, choice), marked


def cache_salt(choice: Choice | None, caller_salt: str | None, prompt: int | None = None) -> str | None:
    """Salt of a request's blocks: sha256 over version, strength, prompt length and caller's salt, each with its length,
    and what has been in the engine's weights until now, if anything has.

    Without all of these there is none: the base model shares its cache as if the plugin were not there. The lengths
    make the tuple unambiguous, and the hash keeps a caller from writing a salt that is another version's.
    """
    version, epoch = (choice.version, choice.epoch) if choice else (None, 0)
    if version is None and caller_salt is None and not epoch:
        return None
    bound = choice is not None and choice.info.bound_to_prompt
    # Where the prompt's length matters and is not known, nothing is shared with anybody.
    length = "" if not bound else str(prompt) if prompt is not None else secrets.token_hex(16)
    strength = "" if choice is None or choice.strength == 1 else repr(choice.strength)
    hasher = hashlib.sha256()
    for part in (version or "", strength, length, caller_salt or "", *([str(epoch)] if epoch else ())):
        data = part.encode()
        hasher.update(len(data).to_bytes(8, "big") + data)
    return hasher.hexdigest()


def _salted(prompt: Any, choice: Choice) -> Any:
    """A copy of the prompt with its salt. A base prompt without one is left as it is."""
    if isinstance(prompt, str):
        prompt = {"prompt": prompt}
    elif isinstance(prompt, list):
        prompt = {"prompt_token_ids": prompt}
    if isinstance(prompt, Mapping):
        salt = cache_salt(choice, prompt.get("cache_salt"), _length(prompt))
        return prompt if salt is None else {**prompt, "cache_salt": salt}
    from vllm.v1.engine import EngineCoreRequest

    if cache_salt(choice, None) is None and not isinstance(prompt, EngineCoreRequest):
        return prompt
    raise TypeError(
        f"a prompt of type {type(prompt).__name__} cannot have a cache salt, which variants need. Send text or tokens"
    )


def _length(prompt: Any) -> int | None:
    ids = prompt.get("prompt_token_ids", prompt.get("prompt_embeds")) if isinstance(prompt, Mapping) else prompt
    return None if ids is None or isinstance(ids, str) else len(ids)
