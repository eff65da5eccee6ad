"""Changes of a weight as edits of low rank, which a server applies per request.

    delta ~ write^T read        the nearest matrix of that rank: the leading singular directions of delta
    error = |delta - write^T read| / |delta|        Frobenius norms

delta  [out, in]
read   [rank, in]   write [rank, out]

The directions are eigenvectors of the smaller of delta delta^T and delta^T delta, in float64. The error is that of the
float32 factors, measured on their product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_edits.edit_store.authoring.host import Edits
from vllm_edits.edit_store.authoring.method import Work
from vllm_edits.edit_store.bundle import Measurement
from vllm_edits.edit_store.edits import MAX_RANK
from vllm_edits.edit_store.errors import BundleRefused, Reason
from vllm_edits.edit_store.kinds.low_rank import LowRank
from vllm_edits.edit_store.kinds.weight_delta import WeightDelta
from vllm_edits.edit_store.sites import Site

_ROUNDING = 1e-6
"""relative error of factors in float32, which no rank takes away"""


@dataclass(frozen=True)
class LowRankForm:
    """A matrix of low rank in place of another one."""

    read: Tensor
    write: Tensor
    error: float
    """relative, in the Frobenius norm"""

    @property
    def rank(self) -> int:
        """The number of directions."""
        return len(self.read)


def as_low_rank(delta: Tensor, *, rank: int | None = None, error: float | None = None) -> LowRankForm | None:
    """The smallest rank of `delta` [out, in] within the relative error, and at most `rank`; None if there is none.

    Without an error it is the nearest matrix of that rank. No rank is above that of the delta, or above what an edit
    may have.
    """
    exact = delta.double()
    tall = exact.shape[0] > exact.shape[1]
    energy, directions = torch.linalg.eigh(exact.T @ exact if tall else exact @ exact.T)
    energy, directions = energy.flip(0).clamp(min=0), directions.flip(1)
    lost = (energy.flip(0).cumsum(0).flip(0) / energy.sum().clamp(min=torch.finfo(energy.dtype).tiny)).sqrt()
    enough = int((lost > max(_ROUNDING, error or 0)).sum())
    most = min(MAX_RANK if rank is None else min(rank, MAX_RANK), len(energy))
    if error is not None and enough > most:
        return None
    kept = directions[:, : max(1, min(enough, most))].T
    read, write = (kept, kept @ exact.T) if tall else (kept @ exact, kept)
    read, write = read.float().contiguous(), write.float().contiguous()
    size = float(exact.norm())
    apart = float((exact - write.double().T @ read.double()).norm())
    return LowRankForm(read, write, apart / size if size else 0.0)


def shortened(work: Work, edits: Edits, *, rank: int | None = None, error: float | None = None) -> Edits:
    """The same edits, with every change of a whole weight as one of low rank; the largest error is a measurement.

    BundleRefused lists every change of which more than `error` would be lost.
    """
    widths, found, errors, reasons = work.inputs.base.widths, Edits(), list[float](), list[Reason]()
    for number, (edit, fields) in enumerate(edits):
        work.step("low rank", number, len(edits))
        if not isinstance(edit, WeightDelta):
            found.append((edit, fields))
            continue
        shape = [widths.of(Site.parse(site).point) for site in (edit.site, edit.source)]
        (delta,) = edit.weight_change(fields, shape)
        whole = torch.as_tensor(delta).to(work.host.device)
        form = as_low_rank(whole, rank=rank, error=error)
        if form is None:
            reasons.append(_too_much(edit, whole, rank, error))
            continue
        numbers = {"read": form.read.cpu().numpy(), "write": form.write.cpu().numpy()}
        errors.append(form.error)
        found.append((LowRank(site=edit.site, reads=edit.reads, rank=form.rank, part=edit.part), numbers))
    work.step("low rank", len(edits), len(edits))
    if reasons:
        raise BundleRefused("the low-rank form", reasons)
    if errors:
        metric = "largest part of a weight's change that its low rank loses"
        work.measurements.append(Measurement(metric=metric, base=0, edited=max(errors), n=len(errors)))
    return found


def _too_much(edit: WeightDelta, delta: Tensor, rank: int | None, error: float | None) -> Reason:
    nearest = as_low_rank(delta, rank=rank)
    told = "" if nearest is None else f"rank {nearest.rank} loses {nearest.error:.1%} of the change"
    return Reason(
        "low_rank", f"{edit.site}: expected to lose at most {error or 0:.1%}, found that {told}. Raise rank (up to "
        f"{MAX_RANK}) or error, or leave both out and serve the bundle in the install mode `weights`",
    )  # fmt: skip
