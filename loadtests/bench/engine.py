"""One side of the benchmark: a `vllm.LLM` in a process of its own. sides.py starts it; not to be run by hand.

Line by line on standard input and output, as JSON: first what to load, then one batch a line.

    {"engine": {arguments of LLM}, "adapters": [folders]}             -> {"ready": true}
    {"prompts": [[ids]], "names": [variant, null, ...], "tokens": n}  -> {"requests": [RequestTimes]}
    {..., "profile": true}  -> {"requests": [...], "calls": {"<device> <name>": [count, microseconds]}}
    {..., "paced": true, "reads": bytes}
                            -> {"waits": true} before each step, which any line starts; then {"steps": [seconds], ...}

The engine runs in this very process (VLLM_ENABLE_V1_MULTIPROCESSING=0), so a side that waits for its next line is at
rest, and the stamps are taken where the steps are.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import cache, partial
from typing import Any, TextIO

from loadtests.bench.report import RequestTimes

Calls = Mapping[str, tuple[int, float]]
"""How often torch called what, by `<device> <name>`, and how many microseconds that took without what it called."""
Generate = Callable[[list[str | None], list[Any], Any], list[Any]]


def main() -> None:
    """Serve batches until standard input ends."""
    answers = _own_stdout()
    engine, generate = _load(json.loads(sys.stdin.readline()))
    _answer(answers, {"ready": True})
    for line in sys.stdin:
        batch = json.loads(line)
        with (
            _profiled() if batch.get("profile") else nullcontext() as calls,
            _paced(engine, answers, batch["reads"]) if batch.get("paced") else nullcontext() as steps,
        ):
            requests = _run(generate, batch)
        _answer(answers, {"requests": [asdict(times) for times in requests], "calls": calls, "steps": steps})


def _own_stdout() -> TextIO:
    """The channel to the parent; whatever vLLM prints goes to the log with the errors."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return channel


def _answer(answers: TextIO, answer: dict[str, Any]) -> None:
    print(json.dumps(answer), file=answers, flush=True)


def _load(wanted: dict[str, Any]) -> tuple[Any, Generate]:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    from vllm_edits import Variants

    llm = LLM(**wanted["engine"], disable_log_stats=False)  # the stamps are part of its statistics
    if "additional_config" in wanted["engine"]:
        variants = Variants(llm)
        return llm.llm_engine, partial(variants.generate, use_tqdm=False)
    adapters = {
        name: LoRARequest(name, number, folder) for number, (name, folder) in enumerate(wanted["adapters"].items(), 1)
    }

    def generate(names: list[str | None], prompts: list[Any], params: Any) -> list[Any]:
        chosen = [adapters[name] if name else None for name in names]
        outputs: list[Any] = llm.generate(prompts, params, use_tqdm=False, lora_request=chosen if any(chosen) else None)
        return outputs

    return llm.llm_engine, generate


def _run(generate: Generate, batch: dict[str, Any]) -> list[RequestTimes]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=batch["tokens"], ignore_eos=True, detokenize=False)
    outputs = generate(batch["names"], [{"prompt_token_ids": ids} for ids in batch["prompts"]], params)
    if any(output.num_cached_tokens for output in outputs):
        raise RuntimeError("the prefix cache knew a prompt: this batch does not measure what it should")
    return [
        RequestTimes(
            scheduled=output.metrics.scheduled_ts,
            first_token=output.metrics.first_token_ts,
            last_token=output.metrics.last_token_ts,
            prompt_tokens=len(output.prompt_token_ids),
            output_tokens=len(output.outputs[0].token_ids),
        )
        for output in outputs
    ]


@contextmanager
def _profiled() -> Iterator[dict[str, tuple[int, float]]]:
    """Counts what torch calls inside: operators, and on a GPU kernels and launches. Filled at the end."""
    from torch.profiler import profile

    calls: dict[str, tuple[int, float]] = {}
    with profile() as profiled:
        yield calls
    for event in profiled.key_averages():
        taken = event.self_device_time_total if event.device_type.name != "CPU" else event.self_cpu_time_total
        calls[f"{event.device_type.name} {event.key}"] = event.count, taken


@contextmanager
def _paced(engine: Any, answers: TextIO, reads: int = 0) -> Iterator[list[float]]:
    """Has each step of the engine wait for its line, and read so many bytes of memory in the end; the seconds that
    they take, as they come."""
    step, seconds, read = engine.step, list[float](), _memory(reads).sum if reads else lambda: None

    def paced() -> Any:
        _answer(answers, {"waits": True})
        sys.stdin.readline()
        began = time.perf_counter()
        outputs = step()
        read()
        seconds.append(time.perf_counter() - began)
        return outputs

    engine.step = paced
    try:
        yield seconds
    finally:
        del engine.step  # the class has it


@cache
def _memory(size: int) -> Any:
    """So many bytes of memory, always the same."""
    import torch

    return torch.ones(size // 4)


if __name__ == "__main__":
    main()
