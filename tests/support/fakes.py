"""Fakes that implement the real seams: a model of vLLM's shapes, the engine's workers, a store that can go away."""

from __future__ import annotations

import asyncio
import copy
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry
from torch import Tensor, nn

from tests.support.bundles import publish
from vllm_edits.edit_store import (
    BaseModelRef,
    Bundle,
    EditStore,
    Offset,
    Provenance,
    Site,
    TagEntry,
    Widths,
    check,
)
from vllm_edits.edit_store.architectures import supported
from vllm_edits.edit_store.backends import Backend, Item
from vllm_edits.edit_store.edits import Array, ReadingEdit, order_at_site
from vllm_edits.edit_store.errors import BundleRefused, EditsError, InstallRefused, Reason, StoreUnavailable
from vllm_edits.edit_store.probes import Probe, Trace
from vllm_edits.edit_store.reading.cache import NodeCache
from vllm_edits.edit_store.reading.reader import Reader
from vllm_edits.edit_store.signing import SigningKey
from vllm_edits.edit_store.trust import Trust
from vllm_edits.plugin.claim import Claim
from vllm_edits.plugin.graph.edited_model import EditedModel, Prepared, SiteModule
from vllm_edits.plugin.graph.reservation import Capacity, EditGroup, Reservation
from vllm_edits.plugin.graph.slot_products import EXPRESSIONS, SlotProducts
from vllm_edits.plugin.graph.step_filler import Extents, StepBatch
from vllm_edits.plugin.graph.tensor_parallel import ONLY_RANK, AllReduce, Rank, identity
from vllm_edits.plugin.metrics import PREFIX, Metrics
from vllm_edits.plugin.request import Request
from vllm_edits.plugin.serving.coordinator import Extras, LocalCoordinator
from vllm_edits.plugin.serving.lease import Lease
from vllm_edits.plugin.serving.residency import Resident
from vllm_edits.plugin.serving.status import status
from vllm_edits.plugin.serving.swap import Swap
from vllm_edits.plugin.serving.workers import Workers
from vllm_edits.plugin.vllm_host.architectures import site_modules
from vllm_edits.plugin.weights import weights_reservation
from vllm_edits.plugin.weights.patched_weights import Patch, PatchedWeights, ProjectionPart, Whole
from vllm_edits.plugin.weights.plain_weight import PlainWeight
from vllm_edits.server_config.settings import Reserve

WIDTHS = Widths(layers=3, hidden=8, mlp=16, heads=2, kv_heads=1, head_dim=4, vocab=24)
BASE = BaseModelRef(name="tiny", architecture="LlamaForCausalLM", widths=WIDTHS, files={"model.safetensors": "a" * 64})
MAX_TOKENS = 32
SLOTS = 3

cheaply = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""For every property here: the machine is shared with real servers, so nothing is judged by the clock."""

Answer = dict[str, Any]
Read = TypeVar("Read")


class Projection(nn.Module):
    """A linear layer that answers as vLLM's do: (output, bias)."""

    def __init__(self, reads: int, writes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(writes, reads) / reads**0.5, requires_grad=False)
        self.bias: nn.Parameter | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return nn.functional.linear(x, self.weight, self.bias), None


class SummingProjection(Projection):
    """One of a vector that workers may divide: what each gives is added up."""

    reduce_results = True
    over_workers = staticmethod(identity)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        output, bias = super().forward(x)
        return (self.over_workers(output) if self.reduce_results else output), bias


