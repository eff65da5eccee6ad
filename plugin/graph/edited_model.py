"""The edited model in one worker: every site's slot tensors, what each slot holds, and the slot of each token.

One object per worker. No vLLM here: the loader hands over the modules, the runner hands over the batch.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vllm_edits.edit_store.bundle import Manifest
from vllm_edits.edit_store.edits import Edit, Tensors
from vllm_edits.edit_store.errors import InstallRefused
from vllm_edits.edit_store.kinds import KINDS
from vllm_edits.edit_store.scope import Scope
from vllm_edits.edit_store.sites import Site
from vllm_edits.plugin.claim import Claim, FalseClaim
from vllm_edits.plugin.graph.carried import Carried
from vllm_edits.plugin.graph.device_rows import DeviceRows
from vllm_edits.plugin.graph.edited_modules import EditedModules, LogitsEdits
from vllm_edits.plugin.graph.firing_counters import FiringCounters
from vllm_edits.plugin.graph.kinds import SLOT_TENSORS
from vllm_edits.plugin.graph.reservation import EditGroup, Reservation, edit_groups, scopes_of
from vllm_edits.plugin.graph.site_edits import SiteEdits
from vllm_edits.plugin.graph.slot_bytes import slot_bytes
from vllm_edits.plugin.graph.slot_products import EXPRESSIONS, SlotProducts
from vllm_edits.plugin.graph.slot_rows import Columns, Layout, Rows
from vllm_edits.plugin.graph.slot_tensors import Shape, SlotTensors
from vllm_edits.plugin.graph.step import Step
from vllm_edits.plugin.graph.step_filler import StepBatch, StepFiller
from vllm_edits.plugin.graph.tensor_parallel import ONLY_RANK, AllReduce, Rank, Shard, identity

BASE_SLOT = 0
"""The base model's slot, which holds zeros."""


@dataclass(frozen=True)
class SiteModule:
    """A site in the model: a side of a module, and the part of the vector there that begins at `start`."""

    module: nn.Module
    side: str
    start: int | None
    shard: Shard
    """this worker's part of the site's vector"""
    argument: tuple[str, int]
    """name and place of the module's input among its forward's arguments"""
    add_up: Callable[[Any, bool], None]
    """tells the module, or a copy of it, whether it adds up the workers' parts"""
    is_layer: bool = False


@dataclass(frozen=True)
class Prepared:
    """A version ready to be written into a slot: its edits by group, and the row of bytes for the slot."""

    version: str
    edits: Mapping[EditGroup, tuple[Edit, ...]]
    row: Tensor
    scopes: tuple[Scope, ...]
    digest: str
    """sha256 over the slot's content: equal on workers that have the same share of the model"""

    @property
    def nbytes(self) -> int:
        """Host memory in bytes; torch pins in powers of two."""
        return 1 << (self.row.nbytes - 1).bit_length() if self.row.is_pinned() else self.row.nbytes


CountedEdit = tuple[str, FiringCounters, slice]
"""Label of an edit whose firings are counted, its counters, and its columns there."""


