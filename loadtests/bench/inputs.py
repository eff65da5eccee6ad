"""What the benchmark serves: versions of the demo's edits in a store, its redirection as LoRA adapters, prompts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Self

import numpy as np
import torch
from safetensors.numpy import save_file

import loadtests.demo.bundles
import vllm_edits.edit_store.authoring
from loadtests.demo.bundles import EXHIBITS
from vllm_edits.edit_store import (
    KINDS,
    BaseModelRef,
    Bundle,
    EditStore,
    LowRank,
    Provenance,
    check,
    identify,
)
from vllm_edits.edit_store.authoring.host import Edits
from vllm_edits.edit_store.bundle import MANIFEST_FILE
from vllm_edits.edit_store.canonical import canonical_json, sha256
from vllm_edits.edit_store.sites import Site
from vllm_edits.plugin.graph.reservation import Reservation
from vllm_edits.plugin.graph.slot_bytes import slot_bytes
from vllm_edits.plugin.plan import Plan

MADE_AT = datetime(2026, 1, 1, tzinfo=UTC)  # one moment for all: the same numbers are the same version in every run
PROVENANCE = Provenance(tool="loadtests.bench", method="the demo's edits at some strength")
FIRST_ORDINARY_TOKEN = 100
AT_A_TIME = 16
"""Versions in memory while they are published: one of rank 16 on a model of a billion parameters has 10 MB."""


@dataclass(frozen=True)
class Inputs:
    """One model, one set of edits, and a folder for everything made of them."""

    model: Path
    base: BaseModelRef
    edits: Edits
    folder: Path

    @classmethod
    def prepare(cls, model: Path, folder: Path) -> Self:
        """Identify the model; no edits yet."""
        folder.mkdir(parents=True, exist_ok=True)
        return cls(model.resolve(), identify(model), [], folder.resolve())

    def of_the_demo(self, say: Callable[[str], None]) -> Self:
        """The same with all edits of the demo together. `say` is told each step of computing them."""
        return replace(self, edits=demo_edits(self.model, self.base, self.folder / "edits", say))

    def everywhere(self, kinds: Sequence[str], rank: int = 1) -> Self:
        """The same with small edits of these kinds at every layer instead, in a folder of their own."""
        folder = self.folder / "-".join(["everywhere", *kinds, *([str(rank)] if rank > 1 else [])])
        folder.mkdir(exist_ok=True)
        return replace(self, edits=edits_everywhere(self.base, kinds, rank), folder=folder)

    def described(self) -> list[str]:
        """Kind and site of every edit."""
        return sorted(f"{edit.kind} at {edit.site}" for edit, _ in self.edits)

    def slot_bytes(self, dtype: str) -> int:
        """What one version takes on the device, and a step reads of it, as `vllm-edits plan` counts."""
        reservation = Reservation.for_versions([self.version("a-version", 1).manifest])
        return Plan.of(reservation, slot_bytes(self.base.widths, getattr(torch, dtype))).slot

    def version(self, name: str, strength: float) -> Bundle:
        """The edits at a strength between 0 and 1: as much work, other numbers."""
        return Bundle.create(name, self.base, weakened(self.edits, strength), PROVENANCE, created_at=MADE_AT)

    def make_store(self, folder: str, count: int) -> tuple[list[str], Path]:
        """A new store that promotes `count` variants, no two alike. Returns their names and its folder."""
        names = [f"variant-{number:02}" for number in range(count)]
        versions = (self.version(name, strength) for name, strength in zip(names, strengths(count), strict=True))
        return names, self.store_of(folder, versions)

    def store_of(self, folder: str, versions: Iterable[Bundle]) -> Path:
        """A new store that promotes these versions; returns its folder."""
        path = self.folder / folder
        # A node remembers what it has seen of a store, and would take the new one for a rewritten history.
        for old in (path, self.node):
            shutil.rmtree(old, ignore_errors=True)
        store = EditStore(str(path), create=True)

        def publish(version: Bundle) -> str:
            return f"{version.manifest.name}@{store.publish(version)}"

        with ThreadPoolExecutor() as pool:  # much of it is hashing, and waiting for the disk
            coming = iter(versions)
            while some := list(islice(coming, AT_A_TIME)):
                for published in pool.map(publish, some):
                    store.promote(published)
        return path

    @property
    def node(self) -> Path:
        """The node's memory, for `edits.cache_folder`."""
        return self.folder / "node"

    @property
    def lora_rank(self) -> int:
        """The rank that LoRA reserves; vLLM knows 1 and then multiples of 8."""
        rank = max(edit.rank for edit, _ in self.edits if isinstance(edit, LowRank))
        return 1 if rank == 1 else 8 * -(-rank // 8)

    def make_adapters(self, count: int) -> dict[str, str]:
        """The low-rank edits as LoRA adapters in PEFT's format: W_down + write read^T is B A. Folders by name."""
        adapters = {}
        for number, strength in enumerate(strengths(count)):
            tensors, rank = {}, 0
            for edit, fields in weakened(self.edits, strength):
                if isinstance(edit, LowRank):
                    module = f"base_model.model.model.layers.{Site.parse(edit.site).layer}.mlp.down_proj"
                    tensors[f"{module}.lora_A.weight"] = fields["read"]
                    tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(fields["write"].T)
                    rank = max(rank, edit.rank)
            config = {
                "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": self.base.name, "r": rank,
                "lora_alpha": rank, "target_modules": ["down_proj"], "bias": "none",
            }  # fmt: skip
            folder = self.folder / "adapters" / f"adapter-{number:02}"
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, folder / "adapter_model.safetensors")
            (folder / "adapter_config.json").write_text(json.dumps(config))
            adapters[folder.name] = str(folder)
        return adapters

    def make_checkpoint(self) -> Path:
        """The model with the low-rank edits in its weights: W_down + write^T read."""
        import safetensors.torch

        folder = self.folder / "checkpoint"
        shutil.copytree(self.model, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
        for path in self.model.glob("*.safetensors"):
            tensors = safetensors.torch.load_file(path)
            for edit, fields in self.edits:
                name = f"model.layers.{Site.parse(edit.site).layer}.mlp.down_proj.weight"
                if isinstance(edit, LowRank) and name in tensors:
                    delta = torch.from_numpy(fields["write"]).T @ torch.from_numpy(fields["read"])
                    tensors[name] = (tensors[name].float() + delta).to(tensors[name].dtype)
            safetensors.torch.save_file(tensors, folder / path.name, metadata={"format": "pt"})
        return folder

    def random_prompts(self, seed: Sequence[int], requests: int, tokens: int) -> list[list[int]]:
        """Prompts that no other seed gives, so that a prefix cache never knows their beginning."""
        config = json.loads((self.model / "config.json").read_bytes())
        random = np.random.default_rng(seed)
        ids: list[list[int]] = random.integers(
            FIRST_ORDINARY_TOKEN, config["vocab_size"], size=(requests, tokens)
        ).tolist()
        return ids


def demo_edits(model: Path, base: BaseModelRef, kept: Path, say: Callable[[str], None]) -> Edits:
    """All edits of the demo together: each kind, at every layer it touches there.

    Computing them takes minutes, so they are kept in `kept` for as long as neither the model nor their code changes.
    """
    folder = kept / _digest_of_authoring(base)
    if (folder / MANIFEST_FILE).is_file():
        bundle = Bundle.load(folder)
    else:
        found = {}
        for exhibit in {exhibit.name: exhibit for exhibit in EXHIBITS}.values():  # one version of each variant
            say(f"computing the demo's edits: {exhibit.name}")
            edits = exhibit.edits(exhibit.build(model))
            found.update({(edit.site, edit.kind): (edit, fields) for edit, fields in edits})
        bundle = Bundle.create("demo-edits", base, found.values(), PROVENANCE, created_at=MADE_AT)
        bundle.save(folder)
    numbers = check(bundle, base)
    return [(edit, edit.numbers(numbers, base.widths)) for edit in bundle.manifest.edits]


def _digest_of_authoring(base: BaseModelRef) -> str:
    """What the demo's edits follow from: the model, the data, the methods."""
    sources = [Path(loadtests.demo.bundles.__file__), *sorted(loadtests.demo.bundles.DATA.iterdir())]
    sources += sorted(Path(vllm_edits.edit_store.authoring.__file__).parent.rglob("*.py"))
    return sha256(canonical_json(base.files) + b"".join(source.read_bytes() for source in sources))


def edits_everywhere(base: BaseModelRef, kinds: Sequence[str], rank: int = 1) -> Edits:
    """Kinds at every layer, where published methods put them, with numbers too small to derail the model."""
    random = np.random.default_rng(0)
    edits: Edits = []
    for layer in range(base.widths.layers):
        for kind in kinds:
            edit = KINDS[kind].usual(layer, rank)
            numbers = edit.sample(random, base.widths, strength=0.01)
            edits.append((edit, {field: np.asarray(array, dtype=np.float32) for field, array in numbers.items()}))
    return edits


def weakened(edits: Edits, strength: float) -> Edits:
    """The same edits at a strength between 0 (none) and 1 (as they are)."""
    return [(edit, edit.weakened(fields, strength)) for edit, fields in edits]


def strengths(count: int) -> list[float]:
    """That many distinct strengths."""
    return [float(strength) for strength in np.linspace(0.5, 1, count)]
