"""Run by test_growing_fails.py in a process of its own: growths that fail at each phase, and then ones that do not."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.engine.offline_swaps import look
from tests.proofs.parity import random_numbers
from tests.support.bundles import base_of, bundle_of, publish
from vllm_edits import Variants
from vllm_edits.edit_store import EditStore, Offset, Scale
from vllm_edits.plugin.serving.growth import GrowthRun
from vllm_edits.plugin.vllm_host import compiled, growth

GROWTHS = 20


def broken(*_args: Any) -> None:
    raise RuntimeError("broken on purpose")


@contextmanager
def killed_compiler(growing: Callable[[], Any]) -> Iterator[None]:
    """Kill the process that compiles as soon as there is one."""
    ended = threading.Event()

    def kill() -> None:
        while not ended.wait(0.2):
            child = getattr(getattr(growing(), "_compiling", None), "_child", None)
            if child:
                time.sleep(1)
                os.kill(child, signal.SIGKILL)
                return

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Engine:
    """An engine with one variant, `old`, and what is found of it."""

    def __init__(self, model: str, store_folder: str, *, eager: bool) -> None:
        from vllm import LLM, SamplingParams

        self.store, self.base = EditStore(store_folder, create=True), base_of(Path(model))
        self.promoted("old", Offset(site="layers.1.resid"))
        self.llm = LLM(
            model, load_format="edits", additional_config={"edits": {"store": store_folder, "slots": 24}},
            dtype="float32", max_model_len=256, seed=0, kv_cache_memory_bytes=1 << 26, enforce_eager=eager,
        )  # fmt: skip
        self.variants = Variants(self.llm)
        self.params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=0)
        core = self.llm.llm_engine.engine_core.engine_core
        self.loaded = core.model_executor.driver_worker.worker.model_runner.get_model().loaded_edits
        self.before = self.state()
        self.facts: dict[str, Any] = {"failed": {}, "growths": []}

    def promoted(self, name: str, edit: Any, seed: int = 1) -> str:
        return publish(self.store, bundle_of(name, self.base, [(edit, random_numbers(edit, self.base, seed))]))

    def says(self, name: str | None) -> list[Any]:
        (answer,) = self.variants.generate(name, [{"prompt_token_ids": [5, 6, 7]}], self.params, use_tqdm=False)
        (output,) = answer.outputs
        return [list(output.token_ids), [next(iter(step.values())).logprob for step in output.logprobs]]

    def state(self) -> list[Any]:
        return [self.says(None), self.says("old")]

    def last(self) -> GrowthRun:
        run = self.variants.coordinator.growth.last
        assert run is not None
        return run

    def attempt(self, name: str) -> None:
        self.variants.sync()
        run = self.last()
        self.facts["failed"][name] = {
            "phase": run.phase, "error": run.error, "same": self.state() == self.before,
            "growing": self.loaded.growth is not None,
            "refused": self.variants.coordinator.reconciler.refusal("new", "prod"),
        }  # fmt: skip

    def fail(self, *, eager: bool) -> None:
        """Let a growth fail at every phase."""
        self.promoted("new", Scale(site="layers.2.attn.z"))
        with patch.object(self.variants.coordinator.growth, "_limit_bytes", 100):
            self.attempt("memory")
        if not eager:
            with patch.object(compiled, "compile_and_save", broken):
                self.attempt("compile error")
            with killed_compiler(lambda: self.loaded.growth):
                self.attempt("killed compiler")
            with patch.object(compiled, "load", broken):
                self.attempt("load error")
        with patch.object(self.loaded.building, "make", broken):
            self.attempt("build error")
        with patch.object(growth.Growth, "_carry", broken):
            self.attempt("carry error")
        with patch.object(growth, "require_effective", broken):
            self.attempt("switch error")

        def break_when_grown(_worker: Any) -> None:
            if len(self.loaded.edited.reservation.capacities) > 1:
                broken()

        with patch.object(growth, "capture_again", break_when_grown):
            self.attempt("capture error")

    def grow_in_thread(self) -> None:
        """Compile in a thread, as on a GPU; the switch is asked for twice, as when another engine was not ready."""
        switch = growth.Growth.switch
        with (
            patch.object(compiled, "can_fork", lambda _device: False),
            patch.object(growth.Growth, "switch", lambda growing: switch(growing) and switch(growing)),
        ):
            self.promoted("in-thread", Scale(site="layers.0.q.out"))
            self.variants.sync()
        told = {name: self.says(name) != self.before[0] for name in ("in-thread", "new")}
        self.facts["thread"] = {"differ": told, "same": self.state() == self.before, "seconds": self.last().seconds}

    def grow_often(self) -> None:
        """Grow again and again, each time for another site."""
        points = ("attn.out", "mlp.out", "mlp.in", "attn.in", "mlp.h")
        sites = [f"layers.{layer}.{point}" for layer in range(self.base.widths.layers) for point in points]
        for number, site in enumerate(sites[:GROWTHS]):
            self.promoted(f"grown-{number}", Offset(site=site), seed=number)
            self.variants.sync()
            run, answer = self.last(), self.says(f"grown-{number}")
            self.store.withdraw(f"grown-{number}")
            self.variants.sync()
            self.facts["growths"].append({
                **asdict(look()), "seconds": run.seconds, "error": run.error, "same": self.state() == self.before,
                "pause": run.longest_pause_seconds, "differs": answer != self.before[0],
            })  # fmt: skip


def main(model: str, store_folder: str, *words: str) -> None:
    engine = Engine(model, store_folder, eager="eager" in words)
    if "fail" in words:
        engine.fail(eager="eager" in words)
        engine.grow_in_thread()
    if "many" in words:
        engine.grow_often()
    sys.stdout.write(f"\n{json.dumps(engine.facts)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
