"""PCB-Merging: several changes of the weights as one (arXiv 2410.02396; code: duguodong7/pcb-merging).

    c_i     = sign(t_i) |t_i| with the magnitudes of either tail set to the nearest one inside
    intra_i = exp(N norm(|c_i|)^2)                   large numbers of a task count more
    inter_i = tanh(t_i sum_j t_j)                    those that the other tasks oppose count less
    s_i     = norm(max(intra_i inter_i, threshold_i))    threshold_i: the score that a share `ratio` of them exceeds
    t       = sum_i s_i w_i c_i / sum_i s_i

t_i   [numbers]  task vector of bundle i, over all matrices that any of the N bundles changes (`task_vectors.py`)
norm             to 0 and 1 by the least and the largest, of the whole vector: a matrix alone cannot be merged
w_i              weight of bundle i, the lambda of the source
products, powers, tanh are of each number by itself

A number that no bundle has a score for becomes zero; one that a single bundle has a score for is that bundle's.

As in the file of the code that its README names for the details: formulas, ranks of the tails and of the threshold,
tails of 1e-4, a ratio of 0.1 (the code's runs take 0.05 to 0.2). That file does not run as it stands, since its last
part takes two of three results. Two other files of the code differ: they clamp tails of 0.01, and for inter they have
tanh(t_i sum_j norm(c_j)) and sum_j tanh(norm(c_i) norm(c_j)). The paper's own formulas are not confirmed here. Its
search for weights needs a score of every try, and is not here: weights are data, 1 by default, where the code's runs
try 0.8 to 2.2. Unlike the code: numbers that are all equal are normed to zero (there it divides by zero), and shares
are of the matrices that the bundles change, where a fine-tuned model changes all.

It works on about seven vectors of that length in float32 at a time, however many bundles there are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from vllm_edits.edit_store.architectures import supported
from vllm_edits.edit_store.authoring.build import register
from vllm_edits.edit_store.authoring.data import Row, Table, Text
from vllm_edits.edit_store.authoring.host import Edits
from vllm_edits.edit_store.authoring.low_rank_of import shortened
from vllm_edits.edit_store.authoring.method import Cost, Inputs, Method, Work
from vllm_edits.edit_store.authoring.task_vectors import TaskVectors, matrices, refusals
from vllm_edits.edit_store.bundle import MANIFEST_FILE, Bundle, Manifest
from vllm_edits.edit_store.canonical import sha256
from vllm_edits.edit_store.edits import MAX_RANK
from vllm_edits.edit_store.errors import BundleRefused, Reason
from vllm_edits.edit_store.kinds.weight_delta import WeightDelta
from vllm_edits.edit_store.tensor_file import MAX_HEADER_BYTES, MAX_TENSOR_FILE_BYTES

MERGED_FILE = "merged.json"
"""File with the names, versions and weights of the bundles."""
_VECTORS = 7
"""of all numbers, that are there at once"""
_FLOAT = 4


class Merged(Row):
    """A bundle to merge, with its weight.

    The version is read from the folder, so the digest of the rows in a recipe is that of these versions. If the row
    has one (six digits of it or more), the folder must have that.
    """

    bundle: Text
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    version: str = Field("", pattern="^[0-9a-f]{64}$")

    @model_validator(mode="before")
    @classmethod
    def _with_its_version(cls, given: Any) -> Any:
        if not isinstance(given, dict) or not isinstance(given.get("bundle"), str):
            return given
        path, expected = Path(given["bundle"], MANIFEST_FILE), given.get("version", "")
        try:
            found = sha256(path.read_bytes())
        except OSError as error:
            raise ValueError(f"expected the folder of a bundle, found no {path}: {error.strerror}") from None
        if expected and not (isinstance(expected, str) and len(expected) >= 6 and found.startswith(expected)):
            raise ValueError(
                f"expected version {expected} in {given['bundle']}, found {found}. Name the folder with that version, "
                "or leave the version out"
            )
        return {**given, "version": found}


class PcbMerge(Method):
    """Merge bundles that change weights into one, number by number: what is large counts more, what is opposed less.

    The result changes whole matrices, and is served in the install mode `weights`; with --error or --rank it is of low
    rank, and served per request. Test it with the probes of every bundle that is merged.
    """

    source: ClassVar[str] = "arXiv 2410.02396"
    kinds: ClassVar[tuple[str, ...]] = ("weight_delta", "low_rank")
    tables: ClassVar[Mapping[str, Table]] = {
        "bundles": Table(Merged, "folders of saved bundles for the same model, each with its weight", least=2)
    }
    takes: ClassVar[str] = "two passes over the changes of all bundles, without the model"

    ratio: float = Field(0.1, gt=0, le=1, description="Share of each bundle's numbers that compete; the others drop.")
    tail: float = Field(1e-4, ge=0, lt=0.5, description="Share of the magnitudes at either end that are clamped.")
    rank: int | None = Field(
        None, gt=0, le=MAX_RANK, description="Highest rank of each change. Default: whole matrices."
    )
    error: float | None = Field(None, gt=0, lt=1, description="Part of each change that its low rank may lose.")

    def changes(self, inputs: Inputs) -> int:
        return sum(manifest.cumulative_edits for manifest in _manifests(inputs))

    def takes_safety(self, inputs: Inputs) -> bool:
        """True if one of the bundles does."""
        with suppress(BundleRefused, OSError):  # a folder without a bundle is one of the problems
            return any(manifest.privileged for manifest in _manifests(inputs))
        return False

    def problems(self, inputs: Inputs) -> Iterator[Reason]:
        bundles, sound = list[Bundle](), True
        for row in inputs.data["bundles"]:
            try:
                bundle = Bundle.load(Path(row.bundle))
            except BundleRefused as refused:
                reasons = list(refused.reasons)
            else:
                bundles.append(bundle)
                reasons = list(refusals(bundle, inputs.base))
            yield from (Reason(reason.code, f"{row.bundle}: {reason.message}") for reason in reasons)
            sound = sound and not reasons
        if sound:
            yield from self._problems_together(inputs, TaskVectors.of(bundles))

    def _problems_together(self, inputs: Inputs, tasks: TaskVectors) -> Iterator[Reason]:
        """Too many numbers for a bundle, or too few of one to be left by its tails and its threshold."""
        count, size = tasks.numbers, tasks.numbers * _FLOAT
        if not self._shortened and size + MAX_HEADER_BYTES > MAX_TENSOR_FILE_BYTES:
            yield Reason(
                "too_large", f"{len(tasks.shapes)} whole matrices are {size} bytes, and a bundle has at most "
                f"{MAX_TENSOR_FILE_BYTES}. Give --rank or --error",
            )  # fmt: skip
        if _place(count, 1 - self.ratio) >= count - 1:
            yield Reason("ratio", f"{self.ratio:g} of {count} numbers are none. Raise ratio")
        least = count - _largest(count, self.tail)
        for row, vector in zip(inputs.data["bundles"], tasks.vectors(), strict=True):
            if (changed := int(vector.count_nonzero())) < least:
                yield Reason(
                    "too_few_numbers", f"{row.bundle} changes {changed} of the {count} numbers of all matrices. The "
                    f"largest {least - 1} magnitudes are clamped to the next one, so nothing of it would be left. "
                    "Lower tail, or merge it with bundles that change fewer matrices",
                )  # fmt: skip

    def cost(self, inputs: Inputs) -> Cost:
        numbers = sum(out * into for out, into in matrices(_manifests(inputs)).values())
        return Cost(0, statistics_bytes=_VECTORS * numbers * _FLOAT)

    def make(self, work: Work) -> Edits:
        rows = work.data["bundles"]
        bundles = [_unchanged(row) for row in rows]
        tasks = TaskVectors.of(bundles)
        done = iter(range(2 * len(rows)))

        def vectors() -> Iterator[Tensor]:
            for vector in tasks.vectors():
                work.step("task vectors", next(done), 2 * len(rows))
                yield vector

        merged = merge(vectors, [row.weight for row in rows], ratio=self.ratio, tail=self.tail)
        work.step("task vectors", 2 * len(rows), 2 * len(rows))
        reads = supported(work.inputs.base.architecture).projections()
        edits: Edits = [
            (WeightDelta(site=str(site), reads=str(site.beside(reads[site.point]))), {"delta": delta.numpy()})
            for site, delta in tasks.split(merged) if delta.any()
        ]  # fmt: skip
        if not edits:
            raise BundleRefused("pcb-merge", [Reason(
                "nothing_left", "expected some numbers on which the bundles agree, found none: they cancel each other. "
                "Merge other bundles, or raise ratio",
            )])  # fmt: skip
        listed = [
            {"bundle": row.bundle, "name": bundle.manifest.name, "version": row.version, "weight": row.weight}
            for row, bundle in zip(rows, bundles, strict=True)
        ]
        work.notes[MERGED_FILE] = (json.dumps(listed, indent=1) + "\n").encode()
        return shortened(work, edits, rank=self.rank, error=self.error) if self._shortened else edits

    @property
    def _shortened(self) -> bool:
        return self.rank is not None or self.error is not None


def merge(
    vectors: Callable[[], Iterable[Tensor]], weights: Sequence[float], *, ratio: float = 0.1, tail: float = 1e-4
) -> Tensor:
    """Merged task vector [numbers]. vectors: called twice, for the task vectors in the order of their weights."""
    total: Tensor = sum(vectors(), start=torch.zeros(()))
    changed, competed = torch.zeros_like(total), torch.zeros_like(total)
    for vector, weight in zip(vectors(), weights, strict=True):
        clamped, score = balanced(vector, total, len(weights), ratio=ratio, tail=tail)
        changed.addcmul_(clamped, score, value=weight)
        competed += score
        del clamped, score  # as large as all weights together, and the next ones come while they are there
    return changed.div_(competed.clamp_(min=1e-12))


def balanced(vector: Tensor, total: Tensor, count: int, *, ratio: float, tail: float) -> tuple[Tensor, Tensor]:
    """Clamped task vector c_i and its scores s_i, [numbers] each. total: the sum of all `count` task vectors."""
    numbers = len(vector)
    magnitude = vector.abs()
    least, most = _ranked(magnitude, _place(numbers, tail), _largest(numbers, tail))
    magnitude.clamp_(least, most)
    score = _normed(magnitude.clone()).square_().mul_(count).exp_().mul_((vector * total).tanh_())
    (threshold,) = _ranked(score, _place(numbers, 1 - ratio))
    return magnitude.mul_(vector.sign()), _normed(score.clamp_(min=threshold))


def _place(numbers: int, share: float) -> int:
    """Place of the threshold among sorted numbers, below which there is that share of them."""
    return int(numbers * share)


def _largest(numbers: int, tail: float) -> int:
    """Place of the largest number that is not in the upper tail."""
    return int(numbers * (1 - tail) - 1)


def _ranked(vector: Tensor, *places: int) -> list[float]:
    """The numbers at these places of the sorted vector."""
    return [float(found) for found in np.partition(vector.numpy(), places)[list(places)]]


def _normed(vector: Tensor) -> Tensor:
    """The same vector, changed in place, from 0 at its least number to 1 at its largest; zeros if all are equal."""
    least, most = map(float, vector.aminmax())
    return vector.sub_(least).div_(most - least) if most > least else vector.zero_()


def _manifests(inputs: Inputs) -> list[Manifest]:
    paths = [Path(row.bundle, MANIFEST_FILE) for row in inputs.data["bundles"]]
    return [Manifest.from_bytes(path.read_bytes(), str(path)) for path in paths]


def _unchanged(row: Merged) -> Bundle:
    """The bundle of a row. BundleRefused if the folder has another one by now."""
    bundle = Bundle.load(Path(row.bundle))
    if bundle.version != row.version:
        raise BundleRefused("pcb-merge", [Reason(
            "changed", f"{row.bundle} was version {row.version[:12]} when the build began, and is "
            f"{bundle.version[:12]} now. Build again",
        )])  # fmt: skip
    return bundle


build = register(PcbMerge)
