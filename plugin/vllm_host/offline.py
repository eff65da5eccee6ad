"""Edited variants for Python users of `vllm.LLM`, without a server.

    llm = LLM(model, load_format="edits", additional_config={"edits": {"store": "/path/to/store"}})
    variants = Variants(llm)
    variants.generate("polite", ["Hello"], SamplingParams(max_tokens=20))
    variants.generate(["polite", None], ["Hello", "Hello"], SamplingParams(max_tokens=20))   # mixed in one batch

Start Python with VLLM_PLUGINS=edits, as for a server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import ExitStack
from typing import Any

from prometheus_client import CollectorRegistry

from vllm_edits.plugin.metrics import Metrics
from vllm_edits.plugin.request import Request
from vllm_edits.plugin.serving.coordinator import LocalCoordinator
from vllm_edits.plugin.serving.lease import Lease
from vllm_edits.plugin.vllm_host import compat
from vllm_edits.plugin.vllm_host.addressing import address
from vllm_edits.plugin.vllm_host.continuing import OfflineContinuing, can_probe
from vllm_edits.plugin.vllm_host.frontend import start
from vllm_edits.plugin.vllm_host.scheduler import forks
from vllm_edits.server_config.settings import read_settings


class Variants:
    """The variants that a loaded `LLM` can serve. One per engine; use it from one thread."""

    def __init__(self, llm: Any) -> None:
        settings = read_settings(llm.llm_engine.vllm_config.additional_config)
        compat.check_seams(any_vllm=settings.any_vllm)
        self._llm = llm
        self._forks = forks(llm.llm_engine.vllm_config)
        self._loop = asyncio.new_event_loop()
        self.coordinator: LocalCoordinator
        self.coordinator, self.description = self._loop.run_until_complete(
            start(
                _OfflineWorkers(llm),
                settings,
                Metrics(CollectorRegistry()),
                ("base",),
                OfflineContinuing(llm) if can_probe(llm.llm_engine.vllm_config) else None,
            )
        )

    def _lease(self, name: str | None, strength: float | None) -> Coroutine[Any, Any, Lease]:
        strengths = () if name is None or strength is None else (str(strength),)
        return self.coordinator.lease(Request(name or "", strengths))

    def sync(self) -> None:
        """Follow new promotions. It raises no error: after a refused version, the old version keeps serving."""
        self._loop.run_until_complete(self._sync())

    async def _sync(self) -> None:
        await self.coordinator.reconciler.sync(retry_refused=True, wait_for_weights=True)
        await self.coordinator.growth.wait()  # which then follows what waited for it
        await self.coordinator.slots.wait_drained()

    def generate(
        self,
        variant: str | Sequence[str | None] | None,
        prompts: Sequence[Any],
        sampling_params: Any,
        *,
        strength: float | None = None,
        **options: Any,
    ) -> list[Any]:
        """`LLM.generate` with one variant for all prompts (None for the base model), or with one for each prompt.

        strength: for all prompts of variants. RequestRefused if a variant does not accept it.
        """
        names = [variant] * len(prompts) if variant is None or isinstance(variant, str) else list(variant)
        if len(names) != len(prompts):
            raise ValueError(f"expected one variant for each of {len(prompts)} prompts, found {len(names)}")
        params = sampling_params if isinstance(sampling_params, Sequence) else [sampling_params] * len(prompts)
        distinct, slots = len(set(names) - {None}), self.coordinator.slots.residency.slots
        if distinct > slots:
            raise ValueError(
                f"{distinct} variants in one batch need as many slots, found {slots}. "
                "Split the batch, or raise edits.slots"
            )
        with ExitStack() as held:
            leases = [
                held.enter_context(self._loop.run_until_complete(self._lease(name, strength)).hold()) for name in names
            ]
            requests = [
                address(prompt, each, lease.choice, lease.slot, forks=self._forks)
                for prompt, each, lease in zip(prompts, params, leases, strict=True)
            ]
            outputs: list[Any] = self._llm.generate(*map(list, zip(*requests, strict=True)), **options)
        self._loop.run_until_complete(self.coordinator.slots.wait_drained())
        return outputs


class _OfflineWorkers:
    """`Workers` through `LLM.collective_rpc`."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    async def call(self, method: str, *args: Any) -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = self._llm.collective_rpc(method, args=args)
        return answers

    async def abort_all(self) -> None:
        """Do nothing, because no request runs between two calls of `generate`."""
