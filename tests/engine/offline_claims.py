"""Run by test_start.py in a process of its own: requests with false claims end alone, and leave nothing behind."""

from __future__ import annotations

import sys
from typing import Any

from vllm_edits import Variants
from vllm_edits.plugin.claim import CLAIM, SCHEDULER
from vllm_edits.plugin.vllm_host.addressing import address

PROMPT, TOKENS = "The sea, the hills and the road between them. " * 8, 24


def main(model: str, store_folder: str) -> None:
    from vllm import LLM, SamplingParams

    settings = {"edits": {"store": store_folder}}
    llm = LLM(
        model, load_format="edits", additional_config=settings, dtype="float32", max_model_len=512, seed=0,
        scheduler_cls=SCHEDULER, enable_prefix_caching=True, block_size=32,
    )  # fmt: skip
    engine, params = llm.llm_engine, SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    # Nothing of the plugin has attached itself: it is not known what sends this.
    (unattached,) = llm.generate(PROMPT, params, use_tqdm=False)
    assert (unattached.outputs[0].finish_reason, list(unattached.outputs[0].token_ids)) == ("error", [])
    variants = Variants(llm)

    def add(request_id: str, name: str | None, *, claim: Any = None) -> None:
        lease = variants._loop.run_until_complete(variants._lease(name, None))
        with lease.hold():  # given back at once: what protects a slot is what this story does without
            prompt, mine = address({"prompt": PROMPT}, params, lease.choice, lease.slot, forks=True)
        if claim is not None:
            mine.extra_args = {CLAIM: claim}
        engine.add_request(request_id, prompt, mine)

    def run(steps: int = 1000) -> dict[str, Any]:
        ended = {}
        while engine.has_unfinished_requests() and steps:
            ended |= {output.request_id: output.outputs[0] for output in engine.step() if output.finished}
            steps -= 1
        return ended

    add("loud", "loud")
    add("base", None)
    right = run()
    assert right["loud"].token_ids != right["base"].token_ids

    # The slot is emptied behind the reconciler's back: in the middle of an answer, and before a prompt is computed.
    assert llm.llm_engine.reset_prefix_cache()
    (slot,) = (each.slot for each in variants.coordinator.slots.residency.residents().values())
    version = variants.coordinator.reconciler.table.promoted["loud"]["prod"]
    add("running", "loud")
    add("beside", None)
    assert not run(5)
    llm.collective_rpc("edits_clear", args=(slot,))
    add("late", "loud")
    add("garbage", "loud", claim="mine")
    add("nowhere", "loud", claim=[3, "f" * 64, 1.0])
    ended = run()
    assert {name: output.finish_reason for name, output in ended.items()} == {
        "running": "error", "late": "error", "garbage": "error", "nowhere": "error", "beside": "length"
    }, ended  # fmt: skip
    assert ended["beside"].token_ids == right["base"].token_ids
    assert list(ended["running"].token_ids) == list(right["loud"].token_ids[: len(ended["running"].token_ids)])
    assert not ended["late"].token_ids

    # What was computed with the base model meanwhile is not in the cache under the version's name.
    llm.collective_rpc("edits_install", args=(slot, version, None))
    add("again", "loud")
    add("base again", None)
    again = run()
    assert again["again"].token_ids == right["loud"].token_ids
    assert again["base again"].token_ids == right["base"].token_ids
    sys.stdout.write("the story holds\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
