"""False alarms and faults: every kind of edit is probed in several ways of running, as it is and with a fault.

    python -m tests.proofs.probes [WAY …] [--every N] [--write]

A version of every kind at every site gets probes by transformers; one engine holds them all, each in a slot of its own,
and probes each. Then each is probed at another strength than the recorded one: nothing of it, half of it, its opposite.
What is applied exactly must pass, and a fault must not, unless the probes say that they cannot tell it: where the
server's noise allows the share to be that far from 1. --write writes the table.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

from loadtests.harness.model import ensure_model
from tests.proofs.parity import cores_apart, every_edit, in_a_process_of_its_own
from tests.support.bundles import bundle_of
from tests.support.gpu_ways import ON_V2
from tests.support.quantised import Scheme, quantise
from tests.support.tiny_models import make_tiny_llama
from vllm_edits.edit_store import Bundle, EditStore, Strength, identify

TABLE = Path(__file__).with_name("PROBES.md")
TEXTS = (
    "The capital of France is", "Once upon a time there was a little", "To make a cake you need",
)  # fmt: skip
FAULTS = {"nothing": 0.0, "half": 0.5, "opposite": -1.0}
"""The strength at which a version is probed that was recorded at 1."""
SIZE = 0.05
"""of the numbers of an edit, for a trained model"""


@dataclass(frozen=True)
class Way:
    """A model and arguments of vLLM."""

    trained: bool = True
    arguments: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    quantised: Scheme | None = None
    every: int = 1
    """of the edits, one of so many"""


WAYS = {
    "float32": Way(arguments={"dtype": "float32"}),
    "bfloat16": Way(arguments={"dtype": "bfloat16"}),
    "bfloat16, compiled": Way(arguments={"dtype": "bfloat16", "enforce_eager": False}, every=2),
    "8-bit weights and activations (compressed-tensors), bfloat16": Way(
        arguments={"dtype": "bfloat16"}, quantised="int8"
    ),
    "tiny model, tensor parallel": Way(
        trained=False,
        arguments={"dtype": "float32", "tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
        environment={"VLLM_CPU_OMP_THREADS_BIND": cores_apart(2)},
    ),
    "tiny model, V2 runner": Way(trained=False, arguments={"dtype": "float32"}, environment=dict(ON_V2), every=3),
}


def bundles_of(model: Path, way: Way, every: int) -> list[Bundle]:
    """A bundle with probes for each edit."""
    from vllm_edits.edit_store.authoring.host import Host
    from vllm_edits.edit_store.authoring.probing import probes_of

    host, base, strength = Host.load(model), identify(model), Strength(minimum=-1, maximum=1)
    wanted = [pair for _, pair in every_edit(base, SIZE if way.trained else 0.4)][:: every * way.every]
    found = []
    for number, pair in enumerate(wanted):
        print(f"\r  recorded {number} of {len(wanted)}", end="", file=sys.stderr)
        made = bundle_of(f"edit-{number}", base, [pair])
        probes = [probe for probe in probes_of(host, [pair], TEXTS, strength=strength) if probe.strength == 1]
        manifest = made.manifest.model_copy(update={"strength": strength, "probes": tuple(probes)})
        found.append(Bundle(manifest, made.tensor_bytes))
    print(file=sys.stderr)
    return found


def probed(model: Path, store: Path, versions: list[str], way: Way) -> list[dict[str, Any]]:
    """The reports of every version, by the fault it is probed with; '' for none. Run in a process of its own."""
    from vllm import LLM

    from vllm_edits import Variants
    from vllm_edits.edit_store.probes import compare
    from vllm_edits.plugin.claim import Claim
    from vllm_edits.plugin.vllm_host.continuing import OfflineContinuing

    settings = {"store": str(store), "slots": len(versions), "probes": "off"}
    llm = LLM(
        str(model), load_format="edits", additional_config={"edits": settings}, max_model_len=256,
        max_num_seqs=16, seed=0, **{"enforce_eager": True, **way.arguments},
    )  # fmt: skip
    variants, engine = Variants(llm), OfflineContinuing(llm)
    residents = variants.coordinator.slots.residency.residents()

    async def reports(version: str) -> dict[str, Any]:
        slot, probes = residents[version].slot, variants.coordinator.prober._manifests[version].probes
        base = [await engine.continued(probe, None, 0) for probe in probes]
        found = {}
        for fault, strength in {"": 1.0, **FAULTS}.items():
            edited = [await engine.continued(probe, Claim(slot, version, strength), 0) for probe in probes]
            found[fault] = compare(probes, base, edited, floor=engine.floor).as_json()
        return found

    told = []
    for number, version in enumerate(versions):
        print(f"\r  probed {number} of {len(versions)}", end="", file=sys.stderr)
        told.append(asyncio.run(reports(version)))
    print(file=sys.stderr)
    return told


def measure(way: Way, every: int) -> dict[str, Any]:
    """The figures of one way."""
    with tempfile.TemporaryDirectory() as folder:
        model = ensure_model()
        if not way.trained:
            make_tiny_llama(Path(folder) / "tiny", model)
            model = Path(folder) / "tiny"
        if way.quantised is not None:
            model = quantise(model, Path(folder) / "quantised", way.quantised)
        bundles = bundles_of(model, way, every)
        store = EditStore(f"{folder}/store", create=True)
        versions = [store.publish(bundle) for bundle in bundles]
        for bundle, version in zip(bundles, versions, strict=True):
            store.promote(f"{bundle.manifest.name}@{version}")
        with ProcessPoolExecutor(
            1, mp_context=get_context("spawn"), initializer=in_a_process_of_its_own, initargs=(way.environment,)
        ) as pool:
            told = pool.submit(probed, model, Path(folder) / "store", versions, way).result()
    labels = [f"{bundle.manifest.edits[0].kind} at {bundle.manifest.edits[0].label}" for bundle in bundles]
    return figures(labels, told)


def figures(labels: list[str], told: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts, and the largest figures."""
    exact = [of[""] for of in told]
    strong = [of for of in told if not of[""]["weak"]]
    shares = [abs(of[""]["share"] - 1) for of in strong]
    return {
        "versions": len(told), "weak": len(told) - len(strong),
        "false_alarms": [label for label, report in zip(labels, exact, strict=True) if not report["passed"]],
        "missed": {
            fault: [label for label, of in zip(labels, told, strict=True)
                    if of[""]["allowed"] < abs(1 - strength) and of[fault]["passed"]]
            for fault, strength in FAULTS.items()
        },
        "cannot_tell": {
            fault: sum(of[""]["allowed"] >= abs(1 - strength) for of in told) for fault, strength in FAULTS.items()
        },
        "noise": median(report["noise"] for report in exact),
        "farthest_share": max(shares, default=0.0),
        "largest_error": max(
            (probe["error"] / probe["limit"] for report in exact for probe in report["probes"]), default=0.0
        ),
    }  # fmt: skip