class TinyAttention(nn.Module):
    """Fused queries, keys and values; token-wise, so nothing here mixes tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.widths = WIDTHS
        self.qkv_proj = Projection(WIDTHS.hidden, sum(map(WIDTHS.of, ("q.out", "k.out", "v.out"))))
        self.o_proj = SummingProjection(WIDTHS.of("attn.z"), WIDTHS.hidden)

    def forward(self, hidden_states: Tensor) -> Tensor:
        widths = [self.widths.of(name) for name in ("q.out", "k.out", "v.out")]
        q, k, v = self.qkv_proj(hidden_states)[0].split(widths, -1)
        group = self.widths.heads // self.widths.kv_heads
        output: Tensor = self.o_proj(q.tanh() * k.repeat(1, group) + v.repeat(1, group))[0]
        return output


class TinyMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = Projection(WIDTHS.hidden, 2 * WIDTHS.mlp)
        self.down_proj = SummingProjection(WIDTHS.mlp, WIDTHS.hidden)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x)[0].chunk(2, -1)
        output: Tensor = self.down_proj(gate.relu() * up)[0]
        return output


class TinyLayer(nn.Module):
    """A decoder layer with the residual stream in two halves."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = TinyAttention(), TinyMLP()

    def forward(self, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        stream = hidden_states if residual is None else hidden_states + residual
        residual = stream + self.self_attn(hidden_states=stream.tanh())
        return self.mlp(residual.tanh()), residual


class TinyNorm(nn.Module):
    def forward(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return (hidden + residual).tanh(), hidden + residual


class TinyLogits(nn.Module):
    def forward(self, lm_head: Projection, hidden_states: Tensor) -> Tensor:
        logits: Tensor = lm_head(hidden_states)[0]
        return logits


class TinyModel(nn.Module):
    """Laid out like vLLM's Llama, so that the real table of architectures finds its sites."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.model: Any = nn.Module()
        self.model.layers = nn.ModuleList(TinyLayer() for _ in range(WIDTHS.layers))
        self.model.norm = TinyNorm()
        self.lm_head = Projection(WIDTHS.hidden, WIDTHS.vocab)
        self.logits_processor = TinyLogits()

    def forward(self, x: Tensor) -> Tensor:
        """The last hidden states, from which `logits` are computed."""
        hidden, residual = x, None
        for layer in self.model.layers:
            hidden, residual = layer(hidden, residual)
        final: Tensor = self.model.norm(hidden, residual)[0]
        return final

    def logits(self, hidden: Tensor) -> Tensor:
        """As vLLM's compute_logits."""
        computed: Tensor = self.logits_processor(self.lm_head, hidden)
        return computed


def divided(model: TinyModel, worker: Rank, over_workers: AllReduce) -> TinyModel:
    """One worker's part of a model, cut as tensor parallel cuts it."""
    mine = copy.deepcopy(model)
    for layer in mine.model.layers:
        layer.self_attn.widths = WIDTHS.per_worker(worker.size)
        for projection, points in (
            (layer.self_attn.qkv_proj, ("q.out", "k.out", "v.out")), (layer.mlp.gate_up_proj, ("gate.out", "up.out")),
        ):  # fmt: skip
            parts = projection.weight.split([WIDTHS.of(point) for point in points])
            own = [worker.shard(WIDTHS, point).of(part.T).T for point, part in zip(points, parts, strict=True)]
            projection.weight = nn.Parameter(torch.cat(own), requires_grad=False)
        for projection, point in ((layer.self_attn.o_proj, "attn.z"), (layer.mlp.down_proj, "mlp.h")):
            own_columns = worker.shard(WIDTHS, point).of(projection.weight)
            projection.weight = nn.Parameter(own_columns.contiguous(), requires_grad=False)
            projection.over_workers = over_workers
    return mine


At = Callable[[str, Array], Array]
"""What becomes of a vector at a site."""


def tiny_by_formula(model: TinyModel, x: Tensor, at: At) -> Array:
    """The tiny model's logits in numpy, for all tokens; `at` is called at every site."""
    stream = at("embed.out", x.numpy())
    for number, layer in enumerate(model.model.layers):
        here = f"layers.{number}."
        modules = (layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj)
        weights = [module.weight.numpy().T for module in modules]
        attended = at(f"{here}attn.in", np.tanh(stream)) @ weights[0]
        ends = [WIDTHS.of("q.out"), WIDTHS.of("q.out") + WIDTHS.of("k.out")]
        q, k, v = np.split(attended, ends, -1)
        q, k, v = at(f"{here}q.out", q), at(f"{here}k.out", k), at(f"{here}v.out", v)
        z = at(f"{here}attn.z", np.tanh(q) * np.tile(k, 2) + np.tile(v, 2))
        stream = stream + at(f"{here}attn.out", z @ weights[1])
        gate, up = np.split(at(f"{here}mlp.in", np.tanh(stream)) @ weights[2], 2, -1)
        h = at(f"{here}mlp.h", np.maximum(at(f"{here}gate.out", gate), 0) * at(f"{here}up.out", up))
        stream = at(f"{here}resid", stream + at(f"{here}mlp.out", h @ weights[3]))
    return at("logits", at("final", np.tanh(stream)) @ model.lm_head.weight.numpy().T)


def edits_by_formula(pairs: Sequence[tuple[Any, Mapping[str, Array]]]) -> At:
    """What edits do to every site, by the `apply` of their kinds, in the order that these declare."""
    seen: dict[str, Array] = {}

    def at(site: str, value: Array) -> Array:
        here = sorted((pair for pair in pairs if pair[0].site == site), key=lambda pair: order_at_site(pair[0]))
        for _, stage in groupby(here, key=lambda pair: pair[0].order.stage):
            before = value
            for edit, fields in stage:
                reads = before if edit.source == site else seen[edit.source]
                vectors = (reads, value) if isinstance(edit, ReadingEdit) else (value,)
                value = edit.apply(*vectors, **fields)
        seen[site] = value
        return value

    return at


def edited_model(
    model: TinyModel, reservation: Reservation, *, slots: int, dtype: torch.dtype = torch.float32,
    worker: Rank = ONLY_RANK, over_workers: AllReduce = identity, products: SlotProducts = EXPRESSIONS,
    sites: Mapping[Site, SiteModule] | None = None,
) -> EditedModel:  # fmt: skip
    """The real thing on a tiny model, or on one worker's part of it. sites: of a model with edits; these are not put
    around its modules then."""
    attached = sites is None
    sites = site_modules(model, BASE.architecture, WIDTHS, worker) if sites is None else sites
    edited = EditedModel(
        sites, reservation, slots=slots, max_tokens=MAX_TOKENS, dtype=dtype, device=torch.device("cpu"),
        worker=worker, over_workers=over_workers, products=products,
    )  # fmt: skip
    if attached:
        edited.attach()
    return edited


def plain_weights(model: TinyModel, worker: Rank = ONLY_RANK, whole: Whole | None = None) -> PatchedWeights:
    """Every projection of the tiny model, those of `attn.out` and `mlp.out` with a bias."""
    architecture, sites = supported(BASE.architecture), site_modules(model, BASE.architecture, WIDTHS, worker)
    names = {module: name for name, module in model.named_modules()}
    reserved = weights_reservation.usual(architecture, WIDTHS)
    for site in reserved:
        module: Any = sites[site].module
        if site.point in ("attn.out", "mlp.out"):
            module.bias = nn.Parameter(torch.zeros(WIDTHS.hidden), requires_grad=False)
    modules = {
        names[sites[site].module]: PlainWeight(sites[site].module.weight, sites[site].module.bias) for site in reserved
    }
    reads = architecture.projections()
    parts = {
        site: ProjectionPart(names[at.module], at.start or 0, at.shard, sites[site.beside(reads[site.point])].shard)
        for site, at in ((site, sites[site]) for site in reserved)
    }
    return PatchedWeights(modules, parts, architecture, lambda: 1 << 30, whole)


@dataclass(frozen=True, eq=False)
class RequestStep:
    """What a request has in the coming step. `claim` is None for the base, else [slot, version, strength]."""

    claim: Any
    tokens: int
    start: int = 0
    prompt: int = 0
    embedded: NDArray[np.bool_] | None = None


def set_step(edited: EditedModel, requests: Sequence[RequestStep], input_ids: Tensor | None = None) -> None:
    """Tell the model of a step, as a runner does. input_ids: of every token; by default 0."""
    tokens, starts, prompts = (
        np.array([getattr(request, field) for request in requests], dtype=np.int64)
        for field in ("tokens", "start", "prompt")
    )
    ids = torch.zeros(tokens.sum(), dtype=torch.int64) if input_ids is None else input_ids
    extents = Extents(tokens, starts, lambda: prompts, ids)
    edited.set_step(StepBatch(requests, attrgetter("claim"), attrgetter("embedded"), lambda: extents))


class FakeWorker:
    """`EditsWorker` without vLLM: the same answers, around a real EditedModel."""

    def __init__(self, store: EditStore, reservation: Reservation, slots: int, staging_ready: asyncio.Event) -> None:
        self.model = TinyModel()
        self._sites = site_modules(self.model, BASE.architecture, WIDTHS)
        self.edited = edited_model(self.model, reservation, slots=slots)
        self.grown: EditedModel | None = None
        self.before: EditedModel | None = None
        self._slots = slots
        self._store = store
        self._staging_ready = staging_ready
        self.ready: dict[str, Prepared] = {}
        self.weights = plain_weights(self.model)
        self.patches: dict[str, Patch] = {}

    def edits_stage(self, version: str) -> Answer:
        return {}

    def edits_staged(self, version: str) -> Answer:
        if not self._staging_ready.is_set():
            return {"pending": True}

        def prepare() -> Answer:
            bundle = self._store.bundle(version)
            self.ready[version] = self.edited.prepare(version, bundle.manifest, check(bundle, BASE))
            return {}

        return answered(prepare)

    def edits_stage_weights(self, version: str) -> Answer:
        return {}

    def edits_weights_staged(self, version: str) -> Answer:
        def prepare() -> Answer:
            bundle = self._store.bundle(version)
            self.patches[version] = self.weights.prepare(version, bundle.manifest, check(bundle, BASE))
            return {}

        return answered(prepare) if self._staging_ready.is_set() else {"pending": True}

    def edits_put_weights(self, version: str | None, epoch: int, keep_running: bool) -> Answer:
        def put() -> Answer:
            if self.weights.version != version:
                patch = None if version is None else self.weights.known(version) or self.patches.pop(version, None)
                if version is not None and patch is None:
                    return {"absent": True}
                self.weights.install(patch, epoch)
                self.edited.weights_hold(version, keep_running=keep_running)
            return {"digest": self.weights.digest, "rank": 0}

        return answered(put)

    def edits_install(self, slot: int, version: str, evicted: str | None) -> Answer:
        def install() -> Answer:
            if self.edited.held.get(slot) == version:
                return {"digest": self.edited.digest(slot), "rank": 0, "firings": []}
            if version not in self.ready:
                return {"absent": True}
            firings = self.edited.firings(slot)
            if evicted is not None:
                self.edited.clear(slot)
            return {"digest": self.edited.install(slot, self.ready[version]), "rank": 0, "firings": firings}

        return answered(install)

    def edits_grow(self, reserve: list[dict[str, Any]], scopes: int, limit_bytes: int | None) -> Answer:
        def grow() -> Answer:
            entries = [Reserve(**item) for item in reserve]
            reservation = Reservation.from_settings(entries, supported(BASE.architecture), WIDTHS, scopes)
            self.grown = edited_model(self.model, reservation, slots=self._slots, sites=self._sites)
            if limit_bytes is not None and self.grown.bytes_reserved > limit_bytes:
                raise InstallRefused("a larger reservation", [Reason("memory", f"{limit_bytes} bytes are allowed")])
            return {}

        return answered(grow)

    def edits_grow_poll(self) -> Answer:
        def poll() -> Answer:
            assert self.grown is not None
            for slot, version in self.edited.held.items():
                if self.grown.held.get(slot) != version:
                    if slot in self.grown.held:
                        self.grown.clear(slot)
                    bundle = self._store.bundle(version)
                    prepared = self.grown.prepare(version, bundle.manifest, check(bundle, BASE))
                    self.grown.carry(slot, prepared, self.edited)
                    return {"phase": "carrying", "pause": 0.001}
            return {"phase": "ready", "pause": 0.001}

        return answered(poll)

    def edits_grow_switch(self) -> Answer:
        def switch() -> Answer:
            assert self.grown is not None
            if self.before is None:
                if self.edited.held.items() - self.grown.held.items():
                    return {"absent": True}
                self._exchange(self.edited, self.grown)
                self.before, self.ready = self.edited, {}
                self.edited = self.grown
            return {"pause": 0.002}

        return answered(switch)

    def _exchange(self, old: EditedModel, new: EditedModel) -> None:
        new.go_on_from(old)
        old.detach()
        new.attach()

    def edits_grow_end(self, keep: bool) -> Answer:
        def end() -> Answer:
            if not keep and self.before is not None:
                self._exchange(self.edited, self.before)
                self.edited, self.ready = self.before, {}
            self.before = self.grown = None
            return {"pause": 0.001}

        return answered(end)

    def edits_fence(self) -> Answer:
        return {}

    def edits_firings(self) -> Answer:
        return {"rank": 0, "firings": self.edited.firings()}

    def edits_clear(self, slot: int) -> Answer:
        def clear() -> Answer:
            firings = self.edited.firings(slot)
            self.edited.clear(slot)
            return {"rank": 0, "firings": firings}

        return answered(clear)


def answered(act: Callable[[], Answer]) -> Answer:
    """A refusal is an answer too, as in `vllm_edits.plugin.vllm_host.worker`."""
    try:
        return act()
    except BundleRefused as refusal:
        return {"error": str(refusal), "reasons": [[reason.code, reason.message] for reason in refusal.reasons]}
    except EditsError as error:
        return {"error": str(error)}
    except Exception as error:  # noqa: BLE001  a worker must not die of a bad version
        return {"error": repr(error)}


def as_told(_number: int, act: Callable[[], Answer]) -> Answer:
    return act()


def refuse(number: int, act: Callable[[], Answer]) -> Answer:
    """Worker 1 says no, with a reason, before it does anything; worker 0 does as it is told."""
    return {"error": "no", "reasons": [["not_finite", "tensor x holds NaN"]]} if number else act()


def refuse_afterwards(number: int, act: Callable[[], Answer]) -> Answer:
    """Worker 1 does it, and then falls over."""
    return (act(), {"error": "CUDA error"})[1] if number else act()


def lie(number: int, act: Callable[[], Answer]) -> Answer:
    return {**act(), "digest": f"digest of worker {number}"}


def die(_number: int, _act: Callable[[], Answer]) -> Answer:
    raise RuntimeError("the engine did not answer")


class FakeWorkers:
    """`Workers`: every call reaches all workers, and calls are carried out one after the other, as the engine does.

    `overrides[method]` is asked instead of the worker, with its number and the real act: it may refuse before or after,
    lie, or raise. While `staging_ready` is cleared, staging takes its time; while an event of `gates` is, that call
    does. As in the engine, a call whose caller has gone is carried out all the same.
    """

    def __init__(self, store: EditStore, reservation: Reservation, *, slots: int, count: int = 2) -> None:
        self.staging_ready = asyncio.Event()
        self.staging_ready.set()
        self.workers = [FakeWorker(store, reservation, slots, self.staging_ready) for _ in range(count)]
        self.overrides: dict[str, Callable[[int, Callable[[], Answer]], Answer]] = {}
        self.gates: dict[str, asyncio.Event] = {}
        self.calls: list[tuple[Any, ...]] = []
        self.aborted = asyncio.Event()
        self._engine = asyncio.Lock()

    async def abort_all(self) -> None:
        self.aborted.set()

    async def call(self, method: str, *args: Any) -> list[Answer]:
        return await asyncio.shield(asyncio.ensure_future(self._carried_out(method, *args)))

    async def _carried_out(self, method: str, *args: Any) -> list[Answer]:
        async with self._engine:
            await asyncio.sleep(0)
            if method in self.gates:
                await self.gates[method].wait()
            self.calls.append((method, *args))
            acts = [functools.partial(getattr(worker, method), *args) for worker in self.workers]
            override = self.overrides.get(method, as_told)
            return [override(number, act) for number, act in enumerate(acts)]

    def step(self, *leases: Lease) -> None:
        """One step of the engine with a token for each lease; raises when a claim is false on any worker."""
        claims = [None if lease.choice.version is None else [lease.slot, lease.choice.version, 1.0] for lease in leases]
        for worker in self.workers:
            assert [worker.edited.slot_of(claim) for claim in claims] == [lease.slot for lease in leases]

    @property
    def held(self) -> dict[int, str]:
        """Version by slot; all workers hold the same."""
        first, *others = (worker.edited.held for worker in self.workers)
        assert all(other == first for other in others)
        return dict(first)


class FakeEngines:
    """`Continuing`: two engines that say what probes recorded, as far as edits are `applied` to them.

    A claim must be true when it comes. While `answering` is cleared, no answer comes.
    """

    engines = 2
    floor = 0.01
    longest = 5

    def __init__(self, workers: FakeWorkers) -> None:
        self.applied = {0: 1.0, 1: 1.0}
        self.answering = asyncio.Event()
        self.answering.set()
        self.claims: list[Claim | None] = []
        self._workers = workers

    async def continued(self, probe: Probe, claim: Claim | None, engine: int) -> Trace:
        for worker in self._workers.workers if claim is not None else ():
            assert worker.edited.slot_of(list(claim or ())) == claim[0]
        self.claims.append(claim)
        await self.answering.wait()
        if claim is None:
            return probe.base
        base, edited = (np.array(each.logprobs) for each in (probe.base, probe.edited))
        rows = base + self.applied[engine] * (edited - base)
        return probe.edited.model_copy(update={"logprobs": tuple(map(tuple, rows.tolist()))})


def with_probes(bundle: Bundle, *strengths: float) -> Bundle:
    """A bundle with probes of edits that change much, at these strengths or at 1."""
    numbers = np.random.default_rng(next(seeds))

    def trace(tokens: tuple[int, ...]) -> Trace:
        rows = numbers.uniform(-30, -20, size=(len(tokens), 6))
        return Trace(tokens=tokens, logprobs=tuple(map(tuple, rows.tolist())), least=(-99.0,) * len(tokens))

    return bundle.with_probes(
        Probe(prompt=(1, 2, 3), strength=strength, watched=tuple(range(6)), base=trace((4, 5)), edited=trace((4, 5)))
        for strength in strengths or (1.0, 1.0)
    )


class FlakyBackend:
    """A backend that can be cut off: while `down` is a prefix, keys below it cannot be reached ('' for all)."""

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.url = inner.url
        self.parallel = inner.parallel
        self.down: str | None = None

    def _reach(self, key: str) -> None:
        if self.down is not None and key.startswith(self.down):
            raise StoreUnavailable(f"store {self.url}: {key}: the network is down")

    def get(self, key: str) -> bytes:
        self._reach(key)
        return self.inner.get(key)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        self._reach(key)
        return self.inner.get_range(key, start, length)

    def put(self, key: str, data: bytes) -> None:
        self._reach(key)
        self.inner.put(key, data)

    def create(self, key: str, data: bytes) -> None:
        self._reach(key)
        self.inner.create(key, data)

    def list(self, prefix: str) -> Iterator[Item]:
        self._reach(prefix)
        return self.inner.list(prefix)

    def delete(self, key: str) -> None:
        self._reach(key)
        self.inner.delete(key)


class Overtaken(EditStore):
    """A store object that somebody else overtakes once, just after it reads what it decides on."""

    overtake: Callable[[], Any] | None = None

    def head(self, name: str, tag: str = "prod") -> TagEntry | None:
        return self._overtaken(lambda: super(Overtaken, self).head(name, tag))

    def history(self, name: str, tag: str = "prod") -> list[TagEntry]:
        return self._overtaken(lambda: super(Overtaken, self).history(name, tag))

    def _overtaken(self, read: Callable[[], Read]) -> Read:
        found = read()
        overtake, self.overtake = self.overtake, None
        if overtake is not None:
            overtake()
        return found


seeds = count()


def version_of(name: str, base: BaseModelRef = BASE, edit: Any = None) -> Bundle:
    """A new version of a variant: random numbers of one edit."""
    edit = edit or Offset(site="layers.1.resid")
    numbers = np.random.default_rng(next(seeds))
    fields = {field: numbers.normal(size=shape) for field, shape in edit.shapes(WIDTHS).items()}
    return Bundle.create(name, base, [(edit, fields)], Provenance(tool="tests", method="random"))


@dataclass
class Asked:
    """The workers, by a way that may be exchanged for another."""

    workers: Workers

    async def call(self, method: str, *args: Any) -> list[Answer]:
        return await self.workers.call(method, *args)

    async def abort_all(self) -> None:
        await self.workers.abort_all()


class Server:
    """One API process over two fake workers and a store in memory that can be cut off."""

    def __init__(self, url: str, slots: int = SLOTS, trust: Trust | None = None, node: Path | None = None,
                 signer: SigningKey | None = None, *, weights: str | None = None, **options: Any) -> None:  # fmt: skip
        self.store = EditStore(url, create=True, signer=signer)
        self.backend = FlakyBackend(self.store.backend)
        self.store.backend = self.backend
        site = Site(1, "resid")
        capacity = Capacity(features=frozenset({"scaled"}))
        reservation = Reservation({EditGroup(site, kind, site): capacity for kind in ("offset", "gate")}, scopes=1)
        self.workers = FakeWorkers(self.store, reservation, slots=slots)
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry)
        self.asked = Asked(self.workers)
        self.engines = FakeEngines(self.workers)
        self.core = LocalCoordinator(
            Reader(self.store, trust, NodeCache(node or Path(tempfile.mkdtemp()))),
            self.asked,
            self.metrics,
            base=BASE,
            base_names=("tiny", "small"),
            reservation=reservation,
            slot_bytes=lambda _, capacity: 1024 * capacity.rank,
            slots=slots,
            default_tag="prod",
            extras=Extras(weights_key=(weights, "prod") if weights else None, continuing=self.engines, **options),
        )

    async def sync(self, *, retry_refused: bool = False) -> list[Swap]:
        """Look at the store once; also what changes the weights has ended then."""
        return await self.core.reconciler.sync(retry_refused=retry_refused, wait_for_weights=True)

    async def lease(self, model: str = "", strength: float | None = None, **told: Any) -> Lease:
        """A lease for a request of this model."""
        return await self.core.admission.lease(Request(model, () if strength is None else (str(strength),), **told))

    def status(self) -> Mapping[str, Any]:
        """What the server says of itself."""
        core = self.core
        return status(core.reconciler, core.admission, core.slots, experiments=core.experiments, weights=core.weights,
                      growth=core.growth, prober=core.prober)  # fmt: skip

    def refusal(self, model: str) -> str:
        """Why a variant is not served."""
        name, _, tag = model.partition("@")
        return self.core.reconciler.refusal(name, tag or "prod")

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(PREFIX + name, labels) or 0.0

    async def promote(self, *bundles: Bundle, tag: str = "prod") -> list[str]:
        """Publish, promote and follow; returns the versions."""
        versions = [publish(self.store, bundle, tag) for bundle in bundles]
        await self.sync()
        await self.core.slots.wait_drained()
        return versions

    async def ask(self, model: str) -> str | None:
        """A whole request of one step; returns the version that answered."""
        lease = await self.lease(model)
        with lease.hold():
            self.workers.step(lease)
        await self.core.slots.wait_drained()
        return lease.choice.version

    def residents(self) -> dict[str, Resident]:
        return self.core.slots.residency.residents()

    def check(self) -> None:
        """Workers hold what the API process believes, the gauge says so, and no slot is lost."""
        assert self.workers.held == {one.slot: version for version, one in self.residents().items()}
        assert self.core.slots.residency.used == len(self.residents()) == self.metric("slots_used")
        assert len(self.core.slots.residency._free) == self.core.slots.residency.slots - len(self.residents())
