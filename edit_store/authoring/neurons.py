"""Neurons of an MLP that are given to edits, and the vectors that they shall write: by gradient steps.

    u = argmin  mean -log p(answer | prompt; mlp.out + h u - h_old old)  +  decay |u|^2 / |old|^2,   |u| <= clamp |old|

old, h_old   column of the down projection of the neuron, and its activation at the prompt's last token
h            the same activation where the neuron's gate is open

Source: stealth edits (arXiv 2406.12670, `editors.py` of its code), which begins at the old column, and takes the u with
the least loss of all steps. Each edit has a loss of its own, and Adam treats every number by itself, so no edit sees
another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_edits.edit_store.authoring.host import Host, added, batches
from vllm_edits.edit_store.authoring.lessons import Lessons, lesson
from vllm_edits.edit_store.authoring.method import Work
from vllm_edits.edit_store.sites import Site

ENOUGH = 5e-3
"""loss at which the steps end, as in the code"""


@dataclass(frozen=True)
class Neurons:
    """Neurons of the MLP, one for each edit, at the triggers."""

    chosen: Tensor
    """their numbers, [edits]"""
    old: Tensor
    """their columns of the down projection, [edits, hidden]"""
    before: Tensor
    """activation of each at its trigger, [edits]"""
    reached: Tensor
    """the same where its gate has the response Delta"""

    def some(self, edits: Sequence[int]) -> Neurons:
        """Those of some edits, one after the other."""
        part = slice(edits[0], edits[-1] + 1)
        return Neurons(self.chosen[part], self.old[part], self.before[part], self.reached[part])

    def change(self, u: Tensor) -> Tensor:
        """Change of the MLP's output at each trigger, [edits, hidden]."""
        return self.reached[:, None] * u - self.before[:, None] * self.old


@dataclass(frozen=True)
class Right:
    """Of each edit, True if the model says the answer's first token, and if the whole answer, greedily."""

    first: list[bool]
    whole: list[bool]


@dataclass(frozen=True)
class WriteSearch:
    """Parameters of the gradient steps."""

    steps: int
    rate: float
    decay: float
    clamp: float

    def written(self, work: Work, site: Site, facts: Sequence[tuple[str, str]], neurons: Neurons) -> Tensor:
        """u of each edit, [edits, hidden]."""

        def best_of(some: Sequence[int]) -> Tensor:
            best = neurons.some(some).old
            for step, u in self._steps(work.host, site, [facts[each] for each in some], neurons.some(some)):
                work.step("gradient steps", step + 1, self.steps)
                best = u
            return best

        return torch.cat(list(work.each("batches of facts", list(batches(range(len(facts)))), best_of)))

    def _steps(
        self, host: Host, site: Site, facts: Sequence[tuple[str, str]], neurons: Neurons
    ) -> Iterator[tuple[int, Tensor]]:
        """Number of each step, and the best u so far, [edits, hidden].

        Each edit has a loss of its own, and Adam treats every number by itself, so no edit sees another.
        """
        lessons, every = _lessons(host, facts, below=site.layer or 0), range(len(facts))
        ends = torch.tensor([len(host.tokenizer(prompt)["input_ids"]) - 1 for prompt, _ in facts])
        lengths = neurons.old.norm(dim=1)
        u = neurons.old.clone().requires_grad_()
        best, least = neurons.old.clone(), torch.full_like(lengths, torch.inf)
        optimizer = torch.optim.Adam([u], lr=self.rate)
        for number in range(self.steps):
            with added(host, site, ends, neurons.change(u)):
                loss = -lessons.said(every).means() + self.decay * (u.norm(dim=1) / lengths) ** 2
            now = loss.detach()
            better = (now < least) & (number > 0)  # the source leaves out the old column
            best = torch.where(better[:, None], u.detach(), best)
            least = torch.where(better, now, least)
            yield number, best
            if bool((now < ENOUGH).all()) or number == self.steps - 1:
                break
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            with torch.no_grad():
                u *= (self.clamp * lengths / u.norm(dim=1)).clamp(max=1)[:, None]


@torch.inference_mode()
def right_answers(host: Host, facts: Sequence[tuple[str, str]]) -> Right:
    """Success of each answer, greedily."""
    first, whole = [], []
    for some in batches(range(len(facts))):
        right = _lessons(host, [facts[each] for each in some]).said(range(len(some))).right()
        first += [tokens[0] for tokens in right]
        whole += [all(tokens) for tokens in right]
    return Right(first, whole)


def _lessons(host: Host, facts: Sequence[tuple[str, str]], below: int = 0) -> Lessons:
    return Lessons(host, [lesson(host.tokenizer, prompt, answer) for prompt, answer in facts], below=below)


def at_end(host: Host, prompts: Sequence[str], site: str) -> Tensor:
    """Vectors at a site at the last token of each prompt, [prompts, width]."""
    return torch.stack([rows[-1] for rows in host.activations(prompts, [site])[site]])
