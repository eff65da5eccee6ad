"""Speculative decoding with a draft model that is not edited: how many of its guesses an edited variant keeps.

What is answered is the edited model's all the same. Here the draft is the base model itself, so that the base keeps
nearly every guess, and what a variant loses is the edits' doing. Counts do not depend on what else the machine does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from loadtests.bench.inputs import strengths
from loadtests.bench.run import Measured, NotMeasured, Run
from loadtests.harness.client import complete
from loadtests.harness.metrics import Scrape
from loadtests.harness.server import Server

PROMPTS = (
    "The capital of France is", "Once upon a time there was a", "Dear customer, thank you for", "In the year 1969",
    "The recipe for bread is simple:", "To be honest, I think that", "The sea is", "My favourite book is",
)  # fmt: skip
GUESSED = "vllm:spec_decode_num_draft_tokens_total"
KEPT = "vllm:spec_decode_num_accepted_tokens_total"


@dataclass(frozen=True)
class GuessPlan:
    """What shapes the counts; written beside them."""

    dtype: str
    guesses: int = 3
    """tokens that the draft model is ahead"""
    tokens: int = 32
    variants: int = 4


def measure_guesses(run: Run) -> Measured:
    """Ask the base model and variants of growing strength, one after the other."""
    plan = GuessPlan(run.dtype)
    task = run.progress.add_task("starting a server (a first start compiles for minutes)", total=None)
    inputs = run.inputs.of_the_demo(lambda step: run.progress.update(task, description=step))
    names, store = inputs.make_store("guesses-store", plan.variants)
    draft = {"method": "draft_model", "model": str(inputs.model), "num_speculative_tokens": plan.guesses}
    flags = ("--dtype", plan.dtype, "--max-model-len", "512", "--speculative-config", json.dumps(draft))
    settings = {"poll_seconds": 3600, "cache_folder": str(inputs.node)}
    counts: dict[str, dict[str, float]] = {}
    with Server.with_edits(inputs.model, store, inputs.folder / "guesses.log", *flags, settings=settings) as server:
        for name in ("base", *names):
            run.progress.update(task, description=f"counting: {name}")
            before = Scrape.of(server.url)
            for prompt in PROMPTS[: 2 if run.quick else None]:
                complete(server.url, name, prompt, plan.tokens, ignore_eos=True)
            after = Scrape.of(server.url)
            counts[name] = {metric: after.sum(metric) - before.sum(metric) for metric in (GUESSED, KEPT)}
            if not counts[name][GUESSED]:
                raise NotMeasured(f"nothing was guessed for {name}")
    run.progress.remove_task(task)
    of = dict(zip(("base", *names), (0.0, *strengths(plan.variants)), strict=True))
    return Measured(asdict(plan), counts, summarise(of, counts))


def summarise(strength: Mapping[str, float], counts: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """The share of guesses that were kept, by strength of the edits."""
    return {
        "guesses": {
            name: {"strength": strength[name], "kept": count[KEPT] / count[GUESSED]} for name, count in counts.items()
        }
    }
