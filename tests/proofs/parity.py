"""Every kind of edit at every site of an architecture: served by vLLM, compared with transformers edited by formula.

    python -m tests.proofs.parity [ARCHITECTURE or FOLDER …] [--dtype bfloat16] [--eager] [--write FILE]

Of an architecture a tiny random model is made; a folder holds a real one. One engine holds all edits, each in a slot of
its own, and answers all in one batch: a prompt, some tokens after it. Another one takes every edit that has a weight
form into its weights, one after the other. Two more do so with the model divided among two workers (tensor parallel).
Prints a table of each; with --write those of all architectures are also written down.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from loadtests.harness.record import gpu
from tests.support.bundles import bundle_of
from tests.support.tiny_models import VOCABULARY, make_tiny
from vllm_edits.edit_store import BaseModelRef, Bundle, identify
from vllm_edits.edit_store.architectures import ARCHITECTURES, supported
from vllm_edits.edit_store.edits import Edit
from vllm_edits.edit_store.kinds import KINDS
from vllm_edits.edit_store.sites import Site
from vllm_edits.edit_store.verify import edit_rules
from vllm_edits.plugin.weights.weight_form import formless

PROMPT_TOKENS, NEW_TOKENS = 11, 3
TOLD = 100
"""How many log-probabilities of each token are compared where the vocabulary has more."""
ENVIRONMENT = {
    "VLLM_PLUGINS": "edits", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
    # By itself Triton multiplies float32 as TF32, which has ten bits.
    **({"TRITON_F32_DEFAULT": "ieee"} if gpu() else {}),
}  # fmt: skip
"""Of the process that serves."""
BESIDE_OTHERS = {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 1 << 30}
"""Arguments of a small engine on a GPU that others use at the same time: without the second vLLM measures what is free,
and ends where another engine frees some meanwhile."""
TEXT = "The capital of France is Paris, and its longest river is the Loire."
Pair = tuple[Any, dict[str, np.ndarray]]


@dataclass(frozen=True)
class How:
    """How edits are served: per request, by one worker or several that divide the model, or in the weights."""

    dtype: str = "float32"
    eager: bool = True
    workers: int = 1
    weights: bool = False

    def __str__(self) -> str:
        """What is unusual of it."""
        divided = f"divided among {self.workers} workers" if self.workers > 1 else ""
        return ", ".join(filter(None, (divided, "in the weights" if self.weights else "")))


@dataclass(frozen=True)
class Row:
    """How one edit fared. Each figure is a largest difference of centred log-probabilities over the largest of them."""

    site: str
    kind: str
    served: float
    """served - the formula in float64"""
    rounded: float
    """transformers in the served dtype - the formula in float64"""
    effect: float
    """the formula - the unedited model: what the edit changes"""


def every_edit(base: BaseModelRef, strength: float = 0.4, *, weights: bool = False) -> Iterator[tuple[str, Pair]]:
    """Every kind at every site of a middle layer and outside the layers, in every form, with random numbers.

    weights: only what has a weight form, and weight deltas besides
    """
    architecture, middle = ARCHITECTURES[base.architecture], base.widths.layers // 2
    kinds = [kind for kind in KINDS.values() if weights or not kind.only_in_weights]
    for site in architecture.sites(base.widths.layers):
        if site.layer in (None, middle):
            forms = [form for kind in kinds for form in kind.forms(site, base.widths.of(site.point))]
            for number, (form, edit) in enumerate(forms):
                if not edit_rules([edit], base) and not (weights and formless([edit], architecture)):
                    yield _labelled(form, edit), (edit, random_numbers(edit, base, number, strength))


def _labelled(form: str, edit: Edit) -> str:
    read = "" if edit.source == edit.site else f"<-{Site.parse(edit.source).point}"
    return f"{edit.kind}{f'/{form}' if form else ''}{read}"


def random_numbers(edit: Edit, base: BaseModelRef, seed: int, strength: float = 0.4) -> dict[str, np.ndarray]:
    """Numbers for an edit, of about the size of the activations it meets in a tiny model."""
    random = np.random.default_rng([seed, *edit.site.encode(), *edit.kind.encode()])
    numbers = edit.sample(random, base.widths, strength)
    return {field: np.asarray(array, dtype=np.int32 if field in edit.integers else np.float32)
            for field, array in numbers.items()}  # fmt: skip


def compare(model: Path, prompt: list[int], how: How, store: Path) -> list[Row]:
    """Serve every edit of a model, in one batch or one after the other in the weights, and hold each against the
    formula."""
    import torch
    from transformers import AutoModelForCausalLM

    from vllm_edits.edit_store.authoring.formula import edited

    base = identify(model)
    # The embeddings of trained models are small: what is to be compared should not be drowned.
    wanted = list(every_edit(base, 0.4 if base.widths.vocab == VOCABULARY else 0.05, weights=how.weights))
    bundles = [bundle_of(f"edit-{number}", base, [pair]) for number, (_, pair) in enumerate(wanted)]
    # vLLM changes classes of transformers that it builds upon, so the reference has a process of its own.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=in_a_process_of_its_own) as pool:
        serving = serve_from_weights if how.weights else serve
        served = pool.submit(serving, model, prompt, store, bundles, how).result()
    torch.set_num_threads(1)
    # The plain implementations: others leave out soft caps, or have no float64.
    plainly = {"attn_implementation": "eager", "experts_implementation": "eager"}
    exact, rounded = (
        AutoModelForCausalLM.from_pretrained(model, dtype=kind, **plainly).eval()
        for kind in (torch.float64, getattr(torch, how.dtype))
    )

    @torch.no_grad()
    def says(host: Any, answer: Answer) -> np.ndarray:
        logits = np.asarray(host(torch.tensor([answer.ids])).logits[0, :-1].double())
        return centred(np.take_along_axis(logits, answer.told, -1))

    @torch.no_grad()
    def before_ties(answer: Answer) -> slice:
        """The positions before the first one at which rounding may choose another expert."""
        if how.dtype == "float32" or not supported(base.architecture).experts:
            return slice(None)
        routed = exact.model(torch.tensor([answer.ids[:-1]]), output_router_logits=True).router_logits
        scores, last = torch.stack(routed).sort(-1, descending=True).values, exact.config.num_experts_per_tok
        margins = (scores[..., last - 1] - scores[..., last]).amin(0) / scores.std()
        return slice(next(iter((margins < NEAR_TIE).nonzero().flatten().tolist()), None))

    def row(site: str, label: str, pairs: list[Pair], answer: Answer) -> Row:
        plain = says(exact, answer)
        with edited(exact, pairs), edited(rounded, pairs):
            truth, noisy, sure = says(exact, answer), says(rounded, answer), before_ties(answer)
        size = float(np.abs(truth).max())
        error, noise, effect = (
            float(np.abs(said - than)[sure].max()) / size
            for said, than in ((centred(answer.logprobs), truth), (noisy, truth), (truth, plain))
        )
        return Row(site, label, error, noise, effect)

    rows = [row("", "base", [], served[0])]
    for (label, pair), answer in zip(wanted, served[1:], strict=True):
        rows.append(row(pair[0].site, label, [pair], answer))
    return rows


@dataclass(frozen=True)
class Answer:
    """Prompt and answer; for every token but the first, the ids that were told of and their log-probabilities."""

    ids: list[int]
    told: np.ndarray
    logprobs: np.ndarray

    @classmethod
    def of(cls, ids: list[int], told: Sequence[Any], most: int) -> Answer:
        """Of what vLLM tells of each token the `most` likeliest: what was given or sampled may be told besides."""
        likeliest = [sorted(said, key=lambda token: said[token].rank)[:most] for said in told]
        logprobs = [[said[token].logprob for token in ids] for said, ids in zip(told, likeliest, strict=True)]
        return cls(ids, np.asarray(likeliest), np.asarray(logprobs))


def in_a_process_of_its_own(besides: Mapping[str, str] = MappingProxyType({})) -> None:
    """Set up the process that serves; `besides`: what its environment is to have instead, and plugins besides ours."""
    plugins = ",".join(filter(None, [ENVIRONMENT["VLLM_PLUGINS"], besides.get("VLLM_PLUGINS")]))
    os.environ.update({**ENVIRONMENT, **besides, "VLLM_PLUGINS": plugins})


def serve(model: Path, prompt: list[int], store: Path, bundles: list[Bundle], how: How) -> list[Answer]:
    """What the base model and every bundle, each in its slot, say to one prompt, all in one batch."""
    from vllm_edits.edit_store import EditStore
    from vllm_edits.plugin.graph.reservation import Reservation

    opened = EditStore(str(store), create=True)
    versions = [opened.publish(bundle) for bundle in bundles]
    reserve = Reservation.for_versions(bundle.manifest for bundle in bundles).to_settings()
    llm = _engine(model, store, {"slots": len(bundles), "reserve": reserve}, how, at_once=len(bundles) + 1)
    llm.collective_rpc("edits_attach")
    for slot, version in enumerate(versions, 1):
        _prepared(llm, "edits_stage", "edits_staged", version)
        _told(llm, "edits_install", slot, version, None)
    return _says(llm, prompt, [None, *([slot, version, 1.0] for slot, version in enumerate(versions, 1))])


def _told(llm: Any, method: str, *arguments: Any) -> list[dict[str, Any]]:
    """What every worker answers; none may refuse."""
    answers: list[dict[str, Any]] = llm.collective_rpc(method, args=arguments)
    if refused := [answer["error"] for answer in answers if "error" in answer]:
        raise RuntimeError(f"{method}{arguments}: {refused[0]}")
    return answers


def serve_from_weights(model: Path, prompt: list[int], store: Path, bundles: list[Bundle], how: How) -> list[Answer]:
    """What the base model and every bundle, one after the other in the weights, say to one prompt; then the base model
    must say again what it said."""
    from vllm_edits.edit_store import EditStore

    opened = EditStore(str(store), create=True)
    settings = {"weights": "edit-0", "weights_reserve": [{"site": "*", "bias": True}]}
    llm = _engine(model, store, settings, how, at_once=1)
    llm.collective_rpc("edits_attach")
    answers = _says(llm, prompt, [None])
    for epoch, version in enumerate(map(opened.publish, bundles), 1):
        _prepared(llm, "edits_stage_weights", "edits_weights_staged", version)
        _told(llm, "edits_put_weights", version, epoch, False)
        answers += _says(llm, prompt, [[0, version, 1.0]])
    _told(llm, "edits_put_weights", None, len(bundles) + 1, False)
    (again,) = _says(llm, prompt, [None])
    if not np.array_equal(again.logprobs, answers[0].logprobs):
        raise RuntimeError("the base model is not what it was before its weights were exchanged")
    return answers


def _prepared(llm: Any, stage: str, staged: str, version: str) -> None:
    _told(llm, stage, version)
    while any(_told(llm, staged, version)):
        time.sleep(0.001)


def _engine(model: Path, store: Path, settings: dict[str, Any], how: How, *, at_once: int) -> Any:
    """An engine with the plugin."""
    from vllm import LLM

    divided: dict[str, Any] = {}
    if how.workers > 1:
        divided = {"tensor_parallel_size": how.workers, "distributed_executor_backend": "mp"}
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = cores_apart(how.workers)
    return LLM(
        str(model), load_format="edits", additional_config={"edits": {"store": str(store), **settings}},
        dtype=how.dtype, enforce_eager=how.eager, skip_tokenizer_init=True, max_model_len=64, max_logprobs=TOLD,
        enable_prefix_caching=False, seed=0, max_num_seqs=at_once, **divided, **(BESIDE_OTHERS if gpu() else {}),
    )  # fmt: skip


def cores_apart(workers: int) -> str:
    """A core for each worker, in turn; by itself vLLM wants a NUMA node for each."""
    cores = sorted(os.sched_getaffinity(0))
    return "|".join(str(cores[worker % len(cores)]) for worker in range(workers))


def _says(llm: Any, prompt: list[int], claims: list[Any]) -> list[Answer]:
    """What requests with these claims answer to one prompt, in one batch."""
    from vllm import SamplingParams

    from vllm_edits.plugin.claim import CLAIM

    sampling = [
        SamplingParams(
            max_tokens=NEW_TOKENS, temperature=0, logprobs=TOLD, prompt_logprobs=TOLD, detokenize=False,
            ignore_eos=True, extra_args={CLAIM: claim} if claim else {},
        )
        for claim in claims
    ]  # fmt: skip
    prompts = [{"prompt_token_ids": prompt}] * len(sampling)
    return [
        Answer.of(
            [*output.prompt_token_ids, *output.outputs[0].token_ids],
            [*output.prompt_logprobs[1:], *output.outputs[0].logprobs],
            TOLD,
        )
        for output in llm.generate(prompts, sampling, use_tqdm=False)
    ]


def centred(scores: np.ndarray) -> np.ndarray:
    """Logits and log-probabilities alike, without the constant that tells them apart."""
    return np.asarray(scores - scores.mean(-1, keepdims=True))


NEAR_TIE = 0.02
"""Standard deviations of a router's scores between the last expert that is chosen and the first that is not, below
which rounding may exchange them: a jump there, felt behind it, whoever rounds. About one position in fifty."""
UNFELT = {
    ("GPT2LMHeadModel", "k.out", "offset"),  # without rotary positions, one vector added to every key moves no softmax
    ("gemma-3-270m (real weights)", "v.out", "scale/head"),  # one head of values, and a norm after the projection
}
"""Edits that nothing can show."""


@dataclass(frozen=True)
class Findings:
    """All rows of one architecture, and how they were got."""

    architecture: str
    how: How
    rows: tuple[Row, ...]

    def faults(self) -> list[Row]:
        """Rows that are not exact, or whose edit cannot be seen."""
        return [row for row in self.rows if not (self._exact(row) and self._felt(row))]

    def _tolerance(self, row: Row) -> float:
        """1e-4 in float32; elsewhere about what transformers is off in that dtype (one answer of each)."""
        return 1e-4 if self.how.dtype == "float32" else 3 * row.rounded + 5e-3

    def _exact(self, row: Row) -> bool:
        return row.served <= self._tolerance(row)

    def _felt(self, row: Row) -> bool:
        """In float32 every edit is; elsewhere those are that change more than rounding may."""
        if row.kind == "base" or (self.architecture, row.site.split(".", 2)[-1], row.kind) in UNFELT:
            return True
        if self.how.dtype == "float32":
            return row.effect > 10 * row.served
        return row.effect > 2 * row.served or self._lost(row)

    def _lost(self, row: Row) -> bool:
        return row.effect < 2 * self._tolerance(row)

    def lost_in_rounding(self) -> float:
        """The share of edits that change so little that rounding may hide them."""
        return sum(map(self._lost, self.rows[1:])) / len(self.rows[1:])

    def table(self) -> str:
        """Markdown: the largest error of every kind at every site, over all forms of the kind."""
        how = "not compiled" if self.how.eager else "compiled"
        worst = max(row.served for row in self.rows)
        noise, base = max(row.rounded for row in self.rows), self.rows[0].served
        lost = f"; {self.lost_in_rounding():.0%} change less than rounding may" if self.how.dtype != "float32" else ""
        where = "one after the other in the weights" if self.how.weights else "in one batch"
        summary = (
            f"{len(self.rows) - 1} edits {where}, {self.how.dtype}, {how}; largest error {worst:.1e}, of the base "
            f"model {base:.1e}, of transformers in the same dtype {noise:.1e}{lost}."
        )
        kinds = [kind for kind in KINDS if any(_kind(row) == kind for row in self.rows)]
        title = f"### {self.architecture}, {self.how}" if str(self.how) else f"## {self.architecture}"
        lines = [title, "", summary, "", f"| site | {' | '.join(kinds)} |", "|" + "---|" * (len(kinds) + 1)]
        for site in dict.fromkeys(row.site for row in self.rows[1:]):
            cells = []
            for kind in kinds:
                found = [row.served for row in self.rows if row.site == site and _kind(row) == kind]
                cells.append(f"{max(found):.0e}" if found else "")
            lines.append(f"| `{site}` | {' | '.join(cells)} |")
        return "\n".join([*lines, ""])


def _kind(row: Row) -> str:
    return row.kind.split("/")[0].split("<-")[0]


_HEAD = """# Every kind at every site of every architecture

