"""The interface of measures to a model: it continues prompts, and says how likely texts are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from vllm_edits.edit_store.errors import EditsError


def merged(prompt: str, answer: str) -> EditsError:
    """The error for an answer without a token of its own."""
    return EditsError(
        f"the tokens of the answer {answer!r} cannot be told from those of its prompt {prompt[-40:]!r}. Put the space "
        "before the answer, and not behind the prompt"
    )


class Speaker(Protocol):
    """A model, edited or not. Prompts are texts; answers bring their space."""

    def likelihoods(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """Mean log-probability per token of each answer behind its prompt, in nats."""

    def totals(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """Log-probability of each answer behind its prompt, the sum over its tokens."""

    def losses(self, texts: Sequence[str]) -> list[list[float]]:
        """-log p of every token of each text behind its first, in nats."""

    def continuations(self, prompts: Sequence[str], tokens: int) -> list[str]:
        """Greedy continuation of each prompt."""

    def answers(self, questions: Sequence[str], tokens: int) -> list[str]:
        """Greedy answer to each question in the model's chat template."""

    def likeliest(self, prompts: Sequence[str]) -> list[Mapping[str, float]]:
        """Log-probabilities of the likeliest (`probes.LISTED`) tokens behind each prompt, by the token's text."""
