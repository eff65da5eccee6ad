"""The vector which, added at one place of a site, makes a model say something else: by gradient steps.

    delta* = argmin  -mean log p(answer | prompt; x + delta)  +  kl KL(p_delta || p)  +  decay |delta| / |x|^2
             with |delta| <= clamp |x|

x      [hidden]  vector at the place in the first prompt
p, p_delta       next token at the place in a neutral text, without and with delta

ROME (arXiv 2202.05262), MEMIT (arXiv 2210.07229), AlphaEdit (arXiv 2410.02355) and ROCR in its mode `reject` find what
they write like this, with Adam. The layers below the place are computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_edits.edit_store.authoring.host import Host, added, divergence, last_token_of, replayed
from vllm_edits.edit_store.authoring.lessons import Lessons, lesson
from vllm_edits.edit_store.sites import Site

ENOUGH = 0.05
"""loss at which the steps end, as in the sources"""


@dataclass(frozen=True)
class Saying:
    """Prompts that all say a word, and how the model shall go on behind each."""

    prompts: Sequence[str]
    word: str
    answer: str
    neutral: str = "{} is a"
    """a text about the word, which shall go on as before"""


@dataclass(frozen=True)
class Search:
    """Parameters of the search."""

    steps: int
    rate: float
    kl: float
    decay: float
    clamp: float

    def value_vector(self, host: Host, site: str, saying: Saying) -> Tensor:
        """delta* [hidden], added at the last token of the word."""
        below = Site.parse(site).layer or 0
        spoken = [lesson(host.tokenizer, prompt, saying.answer) for prompt in saying.prompts]
        lessons, drift = Lessons(host, spoken, below=below), _Drift.of(host, saying, below)
        places = torch.tensor([last_token_of(host.tokenizer, prompt, saying.word) for prompt in saying.prompts])
        start = host.at_words(saying.prompts[:1], [saying.word], [site])[site][0]
        length = float(start.norm())
        delta = torch.zeros_like(start, requires_grad=True)
        optimizer = torch.optim.Adam([delta], lr=self.rate)
        for number in range(self.steps):
            optimizer.zero_grad()
            with added(host, Site.parse(site), places, delta):
                missing = lessons.loss(range(len(lessons)))
            with added(host, Site.parse(site), drift.place, delta):
                moved = drift.moved(host)
            loss = missing + self.kl * moved + self.decay * delta.norm() / length**2
            if float(loss.detach()) < ENOUGH or number == self.steps - 1:
                break
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                delta *= min(1.0, self.clamp * length / float(delta.norm()))
        return delta.detach()


@dataclass(frozen=True)
class _Drift:
    """The neutral text, and what the model says behind the word without an edit."""

    ids: Tensor
    below: int
    states: Tensor
    """[1, tokens, hidden], behind the layers `below`; empty if there are none"""
    place: Tensor
    before: Tensor

    @classmethod
    def of(cls, host: Host, saying: Saying, below: int) -> _Drift:
        text = saying.neutral.format(saying.word)
        (ids, _), site = host.tokens([text]), f"layers.{below - 1}.resid"
        states = host.activations([text], [site])[site][0].clone()[None] if below else torch.empty(0)
        place = torch.tensor([last_token_of(host.tokenizer, text, saying.word)], device=ids.device)
        found = cls(ids, below, states, place, torch.empty(0))
        with torch.no_grad():
            return replace(found, before=found._next(host))

    def moved(self, host: Host) -> Tensor:
        """KL(now | before) of the next token behind the word, in nats, as the paper and the code of ROME have it."""
        return divergence(self._next(host), self.before)

    def _next(self, host: Host) -> Tensor:
        with replayed(host, self.states, below=self.below):
            logits: Tensor = host.model(self.ids, use_cache=False, logits_to_keep=self.place).logits
        return logits[0, 0].log_softmax(-1)