def table(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The page."""
    yield "# Probes: false alarms, and faults that are found\n\n"
    yield "`python -m tests.proofs.probes --write` made this table: what it measures is in that module.\n\n"
    yield "| way | versions | false alarms | faults missed: nothing, half, opposite | cannot be told | noise, nats "
    yield "| farthest share from 1 | largest error of its limit |\n|---|---|---|---|---|---|---|---|\n"
    for name, of in found.items():
        missed = ", ".join(str(len(of["missed"][fault])) for fault in FAULTS)
        untold = ", ".join(str(of["cannot_tell"][fault]) for fault in FAULTS)
        yield (
            f"| {name} | {of['versions']} | {len(of['false_alarms'])} | {missed} | {untold} | {of['noise']:.2g} "
            f"| {of['farthest_share']:.2f} | {of['largest_error']:.0%} |\n"
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.proofs.probes", description=__doc__)
    parser.add_argument("ways", nargs="*", metavar="WAY", choices=[[], *WAYS], default=[])
    parser.add_argument("--every", type=int, default=1, help="probe one of so many edits, to be quick")
    parser.add_argument("--write", action="store_true", help="write the table")
    args = parser.parse_args()
    found = {}
    for name in args.ways or WAYS:
        print(name, file=sys.stderr)
        found[name] = measure(WAYS[name], args.every)
        print(json.dumps({name: found[name]}, indent=1))
    if args.write:
        TABLE.write_text("".join(table(found)))
    faults = [label for of in found.values() for label in (*of["false_alarms"], *chain(*of["missed"].values()))]
    if faults:
        sys.exit(f"{len(faults)} versions are not judged rightly")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
