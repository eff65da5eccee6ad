"""A variant is evaluated on a real server by any client's means, with the figures that transformers has."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.bundles import bundle_of, publish, random_pairs
from tests.support.engine import Serving, serve
from vllm_edits.edit_store import identify
from vllm_edits.edit_store.errors import EditsError
from vllm_edits.edit_store.evaluation import suite
from vllm_edits.edit_store.evaluation.evaluate import in_process, on_server

pytestmark = pytest.mark.vllm

PROMPTS = ("The bird sings in the tree and", "Good morning, said the man to", "Count to ten and then begin")
ROWS = {
    "forms": [{"form": "fill-in", "prompt": prompt, "answer": " Rome is", "was": " Paris is"} for prompt in PROMPTS],
    "prompts": [{"prompt": prompt} for prompt in PROMPTS],
    "texts": [{"text": f"{prompt} goes away, far away."} for prompt in PROMPTS],
    "choices": [{"task": "birds", "prompt": prompt, "right": "a bird", "wrong": "some fish"} for prompt in PROMPTS],
}
SUITE = """
name: served
measures:
  - {measure: forms, data: {forms: forms.jsonl}}
  - {measure: locality, data: {harmless: prompts.jsonl}}
  - {measure: collapse, data: {corpus: texts.jsonl, openings: prompts.jsonl}, options: {tokens: 6}}
  - {measure: ability, data: {choices: choices.jsonl}}
  - {measure: safety, data: {harmful: prompts.jsonl}, options: {tokens: 4}}
"""


def silent(_what: str, _done: int, _total: int) -> None: ...


@pytest.fixture(scope="module")
def serving(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    base = identify(tiny_model)
    bundle = bundle_of("loud", base, random_pairs("offset", 1, base.widths, seed=1, strength=3.0))
    found = serve(
        tiny_model, tmp_path_factory.mktemp("evaluated"), [bundle], "--dtype", "float32", "--max-model-len", "256",
        "--enforce-eager",
    )  # fmt: skip
    yield found
    found.server.stop()


def test_figures_of_a_server_are_those_of_transformers(serving: Serving, tmp_path: Path) -> None:
    for name, rows in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "suite.yaml").write_text(SUITE)
    own, bundle = suite.load(tmp_path / "suite.yaml"), serving.bundles["loud"]
    here, there = in_process(bundle, serving.model, own, silent), on_server("loud", serving.url, own, silent)
    assert (there.version, there.variant, there.suite_sha256) == (bundle.version, "loud", own.sha256)
    assert there.measured_by.startswith("vLLM ")
    assert [figure.name for figure in there.figures] == [figure.name for figure in here.figures]
    for a, b in zip(here.figures, there.figures, strict=True):
        assert (b.base, b.edited) == pytest.approx((a.base, a.edited), rel=2e-3, abs=2e-3), a.name
    ratio = there.figure("collapse: perplexity: ratio")
    assert ratio is not None
    assert abs(ratio.edited - 1) > 0.01, "positive control"


def test_a_variant_that_moves_meanwhile_has_no_figures(serving: Serving, tmp_path: Path) -> None:
    for name, rows in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "suite.yaml").write_text(SUITE)
    own = suite.load(tmp_path / "suite.yaml")

    def move(what: str, _done: int, _total: int) -> None:
        if what == "collapse":
            pairs = random_pairs("offset", 1, serving.base.widths, seed=2, strength=3.0)
            publish(serving.store, bundle_of("loud", serving.base, pairs))
            serving.sync()

    with pytest.raises(EditsError, match=r"answered by 2 versions: it moved"):
        on_server("loud", serving.url, own, move)
    with pytest.raises(EditsError, match="expected a variant, found base"):
        on_server("base", serving.url, own, silent)
    with pytest.raises(EditsError, match="404"):
        on_server("nobody", serving.url, own, silent)
