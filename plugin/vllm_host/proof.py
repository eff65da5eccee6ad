"""Proves that a loaded model really calls the modules of the edited sites, before it is compiled. Runs in workers.

A model may bypass a module: for example, a fused kernel reads a norm's weight and never calls the norm. Edits there
would be installed and counted, but have no effect. So the model's forward is run once, as Python. Each reserved site
must be reached exactly once.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.forward_context import set_forward_context

from vllm_edits.edit_store.errors import UnsupportedHost
from vllm_edits.plugin.graph.edited_model import EditedModel

_TOKENS, _SHOWN = 2, 8


def require_effective(model: Any, edited: EditedModel, vllm_config: Any, device: torch.device) -> None:
    """UnsupportedHost lists the sites where edits would have no effect, or be applied several times."""
    tokens = torch.zeros(_TOKENS, dtype=torch.int64, device=device)
    positions = torch.arange(_TOKENS, device=device)
    context = set_forward_context(None, vllm_config, skip_compiled=True)
    with edited.watched() as reached, torch.inference_mode(), context:
        try:
            # Not the call with its hooks, which are for the steps of the engine.
            hidden = model.forward(input_ids=tokens, positions=positions, intermediate_tensors=None, inputs_embeds=None)
        except AttributeError as error:  # an edit reads a site that was not computed before it
            raise UnsupportedHost(
                f"this vLLM does not compute a site that edits read: {error}. Use another version of vLLM"
            ) from error
        model.compute_logits(hidden)
    wrong = [f"{site} ({times} times)" for site, times in reached.items() if times != 1]
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise UnsupportedHost(
            f"expected vLLM to run the module of each reserved site once, found {', '.join(wrong[:_SHOWN])}{more}: "
            "edits there would have no effect, or a double effect. Leave these sites out of edits.reserve, or use "
            "another version of vLLM"
        )
