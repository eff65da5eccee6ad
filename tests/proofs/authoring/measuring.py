"""Builds by the real command, and what each does to a transformers model."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from tests.proofs.authoring import sentences
from tests.proofs.authoring.effects import EXAMPLES, Neutral
from tests.proofs.authoring.proofs import Built, Proof
from vllm_edits.edit_store import Bundle
from vllm_edits.edit_store.authoring.build import pairs_of
from vllm_edits.edit_store.authoring.host import Edits, EditWithNumbers, Host, edited

CONTROL_SEEDS = 3
WHOLE = "whole"
"""Name of all bundles that a server takes into its weights, one after the other."""
_MOVED = {"offset": "vector", "low_rank": "write", "gate": "write", "weight_delta": "values"}


class NotBuilt(Exception):
    """A build that ended with an error, with what it said."""


@dataclass(frozen=True)
class Figures:
    """The figures of one proof on one model."""

    measure: str
    base: float
    edited: list[float]
    """by seed"""
    negated: float | None
    control: list[float]
    control_is: str
    more: Mapping[str, tuple[float, float]]
    """further figures, of the base model and of the edited one"""
    side_effects: Mapping[str, float]
    seconds: float
    memory_gib: float
    edits: int
    megabytes: float
    told: str = ""
    """a further figure in words"""
    served: float | None = None
    """largest difference of a log-probability between the served variant and the edited transformers model"""

    def as_json(self) -> dict[str, Any]:
        """The figures as plain data."""
        return asdict(self)


@dataclass
class Bench:
    """One model with all that is measured on it."""

    model: Path
    folder: Path
    """of the bundles that are built"""
    host: Host = field(init=False)
    neutral: Neutral = field(init=False)

    def __post_init__(self) -> None:
        self.host = Host.load(self.model)
        self.neutral = Neutral.of(self.host)

    def measure(self, proof: Proof) -> Figures:
        """Build what a proof names, and measure it. NotBuilt if the command refuses."""
        effect = proof.effect(self.host)
        base = effect(self.host)
        builds = [self.build(proof, proof.build, seed) for seed in range(proof.seeds)]
        bundle, seconds, memory = builds[0]
        edits = pairs_of(bundle)
        more = {name: (of(self.host)(self.host)) for name, of in proof.more.items()}
        with edited(self.host.model, edits):
            more_now = {name: of(self.host)(self.host) for name, of in proof.more.items()}
            side_effects = self.neutral.side_effects(self.host)
        found = [self._of(pairs_of(each), effect) for each, _, _ in builds]
        negated = self._of(edits, effect, strength=-1) if proof.negated else None
        return Figures(
            proof.measure, base, found, negated, self._control(proof, edits, effect), proof.control,
            {name: (more[name], more_now[name]) for name in more}, side_effects, seconds, memory, len(edits),
            len(bundle.tensor_bytes) / 1e6, proof.told(self._out(proof.name, 0)),
        )  # fmt: skip

    def build(self, proof: Proof, build: Built, seed: int, name: str = "") -> tuple[Bundle, float, float]:
        """The bundle of a build, its seconds, and the most memory in GiB that it took."""
        out = self.folder / name if name else self._out(proof.name, seed)
        data = [f"{table}={self._file(file)}" for table, file in (word.split("=") for word in build.data)]
        named = ["--name", WHOLE] if proof.served == "weights" else ["--name", proof.name.replace(" ", "-")]
        words = [proof.method, str(self.model), *data, "--out", str(out), "--seed", str(seed), *named, *build.options]
        if not (out / "manifest.json").is_file():
            if proof.members:
                words[2:2] = [f"bundles={self._members(proof)}"]
            done = _run([*words, "--strength=-1:1"])
            (out / "cost.json").write_text(json.dumps(done))
        seconds, memory = json.loads((out / "cost.json").read_text())
        return Bundle.load(out), seconds, memory

    def _out(self, name: str, seed: int) -> Path:
        return self.folder / f"{name.replace(' ', '-')}-{seed}"

    def _file(self, name: str) -> Path:
        """A file of the examples, or the one with many sentences."""
        return sentences.written(self.folder) if name == sentences.NAME else EXAMPLES / f"{name}.jsonl"

    def _members(self, proof: Proof) -> Path:
        """A file that names the bundles of the members."""
        folders = []
        for member in proof.members:
            self.build(member, member.build, 0)
            folders.append(self._out(member.name, 0))
        listed = self.folder / f"{proof.name}.jsonl"
        listed.write_text("".join(json.dumps({"bundle": str(each)}) + "\n" for each in folders))
        return listed

    def _of(self, edits: Edits, effect: Any, strength: float = 1.0) -> float:
        with edited(self.host.model, edits, strength=strength):
            return float(effect(self.host))

    def _control(self, proof: Proof, edits: Edits, effect: Any) -> list[float]:
        if proof.control_build is not None:
            bundle, _, _ = self.build(proof, proof.control_build, 0, f"{proof.name.replace(' ', '-')}-control")
            return [self._of(pairs_of(bundle), effect)]
        if proof.members:
            halves = [pair for each in proof.members for pair in pairs_of(self.build(each, each.build, 0)[0])]
            return [self._of(halves, effect, strength=0.5)]
        return [self._of(randomised(edits, seed), effect) for seed in range(CONTROL_SEEDS)]


def randomised(edits: Edits, seed: int) -> Edits:
    """The same edits with random numbers: vectors as long, other heads of the same layers, another subspace."""
    random = np.random.default_rng(seed)
    factors = [numbers["factor"] for edit, numbers in edits if edit.kind == "scale"]
    drawn = iter(np.array_split(random.permutation(np.concatenate(factors)), len(factors)) if factors else [])
    found: list[EditWithNumbers] = []
    for edit, numbers in edits:
        new = dict(numbers)
        if edit.kind == "scale":
            new["factor"] = next(drawn)
        elif edit.kind == "subspace_filter":
            basis = np.linalg.qr(random.normal(size=numbers["basis"].T.shape))[0].T.astype(np.float32)
            new |= {name: basis for name in ("basis", "dual") if name in numbers}
        else:
            name = _MOVED[edit.kind] if _MOVED[edit.kind] in numbers else "delta"
            vectors = random.normal(size=numbers[name].shape)
            length = np.linalg.norm(numbers[name], axis=-1, keepdims=True)
            new[name] = (vectors * length / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)
        found.append((edit, new))
    return found


def _run(words: Sequence[str]) -> tuple[float, float]:
    """Run `vllm-edits build` to its end. Returns its seconds, and the most memory in GiB that it took."""
    command = [str(Path(sys.executable).with_name("vllm-edits")), "build", *words]
    began = time.monotonic()
    read, write = os.pipe()
    child = os.posix_spawn(command[0], command, os.environ, file_actions=[
        (os.POSIX_SPAWN_DUP2, write, 1), (os.POSIX_SPAWN_DUP2, write, 2), (os.POSIX_SPAWN_CLOSE, read),
    ])  # fmt: skip
    os.close(write)
    with os.fdopen(read, encoding="utf-8", errors="replace") as output:
        said = output.read()
    _, status, used = os.wait4(child, 0)
    if os.waitstatus_to_exitcode(status):
        raise NotBuilt(said.strip()[-600:])
    return time.monotonic() - began, used.ru_maxrss / (1 << 20)


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, least and largest."""
    return mean(values), min(values), max(values)
