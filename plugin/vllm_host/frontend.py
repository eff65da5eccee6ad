"""The API server's side: attaches to the workers, opens the store, and replaces the engine in vLLM's handlers."""

from __future__ import annotations

import asyncio
import atexit
import importlib.metadata
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import vllm

from vllm_edits.edit_store.architectures import supported
from vllm_edits.edit_store.base_ref import BaseModelRef
from vllm_edits.edit_store.byte_sizes import sized
from vllm_edits.edit_store.errors import EditsError, NotFound, UnsupportedHost
from vllm_edits.edit_store.refs import Ref
from vllm_edits.plugin.experiments.exposure_log import ExposureLog
from vllm_edits.plugin.experiments.feedback_token import FeedbackTokens
from vllm_edits.plugin.experiments.resolver import Resolver
from vllm_edits.plugin.graph.reservation import Reservation
from vllm_edits.plugin.graph.slot_bytes import slot_bytes
from vllm_edits.plugin.http import admin_token
from vllm_edits.plugin.http.api_key import ApiKeys
from vllm_edits.plugin.http.middleware import VariantMiddleware, record_late
from vllm_edits.plugin.http.routes import router
from vllm_edits.plugin.metrics import Metrics
from vllm_edits.plugin.open_store import open_reader
from vllm_edits.plugin.plan import weights_key
from vllm_edits.plugin.request import Request
from vllm_edits.plugin.serving.coordinator import Coordinator, Extras, LocalCoordinator
from vllm_edits.plugin.serving.coordinator_socket import (
    CoordinatorServer,
    FencedWorkers,
    RemoteCoordinator,
    socket_path,
)
from vllm_edits.plugin.serving.probing import Continuing
from vllm_edits.plugin.serving.workers import Workers
from vllm_edits.plugin.vllm_host import compat
from vllm_edits.plugin.vllm_host.continuing import EngineContinuing, can_probe
from vllm_edits.plugin.vllm_host.engine_gate import EngineGate
from vllm_edits.plugin.vllm_host.scheduler import forks
from vllm_edits.plugin.vllm_host.served_models import ServedModels
from vllm_edits.server_config.settings import EditSettings, Reserve, read_settings

logger = logging.getLogger("vllm.edits")

_LOOK_SECONDS = 0.5


class EngineWorkers:
    """`Workers` through the engine client's collective call. With data parallel, the workers of all engines."""

    def __init__(self, engine_client: Any) -> None:
        self._engine = engine_client

    @property
    def engine(self) -> Any:
        """The engine client."""
        return self._engine

    @property
    def api_process(self) -> tuple[int, int]:
        """The number of this API server process, and the count of all."""
        parallel = self._engine.vllm_config.parallel_config
        return parallel._api_process_rank, parallel._api_process_count  # noqa: SLF001  vLLM has no public name for them

    async def call(self, method: str, *args: Any) -> list[dict[str, Any]]:
        answering = asyncio.ensure_future(self._answers(method, *args))
        try:
            # vLLM never answers a call if its engine has died.
            while not (await asyncio.wait({answering}, timeout=_LOOK_SECONDS))[0]:
                if self._engine.errored:
                    raise EditsError("the engine has ended")
            return answering.result()
        finally:
            answering.cancel()

    async def _answers(self, method: str, *args: Any) -> list[dict[str, Any]]:
        if self._engine.vllm_config.parallel_config.data_parallel_size == 1:
            answers: list[dict[str, Any]] = await self._engine.collective_rpc(method, args=args)
            return answers
        # The public call reaches every engine too, but returns only the first engine's answer.
        client = compat.need(self._engine, "engine_core")
        ask, engines = compat.need(client, "_call_utility_async"), compat.need(client, "core_engines")
        by_engine = await asyncio.gather(
            *(ask("collective_rpc", method, None, args, None, engine=engine) for engine in engines)
        )
        return [answer for answers in by_engine for answer in answers]

    async def abort_all(self) -> None:
        paused = await self._engine.is_paused()
        try:
            await self._engine.pause_generation(mode="abort", clear_cache=False)
        finally:
            if not paused:  # else the operator has paused it
                await self._engine.resume_generation()


