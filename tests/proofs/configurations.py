"""The ways in which vLLM can be run, and whether edits are exact in each: served, and compared with transformers.

    python -m tests.proofs.configurations [NAME …] [--write]

In every way a tiny Llama answers as the base model and with edits of every kind, with scopes too, all in one batch; and
with every linear kind in its weights. The log-probabilities of what it generates are held against transformers in
float64 with the edits' formulas applied by hooks. A way that is refused must say why before a model is loaded. With
--write the table becomes tests/proofs/CONFIGURATIONS.md; tests/engine/test_configurations.py holds every line of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import httpx
import numpy as np

from loadtests.harness.metrics import Scrape
from loadtests.harness.server import Server
from tests.proofs.parity import Answer, Pair, cores_apart, in_a_process_of_its_own, random_numbers
from tests.support.bundles import bundle_of
from tests.support.gpu_ways import IN_PIECES, ON_V2, runner_of
from tests.support.quantised import Scheme, quantise
from tests.support.tiny_models import VOCABULARY, make_tiny
from vllm_edits.edit_store import (
    BaseModelRef,
    Bundle,
    EditStore,
    Gate,
    LowRank,
    Offset,
    Scale,
    SubspaceFilter,
    WeightDelta,
    check,
    identify,
)
from vllm_edits.edit_store.architectures import supported
from vllm_edits.edit_store.errors import UnsupportedHost
from vllm_edits.edit_store.scope import Scope
from vllm_edits.plugin.weights.weight_form import formless

TABLE = Path(__file__).with_name("CONFIGURATIONS.md")
MODEL = "LlamaForCausalLM"
NEW_TOKENS, TOLD = 12, 40
TOLERANCE = {"float32": 1e-4, "bfloat16": 6e-2, "float16": 6e-3}
"""Of a log-probability, relative to the largest: about three times what transformers is off in that type."""
NEIGHBOURS = 8
"""Where activations are rounded to levels, an answer may be that of edits whose numbers differ in the last bit: of so
many of these. One such bit moves a log-probability by 7e-3 there, with or without the plugin."""


@dataclass(frozen=True)
class Way:
    """Arguments of vLLM, by which it runs otherwise than usual; `sampling` likewise of a request."""

    arguments: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    flags: Sequence[str] = ()
    """of a server, for what only a server can do"""
    quantised: Scheme | None = None
    prompt: int = 40
    """its length in tokens"""
    quick: bool = False
    """whether it belongs to the quick tests"""
    needs: str = ""
    """what the CPU must have, as the kernel calls it"""
    environment: Mapping[str, str] = field(default_factory=dict)
    """of its processes, besides"""
    untested: str = ""
    """why nobody knows"""

    @property
    def dtype(self) -> str:
        return str(self.arguments.get("dtype", "float32"))

    @property
    def runner(self) -> str:
        """vLLM's model runner."""
        return runner_of(self.environment)

    @property
    def rounds_activations(self) -> bool:
        """Whether a sum's last bit can become a whole level of what the next product reads."""
        return self.quantised == "int8"

    @property
    def runs_here(self) -> bool:
        """Whether the CPU has what it needs."""
        return not self.needs or cpu_has(self.needs)


def cpu_has(flag: str) -> bool:
    """Whether the CPU has that, as the kernel calls it."""
    return flag in Path("/proc/cpuinfo").read_text().split()


