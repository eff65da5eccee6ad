"""A transformers model for authors: the vectors at its sites, and its answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from operator import add
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from vllm_edits.edit_store.authoring.formula import architecture_of, decoder_of, edited, hook, own_layers
from vllm_edits.edit_store.base_model import widths_of
from vllm_edits.edit_store.edits import Array, Edit
from vllm_edits.edit_store.sites import LAST, Site, Widths

__all__ = ["EditWithNumbers", "Edits", "Generated", "Host", "edited"]

EditWithNumbers = tuple[Edit, dict[str, Array]]
"""An edit with its tensors by field name."""
Edits = list[EditWithNumbers]
"""Result of every authoring method."""

T = TypeVar("T")
BATCH = 32  # texts in one forward pass; more is no faster on a few cores


@dataclass(frozen=True)
class Generated:
    """Answer of a model to a prompt: its greedy `text`, and the probabilities of the likeliest `first` tokens."""

    text: str
    first: Mapping[str, float]


@dataclass(frozen=True)
class Said:
    """Logits of a model at every token of some answers, one answer behind the other."""

    logits: Tensor
    """[tokens, vocabulary]"""
    wanted: Tensor
    """the token that the answer has there, [tokens]"""
    counts: Tensor
    """tokens of each answer"""

    def sums(self) -> Tensor:
        """Log-probability of each answer, [answers]."""
        found = -nn.functional.cross_entropy(self.logits, self.wanted, reduction="none")
        row = torch.repeat_interleave(torch.arange(len(self.counts), device=found.device), self.counts)
        return torch.zeros(len(self.counts), device=found.device).index_add(0, row, found)

    def means(self) -> Tensor:
        """The same per token."""
        return self.sums() / self.counts

    def right(self) -> list[list[bool]]:
        """For each answer, True at every token that is the likeliest one there."""
        found = (self.logits.argmax(-1) == self.wanted).tolist()
        ends = self.counts.cumsum(0).tolist()
        return [found[end - count : end] for end, count in zip(ends, self.counts.tolist(), strict=True)]


@dataclass(frozen=True)
class Host:
    """A base model in float32 with its tokenizer. Inside `edited`, every method sees the edited model."""

    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, folder: Path, *, device: str = "cpu") -> Host:
        """Read a checkpoint folder; nothing is fetched."""
        with _no_bars():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return cls(model.eval().requires_grad_(False).to(device), tokenizer)

    @property
    def device(self) -> torch.device:
        """The device that the model is on. Results stay there."""
        device: torch.device = self.model.device
        return device

    @property
    def widths(self) -> Widths:
        """The sizes that decide the shapes of edits."""
        return widths_of(self.model.config.to_dict())

    def activations(self, texts: Sequence[str], sites: Iterable[str]) -> dict[str, list[Tensor]]:
        """Vectors at each site, for each text `[tokens, width]`. Layers above the last site are not computed."""
        return self.activations_of([self.tokenizer(text)["input_ids"] for text in texts], sites)

    @torch.inference_mode()
    def activations_of(self, ids_of: Sequence[Sequence[int]], sites: Iterable[str]) -> dict[str, list[Tensor]]:
        """Vectors at each site, for each sequence of token ids `[tokens, width]`."""
        seen: dict[str, list[Tensor]] = {site: [] for site in sites}
        places = [Site.parse(site) for site in seen]
        behind = any(place.point in LAST for place in places)
        kept = own_layers(self.model)[: None if behind else max(place.layer or 0 for place in places) + 1]
        for batch in batches(ids_of):
            ids, lengths = self._padded(batch)
            with _recording(self.model, seen) as recorded, _layers(self.model, kept):
                # The head is most of a small model's work, and few sites lie behind it.
                (self.model if "logits" in seen else decoder_of(self.model))(ids, use_cache=False)
            for site, rows in seen.items():
                rows += [row[:length] for row, length in zip(recorded[site], lengths, strict=True)]
        return seen

    def at_words(self, texts: Sequence[str], words: Sequence[str], sites: Iterable[str]) -> dict[str, Tensor]:
        """Vectors at each site `[texts, width]`, at the last token of each word in its text, where it is last said."""
        places = [last_token_of(self.tokenizer, *each) for each in zip(texts, words, strict=True)]
        found = self.activations(texts, sites)
        return {
            site: torch.stack([row[place] for row, place in zip(rows, places, strict=True)])
            for site, rows in found.items()
        }

    @torch.inference_mode()
    def next_token(self, texts: Sequence[str]) -> Tensor:
        """Log-probabilities of the token after each text, `[texts, vocabulary]`."""
        rows = []
        for batch in batches(texts):
            ids, lengths = self.tokens(batch)
            last = lengths - 1
            kept = torch.unique(last)
            logits = self.model(ids, use_cache=False, logits_to_keep=kept).logits
            rows.append(
                logits[torch.arange(len(ids), device=self.device), torch.searchsorted(kept, last)].log_softmax(-1)
            )
        return torch.cat(rows)

    def last_states(self, texts: Sequence[str]) -> Tensor:
        """The vector behind the last norm at the last token of each text, `[texts, hidden]`."""
        return torch.stack([rows[-1] for rows in self.activations(texts, ["final"])["final"]])

    @torch.inference_mode()
    def likelihood(self, prompts: Sequence[str], answers: Sequence[str], *, mean: bool = True) -> Tensor:
        """Log-probability of each answer after its prompt, `[prompts]`: mean per token, or the sum.

        An answer brings its space.
        """
        parts = zip(batches(prompts), batches(answers), strict=True)
        return torch.cat([self._likelihood(*part, mean=mean) for part in parts])

    def _likelihood(self, prompts: Sequence[str], answers: Sequence[str], *, mean: bool) -> Tensor:
        whole = [self.tokenizer(text)["input_ids"] for text in map(add, prompts, answers)]
        said = self.said(whole, [len(self.tokenizer(prompt)["input_ids"]) for prompt in prompts])
        return said.means() if mean else said.sums()

    def said(self, ids_of: Sequence[Sequence[int]], prompts: Sequence[int]) -> Said:
        """The model's word on sequences of token ids behind their first tokens, so many as `prompts` says of each."""
        ids, lengths = self._padded(ids_of)
        starts = torch.tensor(prompts, device=self.device)
        place = torch.arange(min(prompts) - 1, ids.shape[1] - 1, device=self.device)
        logits = self.model(ids, use_cache=False, logits_to_keep=place).logits
        told = (place >= starts[:, None] - 1) & (place < lengths[:, None] - 1)
        return Said(logits[told], ids[:, place + 1][told], lengths - starts)

    @contextmanager
    def replaying(self, texts: Sequence[str], *, below: int) -> Iterator[None]:
        """Compute the layers `below` once for these texts; inside, whatever reads just them reuses the result.

        The texts go through the model at once, so there are at most BATCH of them.
        """
        if below == 0:
            yield
            return
        ids, _ = self.tokens(texts)
        site = f"layers.{below - 1}.resid"
        layers = own_layers(self.model)
        with torch.inference_mode(), _recording(self.model, [site]) as recorded, _layers(self.model, layers[:below]):
            decoder_of(self.model)(ids, use_cache=False)
        with replayed(self, recorded[site], below=below):
            yield

    @torch.inference_mode()
    def answers(self, prompts: Sequence[str], tokens: int) -> list[Generated]:
        """Greedy continuation of each prompt by `tokens` tokens."""
        answers = []
        for batch in batches(prompts):
            inputs = self.tokenizer(list(batch), return_tensors="pt", padding=True, padding_side="left").to(self.device)
            made = self.model.generate(
                **inputs, max_new_tokens=tokens, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
            new = made.sequences[:, inputs["input_ids"].shape[1] :]
            texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
            likeliest = made.logits[0].softmax(-1).topk(20)
            for text, probabilities, ids in zip(texts, *likeliest, strict=True):
                words = self.tokenizer.batch_decode(ids[:, None])
                answers.append(Generated(text, dict(zip(words, probabilities.tolist(), strict=True))))
        return answers

    def tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids `[texts, longest]`, padded on the right where causal attention never looks, and their lengths."""
        return self._padded([self.tokenizer(text)["input_ids"] for text in texts])

    def _padded(self, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        rows = [torch.tensor(row) for row in ids]
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        return nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device), lengths


@contextmanager
def _no_bars() -> Iterator[None]:
    """Keep transformers from drawing progress bars: builds draw their own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def last_token_of(tokenizer: Any, text: str, word: str) -> int:
    """Place of the last token of a word in a text, where the text says it last. ValueError if it does not say it."""
    end = text.rindex(word) + len(word)
    spans = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return max(place for place, (start, stop) in enumerate(spans) if start < end and stop > start)


@contextmanager
def _recording(model: Any, sites: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Record the vectors at each site in the last forward pass, by the site's name."""
    recorded: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for site in sites:

            def record(value: Tensor, site: str = site) -> None:
                recorded[site] = value

            hooks.callback(hook(model, Site.parse(site), record).remove)
        yield recorded


@contextmanager
def changing(host: Host, site: Site, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change the vectors at a site inside a with statement."""
    handle = hook(host.model, site, change)
    try:
        yield
    finally:
        handle.remove()


def added(host: Host, site: Site, places: Tensor, vectors: Tensor) -> AbstractContextManager[None]:
    """Add vectors, one [width] or one for each text [texts, width], at one place of each text."""

    def change(value: Tensor) -> Tensor:
        at = nn.functional.one_hot(places.to(value.device), value.shape[1]).to(value)
        return value + at[:, :, None] * vectors.view(-1, 1, value.shape[-1])

    return changing(host, site, change)


class _Replay(nn.Module):
    """Stands in for a decoder layer, and returns a result that was computed before."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.states


@contextmanager
def replayed(host: Host, states: Tensor, *, below: int) -> Iterator[None]:
    """Inside, the layers `below` return states [texts, tokens, hidden] that they returned before."""
    layers = own_layers(host.model)
    with _layers(host.model, nn.ModuleList([_Replay(states)] * below + list(layers[below:]))):
        yield


@contextmanager
def _layers(model: Any, layers: nn.ModuleList) -> Iterator[None]:
    """Exchange the model's decoder layers for these inside a with statement."""
    decoder, name = decoder_of(model), architecture_of(model).layers
    own = getattr(decoder, name)
    setattr(decoder, name, layers)
    try:
        yield
    finally:
        setattr(decoder, name, own)


def divergence(base: Tensor, other: Tensor) -> Tensor:
    """KL(base | other) of log-probabilities [..., vocabulary], in nats."""
    return (base.exp() * (base - other)).sum(-1)


def batches(texts: Sequence[T], size: int = BATCH) -> Iterator[Sequence[T]]:
    """The texts in parts that go through the model at once."""
    for start in range(0, len(texts), size):
        yield texts[start : start + size]
