"""Writes a request's claim on a slot, and its cache salt or fork. The engine gate calls it in the API process.

The prefix cache shares blocks between requests with equal salt. So the salt is a hash of everything on which the edits
of a token depend: version, strength, and for versions that treat prompt and answer differently the length of the
prompt. If a version edits only the end of the prompt, or generated tokens, the earlier blocks are the base model's.
Then the request keeps the caller's salt, and has a fork: the point from which its blocks differ.
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
    """Copies of a request's prompt and sampling parameters, with claim, and with salt or fork.

    forks: True if the engine's scheduler supports forks.
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
    """The salt of a request's blocks: sha256 over version, strength, prompt length, caller's salt, and weights epoch.

    Without any of these there is no salt: the base model shares its cache as without the plugin. Each part is hashed
    with its length, so that the tuple is unambiguous. The hash keeps a caller from using another version's salt.
    """
    version, epoch = (choice.version, choice.epoch) if choice else (None, 0)
    if version is None and caller_salt is None and not epoch:
        return None
    bound = choice is not None and choice.info.bound_to_prompt
    # If the prompt's length matters but is unknown, a random salt prevents any sharing.
    length = "" if not bound else str(prompt) if prompt is not None else secrets.token_hex(16)
    strength = "" if choice is None or choice.strength == 1 else repr(choice.strength)
    hasher = hashlib.sha256()
    for part in (version or "", strength, length, caller_salt or "", *([str(epoch)] if epoch else ())):
        data = part.encode()
        hasher.update(len(data).to_bytes(8, "big") + data)
    return hasher.hexdigest()


def _salted(prompt: Any, choice: Choice) -> Any:
    """A copy of the prompt with its salt. A prompt for the base model without a salt is unchanged."""
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