MODES = ("per request", "in the weights")
_REFUSED = "edits are not proven exact with: "
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
_BESIDE_INT8 = {"dtype": "bfloat16"} if cpu_has("amx_int8") else {}
"""vLLM's products of 8-bit numbers in AMX take no float32"""
WAYS: dict[str, Way] = {
    "usual: float32, not compiled": Way(),
    "compiled": Way({"enforce_eager": False}),
    "bfloat16": Way({"dtype": "bfloat16"}),
    "bfloat16, compiled": Way({"dtype": "bfloat16", "enforce_eager": False}),
    "float16": Way({"dtype": "float16"}),
    "prefix caching": Way({"enable_prefix_caching": True}),
    "long contexts, 400 tokens": Way({"max_model_len": 448}, prompt=400),
    "chunked prefill, 16 tokens a step": Way({"max_num_batched_tokens": 16, "max_num_seqs": 8}),
    "asynchronous scheduling": Way({"async_scheduling": True}),
    "n-gram speculative decoding": Way({"speculative_config": NGRAM}, quick=True),
    "several answers (n = 3)": Way(sampling={"n": 3, "temperature": 1.0, "seed": 0}),
    "tensor parallel": Way({"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}, quick=True),
    "tensor parallel, compiled": Way(
        {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "enforce_eager": False}
    ),
    "pipeline parallel": Way({"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}),
    "data parallel, behind two API server processes": Way(
        flags=("--data-parallel-size", "2", "--api-server-count", "2"), quick=True
    ),
    "two engines, each divided among two workers": Way(
        flags=("--data-parallel-size", "2", "--tensor-parallel-size", "2")
    ),
    "LoRA": Way({"enable_lora": True}),
    "a draft model": Way({"speculative_config": {"model": "", "num_speculative_tokens": 2}}),
    "8-bit weights and activations (compressed-tensors)": Way(_BESIDE_INT8, quantised="int8", quick=True),
    "4-bit weights (compressed-tensors), AVX-512": Way({"dtype": "bfloat16"}, quantised="int4", needs="avx512f"),
    "a GPU: CUDA graphs": Way(untested="no GPU was at hand; `make test-gpu-all` runs it"),
}
"""By what the table calls them. An empty model of a draft is the model itself."""

_ON_V2 = ("compiled", "bfloat16", "prefix caching", "chunked prefill, 16 tokens a step", "asynchronous scheduling",
          "n-gram speculative decoding", "several answers (n = 3)", "tensor parallel",
          "data parallel, behind two API server processes", "a draft model")  # fmt: skip
WAYS |= {f"V2 runner: {name}": replace(WAYS[name], environment=ON_V2, quick=False) for name in _ON_V2}
WAYS["V2 runner: compiled in pieces, ahead of time"] = replace(WAYS["compiled"], environment=IN_PIECES, quick=True)


@dataclass(frozen=True)
class Outcome:
    """How a way fared in each install mode: the largest error, or why it is refused."""

    errors: Mapping[str, float] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    def faults(self, way: Way) -> list[str]:
        """What is not exact."""
        return [f"{mode}: off by {error:.1e}" for mode, error in self.errors.items() if error > TOLERANCE[way.dtype]]


def edits_of_every_kind(base: BaseModelRef) -> list[Pair]:
    """One of each kind at a point of its own, two with scopes, and all that has a weight form at fused projections."""
    edits: Sequence[Any] = (
        LowRank(site="layers.1.mlp.out", reads="layers.1.mlp.h", rank=2),
        LowRank(site="layers.0.attn.out", reads="layers.0.attn.z", rank=2),
        LowRank(site="layers.0.q.out", reads="layers.0.attn.in", rank=1),
        Scale(site="layers.1.attn.z"),
        Scale(site="layers.0.mlp.in", per="channel"),
        SubspaceFilter(site="layers.0.attn.out", rank=2),
        SubspaceFilter(site="layers.0.resid", rank=2),
        Gate(site="layers.1.mlp.out", reads="layers.1.mlp.in", rank=4),
        Offset(site="layers.1.up.out"),
        Offset(site="layers.0.resid", renorm=True),
        Offset(site="layers.1.resid", scope=Scope(segment="generated")),
        LowRank(site="layers.0.mlp.out", reads="layers.0.mlp.h", rank=1, scope=Scope(last=5)),
        WeightDelta(site="layers.0.gate.out", reads="layers.0.mlp.in"),
    )
    return [(edit, random_numbers(edit, base, number)) for number, edit in enumerate(edits)]


def run(way: Way, folder: Path) -> Outcome:
    """Run one way in a process of its own, and hold what it says against the formulas."""
    plain = make_tiny(MODEL, folder / "plain")
    model = plain if way.quantised is None else quantise(plain, folder / "model", way.quantised)
    base = identify(model)
    prompts = np.random.default_rng(0).integers(3, VOCABULARY, (2, way.prompt // 2))
    prompt = [int(token) for token in np.concatenate([prompts[0], prompts[0]])]  # repeats itself, for n-grams
    pairs = edits_of_every_kind(base)
    architecture = supported(base.architecture)
    per_request = [pair for pair in pairs if pair[0].kind != "weight_delta"]
    if way.quantised:  # what vLLM's own modules can be hooked for
        per_request = [pair for pair in per_request if "resid" not in pair[0].site and pair[0].scope.everything]
    linear = [pair for pair in pairs if not formless([pair[0]], architecture)]
    by_mode = dict(zip(MODES, (per_request, linear), strict=True))
    errors, refused = dict[str, float](), dict[str, str]()
    for mode, chosen in by_mode.items():
        bundles = [bundle_of(f"edit-{number}", base, [pair]) for number, pair in enumerate(chosen)]
        own: Any = {"initializer": in_a_process_of_its_own, "initargs": (dict(way.environment),)}
        with (
            mock.patch.dict(os.environ, way.environment),
            ProcessPoolExecutor(1, mp_context=get_context("spawn"), **own) as pool,
        ):
            answers = pool.submit(_serve, model, folder / mode, prompt, bundles, way=way, mode=mode).result()
        if isinstance(answers, str):
            refused[mode] = answers
            continue
        errors[mode] = _largest_error(model, way, [[], *([pair] for pair in chosen)], answers)
    return Outcome(errors, refused)


def _serve(
    model: Path, store: Path, prompt: list[int], bundles: list[Bundle], *, way: Way, mode: str
) -> list[list[Answer]] | str:
    """What the base model and every bundle say; or why this way is refused."""
    opened = EditStore(str(store), create=True)
    names = [bundle.manifest.name for bundle in bundles]
    settings: dict[str, Any] = {"store": str(store), "slots": len(bundles)}
    if mode == MODES[1]:
        settings |= {"weights": "edit-0", "weights_reserve": [{"site": "*", "bias": True}]}
    else:
        for bundle in bundles:
            opened.promote(f"{bundle.manifest.name}@{opened.publish(bundle)}")
    try:
        with (_server if way.flags else _offline)(model, settings, way) as host:
            if mode == MODES[0]:
                host.says(prompt, [None, *names])  # a second time the prefix cache, if there is one, knows every prompt
                answers = host.says(prompt, [None, *names])
                host.require_in_use()
                return answers
            answers = host.says(prompt, [None])
            for bundle in bundles:
                numbers = check(bundle)
                renamed = Bundle.create(
                    "edit-0", bundle.manifest.base, [(edit, edit.numbers(numbers, bundle.manifest.base.widths))
                    for edit in bundle.manifest.edits], bundle.manifest.provenance,
                )  # fmt: skip
                opened.promote(f"edit-0@{opened.publish(renamed)}")
                host.sync()
                answers += host.says(prompt, ["edit-0"])
            return answers
    except UnsupportedHost as refusal:
        return str(refusal)


class Host(Protocol):
    """Something that serves edits."""

    def says(self, prompt: list[int], names: Sequence[str | None]) -> list[list[Answer]]:
        """What each variant, or the base model, answers, all asked at once."""

    def sync(self) -> None:
        """Follow the store."""

    def require_in_use(self) -> None:
        """Positive control: what is special about this way has been used."""


class _Offline:
    """`vllm.LLM` in this process."""

    def __init__(self, model: Path, arguments: Mapping[str, Any], way: Way) -> None:
        from vllm import LLM, SamplingParams

        from vllm_edits import Variants

        self._guesses, self._runner = "speculative_config" in arguments, way.runner
        self._llm = LLM(str(model), **arguments)
        self._variants = Variants(self._llm)
        usual = {"max_tokens": NEW_TOKENS, "temperature": 0, "logprobs": TOLD, "detokenize": False, "ignore_eos": True}
        self._sampling = SamplingParams(**{**usual, **way.sampling})

    def says(self, prompt: list[int], names: Sequence[str | None]) -> list[list[Answer]]:
        asked: list[Any] = [{"prompt_token_ids": prompt}] * len(names)
        outputs = self._variants.generate(names, asked, self._sampling, use_tqdm=False)
        return [
            [Answer.of([*prompt, *one.token_ids], one.logprobs, TOLD) for one in output.outputs] for output in outputs
        ]

    def sync(self) -> None:
        self._variants.sync()

    def require_in_use(self) -> None:
        """Guesses were made, and some were right; and the tokens are from that runner."""
        if self._llm.collective_rpc("edits_attach")[0]["runner"] != self._runner:
            raise RuntimeError(f"the runner is not {self._runner}: nothing was compared")
        counted = {metric.name: metric.value for metric in self._llm.get_metrics() if hasattr(metric, "value")}
        if self._guesses and not counted.get("vllm:spec_decode_num_accepted_tokens"):
            raise RuntimeError(f"no guess was accepted: nothing was compared; counted {sorted(counted)}")


@contextmanager
def _offline(model: Path, settings: dict[str, Any], way: Way) -> Iterator[Host]:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_edits.plugin.vllm_host.compat import check_config

    arguments: dict[str, Any] = {
        "load_format": "edits", "additional_config": {"edits": settings}, "dtype": "float32", "enforce_eager": True,
        "skip_tokenizer_init": True, "max_model_len": 96, "max_logprobs": TOLD, "seed": 0,
        "enable_prefix_caching": False, "kv_cache_memory_bytes": 1 << 26, "disable_log_stats": False, **way.arguments,
    }  # fmt: skip
    if (workers := arguments.get("tensor_parallel_size", 1)) > 1:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = cores_apart(workers)
    if "speculative_config" in arguments:
        own = arguments["speculative_config"]
        arguments["speculative_config"] = {**own, "model": str(model)} if own.get("model") == "" else dict(own)
    check_config(EngineArgs(model=str(model), **arguments).create_engine_config())
    yield _Offline(model, arguments, way)


class _Server:
    """A real server, asked for tokens by tokens."""

    def __init__(self, server: Server, way: Way) -> None:
        self._server, self._runner = server, way.runner

    def says(self, prompt: list[int], names: Sequence[str | None]) -> list[list[Answer]]:
        def ask(name: str | None) -> list[Answer]:
            body = {
                "model": name or "base", "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0,
                "ignore_eos": True, "logprobs": TOLD, "return_token_ids": True, "return_tokens_as_token_ids": True,
            }  # fmt: skip
            answer = httpx.post(f"{self._server.url}/v1/completions", json=body, timeout=120).raise_for_status()
            (choice,) = answer.json()["choices"]
            rows = [sorted(told.items(), key=lambda each: -each[1])[:TOLD]
                    for told in choice["logprobs"]["top_logprobs"]]  # fmt: skip
            told = [[int(token.removeprefix("token_id:")) for token, _ in row] for row in rows]
            logprobs = [[logprob for _, logprob in row] for row in rows]
            return [Answer([*prompt, *choice["token_ids"]], np.asarray(told), np.asarray(logprobs))]

        with ThreadPoolExecutor(len(names)) as pool:
            return list(pool.map(ask, names))

    def sync(self) -> None:
        httpx.post(f"{self._server.url}/v1/edits/sync", timeout=60).raise_for_status()

    def require_in_use(self) -> None:
        """Every engine has computed tokens, on that runner."""
        if f"runner {self._runner}," not in self._server.log_text():
            raise RuntimeError(f"the runner is not {self._runner}: nothing was compared")
        by_engine = Scrape.of(self._server.url).by("vllm:generation_tokens_total", "engine")
        if len(by_engine) < 2 or not all(by_engine.values()):
            raise RuntimeError(f"not every engine was asked: nothing was compared; tokens by engine {by_engine}")


@contextmanager
def _server(model: Path, settings: dict[str, Any], way: Way) -> Iterator[Host]:
    flags = (
        "--dtype", way.dtype, "--enforce-eager", "--skip-tokenizer-init", "--max-model-len", "96", "--max-logprobs",
        str(TOLD), "--no-enable-prefix-caching", "--kv-cache-memory-bytes", str(1 << 26), *way.flags,
    )  # fmt: skip
    chosen = {name: json.dumps(value) if isinstance(value, list) else value for name, value in settings.items()}
    store = Path(chosen.pop("store"))
    workers = 4 if "--tensor-parallel-size" in way.flags else 2
    environment = {"VLLM_CPU_OMP_THREADS_BIND": cores_apart(workers), "VLLM_LOGGING_LEVEL": "INFO"}
    log = store.with_suffix(".log")
    with Server.with_edits(model, store, log, *flags, settings=chosen, environment=environment) as server:
        yield _Server(server, way)


@dataclass(frozen=True)
class Question:
    """What a model with edits makes of some tokens: the log-probabilities of `told` [generated, TOLD] at the last."""

    ids: list[int]
    pairs: list[Pair]
    told: np.ndarray


def _largest_error(model: Path, way: Way, chosen: list[list[Pair]], answers: list[list[Answer]]) -> float:
    """Over all answers, relative to the largest log-probability. Every edit must also be seen."""
    said = [(pairs, output) for pairs, outputs in zip(chosen, answers, strict=True) for output in outputs]
    asked = [
        [[], pairs, *(in_the_last_bit(pairs, number) for number in range(NEIGHBOURS * way.rounds_activations))]
        for pairs, _ in said
    ]
    questions = [
        Question(output.ids, each, output.told) for (_, output), of in zip(said, asked, strict=True) for each in of
    ]
    if way.quantised:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=in_a_process_of_its_own) as pool:
            known = iter(pool.submit(_by_hooks_in_vllm, model, questions, way).result())
    else:
        known = iter(_by_formula(model, questions, way.prompt))
    errors = []
    for (pairs, output), of in zip(said, asked, strict=True):
        unedited, expected, *neighbours = itertools.islice(known, len(of))
        size = np.abs(expected).max()
        errors.append(min(float(np.abs(output.logprobs - each).max() / size) for each in (expected, *neighbours)))
        if pairs and np.abs(unedited - expected).max() / size < 2 * max(errors[-1], 1e-3):
            raise RuntimeError(f"{pairs[0][0]} cannot be seen: nothing was compared")
    return max(errors)


def in_the_last_bit(pairs: list[Pair], seed: int) -> list[Pair]:
    """The edits with numbers that differ from theirs in the last bit at most."""
    random = np.random.default_rng(seed)

    def beside(numbers: np.ndarray) -> np.ndarray:
        return np.nextafter(numbers, random.choice([-np.inf, np.inf], numbers.shape).astype(numbers.dtype))

    return [(edit, {field: beside(numbers) for field, numbers in of.items()}) for edit, of in pairs]


def _by_formula(model: Path, questions: list[Question], prompt: int) -> list[np.ndarray]:
    """By transformers in float64."""
    import torch
    from transformers import AutoModelForCausalLM

    from vllm_edits.edit_store.authoring.formula import FormulaRequest, edited

    torch.set_num_threads(1)
    host = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64, attn_implementation="eager").eval()
    found = []
    for asked in questions:
        with torch.no_grad(), edited(host, asked.pairs, request=FormulaRequest(asked.ids, prompt)):
            logits = host(torch.tensor([asked.ids])).logits[0, prompt - 1 : -1].log_softmax(-1)
        found.append(np.take_along_axis(logits.numpy(), asked.told, -1))
    return found


def _by_hooks_in_vllm(model: Path, questions: list[Question], way: Way) -> list[np.ndarray]:
    """By vLLM without the plugin, the formulas in hooks: where transformers does not compute as vLLM does."""
    from vllm import LLM, SamplingParams

    from vllm_edits.edit_store.authoring.formula import edited

    llm = LLM(
        str(model), dtype=way.dtype, enforce_eager=True, skip_tokenizer_init=True, max_model_len=96, seed=0,
        max_logprobs=VOCABULARY, enable_prefix_caching=False, kv_cache_memory_bytes=1 << 26,
    )  # fmt: skip
    host = llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=VOCABULARY, detokenize=False)
    found = []
    for asked in questions:
        with edited(host, asked.pairs):
            (output,) = llm.generate([{"prompt_token_ids": asked.ids}], sampling, use_tqdm=False)
        rows = zip(output.prompt_logprobs[way.prompt :], asked.told, strict=True)
        found.append(np.asarray([[row[int(token)].logprob for token in told] for row, told in rows]))
    return found


_HEAD = """# Ways of running vLLM, and whether edits are exact in them

Written by `python -m tests.proofs.configurations --write`; `test_configurations.py` holds every line. In each way
a tiny Llama answers with edits of every kind, with scopes too, and with every linear kind in its weights; a figure is
the largest difference of a log-probability from transformers in float64 with the formula, relative to the largest of
them. Of rounded activations it is the difference from vLLM with the formula in hooks, which rounds likewise. What is
refused is refused at the start, with this reason.

| way | per request | in the weights |
|---|---|---|
"""


def line(name: str, outcome: Outcome) -> str:
    """A way's line of the table."""
    told = {mode: f"exact ({error:.0e})" for mode, error in outcome.errors.items()}
    told |= {mode: f"refused: {why.removeprefix(_REFUSED)}" for mode, why in outcome.refused.items()}
    untested = f"untested: {WAYS[name].untested}"
    return f"| {name} | {' | '.join(told.get(mode, untested) for mode in MODES)} |\n"


def told_of(name: str) -> str:
    """A way's line in the table that is there."""
    (told,) = [row for row in TABLE.read_text().splitlines(keepends=True) if row.startswith(f"| {name} |")]
    return told


def find(name: str) -> Outcome:
    """Run the way of that name, unless it is known that it does not run here."""
    if WAYS[name].untested:
        return Outcome()
    with tempfile.TemporaryDirectory() as folder:
        return run(WAYS[name], Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="beginnings of the ways' names; without any: all")
    parser.add_argument("--write", action="store_true", help="write the table of all of them")
    options = parser.parse_args()
    chosen = [name for name in WAYS if options.write or not options.names or name.startswith(tuple(options.names))]
    table, faulty = _HEAD, 0
    for name in chosen:
        if not WAYS[name].runs_here:
            table += told_of(name)
            sys.stdout.write(f"{name}: not run, this CPU has no {WAYS[name].needs}; its line stays as it is\n")
            continue
        outcome = find(name)
        table += line(name, outcome)
        faults = outcome.faults(WAYS[name])
        faulty += len(faults)
        sys.stdout.write("".join([line(name, outcome), *(f"  WRONG {fault}\n" for fault in faults)]))
        sys.stdout.flush()
    if options.write and not faulty:
        TABLE.write_text(table)
    sys.exit(faulty > 0)


if __name__ == "__main__":
    main()