class EditsEndpoints:
    """vLLM's `EndpointPlugin`, one per API server process. Its parts exist after `init_state`."""

    name = "edits"
    required_tasks: tuple[str, ...] | None = ("generate",)

    def __init__(self) -> None:
        self._coordinator: Coordinator | None = None
        self._metrics: Metrics | None = None
        self._keys = ApiKeys((), ())
        self._settings: EditSettings | None = None
        self._following: list[asyncio.Task[None]] = []

    def attach_router(self, app: Any) -> None:
        """Add middleware and routes. vLLM calls it while it builds its app."""
        app.add_middleware(VariantMiddleware, serving=lambda: (self._asked(), self._metrics, self._keys))
        app.include_router(router(self._asked, self._admin_token_file, lambda: self._keys))

    def _admin_token_file(self) -> str | None:
        return self._settings.admin_token_file if self._settings else None

    def _asked(self) -> Coordinator:
        if self._coordinator is None:
            raise UnsupportedHost("the plugin is not attached to an engine yet")
        return self._coordinator

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Check everything that must be true before the first request, and start. An exception ends the start."""
        _require_no_development()
        config = engine_client.vllm_config
        load_format = config.load_config.load_format
        if load_format != compat.LOAD_FORMAT:
            raise UnsupportedHost(
                f"VLLM_PLUGINS names edits, but the model was loaded with --load-format {load_format}. "
                f"Start with --load-format {compat.LOAD_FORMAT}, or without edits in VLLM_PLUGINS"
            )
        settings = self._settings = read_settings(config.additional_config)
        compat.check_version(any_vllm=settings.any_vllm)
        compat.check_seams(any_vllm=settings.any_vllm)
        admin_token.check(settings.admin_token_file)
        models = compat.need(state, "openai_serving_models")
        self._metrics = Metrics()
        base_names = tuple(path.name for path in models.base_model_paths)
        _require_plain(base_names)
        self._keys = ApiKeys(_api_keys(args), base_names)
        workers = EngineWorkers(engine_client)
        self._coordinator, description = await self._owning(workers, settings, self._metrics, base_names)
        coordinator = self._coordinator
        self._metrics.server_info.labels(base_names[0], importlib.metadata.version("vllm-edits"), vllm.__version__).set(
            1
        )
        gate = EngineGate(
            engine_client,
            coordinator.renew,
            forks=forks(config),
            lease_of=lambda target: coordinator.lease(Request(target=target)),
            note=coordinator.record,
            record_late=partial(record_late, self._metrics),
        )
        put_before_handlers(state, {engine_client: gate, models: ServedModels(models, self._coordinator.served)})
        logger.info("%s; %s", versions(config), description)

    async def _owning(
        self, workers: EngineWorkers, settings: EditSettings, metrics: Metrics, base_names: tuple[str, ...]
    ) -> tuple[Coordinator, str]:
        """The coordinator: in the first API server process it owns the slots, in other processes it asks the first."""
        rank, count = workers.api_process
        if rank:
            remote = RemoteCoordinator(socket_path(), partial(workers.call, "edits_fence"))
            await remote.connect()
            return remote, f"API server process {rank + 1} of {count}, uses the slots of the first"
        asked: Workers = workers
        if count > 1:
            path = socket_path()
            atexit.register(shutil.rmtree, path.parent, ignore_errors=True)
            server = CoordinatorServer(path)
            asked = FencedWorkers(workers, server.fence)
        continuing = EngineContinuing(workers.engine) if can_probe(workers.engine.vllm_config) else None
        coordinator, description = await start(asked, settings, metrics, base_names, continuing)
        if count > 1:
            await server.start(coordinator)
        self._following = [
            asyncio.create_task(coordinator.reconciler.follow(settings.poll_seconds)),
            asyncio.create_task(coordinator.slots.follow_firings()),
            asyncio.create_task(coordinator.experiments.watch()),
        ]
        return coordinator, description


async def start(
    workers: Workers, settings: EditSettings, metrics: Metrics, base_names: tuple[str, ...],
    continuing: Continuing | None,
) -> tuple[LocalCoordinator, str]:  # fmt: skip
    """Attach to every worker, open the store, install promoted versions. Also returns a line for the log.

    continuing: the engines, as far as they can answer probes
    """
    if continuing is None and settings.probes == "require":
        raise UnsupportedHost(
            "edits.probes is require, and probes compare log-probabilities. Start with --logprobs-mode raw_logprobs"
        )
    if continuing is None and settings.probes == "run":
        logger.warning("no version is probed, because --logprobs-mode tells no log-probabilities")
    answers = await workers.call("edits_attach")
    for answer in answers:
        if "error" in answer:
            raise UnsupportedHost(f"a worker cannot serve edits: {answer['error']}")
    if any(answer != answers[0] for answer in answers):
        raise UnsupportedHost(
            "the workers have different reservations. Probably the store changed while they started. Start again, or "
            "set edits.reserve"
        )
    described = answers[0]
    base = BaseModelRef.model_validate(described["base"])
    reserve = [Reserve(**item) for item in described["reserve"]]
    reservation = Reservation.from_settings(reserve, supported(base.architecture), base.widths, described["scopes"])
    coordinator = LocalCoordinator(
        await asyncio.to_thread(open_reader, settings, signs=True),
        workers,
        metrics,
        base=base,
        base_names=base_names,
        reservation=reservation,
        slot_bytes=slot_bytes(base.widths, getattr(torch, described["dtype"]), described["workers"]),
        slots=described["slots"],
        default_tag=settings.default_tag,
        extras=Extras(
            weights_key=weights_key(settings),
            weights_running=settings.weights_running,
            weights_patience_seconds=settings.weights_patience_seconds,
            exposures=ExposureLog(_path(settings.exposure_folder), settings.exposure_bytes),
            feedback_tokens=FeedbackTokens.of(_path(settings.feedback_key_file)),
            resolver=Resolver.of(settings.arm_resolver),
            probes=settings.probes,
            continuing=continuing,
            grow=settings.grow,
            grow_bytes=settings.grow_bytes,
            headroom=settings.reserve_headroom,
        ),
    )
    await coordinator.reconciler.sync(wait_for_weights=True)
    patched, kept = described["weights"]["sites"], sized(described["weights"]["bytes"])
    in_weights = f"; {settings.weights} in the weights, {patched} projections of {kept}" if patched else ""
    return coordinator, (
        f"runner {described['runner']}, {len(answers)} worker(s), {described['slots']} slots, "
        f"{len(reservation.sites())} sites, {sized(described['bytes'])} reserved: {reservation}{in_weights}"
    )


def _path(setting: str | None) -> Path | None:
    return None if setting is None else Path(setting)


def _require_no_development() -> None:
    """UnsupportedHost if any client may call the workers' methods."""
    if os.environ.get("VLLM_SERVER_DEV_MODE", "0") not in ("", "0"):
        raise UnsupportedHost(
            "VLLM_SERVER_DEV_MODE lets every client install versions through /collective_rpc. Start without it"
        )


