"""A speaker in this process: a transformers model in float32, edited by the formulas of the kinds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Tensor, nn

from vllm_edits.edit_store.authoring.chat import asked
from vllm_edits.edit_store.authoring.formula import FormulaRequest
from vllm_edits.edit_store.authoring.host import Edits, Host, batches, edited
from vllm_edits.edit_store.evaluation.speaker import LISTED, merged

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

    def _of_answers(self, prompts: Sequence[str], answers: Sequence[str]) -> Iterator[list[float]]:
        """-log p of the tokens of each answer."""
        if not self._scoped:
            yield from self._in_batches(prompts, answers)
            return
        for prompt, answer in zip(prompts, answers, strict=True):
            ids, begin = self._ids(prompt + answer), len(self._ids(prompt))
            if len(ids) <= begin:
                raise merged(prompt, answer)
            yield _losses(self._rows(ids, begin), ids, begin)

    def losses(self, texts: Sequence[str]) -> list[list[float]]:
        if not self._scoped:
            return self._losses_in_batches([self._ids(text) for text in texts], [1] * len(texts))
        found = []
        for text in texts:
            ids = self._ids(text)
            found.append(_losses(self._rows(ids, len(ids)), ids, 1))
        return found

    def continuations(self, prompts: Sequence[str], tokens: int) -> list[str]:
        if not self._scoped:
            with self._edited():
                return [each.text for each in self.host.answers(prompts, tokens)]
        return [self._continued(self._ids(prompt), tokens) for prompt in prompts]

    def answers(self, questions: Sequence[str], tokens: int) -> list[str]:
        return self.continuations([asked(self.host.tokenizer, question) for question in questions], tokens)

    def likeliest(self, prompts: Sequence[str]) -> list[Mapping[str, float]]:
        found: list[Mapping[str, float]] = []
        for prompt in prompts:
            ids = self._ids(prompt)
            values, tokens = self._rows(ids, len(ids))[-1].topk(LISTED)
            words = self.host.tokenizer.batch_decode(tokens[:, None])
            found.append(dict(zip(reversed(words), reversed(values.tolist()), strict=True)))
        return found

    @property
    def _scoped(self) -> bool:
        return any(not edit.scope.everything for edit, _ in self.edits)

    def _edited(self) -> AbstractContextManager[None]:
        return edited(self.host.model, self.edits, strength=self.strength)

    def _in_batches(self, prompts: Sequence[str], answers: Sequence[str]) -> list[list[float]]:
        ids, begins = [], []
        for prompt, answer in zip(prompts, answers, strict=True):
            ids.append(self._ids(prompt + answer))
            begins.append(len(self._ids(prompt)))
            if len(ids[-1]) <= begins[-1]:
                raise merged(prompt, answer)
        return self._losses_in_batches(ids, begins)

    @torch.inference_mode()
    def _losses_in_batches(self, ids: Sequence[Sequence[int]], begins: Sequence[int]) -> list[list[float]]:
        """-log p of the tokens of each sequence from its beginning on; few at once, since logits are wide."""
        found = []
        with self._edited():
            for some in batches(range(len(ids)), _AT_ONCE):
                said = self.host.said([ids[each] for each in some], [begins[each] for each in some])
                losses = nn.functional.cross_entropy(said.logits, said.wanted, reduction="none").tolist()
                for count in said.counts.tolist():
                    found.append(losses[:count])
                    losses = losses[count:]
        return found

    def _ids(self, text: str) -> list[int]:
        return list(map(int, self.host.tokenizer(text)["input_ids"]))

    def _continued(self, ids: list[int], tokens: int) -> str:
        begin, ends = len(ids), {self.host.tokenizer.eos_token_id}
        for _ in range(tokens):
            ids = [*ids, int(self._rows(ids, begin)[-1].argmax())]
            if ids[-1] in ends:
                break
        text: str = self.host.tokenizer.decode(ids[begin:], skip_special_tokens=True)
        return text

    @torch.inference_mode()
    def _rows(self, ids: Sequence[int], prompt: int) -> Tensor:
        """Log-probabilities of the next token at every token, [tokens, vocabulary]."""
        request = FormulaRequest(ids, prompt)
        with edited(self.host.model, self.edits, strength=self.strength, request=request):
            logits: Tensor = self.host.model(torch.tensor([list(ids)], device=self.host.device), use_cache=False).logits
        return logits[0].float().log_softmax(-1)


def _losses(rows: Tensor, ids: Sequence[int], begin: int) -> list[float]:
    """-log p of the tokens from `begin` on."""
    return [-float(rows[place - 1, ids[place]]) for place in range(max(1, begin), len(ids))]
