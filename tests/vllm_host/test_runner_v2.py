"""The V2 runner's side of the seam: what it tells a ModelState becomes token slots. Its caller here stands for vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.proofs.parity import random_numbers
from tests.support.bundles import bundle_of
from tests.support.edited_models import install
from tests.support.fakes import BASE, WIDTHS, TinyModel, divided, edited_model
from vllm_edits.edit_store import Offset, Scope
from vllm_edits.edit_store.errors import UnsupportedHost
from vllm_edits.plugin.claim import CLAIM
from vllm_edits.plugin.graph.edited_model import EditedModel
from vllm_edits.plugin.graph.reservation import Reservation
from vllm_edits.plugin.graph.tensor_parallel import ONLY_RANK, Rank, identity
from vllm_edits.plugin.vllm_host import prompts
from vllm_edits.plugin.vllm_host.runner_v2 import with_token_slots


def runner_knows(*names: str) -> Any:
    """The runner's own state of so many requests."""
    return SimpleNamespace(req_id_to_index={name: index for index, name in enumerate(names)})


class ModelState:
    """As much of vLLM's as the seam touches; what it was told is kept."""

    def __init__(self, told: list[str], model: Any = None) -> None:
        self.told, self.model = told, torch.nn.Module() if model is None else model

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        self.told.append(f"add {new_req_data.req_id} at {req_index}")

    def remove_request(self, req_id: str) -> None:
        self.told.append(f"remove {req_id}")

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> str:
        self.told.append("prepare")
        return "inputs"


def request(name: str, claim: Any, prompt: int) -> Any:
    arguments = {"somebody": "else's", **({CLAIM: claim} if claim else {})}
    return SimpleNamespace(
        req_id=name,
        prompt_token_ids=[1] * prompt,
        prompt_embeds=None,
        prompt_is_token_ids=None,
        sampling_params=SimpleNamespace(extra_args=arguments),
    )


def batch(*rows: tuple[str, int, int]) -> Any:
    """Rows of name, tokens in the step, tokens before it."""
    names, tokens, starts = zip(*rows, strict=True)
    return SimpleNamespace(
        req_ids=list(names), num_scheduled_tokens=np.array(tokens, dtype=np.int32),
        num_computed_tokens_np=np.array(starts, dtype=np.int32), input_ids=torch.zeros(32, dtype=torch.int64),
    )  # fmt: skip


@pytest.fixture
def edited() -> EditedModel:
    """Slot 1 holds a version for generated tokens."""
    edit = Offset(site="layers.1.resid", scope=Scope(segment="generated"))
    bundle = bundle_of("late", BASE, [(edit, random_numbers(edit, BASE, 1))])
    made = edited_model(TinyModel(), Reservation.for_versions([bundle.manifest]), slots=2)
    install(made, 1, bundle)
    return made


def test_slots_and_scales_follow_the_runners_batches(edited: EditedModel) -> None:
    """And vLLM's own state is told of everything, and its inputs are what the runner gets."""
    told: list[str] = []
    state: Any = with_token_slots(ModelState, SimpleNamespace(edited=edited))(told)  # type: ignore[arg-type]
    known = runner_knows("plain", "late")
    state.add_request(0, request("plain", None, 3))
    state.add_request(1, request("late", [1, edited.held[1], 0.5], 2))
    assert state.prepare_inputs(batch(("plain", 3, 0), ("late", 2, 0)), known) == "inputs"
    assert edited.step.slots[:6].tolist() == [0, 0, 0, 1, 1, 0]
    assert edited.step.token_scales[3:5, 1].tolist() == [0, 0], "its prompt"
    state.prepare_inputs(batch(("late", 1, 2), ("plain", 1, 3)), known)
    assert edited.step.slots[:5].tolist() == [1, 0, 0, 0, 0]
    assert edited.step.token_scales[0, 1] == 0.5
    state.remove_request("late")
    state.prepare_inputs(batch(("plain", 1, 4)), runner_knows("plain"))
    assert not edited.step.slots.any()
    assert told == ["add plain at 0", "add late at 1", "prepare", "prepare", "remove late", "prepare"]