def _require_plain(base_names: Iterable[str]) -> None:
    """UnsupportedHost if a name of the base model looks like a tag or a version of a variant."""
    for name in base_names:
        with suppress(NotFound):
            if "@" in name and Ref.parse(name):
                raise UnsupportedHost(
                    f"--served-model-name {name} looks like a tag or a version of a variant, so the base model could "
                    "answer in its place. Choose another name"
                )


def _api_keys(args: Any) -> list[str]:
    """The API keys of vLLM: those of --api-key, else the key in VLLM_API_KEY."""
    return [key for key in (compat.need(args, "api_key") or [os.environ.get("VLLM_API_KEY")]) if key]


def versions(config: Any) -> str:
    """A line with the versions and the compilation mode."""
    mode = config.compilation_config.mode.name
    return f"vllm-edits {importlib.metadata.version('vllm-edits')} on vLLM {vllm.__version__}, compilation {mode}"


def put_before_handlers(state: Any, stand_ins: dict[Any, Any]) -> None:
    """Replace each original by its stand-in (the gate, the model list) in every handler of vLLM.

    A handler with the original engine would answer a variant with the base model. So a missed handler ends the start.
    """
    replacements = {id(original): stand_in for original, stand_in in stand_ins.items()}
    holders = [vars(state)["_state"], *(vars(handler) for handler in _handlers(state))]
    replaced = 0
    for attributes in holders:
        for name, value in list(attributes.items()):
            if id(value) in replacements:
                attributes[name] = replacements[id(value)]
                replaced += 1
    if replaced < len(replacements) or any(
        id(value) in replacements for holder in holders for value in holder.values()
    ):
        raise UnsupportedHost("vLLM's HTTP handlers use the engine in an unexpected way. Use a supported version")


def _handlers(state: Any) -> Iterator[Any]:
    """Every object of vLLM's HTTP layer that is reachable from the app's state."""
    seen: set[int] = set()
    waiting = list(vars(state)["_state"].values())
    while waiting:
        found = waiting.pop()
        if id(found) in seen or not type(found).__module__.startswith("vllm.entrypoints"):
            continue
        seen.add(id(found))
        if hasattr(found, "__dict__"):
            yield found
            waiting.extend(vars(found).values())
