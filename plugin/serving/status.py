"""The answer of `GET /v1/edits`: served, refused and waiting versions of this server, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from vllm_edits.plugin.experiments.live_experiments import LiveExperiments
from vllm_edits.plugin.serving.admission import Admission
from vllm_edits.plugin.serving.growth import Growth
from vllm_edits.plugin.serving.probing import Prober
from vllm_edits.plugin.serving.reconcile import Reconciler
from vllm_edits.plugin.serving.slots import Slots
from vllm_edits.plugin.serving.variants import BASE
from vllm_edits.plugin.serving.weights_mode import WeightsMode


def status(
    reconciler: Reconciler, admission: Admission, slots: Slots, *, experiments: LiveExperiments, weights: WeightsMode,
    growth: Growth, prober: Prober,
) -> Mapping[str, Any]:  # fmt: skip
    """The state of one server."""
    table, residency = reconciler.table, slots.residency
    return {
        "base": {"names": list(table.base_names), "in_flight": admission.in_flight[BASE, None]},
        "variants": [
            {
                "name": name,
                "tag": tag,
                "version": version,
                "sequence": reconciler.followed[name, tag].sequence,
                "resident": residency.is_resident(version),
                "in_weights": version == table.in_weights,
                "in_flight": admission.in_flight[name, version],
                "refused": reconciler.refusal(name, tag),
                "probes": prober.told_of(version),
            }
            for name, tags in sorted(table.promoted.items())
            for tag, version in sorted(tags.items())
        ],
        "refused": [
            {
                "name": name,
                "tag": tag,
                "sequence": refusal.sequence,
                "error": refusal.error,
                "awaits_capacity": refusal.awaits_capacity,
            }
            for (name, tag), refusal in sorted(reconciler.refused.items())
        ],
        "experiments": experiments.status(),
        "broken_histories": [
            {"name": name, "tag": tag, "error": str(error)} for (name, tag), error in sorted(reconciler.broken.items())
        ],
        "signatures": reconciler.reader.trust.enforcement,
        "weights": {
            "variant": "@".join(weights.key) if weights.key else None,
            "version": weights.version,
            "error": weights.error,
        },
        "slots": {
            "total": residency.slots,
            "used": residency.used,
            "held": [
                {
                    "slot": resident.slot,
                    "version": version,
                    "users": resident.users,
                    "retired": resident.retired,
                    "closed": resident.closed,
                }
                for version, resident in residency.residents().items()
            ],
            "waiting": slots.waiting(),
        },
        "reservation": growth.status(),
        "last_swap": asdict(reconciler.last_swap) if reconciler.last_swap else None,
        "last_error": reconciler.last_error,
        "store": {"url": reconciler.reader.url, "head_age_seconds": reconciler.head_age()},
    }