class EditedModel:
    """Slot tensors for `slots` versions and the base model in slot 0."""

    def __init__(
        self,
        site_modules: Mapping[Site, SiteModule],
        reservation: Reservation,
        *,
        slots: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        worker: Rank = ONLY_RANK,
        over_workers: AllReduce = identity,
        products: SlotProducts = EXPRESSIONS,
        end_request: Callable[[Any, FalseClaim], bool] = lambda _request, _error: False,
    ) -> None:
        """over_workers: adds up, in the graph, the parts of a sum of all workers among which the model is divided.
        products: how tokens are multiplied with the vectors of their slots where an edit has several.
        end_request: called with a request whose claim is false; returns True if that request alone will end.

        The model is not changed until `attach`.
        """
        self.worker = worker
        self.reservation = reservation
        self.edits_logits = reservation.edits_logits
        self.slots = slots
        self.dtype = dtype
        self.step = Step(max_tokens, 1 + reservation.scopes, device)
        self.held: dict[int, str] = {}
        self.in_weights: set[str | None] = {None}
        """the version in the weights, which requests without a slot are computed with; None for the base model"""
        self._scopes: dict[int, tuple[Scope, ...]] = {}
        self._counted: dict[int, list[CountedEdit]] = {}
        self._filler = StepFiller(self.step, self.slot_of, self._scopes, slots=slots, end_request=end_request)
        self._output: Tensor | None = None
        self._at_logits: LogitsEdits | None = None
        self._around = EditedModules()
        most = max_tokens if self.edits_logits else 0
        self._last_rows = DeviceRows(torch.zeros(most, dtype=torch.int64, device=device), 0)
        """the rows of requests' last tokens"""
        self._carried: dict[int | None, Carried] = {}
        self._slot_tensors: dict[EditGroup, SlotTensors] = {}
        self._over_workers = over_workers
        read_elsewhere = reservation.read_elsewhere()
        edits_of_site = {
            site: self._edits_at(site, site_modules[site]) for site in sorted({*reservation.sites(), *read_elsewhere})
        }
        # With tensor parallel, some groups join the all-reduce of their module: their edits are put before it.
        joining = {group for group in reservation.capacities if _joins_sum(group, reservation, site_modules)}
        within = {site: self._edits_before_sum(site, site_modules[site]) for site in {group.site for group in joining}}
        self._edited_sites = {
            **{str(site): (site, site_edits) for site, site_edits in edits_of_site.items()},
            **{f"{site} before the sum over workers": (site, site_edits) for site, site_edits in within.items()},
        }
        # A vector that an edit at a later site reads is carried there, and dropped after its last reader.
        for site in read_elsewhere:
            if site.point != "final":  # read by the logits, which are given it
                edits_of_site[site].carries_as = str(site)
            readers = [group for group in reservation.capacities if group.reads == site != group.site]
            last = max(group.site for group in readers)
            joined = joining.issuperset(group for group in readers if group.site == last)
            (within if joined else edits_of_site)[last].forgets.append(str(site))
        # Each group's tensors are columns of the slots' rows: first all columns, then the memory, then the views.
        self._layout = Layout()
        for group, capacity in sorted(reservation.capacities.items(), key=lambda item: item[0]):
            reads, writes = site_modules[group.reads].shard, site_modules[group.site].shard
            total = identity if group in joining else reads.sum(over_workers)
            shape = Shape(capacity, reads, writes, dtype, total, products if capacity.rank > 1 else EXPRESSIONS)
            tensors = self._slot_tensors[group] = SLOT_TENSORS[group.kind](shape, self._layout)
            site_edits = (within if group in joining else edits_of_site)[group.site]
            site_edits.add(KINDS[group.kind], tensors, None if group.reads == group.site else str(group.reads))
        self._rows = self._layout.rows(slots + 1, device)
        parts: dict[int | None, list[Columns]] = {}
        for group, tensors in self._slot_tensors.items():
            parts.setdefault(group.site.layer, []).extend(tensors.columns.values())
        self._views = Rows(self._rows, parts)
        for group, tensors in self._slot_tensors.items():
            tensors.bind(self._views, group.site.layer)
        self._firings = [self._build_counters(edits_of_site, logits=logits) for logits in (False, True)]

    def _build_counters(self, edits_of_site: Mapping[Site, SiteEdits], *, logits: bool) -> FiringCounters:
        """Build the counters of edits that run with the model, or of edits at the logits, which run after it."""
        firings = FiringCounters()
        counted = {group: tensors for group, tensors in self._slot_tensors.items()
                   if tensors.neurons and (group.site.point == "logits") == logits}  # fmt: skip
        for tensors in counted.values():
            tensors.counted_by(firings)
        firings.bind(self.slots + 1, self._rows.device)
        if counted:
            edits_of_site[max(group.site for group in counted)].count_with(firings)
        return firings

    def _edits_at(self, site: Site, site_module: SiteModule) -> SiteEdits:
        """The edits of a site, around its module."""
        carried = self._carried.setdefault(site.layer, Carried())
        if site.point == "logits":
            site_edits = SiteEdits(Step(1, 1, self.step.slots.device), site_module.shard.width, carried)
            self._at_logits = LogitsEdits(site_edits, self.step, self._logit_rows, *site_module.argument)
            self._around.logits(site_module.module, self._at_logits)
            return site_edits
        site_edits = SiteEdits(self.step, site_module.shard.width, carried, site_module.shard.sum(self._over_workers))
        edits = self._around.of(site_module.module, str(site), site_module.argument, stream=site_module.is_layer)
        if site_module.side == "input":
            edits.before = site_edits
        else:
            edits.after.append(site_edits)
            edits.starts.append(site_module.start)
        return site_edits

    def _edits_before_sum(self, site: Site, site_module: SiteModule) -> SiteEdits:
        """The edits of this worker's part of a module's output; all parts are added up behind them."""
        site_edits = SiteEdits(self.step, site_module.shard.width, self._carried[site.layer])
        edits = self._around.of(site_module.module, str(site), site_module.argument, stream=site_module.is_layer)
        edits.within, edits.sum = site_edits, self._over_workers
        self._around.partial[site_module.module] = site_module.add_up
        return site_edits

    def attach(self, instead_of: Mapping[nn.Module, nn.Module] | None = None) -> None:
        """Put the edits around the modules of the model, or around copies of them: `instead_of` has them by module."""
        self._around.attach(instead_of or {})

    def detach(self) -> None:
        """Make the modules of the model what they were."""
        self._around.detach()

    @property
    def bytes_reserved(self) -> int:
        """Device memory of all slots."""
        return self._rows.nbytes + (self.slots + 1) * sum(group.counters for group in self._slot_tensors.values())

    # -- slots -----------------------------------------------------------------------------------------------------

    def prepare(self, version: str, manifest: Manifest, tensors: Tensors) -> Prepared:
        """Do all that can fail or take time, before a slot is touched. InstallRefused when the version does not fit."""
        if missing := self.reservation.missing(
            manifest, slot_bytes(manifest.base.widths, self.dtype, self.worker.size)
        ):
            raise InstallRefused(f"version {version[:12]} of {manifest.name!r}", missing)
        widths = manifest.base.widths

        def numbers(edit: Edit) -> tuple[Edit, dict[str, Any]]:
            return edit, {field: np.array(array) for field, array in edit.numbers(tensors, widths).items()}

        by_group, scopes = edit_groups(manifest.edits), scopes_of(manifest)
        row = self._layout.rows(1, torch.device("cpu"), pinned=self._rows.is_cuda)
        for group, edits in by_group.items():
            scope_row = 0 if edits[0].scope.everything else 1 + scopes.index(edits[0].scope)
            self._slot_tensors[group].fill(row, [numbers(edit) for edit in edits], scope_row)
        return Prepared(version, by_group, row[0], scopes, _digest(version, row[0]))

    def install(self, slot: int, prepared: Prepared) -> str:
        """Write a prepared version into a free slot; returns the digest of the slot's content.

        RuntimeError when it differs from the prepared one; the caller then clears the slot.
        """
        if not BASE_SLOT < slot <= self.slots or slot in self.held:
            raise ValueError(f"slot {slot} is not a free slot of 1 to {self.slots}")
        self._rows[slot].copy_(prepared.row, non_blocking=True)
        for group, edits in prepared.edits.items():
            if counted := _counted_edits(self._slot_tensors[group], edits):
                self._counted.setdefault(slot, []).extend(counted)
        self.held[slot], self._scopes[slot] = prepared.version, prepared.scopes
        self._filler.forget()
        if (found := self.digest(slot)) != prepared.digest:
            raise RuntimeError(f"slot {slot} does not hold version {prepared.version[:12]} as it was prepared")
        return found

    def clear(self, slot: int) -> None:
        """Make a slot's edits the identity again."""
        self.held.pop(slot, None)  # first: a growth may compare the slot's numbers now, in another thread
        self._rows[slot].zero_()
        for firings in self._firings:
            firings.counts[slot] = 0
        self._filler.tokens_by_slot[slot] = 0
        self._scopes.pop(slot, None)
        self._counted.pop(slot, None)
        self._filler.forget()

    def digest(self, slot: int) -> str:
        """sha256 over a slot's content: equal on workers that have the same share of the model and the same version."""
        return _digest(self.held.get(slot, ""), self._rows[slot])

    def firings(self, *slots: int) -> list[tuple[str, int, dict[str, int]]]:
        """Firings of the edits of these slots, or of all, since they were installed; slots without any are left out.

        For each slot its version, the number of tokens computed with it, and by edit the number of these at which each
        neuron fired. All figures are of one moment: the device computes nothing while it is asked.
        """
        counting = [slot for slot in slots or self._counted if slot in self._counted]
        counts = {firings: firings.counts.cpu().numpy() for firings in self._firings if counting}
        return [
            (self.held[slot], int(self._filler.tokens_by_slot[slot]),
             {edit: int(counts[firings][slot, columns].sum()) for edit, firings, columns in self._counted[slot]})
            for slot in counting
        ]  # fmt: skip

    # -- growth --------------------------------------------------------------------------------------------------------

    def carry(self, slot: int, prepared: Prepared, old: EditedModel) -> None:
        """Write a version that is in the same slot of `old`, prepared for this reservation.

        RuntimeError if a number would not be the same, bit for bit.
        """
        self.install(slot, prepared)
        if old.held.get(slot) == prepared.version:  # else its slot was cleared meanwhile
            self._require_same(slot, old)

    def go_on_from(self, old: EditedModel) -> None:
        """Take the place of `old`: go on with its counts and its weights, and clear slots that it does not hold."""
        for slot in [slot for slot, version in self.held.items() if old.held.get(slot) != version]:
            self.clear(slot)
        for slot in self.held:
            self._copy_counts(slot, old)
        self.in_weights, self._output = old.in_weights, old._output
        self._filler.forget()

    def release(self) -> None:
        """Give back the memory of the slots at once. A model that is used no more lives until Python finds its circles,
        and to make Python look would stop the worker for half a second."""
        self._rows = self._rows.new_empty(0)
        self._views.release()

    def plain_copies(self, root: nn.Module) -> dict[nn.Module, nn.Module]:
        """Copies of a module and all modules in it, by original: without edits, with the same parameters."""
        return self._around.plain_copies(root)

    def _require_same(self, slot: int, old: EditedModel) -> None:
        """RuntimeError unless a slot has all numbers that it has in `old`, and zeros where an edit has more ranks."""
        for group, tensors in old._slot_tensors.items():
            for name, columns in tensors.columns.items():
                mine = self._slot_tensors[group].columns[name]
                before = _as_ranks(columns.of(old._rows.view(columns.dtype))[slot])
                after = _as_ranks(mine.of(self._rows.view(mine.dtype))[slot])
                if not _same_bits(after[: len(before)], before) or after[len(before) :].any():
                    raise RuntimeError(
                        f"slot {slot} does not keep its numbers: {name} of {group.kind} at {group.site} differs"
                    )

    def _copy_counts(self, slot: int, old: EditedModel) -> None:
        """Go on counting a slot's tokens and firings from the figures of `old`."""
        self._filler.tokens_by_slot[slot] = old._filler.tokens_by_slot[slot]
        before = {label: firings.counts[slot, columns] for label, firings, columns in old._counted.get(slot, ())}
        for label, firings, columns in self._counted.get(slot, ()):
            firings.counts[slot, columns] = before[label]

    # -- proof ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def watched(self) -> Iterator[Counter[str]]:
        """Count how often the model's forward reaches each site that can be edited, by its name."""
        reached = Counter(dict.fromkeys(self._edited_sites, 0))
        watching: list[tuple[Any, str, str]] = []
        for called, (site, site_edits) in self._edited_sites.items():
            at_logits = site.point == "logits"
            watching += [(self._at_logits if at_logits else site_edits, name, called)
                         for name in (("edited",) if at_logits else ("edited", "edited_stream"))]  # fmt: skip

        def counted(act: Callable[..., Any], site: str) -> Callable[..., Any]:
            def count(*args: Any) -> Any:
                reached[site] += 1
                return act(*args)

            return count

        for owner, name, at in watching:
            setattr(owner, name, counted(getattr(owner, name), at))
        try:
            yield reached
        finally:
            for owner, name, _ in watching:
                delattr(owner, name)

    # -- logits ----------------------------------------------------------------------------------------------------

    def note_output(self, hidden: Any) -> None:
        """Note the model's output in this step; None if it is not known (some logits are computed from parts of it)."""
        self._output = hidden if self.edits_logits and isinstance(hidden, Tensor) else None

    def _logit_rows(self, hidden: Tensor) -> Tensor | None:
        """Tokens of the step that the rows of `hidden` belong to; None if no edit applies to any of them."""
        if self._filler.all_base:
            return None
        output, last, begin = self._output, self._filler.last_rows, None
        if output is not None and hidden.untyped_storage().data_ptr() == output.untyped_storage().data_ptr():
            begin = output.storage_offset()  # a view of the model's output: prompt log-probabilities, a row per token
        elif output is None and hidden.untyped_storage().nbytes() > hidden.nbytes:
            begin = 0  # such a view too, of the output that a replayed CUDA graph keeps
        if begin is not None:
            first = (hidden.storage_offset() - begin) // hidden.shape[-1]
            return torch.arange(first, first + len(hidden), device=hidden.device)
        if len(hidden) != len(last):
            raise RuntimeError(
                f"logits of {len(hidden)} tokens are wanted of a step with {len(last)} requests: which "
                "tokens those are is unknown, so their edits cannot be applied"
            )
        self._last_rows.write(last)
        return self._last_rows.tensor[: len(last)]

    # -- the step --------------------------------------------------------------------------------------------------

    def slot_of(self, claim: Any) -> int:
        """The slot that a request may use. FalseClaim when it does not hold the version that the request claims."""
        slot, version, _ = (BASE_SLOT, None, 1.0) if claim is None else Claim.of(claim)
        if slot == BASE_SLOT and version not in self.in_weights:
            raise FalseClaim(
                f"a request wants {_named(version)}, and the weights hold {' or '.join(map(_named, self.in_weights))}: "
                "refusing to answer it with other weights"
            )
        holds = slot == BASE_SLOT or (slot in self.held and self.held[slot] == version and None in self.in_weights)
        if not holds:
            raise FalseClaim(
                f"a request claims version {str(version)[:12]} in slot {slot}, which holds "
                f"{self.held.get(slot, 'nothing')[:12]}: refusing to answer it with other edits"
            )
        return int(slot)

    def weights_hold(self, version: str | None, *, keep_running: bool) -> None:
        """Note the version in the weights from now on; with `keep_running`, requests of other versions go on."""
        self.in_weights = {version, *(self.in_weights if keep_running else ())}
        self._filler.forget()

    def set_step(self, batch: StepBatch) -> None:
        """Write each token's slot in the coming step, and its scale for each scope."""
        self._filler.fill(batch)