def test_a_prompt_of_vectors_is_as_long_as_these(edited: EditedModel) -> None:
    """And what follows it is generated; in a mixed one the positions that are vectors are told apart."""
    state: Any = with_token_slots(ModelState, SimpleNamespace(edited=edited))([])  # type: ignore[arg-type]
    mixed = request("mixed", [1, edited.held[1], 1.0], 3)
    mixed.prompt_embeds, mixed.prompt_is_token_ids = torch.zeros(3, 4), [True, False, True]
    vectors = request("vectors", [1, edited.held[1], 1.0], 0)
    vectors.prompt_token_ids, vectors.prompt_embeds = None, torch.zeros(2, 4)
    state.add_request(0, vectors)
    state.add_request(1, mixed)
    state.prepare_inputs(batch(("vectors", 3, 0), ("mixed", 3, 0)), runner_knows("vectors", "mixed"))
    assert edited.step.token_scales[:6, 1].tolist() == [0, 0, 1, 0, 0, 0]
    assert [prompts.embedded(each).tolist() for each in (vectors, mixed)] == [[True, True], [False, True, False]]
    assert prompts.embedded(request("text", None, 3)) is None


def test_a_request_that_the_state_was_not_told_of_stops_the_step(edited: EditedModel) -> None:
    """Rather than being served by the base model."""
    state: Any = with_token_slots(ModelState, SimpleNamespace(edited=edited))([])  # type: ignore[arg-type]
    with pytest.raises(KeyError):
        state.prepare_inputs(batch(("stranger", 1, 0)), runner_knows("stranger"))


def test_what_the_runner_makes_up_is_nobodys(edited: EditedModel) -> None:
    """It profiles and warms up with requests that it was never given, also while no weights are the base's."""
    state: Any = with_token_slots(ModelState, SimpleNamespace(edited=edited))([])  # type: ignore[arg-type]
    state.add_request(0, request("late", [1, edited.held[1], 1.0], 2))
    state.prepare_inputs(batch(("late", 2, 0)), runner_knows("late"))
    assert edited.step.slots[:2].tolist() == [1, 1]
    edited.weights_hold("a version", keep_running=False)
    state.prepare_inputs(batch(("req_0_made_up", 8, 0)), runner_knows("late"))
    assert not edited.step.slots.any()


def at_logits(model: TinyModel, worker: Rank = ONLY_RANK) -> EditedModel:
    """With capacity there, and a version that uses it in slot 1."""
    edit = Offset(site="logits")
    bundle = bundle_of("loud", BASE, [(edit, random_numbers(edit, BASE, 1))])
    made = edited_model(model, Reservation.for_versions([bundle.manifest]), slots=1, worker=worker)
    install(made, 1, bundle)
    return made


def test_logits_are_edited_whether_the_model_was_called_or_a_graph_replayed() -> None:
    """Those of last tokens, of which rows of their own are made, and of prompts, which are parts of what it gave."""
    model = TinyModel()
    edited = at_logits(model)
    state: Any = with_token_slots(ModelState, SimpleNamespace(edited=edited))([], model)  # type: ignore[arg-type]
    state.add_request(0, request("loud", [1, edited.held[1], 1.0], 3))
    state.add_request(1, request("plain", None, 2))
    kept = torch.zeros(32, WIDTHS.hidden)  # a graph's own memory
    for called in (True, False, True):
        state.prepare_inputs(batch(("loud", 3, 0), ("plain", 2, 0)), runner_knows("loud", "plain"))
        hidden = model(torch.randn(5, WIDTHS.hidden)) if called else kept[:5]
        unedited = hidden @ model.lm_head.weight.T
        for rows, changed in ((torch.tensor([2, 4]), [True, False]), (slice(1, 5), [True, True, False, False])):
            told = (model.logits(hidden[rows]) - unedited[rows]).abs().sum(-1) > 0.1
            assert told.tolist() == changed, (called, rows)


def test_edits_at_logits_are_refused_where_workers_divide_the_requests() -> None:
    halves = Rank(0, 2)
    made = at_logits(divided(TinyModel(), halves, identity), halves)
    with pytest.raises(UnsupportedHost, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        with_token_slots(ModelState, SimpleNamespace(edited=made))([])  # type: ignore[arg-type]
