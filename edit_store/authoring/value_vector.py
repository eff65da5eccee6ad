"""The vector which, added at one place of a site, makes a model say something else: by gradient steps.

    delta* = argmin  -mean log p(answer | prompt; x + delta)  +  kl KL(p || p_delta)  +  decay |delta| / |x|^2
             with |delta| <= clamp |x|

x      [hidden]  vector at the place in the first prompt
p, p_delta       next token at the place in a neutral text, without and with delta

ROME (arXiv 2202.05262), MEMIT (arXiv 2210.07229), AlphaEdit (arXiv 2410.02355) and ROCR in its mode `reject` find what
they write like this, with Adam. The layers below the place are computed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vllm_edits.edit_store.authoring.formula import hook
from vllm_edits.edit_store.authoring.host import Host, divergence, last_token_of, replayed
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
        spoken, drift = _Spoken.of(host, saying, below), _Drift.of(host, saying, below)
        start = host.at_words(saying.prompts[:1], [saying.word], [site])[site][0]
        length = float(start.norm())
        delta = torch.zeros_like(start, requires_grad=True)
        optimizer = torch.optim.Adam([delta], lr=self.rate)
        for number in range(self.steps):
            optimizer.zero_grad()
            with _added(host, site, spoken.places, delta):
                missing = spoken.missing(host)
            with _added(host, site, drift.place, delta):
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
class _Texts:
    """Texts that go through the model at every step."""

    ids: Tensor
    below: int
    states: Tensor
    """[texts, tokens, hidden], behind the layers `below`; empty if there are none"""

    @classmethod
    def of(cls, host: Host, texts: Sequence[str], below: int) -> _Texts:
        ids, _ = host.tokens(texts)
        if below == 0:
            return cls(ids, below, torch.empty(0))
        site = f"layers.{below - 1}.resid"
        rows = [row.clone() for row in host.activations(texts, [site])[site]]
        return cls(ids, below, nn.utils.rnn.pad_sequence(rows, batch_first=True))

    def likely(self, host: Host, places: Tensor) -> Tensor:
        """Log-probabilities of the tokens behind these places, [texts, places, vocabulary]."""
        with replayed(host, self.states, below=self.below):
            logits: Tensor = host.model(self.ids, use_cache=False, logits_to_keep=places).logits
        return logits.log_softmax(-1)


@dataclass(frozen=True)
class _Spoken:
    """The prompts with the answer behind them, and where what is."""

    texts: _Texts
    columns: Tensor
    """places from the first that an answer follows on"""
    told: Tensor
    """[prompts, columns], True where the next token is of the answer"""
    places: Tensor

    @classmethod
    def of(cls, host: Host, saying: Saying, below: int) -> _Spoken:
        whole = [f"{prompt}{saying.answer}" for prompt in saying.prompts]
        _, ends = host.tokens(whole)
        _, starts = host.tokens(saying.prompts)
        columns = torch.arange(int(starts.min()) - 1, int(ends.max()) - 1, device=ends.device)
        places = [last_token_of(host.tokenizer, prompt, saying.word) for prompt in saying.prompts]
        told = (columns >= starts[:, None] - 1) & (columns < ends[:, None] - 1)
        return cls(_Texts.of(host, whole, below), columns, told, torch.tensor(places, device=ends.device))

    def missing(self, host: Host) -> Tensor:
        """Mean negative log-probability of the answer, per token and prompt."""
        likely = self.texts.likely(host, self.columns)
        chosen = likely.gather(2, self.texts.ids[:, self.columns + 1, None])[:, :, 0]
        missing: Tensor = -((chosen * self.told).sum(1) / self.told.sum(1)).mean()
        return missing


@dataclass(frozen=True)
class _Drift:
    """The neutral text, and what the model says behind the word without an edit."""

    texts: _Texts
    place: Tensor
    before: Tensor

    @classmethod
    def of(cls, host: Host, saying: Saying, below: int) -> _Drift:
        text = saying.neutral.format(saying.word)
        texts = _Texts.of(host, [text], below)
        place = torch.tensor([last_token_of(host.tokenizer, text, saying.word)], device=texts.ids.device)
        with torch.no_grad():
            return cls(texts, place, texts.likely(host, place)[0, 0])

    def moved(self, host: Host) -> Tensor:
        """KL(before | now) of the next token behind the word, in nats."""
        return divergence(self.before, self.texts.likely(host, self.place)[0, 0])


@contextmanager
def _added(host: Host, site: str, places: Tensor, delta: Tensor) -> Iterator[None]:
    """Add delta at one place of each text."""

    def change(value: Tensor) -> Tensor:
        at = torch.nn.functional.one_hot(places.to(value.device), value.shape[1]).to(value)
        return value + at[:, :, None] * delta

    handle = hook(host.model, Site.parse(site), change)
    try:
        yield
    finally:
        handle.remove()
