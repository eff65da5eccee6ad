"""One engine's life on a GPU: edited and base requests of every form in one batch, swaps, paging, and what a step asks.

    python -m tests.gpu.story WAY        where there is a GPU, or the driver that computes nothing

WAY is JSON: {"environment": {}, "arguments": {of LLM}, "expect": {what must be told}}.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from loadtests.bench.inputs import edits_everywhere
from loadtests.harness.model import made_whole
from tests.gpu.facts import ended, require, tried
from tests.proofs.parity import every_edit, random_numbers
from tests.support.tiny_models import VOCABULARY, make_tiny
from vllm_edits.edit_store import Bundle, EditStore, LowRank, Offset, Provenance, Scope, Strength, identify
from vllm_edits.edit_store.base_ref import BaseModelRef
from vllm_edits.edit_store.canonical import canonical_json, sha256
from vllm_edits.edit_store.kinds import served_per_request

MODEL = Path(".cache/gpu/tiny")
FOLDER = Path(".cache/gpu/story").resolve()
"""always the same one of each way: where the store lies is part of the compile cache's key"""
SLOTS, TOKENS, MADE = 12, 12, Provenance(tool="rehearsal", method="random")
SCOPES = (
    Scope(segment="generated"), Scope(segment="prompt"), Scope(first=2), Scope(last=3), Scope(tokens=(5, 7)),
    Scope(segment="generated", tokens=(5,)),
)  # fmt: skip


def tiny_model() -> Path:
    """A Llama of two layers."""
    if not MODEL.is_dir():
        with made_whole(MODEL) as folder:
            make_tiny("LlamaForCausalLM", folder)
    return MODEL


def each_form_once(edits: Sequence[tuple[str, Any]]) -> Iterator[Any]:
    """An edit of every form, each at another site as far as there are."""
    used: dict[str, int] = {}
    for form in dict.fromkeys(form for form, _ in edits):
        pair = min((pair for name, pair in edits if name == form), key=lambda pair: used.get(pair[0].site, 0))
        used[pair[0].site] = used.get(pair[0].site, 0) + 1
        yield pair


def versions(base: BaseModelRef, *, logits: bool = True) -> Iterator[Bundle]:
    """One of every form, one for every scope, one of a higher rank, one of a strength to choose, one of all kinds."""
    forms = [(form, pair) for form, pair in every_edit(base) if logits or pair[0].site != "logits"]
    for number, pair in enumerate(each_form_once(forms)):
        yield Bundle.create(f"form-{number:02}", base, [pair], MADE)
    for number, scope in enumerate(SCOPES):
        yield _of_one(f"scope-{number}", base, Offset(site="layers.1.resid", scope=scope))
    yield _of_one("rank-4", base, LowRank(site="layers.0.mlp.out", reads="layers.0.mlp.h", rank=4))
    yield _of_one("strong", base, Offset(site="layers.1.resid"), strength=Strength(minimum=0, maximum=2))
    yield Bundle.create("all-kinds", base, edits_everywhere(base, served_per_request()), MADE)


def _of_one(name: str, base: BaseModelRef, edit: Any, **more: Any) -> Bundle:
    return Bundle.create(name, base, [(edit, random_numbers(edit, base, 1))], MADE, **more)


