"""What an answer's log-probabilities are compared by."""

from __future__ import annotations

from typing import Any

import torch

from loadtests.harness.client import complete
from tests.support.engine import Serving

TOKENS = 6
TOP = 5
VISIBLE = 0.05  # a log-probability changed by this much is changed by an edit, not by rounding
NOISE_FLOOR = {"float32": 1e-4, "bfloat16": 0.05}


def ask(serving: Serving, model: str, prompt: str, **options: Any) -> dict[str, Any]:
    """One answer with the log-probabilities of its tokens and their rivals, by token id."""
    wanted = {"logprobs": TOP, "return_token_ids": True, "return_tokens_as_token_ids": True}
    answer = complete(serving.url, model, prompt, TOKENS, **wanted, **options)
    choice: dict[str, Any] = answer["choices"][0]
    choice["version"] = answer["headers"]["x-edits-version"]
    return choice


@torch.no_grad()
def reference(model: Any, choice: dict[str, Any]) -> list[float]:
    """What a model says of every token that an answer names, given the answered text up to there.

    The first step compares a prefill, the others compare decode steps.
    """
    ids = choice["prompt_token_ids"] + choice["token_ids"]
    logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [
        float(logprobs[len(choice["prompt_token_ids"]) - 1 + step, int(token.removeprefix("token_id:"))])
        for step, rivals in enumerate(choice["logprobs"]["top_logprobs"])
        for token in rivals
    ]


def served(choice: dict[str, Any]) -> list[float]:
    return [logprob for rivals in choice["logprobs"]["top_logprobs"] for logprob in rivals.values()]


def apart(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))
