"""Run by test_start.py in a process of its own: variants through `vllm.LLM`, and a worker that refuses."""

from __future__ import annotations

import sys

from vllm_edits import Variants
from vllm_edits.edit_store import EditStore
from vllm_edits.edit_store.errors import InstallRefused, Reason


def main(model: str, store_folder: str, second: str) -> None:
    from vllm import LLM, SamplingParams

    settings = {"edits": {"store": store_folder}}
    llm = LLM(model, load_format="edits", additional_config=settings, dtype="float32", max_model_len=512, seed=0)
    variants, store = Variants(llm), EditStore(store_folder)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)

    def texts(names: list[str | None]) -> list[str]:
        outputs = variants.generate(names, ["One two three"] * len(names), params, use_tqdm=False)
        return [output.outputs[0].text for output in outputs]

    base, loud, again = texts([None, "loud", None])
    assert base == again != loud
    assert texts(["loud"]) == [loud]

    ready = llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model().loaded_edits.ready
    prepare = ready._prepare

    def refuse(*_: object) -> None:
        raise InstallRefused("install", [Reason("test", "this worker refuses")])

    ready._prepare = refuse
    store.promote(f"loud@{second}")
    variants.sync()
    assert variants.coordinator.reconciler.last_swap is not None
    assert "this worker refuses" in variants.coordinator.reconciler.last_swap.error
    assert texts(["loud", None]) == [loud, base]

    ready._prepare = prepare
    variants.sync()
    assert not variants.coordinator.reconciler.last_swap.error
    swapped, still = texts(["loud", None])
    assert swapped not in (loud, base)
    assert still == base
    sys.stdout.write("the story holds\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
