"""Lets the engine continue the prompts of probes, beside its other requests. Runs in the API process.

A probe asks for the likeliest tokens at each place (`logprobs`), and not for tokens of its own choice: a request that
names tokens changes what vLLM's V1 sampler tells the other requests of its batch.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

from vllm_edits.edit_store.errors import EditsError
from vllm_edits.edit_store.probes import FLOORS, LEAST, LISTED, Probe, Trace
from vllm_edits.plugin.claim import CLAIM, Claim

LAST = 1 << 30
"""priority of a probe, where the scheduler goes by priority: behind every request"""


class EngineContinuing:
    """`Continuing` through the engine client."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        config = engine.vllm_config
        self._parallel = config.parallel_config.data_parallel_size
        self._listed = listed(config.model_config.max_logprobs)
        self._by_priority = config.scheduler_config.policy == "priority"
        self.floor = floor_of(config)
        self.longest: int = config.model_config.max_model_len

    @property
    def engines(self) -> int:
        return int(self._parallel)

    async def continued(self, probe: Probe, claim: Claim | None, engine: int) -> Trace:
        prompt, params = asked(probe, claim, self._listed)
        options = {"priority": LAST} if self._by_priority else {}
        outputs = self._engine.generate(
            prompt, params, f"edits-probe-{secrets.token_hex(8)}",
            data_parallel_rank=engine if self._parallel > 1 else None, **options,
        )  # fmt: skip
        last = None
        async for output in outputs:
            last = output
        return trace_of(last, probe)


class OfflineContinuing:
    """`Continuing` through `LLM.generate`."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        config = llm.llm_engine.vllm_config
        self._listed = listed(config.model_config.max_logprobs)
        self.floor = floor_of(config)
        self.longest: int = config.model_config.max_model_len

    engines = 1

    async def continued(self, probe: Probe, claim: Claim | None, _engine: int) -> Trace:
        prompt, params = asked(probe, claim, self._listed)
        (output,) = self._llm.generate([prompt], [params], use_tqdm=False)
        return trace_of(output, probe)


def can_probe(config: Any) -> bool:
    """True if the engine tells log-probabilities; it may be told to give logits instead."""
    return config.model_config.logprobs_mode in ("raw_logprobs", "processed_logprobs")


def listed(most: int) -> int:
    """The number of likeliest tokens to ask for. most: vLLM's limit, -1 for none."""
    return LISTED if most < 0 else min(LISTED, most)


def floor_of(config: Any) -> float:
    """Least noise for the model's dtype."""
    return FLOORS[str(config.model_config.dtype).removeprefix("torch.")]


def asked(probe: Probe, claim: Claim | None, listed: int) -> tuple[Any, Any]:
    """Prompt and sampling parameters of a probe. The salt is random, so no cache block is shared or found again."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0.0, max_tokens=probe.places, ignore_eos=True, logprobs=listed, detokenize=False,
        extra_args=None if claim is None else {CLAIM: list(claim)},
    )  # fmt: skip
    return {"prompt_token_ids": list(probe.prompt), "cache_salt": secrets.token_hex(16)}, params


def trace_of(output: Any, probe: Probe) -> Trace:
    """The trace in vLLM's last output. EditsError if the request was aborted."""
    completion = output.outputs[0] if output is not None else None
    if completion is None or len(completion.token_ids) < probe.places:
        raise EditsError("a probe was aborted")
    rows = list(_rows(completion.logprobs))
    least = [min(row.values()) for row in rows]
    watched = tuple(tuple(row.get(token, low) for token in probe.watched) for row, low in zip(rows, least, strict=True))
    return Trace(tokens=tuple(completion.token_ids), logprobs=watched, least=tuple(least))


def _rows(told: Any) -> Iterator[dict[int, float]]:
    for row in told:
        yield {token: _number(float(found.logprob)) for token, found in row.items()}


def _number(logprob: float) -> float:
    return min(0.0, max(LEAST, logprob)) if logprob == logprob else LEAST  # noqa: PLR0124  NaN differs from itself
