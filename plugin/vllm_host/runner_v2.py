"""Fills the token slots for vLLM's V2 model runner (GPUs, CPUs with Triton), with a ModelState.

V2 asks the model for its ModelState class, reports every added and removed request to it, and calls `prepare_inputs`
before each step, also before a graph replay. The token slots keep their address, so replayed graphs read the new
content.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_edits.edit_store.errors import UnsupportedHost
from vllm_edits.plugin.claim import CLAIM
from vllm_edits.plugin.graph.reservation import Reservation
from vllm_edits.plugin.graph.step_filler import Extents, StepBatch
from vllm_edits.plugin.vllm_host import prompts
from vllm_edits.plugin.vllm_host.loaded import LoadedEdits
from vllm_edits.plugin.vllm_host.seams import optional


@dataclass(frozen=True)
class _Request:
    req_id: str
    claim: Any
    prompt: int
    embedded: NDArray[np.bool_] | None


def use_edits_model_state(model: Any, loaded: LoadedEdits) -> None:
    """Make the V2 runner use its ModelState for this model, extended with token slots."""
    if optional(model, "get_model_state_cls"):
        state_class = with_token_slots(model.get_model_state_cls(), loaded)
    else:
        try:
            from vllm.v1.worker.gpu.model_states.default import DefaultModelState
        except ImportError:  # this build has no V2 runner: V1 attaches later
            return
        state_class = with_token_slots(DefaultModelState, loaded)
    model.get_model_state_cls = lambda: state_class


def require_logits(loaded: LoadedEdits, reservation: Reservation) -> None:
    """UnsupportedHost if the runner cannot edit logits, and they are reserved."""
    if loaded.runner == "V2" and reservation.edits_logits and loaded.edited.worker.size > 1:
        raise UnsupportedHost(
            "edits at logits are not proven exact on vLLM's V2 runner with tensor parallel, because workers may divide "
            "the requests. Start with VLLM_USE_V2_MODEL_RUNNER=0 or --tensor-parallel-size 1, or reserve nothing at "
            "logits"
        )


def with_token_slots(base: Any, loaded: LoadedEdits) -> type:
    """A subclass of a V2 ModelState that fills the token slots of `loaded`."""

    class EditsModelState(base):  # type: ignore[misc]
        """A model state that also sets the slot of every token before each step."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._requests: dict[str, _Request] = {}
            loaded.runner = "V2"
            require_logits(loaded, loaded.edited.reservation)
            self.model.register_forward_hook(lambda _module, _args, output: loaded.edited.note_output(output))

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            sampling = new_req_data.sampling_params
            arguments = sampling.extra_args if sampling is not None else None
            claim, prompt = (arguments or {}).get(CLAIM), prompts.length(new_req_data)
            embedded = prompts.embedded(new_req_data)
            self._requests[new_req_data.req_id] = _Request(new_req_data.req_id, claim, prompt, embedded)

        def remove_request(self, req_id: str) -> None:
            super().remove_request(req_id)
            self._requests.pop(req_id, None)

        def prepare_inputs(self, input_batch: Any, req_states: Any) -> Any:
            known, requests = req_states.req_id_to_index, list[_Request]()
            # For profiling and warm-up the runner invents a batch of requests that it does not know itself: they need
            # no slots. A request that the runner knows, but that was never reported here, is an error: KeyError stops
            # the step, so the base model is not served instead.
            if any(request_id in known for request_id in input_batch.req_ids):
                requests = [self._requests[request_id] for request_id in input_batch.req_ids]

            def extents() -> Extents:
                return Extents(
                    tokens=np.asarray(input_batch.num_scheduled_tokens),
                    starts=np.asarray(input_batch.num_computed_tokens_np),
                    prompts=lambda: np.array([request.prompt for request in requests]),
                    input_ids=input_batch.input_ids,
                )

            loaded.edited.note_output(None)  # a full CUDA graph is replayed without calling the model
            loaded.edited.set_step(StepBatch(requests, attrgetter("claim"), attrgetter("embedded"), extents))
            return super().prepare_inputs(input_batch, req_states)

    return EditsModelState
