"""Makes the probes of a bundle: what the base model and the edited one say, computed by transformers in float32.

Of many prompts those are taken behind which the edits change most, so that a server which applies them wrongly is
found; and an ordinary text behind which they change least, so that one which applies them everywhere is found too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from vllm_edits.edit_store.authoring.host import Edits, Host
from vllm_edits.edit_store.authoring.whole_sequences import continued
from vllm_edits.edit_store.bundle import Strength
from vllm_edits.edit_store.errors import BundleRefused, Reason
from vllm_edits.edit_store.probes import DIGITS, LISTED, Probe, Trace, effect_of

T = TypeVar("T")
PROBES = 4
"""probes of a bundle, those at other strengths aside"""
_PLACES = 4
_PROMPT = 128
"""most tokens of a prompt; of a longer one the last"""
_TRIED = 12
"""prompts that are tried"""
_LIKELIEST = 6
"""tokens of each model that are watched at each place"""
ORDINARY = (
    "The weather in the north was cold this week, and the",
    "She opened the book at the first page and began to",
    "To bake bread you need flour, water, salt and",
    "The train to the city leaves every hour from",
    "Question: How many days are there in a week?\nAnswer:",
    "The company said on Monday that its profits had",
)
"""Texts that are tried beside those of the method."""

Prompt = str | Sequence[int]
"""A text, or token ids."""
_Said = tuple[list[int], Tensor]
"""Tokens of a continuation, and the log-probabilities [places, vocabulary] at each."""


def probes_of(
    host: Host, edits: Edits, prompts: Sequence[Prompt], *, strength: Strength | None = None, count: int = PROBES
) -> tuple[Probe, ...]:
    """Probes of these edits: `count` at the default strength, and one at each end of the strengths that it allows."""
    if count <= 0:
        return ()
    default = strength.default if strength else 1.0
    ordinary = _ids(host, ORDINARY)
    own = _spread([ids for ids in _ids(host, prompts) if ids not in ordinary], _TRIED)
    places = 2 if any(edit.scope.segment == "generated" for edit, _ in edits) else 1
    ranked = sorted(
        [(effect_of(_probe(host, edits, ids, default, places)), ids) for ids in (*own, *ordinary)],
        key=lambda pair: -pair[0],
    )
    quiet = min((pair for pair in ranked if pair[1] in ordinary), default=None, key=lambda pair: pair[0])
    loud = [ids for _, ids in ranked if quiet is None or ids != quiet[1]]
    chosen = loud[:count] if quiet is None or count == 1 else [*loud[: count - 1], quiet[1]]
    found = [_probe(host, edits, ids, default, _PLACES) for ids in chosen]
    ends = {strength.minimum, strength.maximum} - {default} if strength else set()
    found += [_probe(host, edits, chosen[0], end, _PLACES) for end in sorted(ends)]
    return tuple(found)


def _ids(host: Host, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
    """Token ids of each prompt, its last ones if it is long; each once."""
    found = [host.tokenizer(each)["input_ids"] if isinstance(each, str) else each for each in prompts]
    return list(dict.fromkeys(tuple(map(int, ids))[-_PROMPT:] for ids in found if ids))


def _spread(prompts: Sequence[T], count: int) -> list[T]:
    """So many of the prompts, from all parts of them."""
    if len(prompts) <= count:
        return list(prompts)
    return [prompts[number * len(prompts) // count] for number in range(count)]


def _probe(host: Host, edits: Edits, prompt: Sequence[int], strength: float, places: int) -> Probe:
    base, now = (_said(host, some, strength, prompt, places) for some in ([], edits))
    likeliest = [rows.topk(_LIKELIEST).indices.flatten().tolist() for _, rows in (base, now)]
    watched = sorted({token for tokens in likeliest for token in tokens} | {*base[0], *now[0]})
    return Probe(
        prompt=tuple(prompt), strength=strength, watched=tuple(watched), base=_trace(base, watched),
        edited=_trace(now, watched),
    )  # fmt: skip


def _said(host: Host, edits: Edits, strength: float, prompt: Sequence[int], places: int) -> _Said:
    tokens, rows = list[int](), list[Tensor]()
    for token, row in continued(host, edits, prompt, places, strength=strength):
        if not row.isfinite().any() or row.isnan().any():
            raise BundleRefused("the probes", [Reason(
                "not_finite", f"the edited model computes no numbers behind {host.tokenizer.decode(prompt)[-60:]!r}, "
                f"with the strength {strength:g}. Make the edits smaller",
            )])  # fmt: skip
        tokens.append(token)
        rows.append(row)
    return tokens, torch.stack(rows)


def _trace(said: _Said, watched: Sequence[int]) -> Trace:
    tokens, rows = said
    rows = rows.double().cpu().clamp(max=0)
    least = rows.topk(min(LISTED, rows.shape[1])).values[:, -1]
    numbers = rows[:, list(watched)].clamp(min=least[:, None])
    return Trace(
        tokens=tuple(tokens), logprobs=tuple(map(_rounded, numbers.tolist())), least=_rounded(least.tolist())
    )  # fmt: skip


def _rounded(numbers: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(number, DIGITS) for number in numbers)
