"""The search for a value vector against the objective of ROME written out plainly, with whole forward passes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from vllm_edits.edit_store.authoring.host import Host, last_token_of
from vllm_edits.edit_store.authoring.value_vector import Saying, Search

SAYING = Saying(["The city of Paris lies", "They say that Paris is"], "Paris", " north")
SITE, LAYER = "layers.1.mlp.out", 1


@pytest.fixture(scope="module")
def host(tiny_model: Path) -> Host:
    """A model that is surer than one with random weights is: else no divergence moves anything."""
    host = Host.load(tiny_model)
    with torch.no_grad():
        host.model.lm_head.weight.mul_(20)
    return host


def plainly(host: Host, search: Search, *, reversed_kl: bool = False) -> Tensor:
    """By gradient steps through the whole model, one text after the other."""
    layer = host.model.model.layers[LAYER].mlp

    def said(text: str, delta: Tensor, word_in: str) -> Tensor:
        """Log-probabilities [tokens, vocabulary], with delta added at the word's last token."""
        ids = torch.tensor([host.tokenizer(text)["input_ids"]])
        place = last_token_of(host.tokenizer, word_in, SAYING.word)

        def add(_module: object, _inputs: object, output: Tensor) -> Tensor:
            at = torch.nn.functional.one_hot(torch.tensor(place), output.shape[1]).to(output)
            return output + at[None, :, None] * delta

        handle = layer.register_forward_hook(add)
        try:
            logits: Tensor = host.model(ids).logits[0]
        finally:
            handle.remove()
        return logits.log_softmax(-1)

    def missing(prompt: str, delta: Tensor) -> Tensor:
        ids = host.tokenizer(prompt + SAYING.answer)["input_ids"]
        begin = len(host.tokenizer(prompt)["input_ids"])
        rows = said(prompt + SAYING.answer, delta, prompt)
        return -torch.stack([rows[place - 1, ids[place]] for place in range(begin, len(ids))]).mean()

    neutral = SAYING.neutral.format(SAYING.word)
    at = last_token_of(host.tokenizer, neutral, SAYING.word)
    nothing = torch.zeros(host.widths.hidden)
    with torch.no_grad():
        before = said(neutral, nothing, neutral)[at]
    start = host.at_words(SAYING.prompts[:1], [SAYING.word], [SITE])[SITE][0]
    delta = torch.zeros_like(start, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=search.rate)
    for number in range(search.steps):
        optimizer.zero_grad()
        now = said(neutral, delta, neutral)[at]
        one, other = (before, now) if reversed_kl else (now, before)
        moved = (one.exp() * (one - other)).sum()
        loss = torch.stack([missing(prompt, delta) for prompt in SAYING.prompts]).mean()
        loss = loss + search.kl * moved + search.decay * delta.norm() / start.norm() ** 2
        if number == search.steps - 1:
            break
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            delta *= min(1.0, search.clamp * float(start.norm()) / float(delta.norm()))
    return delta.detach()


def test_it_is_the_objective_of_the_paper(host: Host) -> None:
    """The divergence is of what the edited model says from what the base model says, and not the other way round."""
    search = Search(steps=6, rate=0.05, kl=1.0, decay=1e-3, clamp=50.0)
    found = search.value_vector(host, SITE, SAYING)
    torch.testing.assert_close(found, plainly(host, search), atol=1e-3, rtol=1e-3)
    other = plainly(host, search, reversed_kl=True)
    assert float((found - other).norm() / found.norm()) > 0.02, "positive control"