class Story:
    """An engine with the plugin, and what it is asked."""

    def __init__(self, way: Mapping[str, Any], folder: Path) -> None:
        from vllm import LLM

        from vllm_edits import Variants

        chosen = dict(way.get("arguments", {}))
        self.workers = chosen.get("tensor_parallel_size", 1)
        self.speculative = "speculative_config" in chosen
        base = identify(tiny_model())
        self.store = EditStore(str(folder / "store"), create=True)
        # Refused, each in its own words: logits of guesses, and of requests that workers divide.
        self.bundles = {each.manifest.name: each for each in
                        versions(base, logits=not self.speculative and self.workers == 1)}  # fmt: skip
        for bundle in self.bundles.values():
            self.store.promote(f"{bundle.manifest.name}@{self.store.publish(bundle)}")
        settings = {
            "store": self.store.url, "slots": SLOTS, "host_cache_bytes": 4 << 20, "cache_folder": str(folder / "node"),
        }  # fmt: skip
        arguments = {
            "skip_tokenizer_init": True, "dtype": "bfloat16", "seed": 0, "max_model_len": 256, "max_num_seqs": 16,
            "max_num_batched_tokens": 64, "block_size": 16, "num_gpu_blocks_override": 64, "max_logprobs": 5,
            "gpu_memory_utilization": 0.3, "disable_log_stats": False, "load_format": "edits",
            "additional_config": {"edits": settings},
            "scheduler_cls": "vllm_edits.EditsScheduler",
            **chosen,
        }  # fmt: skip
        self.llm = LLM(str(tiny_model().resolve()), **arguments)
        self.variants = Variants(self.llm)
        self._numbers = count(3)

    @property
    def resolved(self) -> dict[str, Any]:
        """What vLLM made of the arguments."""
        from vllm.compilation.counter import compilation_counter as counter

        config = self.llm.llm_engine.vllm_config
        return {
            "runner": "V2" if "runner V2" in self.variants.description else "V1",
            "graphs": config.compilation_config.cudagraph_mode.name,
            "compiled": int(config.compilation_config.mode) > 0,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "async": bool(config.scheduler_config.async_scheduling),
            "workers": self.workers,
            "compiled before": counter.num_aot_artifacts_loaded > 0 and not counter.num_inductor_compiles,
        }

    def prompts(self, requests: int, tokens: int) -> list[dict[str, Any]]:
        """Prompts that were not asked before."""
        return [{"prompt_token_ids": [3 + 7 * next(self._numbers) % (VOCABULARY - 3) for _ in range(tokens)]}
                for _ in range(requests)]  # fmt: skip

    def ask(self, names: Sequence[str | None], prompts: Sequence[Any], tokens: int = TOKENS, **how: Any) -> list[Any]:
        """Answers of one batch, each as long as it was asked for."""
        from vllm import SamplingParams

        strength, sampling = how.pop("strength", None), {"logprobs": 3, **how}
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, **sampling)
        outputs = self.variants.generate(list(names), list(prompts), params, strength=strength, use_tqdm=False)
        lengths = {len(output.outputs[0].token_ids) for output in outputs}
        require(lengths == {tokens}, f"answers of {lengths} tokens, not {tokens}")
        return outputs

    def every_form(self) -> dict[str, Any]:
        """Base and edited requests in one batch; there are more versions than slots, which are paged in and out."""
        names, answers = list(self.bundles), 0
        for begin in range(0, len(names), 8):
            group = [None, *names[begin : begin + 8], None]
            answers += len(self.ask(group, self.prompts(len(group), 9)))
        self.ask(["strong", "strong", None], self.prompts(3, 5), strength=0.5)
        return {"versions": len(names), "slots": SLOTS, "answers": answers}

    def chunks(self) -> dict[str, Any]:
        """Prompts longer than a step, and the log-probabilities of prompts."""
        self.ask(["all-kinds", "scope-0", "scope-3", None], self.prompts(4, 100))
        if not self.speculative:
            at_logits = [name for name, each in self.bundles.items() if each.manifest.edits[0].site == "logits"]
            names = [*at_logits, "scope-1", None]
            self.ask(names, self.prompts(len(names), 20), prompt_logprobs=1)
        return {}

    def prefix_cache(self) -> dict[str, Any]:
        """The same prompts again, of the same versions."""
        names, prompts = ["all-kinds", "scope-0", None], self.prompts(3, 70)
        self.ask(names, prompts)
        cached = [output.num_cached_tokens for output in self.ask(names, prompts)]
        require(all(cached), f"the prefix cache gave {cached} tokens")
        return {"cached": cached}

    def preemption(self) -> dict[str, Any]:
        """More running requests than there are blocks for."""
        names = [*list(self.bundles)[:6], "all-kinds", "scope-2", "scope-4", None]
        self.ask([names[number % len(names)] for number in range(16)], self.prompts(16, 40), tokens=60)
        times = sum(each.value for each in self.llm.get_metrics() if each.name == "vllm:num_preemptions")
        require(times, "nothing was preempted")
        return {"preempted": times}

    def swap_and_rollback(self) -> dict[str, Any]:
        """A version promoted in place of another, and the other again."""
        manifest = self.bundles["all-kinds"].manifest.model_copy(update={"label": "again"})
        again = self.store.publish(replace(self.bundles["all-kinds"], manifest=manifest))
        for change in (partial(self.store.promote, f"all-kinds@{again}"), partial(self.store.rollback, "all-kinds")):
            change()
            self.variants.sync()
            swap = self.variants.coordinator.reconciler.last_swap
            require(swap is not None and not swap.error, f"the swap failed: {swap}")
            self.ask(["all-kinds", None], self.prompts(2, 9))
        return {}

    def gates(self) -> dict[str, Any]:
        """What gates counted, as a server reads it."""
        answers = self.llm.collective_rpc("edits_firings")
        read = len(answers[0].get("firings", ()))
        require(read, f"no gate was counted: {answers}")
        return {"gates": read}


def tell_story(way: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The facts of it."""
    from tests.gpu.watch import Watch

    began = time.monotonic()
    story = Story(way, folder)
    facts = {"seconds": round(time.monotonic() - began, 1), **story.resolved}
    for name, value in way.get("expect", {}).items():
        require(facts[name] == value, f"expected {name} {value}, found {facts[name]}")
    watch = Watch.of(story.llm) if story.workers == 1 else None
    parts = [story.every_form, story.chunks, story.prefix_cache, story.preemption, story.swap_and_rollback, story.gates]
    for part in parts:
        facts |= part()
    if watch is not None:
        facts |= watch.verdict()
        # Where each step's answer is waited for before the next begins, no buffer can be written to too early.
        if os.environ.get("NULL_GPU_LATE") and facts["async"]:
            some = story.prompts(6, 9)
            facts["misread with one buffer"] = watch.with_one_buffer(
                lambda: story.ask(["all-kinds", "scope-0", None] * 2, some)
            )
    return facts


def main() -> None:
    """The command."""
    way = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
    os.environ.update({"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_PLUGINS": "edits", "HF_HUB_OFFLINE": "1"})
    os.environ.update(way.get("environment", {}))
    started = {name: way.get(name) for name in ("environment", "arguments")}
    folder = FOLDER / sha256(canonical_json(started))[:8]
    shutil.rmtree(folder, ignore_errors=True)
    ended(tried("story", lambda: tell_story(way, folder), way=started))


if __name__ == "__main__":
    main()