Written by `make parity`. Each edit is served by vLLM with random numbers, on a tiny random model of each architecture,
and on trained weights where the heading says so: per request, all edits of a model in one batch; and those that have a
weight form also one after the other in the weights, after which the base model must say again what it said, bit for
bit; both again, on the tiny ones, with the model divided among two workers (tensor parallel). The log-probabilities
for a prompt and the tokens generated after it are held against transformers in float64 with the edit's formula applied
by hooks. A cell is the largest difference over the largest log-probability (centred), over all forms of the kind there
(per head and per channel, off and onto, what it reads, activations, dense and sparse).
Every edit also changes the model by at least ten times its error, but two that nothing can show: an offset of all keys
without rotary positions, and a factor on the only head of values before a norm.

"""


def find(model: str, how: How) -> Findings:
    """Run an architecture, by a tiny random model of its name, or the real model in a folder."""
    with tempfile.TemporaryDirectory() as folder:
        if model in ARCHITECTURES:
            checkpoint = make_tiny(model, Path(folder, "model"))
            prompt = np.random.default_rng(0).integers(3, VOCABULARY, PROMPT_TOKENS).tolist()
        else:
            checkpoint = Path(model)
            prompt = _tokens(checkpoint, TEXT)
        rows = compare(checkpoint, prompt, how, Path(folder, "store"))
    name = model if model in ARCHITECTURES else f"{checkpoint.name} (real weights)"
    return Findings(name, how, tuple(rows))


def ways(model: str, dtype: str, *, eager: bool) -> Iterator[How]:
    """How a model is run: per request, divided among two workers where it can be, and in the weights.

    Trained ones are not divided: SmolLM2 has nine heads, and two workers with a slot for each edit of Gemma's 262,144
    logits take more than 24 GiB.
    """
    plain = How(dtype, eager=eager)
    yield plain
    if not Path(model).is_dir() and not supported(model).undivided:
        yield replace(plain, workers=2)
        yield replace(plain, workers=2, weights=True)
    yield replace(plain, weights=True)


def _tokens(checkpoint: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    ids: list[int] = AutoTokenizer.from_pretrained(checkpoint)(text)["input_ids"]
    return ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="ARCHITECTURE|FOLDER", help="without any: every architecture")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--write", type=Path, help="every architecture too, and write the tables there")
    options = parser.parse_args()
    tables, faulty = [], 0
    for name in [*(ARCHITECTURES if options.write or not options.models else ()), *options.models]:
        model = name if Path(name).is_dir() else supported(name).name
        for how in ways(model, options.dtype, eager=options.eager):
            findings = find(model, how)
            tables.append(findings.table())
            sys.stdout.write(tables[-1] + "\n")
            for row in findings.faults():
                faulty += 1
                sys.stdout.write(f"  WRONG {row}\n")
            sys.stdout.flush()
    if options.write and not faulty:
        options.write.write_text(_HEAD + "\n".join(tables))
    sys.exit(faulty > 0)


if __name__ == "__main__":
    main()
