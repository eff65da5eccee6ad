"""A real server that takes prompts as vectors: text and vectors in one batch, exact for every scope, or a 400."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from loadtests.harness.client import complete
from tests.support.bundles import base_of, bundle_of
from tests.support.engine import USUAL_OR_AS_ON_A_GPU, Serving, serve
from tests.support.scoped import SCOPES, numbered, scoped
from vllm_edits.edit_store import Offset, Scope
from vllm_edits.edit_store.authoring.build import pairs_of
from vllm_edits.edit_store.authoring.formula import FormulaRequest, edited

pytestmark = pytest.mark.vllm
torch.set_num_threads(1)

TOKENS, VECTORS = 6, 40
NO_ID = -1
TEXTS = ("One two three", "The sea, the hills and the road between them. " * 4)


@pytest.fixture(scope="module", params=USUAL_OR_AS_ON_A_GPU)
def serving(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Serving]:
    """Short steps, so that prompts come in chunks; and little KV cache, so that requests are preempted."""
    base = base_of(tiny_model)
    bundles = scoped({**SCOPES, "names-id-0": Scope(tokens=(0, 260))}, base)
    bundles.append(bundle_of("at-the-embedding", base, numbered([Offset(site="embed.out")], base)))
    flags = ("--dtype", "float32", "--max-model-len", "256", "--max-num-batched-tokens", "48", "--block-size", "32",
             "--num-gpu-blocks-override", "48", "--enable-prompt-embeds")  # fmt: skip
    running = serve(tiny_model, tmp_path_factory.mktemp("embeds"), bundles, *flags, environment=request.param)
    yield running
    running.server.stop()


@dataclass(frozen=True)
class Prompt:
    """A prompt as it is sent, and what it is to transformers."""

    sent: dict[str, Any]
    vectors: Tensor
    """[prompt, hidden]: what enters the first layer"""
    ids: list[int]
    """the tokens, NO_ID for a vector"""


@pytest.fixture(scope="module")
def exact(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def prompts(tiny_model: Path, exact: Any) -> list[Prompt]:
    """Text short and long, and vectors that are no token's."""
    tokenizer, embed = AutoTokenizer.from_pretrained(tiny_model), exact.get_input_embeddings()
    found = []
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        found.append(Prompt({"prompt": text}, embed(torch.tensor(ids)).detach(), ids))
    for length in (3, VECTORS):
        generator = torch.Generator().manual_seed(length)
        near = embed(torch.randint(0, 1000, (length,), generator=generator)).detach()
        vectors = (near + near.std() * torch.randn(near.shape, generator=generator)).float()
        found.append(Prompt({"prompt": None, "prompt_embeds": packed(vectors)}, vectors.double(), [NO_ID] * length))
    return found


def packed(vectors: Tensor) -> str:
    """Vectors in the form in which vLLM takes them."""
    written = io.BytesIO()
    torch.save(vectors, written)
    return base64.b64encode(written.getvalue()).decode()


def ask(serving: Serving, model: str, prompt: Prompt) -> dict[str, Any]:
    wanted = {"logprobs": 3, "return_token_ids": True, "return_tokens_as_token_ids": True, "ignore_eos": True}
    answer = complete(serving.url, model, max_tokens=TOKENS, **{"prompt": None, **prompt.sent}, **wanted)
    choice: dict[str, Any] = answer["choices"][0]
    return choice


@torch.no_grad()
def off_by(exact: Any, prompt: Prompt, choice: dict[str, Any]) -> float:
    """The largest difference of the log-probabilities that an answer names from what `exact` says of them."""
    answer = exact.get_input_embeddings()(torch.tensor(choice["token_ids"]))
    whole = torch.cat([prompt.vectors, answer]).unsqueeze(0)
    said = exact(inputs_embeds=whole, use_cache=False).logits[0].log_softmax(-1)
    return max(
        abs(logprob - float(said[len(prompt.ids) - 1 + step, int(token.removeprefix("token_id:"))]))
        for step, rivals in enumerate(choice["logprobs"]["top_logprobs"])
        for token, logprob in rivals.items()
    )


def test_text_and_vectors_are_their_formula_in_one_batch(serving: Serving, exact: Any, prompts: list[Prompt]) -> None:
    """Every scope and the base at once, each twice, so that the second finds the prefix cache of the first.

    A scope of token ids covers no vector, whatever id vLLM writes in its place, and in text beside it what it names.
    """
    names = ["base", *SCOPES, "names-id-0", "at-the-embedding"]
    asked = [(name, prompt) for prompt in prompts for name in names]
    worst: dict[str, float] = {}
    felt: dict[str, float] = {}
    for _ in range(2):
        with ThreadPoolExecutor(len(asked)) as pool:
            choices = list(pool.map(lambda pair: ask(serving, *pair), asked))
        for (name, prompt), choice in zip(asked, choices, strict=True):
            request = FormulaRequest([*prompt.ids, *choice["token_ids"]], len(prompt.ids))
            pairs = pairs_of(serving.bundles[name]) if name != "base" else []
            with edited(exact, pairs, request=request):
                worst[name] = max(worst.get(name, 0), off_by(exact, prompt, choice))
            felt[name] = max(felt.get(name, 0), off_by(exact, prompt, choice))
    assert max(worst.values()) < 2e-3, worst
    assert felt.pop("base") < 2e-3
    assert min(felt.values()) > 0.02, felt


def test_a_scope_of_token_ids_leaves_vectors_alone(serving: Serving, exact: Any, prompts: list[Prompt]) -> None:
    """vLLM writes id 0 where a vector stands; a scope that names 0 must not take it for a token."""
    vectors = prompts[-1]
    for name, changed in (("names-id-0", False), ("prompt", True)):
        choice = ask(serving, name, vectors)
        first = {**choice, "logprobs": {"top_logprobs": choice["logprobs"]["top_logprobs"][:1]}}
        assert (off_by(exact, vectors, first) > 0.02) is changed


def test_a_list_of_texts_and_vectors_is_answered_by_the_variant(
    serving: Serving, exact: Any, prompts: list[Prompt]
) -> None:
    """One HTTP request, several engine requests: every one of them is of the version."""
    wanted = {"logprobs": 3, "return_token_ids": True, "return_tokens_as_token_ids": True, "ignore_eos": True}
    sent = {
        "prompt": list(TEXTS),
        "prompt_embeds": [prompts[2].sent["prompt_embeds"], prompts[3].sent["prompt_embeds"]],
    }
    answer = complete(serving.url, "whole", max_tokens=TOKENS, **sent, **wanted)
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    assert len(choices) == 4
    order = [prompts[2], prompts[3], prompts[0], prompts[1]]  # vectors first, as vLLM has them
    for prompt, choice in zip(order, choices, strict=True):
        with edited(exact, pairs_of(serving.bundles["whole"])):
            assert off_by(exact, prompt, choice) < 2e-3
        assert off_by(exact, prompt, choice) > 0.02


def test_what_is_no_vector_is_refused_and_the_engine_lives(serving: Serving, prompts: list[Prompt]) -> None:
    wrong = [packed(torch.zeros(3, 7)), packed(torch.zeros(3)), "not base64", packed(torch.zeros(0, 576)),
             base64.b64encode(b"no tensor").decode()]  # fmt: skip
    for model in ("whole", "tokens"):
        for sent in wrong:
            body = {"model": model, "prompt_embeds": sent, "max_tokens": 2}
            answer = httpx.post(f"{serving.url}/v1/completions", json=body, timeout=60)
            assert 400 <= answer.status_code < 500, answer.text
    assert ask(serving, "tokens", prompts[0])["token_ids"]
