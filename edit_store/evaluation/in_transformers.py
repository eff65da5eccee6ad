"""A speaker in this process: a transformers model in float32, edited by the formulas of the kinds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Tensor

from vllm_edits.edit_store.authoring.chat import asked
from vllm_edits.edit_store.authoring.formula import FormulaRequest
from vllm_edits.edit_store.authoring.host import Edits, Host, edited
from vllm_edits.edit_store.evaluation.speaker import LISTED, merged


@dataclass(frozen=True)
class HostSpeaker:
    """`Speaker` of a loaded model with these edits. Texts go through one by one, since edits may have scopes."""

    host: Host
    edits: Edits = field(default_factory=list)
    strength: float = 1.0

    def likelihoods(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        return [-fmean(losses) for losses in self._of_answers(prompts, answers)]

    def totals(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        return [-sum(losses) for losses in self._of_answers(prompts, answers)]

    def _of_answers(self, prompts: Sequence[str], answers: Sequence[str]) -> Iterator[list[float]]:
        """-log p of the tokens of each answer."""
        for prompt, answer in zip(prompts, answers, strict=True):
            ids, begin = self._ids(prompt + answer), len(self._ids(prompt))
            if len(ids) <= begin:
                raise merged(prompt, answer)
            yield _losses(self._rows(ids, begin), ids, begin)

    def losses(self, texts: Sequence[str]) -> list[list[float]]:
        found = []
        for text in texts:
            ids = self._ids(text)
            found.append(_losses(self._rows(ids, len(ids)), ids, 1))
        return found

    def continuations(self, prompts: Sequence[str], tokens: int) -> list[str]:
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