def _joins_sum(group: EditGroup, reservation: Reservation, site_modules: Mapping[Site, SiteModule]) -> bool:
    """True if a group's result can join the sum over workers that its module makes anyway, at no cost.

    It can if it is linear in a divided vector. Edits that read the site itself, in an earlier stage or the same, must
    not see it yet; with such edits its dot products are added up in a sum of their own.
    """
    divided = {site: site_modules[site].shard.divided for site in (group.site, group.reads)}
    if not SLOT_TENSORS[group.kind].linear or divided[group.site] or not divided[group.reads]:
        return False
    stage = KINDS[group.kind].order.stage
    here = (each for each in reservation.capacities if each.site == each.reads == group.site)
    return all(KINDS[each.kind].order.stage > stage for each in here)


def _as_ranks(numbers: Tensor) -> Tensor:
    """A slot tensor of one slot as rows, one for each rank; a single number is one row."""
    return numbers if numbers.ndim else numbers.unsqueeze(0)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def _digest(version: str, row: Tensor) -> str:
    return hashlib.sha256(version.encode() + row.cpu().numpy().tobytes()).hexdigest()


def _named(version: str | None) -> str:
    return "the base model" if version is None else f"version {version[:12]}"


def _counted_edits(group: SlotTensors, edits: Iterable[Edit]) -> list[CountedEdit]:
    """The edits of a group whose firings are counted."""
    counted, begin = list[CountedEdit](), 0
    for edit in edits:
        if edit.fires and group.firings is not None:
            first = group.column + begin
            counted.append((edit.label, group.firings, slice(first, first + edit.capacity)))
        begin += edit.capacity
    return counted
