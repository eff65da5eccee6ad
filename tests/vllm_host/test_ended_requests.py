"""What false claims leave behind in vLLM's own scheduler and prefix cache: nothing that another request could read.

The worker's side is called by hand; there is no engine.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, ParallelConfig, SchedulerConfig, VllmConfig
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from vllm_edits.plugin.claim import FORK, FalseClaim
from vllm_edits.plugin.vllm_host import ending
from vllm_edits.plugin.vllm_host.ending import EndsRequests
from vllm_edits.plugin.vllm_host.scheduler import EditsScheduler

BLOCK, VERSION = 16, "v1"
PROMPT = list(range(10, 10 + 4 * BLOCK))
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
    "max_position_embeddings": 512,
}  # fmt: skip
SHAPE: dict[str, Any] = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 1, "dtype": torch.float32}
WINDOW = SlidingWindowSpec(**SHAPE, sliding_window=2 * BLOCK)


class Engine:
    """A scheduler of vLLM's with our part in it, and the worker's part."""

    def __init__(self, folder: Path, *, asynchronous: bool = False, specs: Sequence[Any] = ()) -> None:
        init_none_hash(sha256)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        model = ModelConfig(model=str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=512)
        scheduling = SchedulerConfig(
            max_num_seqs=16, max_num_batched_tokens=512, max_model_len=512, enable_chunked_prefill=True,
            is_encoder_decoder=False, async_scheduling=asynchronous,
        )  # fmt: skip
        cache = CacheConfig(block_size=BLOCK, enable_prefix_caching=True)
        cache.num_gpu_blocks = 200
        config = VllmConfig(model_config=model, scheduler_config=scheduling, cache_config=cache,
                            parallel_config=ParallelConfig(), device_config=DeviceConfig("cpu"))  # fmt: skip
        specs = specs or [FullAttentionSpec(**SHAPE)]
        groups = [KVCacheGroupSpec([f"layer-{number}"], spec) for number, spec in enumerate(specs)]
        self.worker = EndsRequests(config)
        self.scheduler = EditsScheduler(
            vllm_config=config, kv_cache_config=KVCacheConfig(200, [], groups), block_size=BLOCK,
            hash_block_size=BLOCK, structured_output_manager=StructuredOutputManager(config), log_stats=True,
        )  # fmt: skip
        self.worker.attached()
        self._hasher = get_request_block_hasher(BLOCK, sha256)

    def add(self, name: str, prompt: Sequence[int], salt: str | None = VERSION, fork: Any = None) -> Request:
        extra = None if fork is None else {FORK: fork}
        request = Request(
            request_id=name, prompt_token_ids=list(prompt), pooling_params=None, arrival_time=time.time(),
            sampling_params=SamplingParams(max_tokens=50, extra_args=extra, ignore_eos=True), block_hasher=self._hasher,
            cache_salt=salt,
        )  # fmt: skip
        self.scheduler.add_request(request)
        return request

    def step(self) -> Any:
        return self.scheduler.schedule()

    def false(self, name: str) -> bool:
        """The worker finds the claim of a request false."""
        return self.worker.end(SimpleNamespace(req_id=name), FalseClaim("no"))

    def update(self, step: Any) -> dict[str, str]:
        """How the requests of a step that ended did."""
        names = list(step.num_scheduled_tokens)
        told = ModelRunnerOutput(
            req_ids=names, req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=[[5]] * len(names), logprobs=None, prompt_logprobs_dict={}, pooler_output=[],
        )  # fmt: skip
        outputs = self.scheduler.update_from_output(step, told)
        return {said.request_id: str(said.finish_reason) for client in outputs.values() for said in client.outputs
                if said.finish_reason is not None}  # fmt: skip

    def computes(self, name: str, prompt: Sequence[int], salt: str | None = VERSION) -> int:
        """How many tokens of a new request are computed: the others come from the prefix cache."""
        self.add(name, prompt, salt)
        step = self.step()
        count: int = step.num_scheduled_tokens[name]
        self.update(step)
        return count


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


def test_blocks_of_a_true_request_are_shared_and_those_of_a_false_one_are_not(folder: Path) -> None:
    true, false = Engine(folder), Engine(folder)
    for engine in (true, false):
        engine.add("A", PROMPT)
        step = engine.step()
        if engine is false:
            assert engine.false("A")
        assert engine.update(step) == ({"A": "error"} if engine is false else {})
    assert true.computes("B", PROMPT) == BLOCK  # at least the last block is computed
    assert false.computes("B", PROMPT) == len(PROMPT)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("how", ["left by its client", "preempted"])
def test_nor_are_those_that_it_gave_back_while_its_step_was_under_way(
    folder: Path, how: str, asynchronous: bool
) -> None:
    engine = Engine(folder, asynchronous=asynchronous)
    engine.add("A", PROMPT)
    step = engine.step()
    engine.false("A")
    if how == "preempted":
        engine.scheduler._preempt_request(engine.scheduler.running.pop(), time.monotonic())
    else:
        engine.scheduler.finish_requests(["A"], RequestStatus.FINISHED_ABORTED)
    engine.update(step)
    assert engine.computes("B", PROMPT) == len(PROMPT)


@pytest.mark.parametrize("when", ["same step", "next step"])
def test_what_shares_them_ends_and_leaves_none_of_its_own(folder: Path, when: str) -> None:
    """The longer prompt read what the shorter one had computed wrongly."""
    longer = [*PROMPT, *([7] * 65)]
    engine = Engine(folder, asynchronous=when == "next step")
    engine.add("A", [*PROMPT, 1])
    first = engine.step() if when == "next step" else None
    engine.add("B", longer)
    last = engine.step()
    engine.false("A")
    ended = engine.update(first or last)
    assert ended == {"A": "error", "B": "error"}
    if first:
        engine.update(last)
    assert engine.computes("C", [*PROMPT, 2]) == len(PROMPT) + 1
    assert engine.computes("D", longer) == len(longer) - len(PROMPT)


def test_a_request_that_shares_nothing_goes_on(folder: Path) -> None:
    """Also behind a window, where one block stands for all that was left behind, of every request."""
    engine = Engine(folder, specs=[FullAttentionSpec(**SHAPE), WINDOW])
    engine.add("A", range(10, 110))
    engine.add("B", range(130, 240), salt=None)
    for _ in range(3):
        assert engine.update(engine.step()) == {}
    step = engine.step()
    shared = [set(engine.scheduler.kv_cache_manager.get_block_ids(name)[1]) for name in "AB"]
    assert set.intersection(*shared), "positive control: a window was left behind"
    engine.false("A")
    assert engine.update(step) == {"A": "error"}
    assert engine.update(engine.step()) == {}


def test_what_is_the_base_models_before_a_fork_stays(folder: Path) -> None:
    engine = Engine(folder)
    engine.add("base", PROMPT, salt=None)
    engine.update(engine.step())
    engine.add("A", [*PROMPT, *([7] * 40)], salt=None, fork=["salt", 40])
    step = engine.step()
    engine.false("A")
    assert engine.update(step) == {"A": "error"}
    assert engine.computes("B", PROMPT, salt=None) == BLOCK


@pytest.mark.parametrize("fork", ["x", ["a"], [1, 2], ["a", "b"], ["a", -1], ["a", 1.5], ["a", None], {}])
def test_a_fork_in_a_form_that_is_never_written_ends_its_request(folder: Path, fork: Any) -> None:
    engine = Engine(folder)
    engine.add("A", PROMPT, salt=None, fork=fork)
    assert engine.update(engine.step()) == {"A": "error"}
    assert engine.computes("B", PROMPT, salt=None) == len(PROMPT)


@pytest.mark.parametrize("name", ["a\nb-1", "x\nattached", "end y", '"'], ids=ascii)
def test_an_id_may_hold_any_letter(folder: Path, name: str) -> None:
    engine = Engine(folder)
    engine.add(name, PROMPT)
    engine.add("y", PROMPT[::-1])
    step = engine.step()
    assert engine.false(name)
    assert engine.update(step) == {name: "error"}


@pytest.mark.parametrize("written", [None, 3])
def test_what_cannot_be_written_is_not_told(folder: Path, monkeypatch: pytest.MonkeyPatch, written: int | None) -> None:
    """On a disk that is full nothing or a part is written. Then the step must be stopped."""
    engine, real = Engine(folder), os.write

    def full(file: int, data: bytes) -> int:
        if written is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, data[:written])

    engine.add("A", PROMPT)
    step = engine.step()
    monkeypatch.setattr(ending.os, "write", full)
    assert not engine.false("A")
    monkeypatch.undo()
    assert engine.update(step) == {}
