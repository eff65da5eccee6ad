"""A speaker in this process: a transformers model in float32, edited by the formulas of the kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import nn

from vllm_edits.edit_store.authoring.chat import asked
from vllm_edits.edit_store.authoring.formula import FormulaRequest
from vllm_edits.edit_store.authoring.host import Edits, Host, batches, edited
from vllm_edits.edit_store.authoring.whole_sequences import continued
from vllm_edits.edit_store.evaluation.speaker import merged
from vllm_edits.edit_store.probes import LISTED

_AT_ONCE = 8


@dataclass(frozen=True)
class HostSpeaker:
    """`Speaker` of a loaded model with these edits.

    Texts go through in batches, answers with a cache; where edits have scopes one by one, as whole sequences.
    """

    host: Host
    edits: Edits = field(default_factory=list)
    strength: float = 1.0

    def likelihoods(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        return [-fmean(losses) for losses in self._of_answers(prompts, answers)]

    def totals(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        return [-sum(losses) for losses in self._of_answers(prompts, answers)]

    def losses(self, texts: Sequence[str]) -> list[list[float]]:
        ids = list(map(self._ids, texts))
        return self._losses(ids, [1] * len(ids), list(map(len, ids)))

    def continuations(self, prompts: Sequence[str], tokens: int) -> list[str]:
        if self._scoped:
            return [self._continued(self._ids(prompt), tokens) for prompt in prompts]
        with edited(self.host.model, self.edits, strength=self.strength):
            return [each.text for each in self.host.answers(prompts, tokens)]

    def answers(self, questions: Sequence[str], tokens: int) -> list[str]:
        return self.continuations([asked(self.host.tokenizer, question) for question in questions], tokens)

    def likeliest(self, prompts: Sequence[str]) -> list[Mapping[str, float]]:
        found: list[Mapping[str, float]] = []
        for prompt in prompts:
            ((_, row),) = continued(self.host, self.edits, self._ids(prompt), 1, strength=self.strength)
            values, tokens = row.topk(LISTED)
            words = self.host.tokenizer.batch_decode(tokens[:, None])
            found.append(dict(zip(reversed(words), reversed(values.tolist()), strict=True)))
        return found

    @property
    def _scoped(self) -> bool:
        return any(not edit.scope.everything for edit, _ in self.edits)

    def _ids(self, text: str) -> list[int]:
        return list(map(int, self.host.tokenizer(text)["input_ids"]))

    def _of_answers(self, prompts: Sequence[str], answers: Sequence[str]) -> list[list[float]]:
        """-log p of the tokens of each answer."""
        ids, begins = [], []
        for prompt, answer in zip(prompts, answers, strict=True):
            ids.append(self._ids(prompt + answer))
            begins.append(len(self._ids(prompt)))
            if len(ids[-1]) <= begins[-1]:
                raise merged(prompt, answer)
        return self._losses(ids, begins, begins)

    @torch.inference_mode()
    def _losses(self, ids: Sequence[list[int]], begins: Sequence[int], prompts: Sequence[int]) -> list[list[float]]:
        """-log p of the tokens of each sequence from its beginning on; few at once, since logits are wide.

        prompts: lengths of the prompts, for scopes
        """
        found = []
        for some in batches(range(len(ids)), 1 if self._scoped else _AT_ONCE):
            request = FormulaRequest(ids[some[0]], prompts[some[0]]) if self._scoped else None
            with edited(self.host.model, self.edits, strength=self.strength, request=request):
                said = self.host.said([ids[each] for each in some], [begins[each] for each in some])
            losses = nn.functional.cross_entropy(said.logits, said.wanted, reduction="none").tolist()
            for count in said.counts.tolist():
                found.append(losses[:count])
                losses = losses[count:]
        return found

    def _continued(self, ids: list[int], tokens: int) -> str:
        found = []
        for token, _ in continued(self.host, self.edits, ids, tokens, strength=self.strength):
            found.append(token)
            if token == self.host.tokenizer.eos_token_id:
                break
        text: str = self.host.tokenizer.decode(found, skip_special_tokens=True)
        return text
