"""How the golden store was made: every kind of object of format 1, by the API, at fixed times and with fixed keys.

    python -m tests.store.golden.make FOLDER

What it makes today must be what is kept in format-1, byte for byte. Where it is not, the program has changed what it
writes, or what it makes of numbers and texts: then the version of a bundle would change with the program.
"""

from __future__ import annotations

import hashlib
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import CryptoSigner

from vllm_edits.edit_store import (
    BaseModelRef,
    Bundle,
    EditStore,
    Gate,
    LowRank,
    Measurement,
    Offset,
    Provenance,
    Role,
    Scale,
    Scope,
    SigningKey,
    Strength,
    SubspaceFilter,
    TrustedKey,
    TrustPolicy,
    WeightDelta,
    Widths,
    canonical,
)
from vllm_edits.edit_store.bundle import GATE_FIRINGS
from vllm_edits.edit_store.compose import compose
from vllm_edits.edit_store.experiments.document import Experiment
from vllm_edits.edit_store.experiments.experiment_log import Experiments
from vllm_edits.edit_store.experiments.state import ExperimentChange

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
FLOATS = (
    1e-7, 1e-6, 0.1, 0.1 + 0.2, 1 / 3, 100.0, 123456789012345680.0, 1e20, 1e21, 2.0**53 + 2, 1.7976931348623157e308,
    2.2250738585072014e-308, 5e-324, -0.0, -1e-7, -1e21,
)  # fmt: skip
"""Numbers of which JSON knows several spellings, RFC 8785 one."""
TEXT = (
    'Höflich – 礼儀正しく 🙂, "quoted" \\ / \t\n\r\b\f\x00\x1f\x7f\u2028\u2029, \xe9 composed and e\u0301 in two, '
    "\ufb33, <&> \u202e"
)
"""What JSON escapes in several ways, or not at all."""
KEYS = ("\u20ac", "\r", "\ufb33", "1", "\U0001f600", "\x80", "\u00f6", "", "a", "B")
"""Sorted by UTF-16 code units, in which the smiling face comes before the Hebrew letter."""

WIDTHS = Widths(layers=2, hidden=8, mlp=12, heads=4, kv_heads=2, head_dim=2, vocab=24)
BASE = BaseModelRef(
    name="golden/Grundmodell-é", architecture="Qwen2ForCausalLM", widths=WIDTHS, biased=("k.out", "q.out", "v.out"),
    files={"model-00002-of-00002.safetensors": "b" * 64, "model-00001-of-00002.safetensors": "a" * 64,
           "config.json": "0123456789abcdef" * 4},
)  # fmt: skip


def numbers(*shape: int, seed: int) -> np.ndarray:
    """Float32 made of integers, so that no generator and no rounding decides about them; with zeros of both signs."""
    found = np.arange(np.prod(shape), dtype=np.int64) * (2 * seed + 1) % 17 - 8
    return (found.reshape(shape) / 8).astype(np.float32) * np.float32(-1)


ODD = np.array([1e-45, -1e-45, 3.4028235e38, -3.4028235e38, 1.1754944e-38, -0.0, 0.1, 1 / 3], dtype=np.float32)
"""What float32 has at its ends."""


def everything() -> Bundle:
    """Every kind in every form, every scope, every field of a manifest."""
    here, there = "layers.0.", "layers.1."
    norm = {"norm_weight": numbers(8, seed=3) + np.float32(2), "norm_bias": ODD / 4, "centroid": numbers(8, seed=4)}

    def gate(site: str, width: int, seed: int, **options: Any) -> tuple[Gate, dict[str, np.ndarray]]:
        fields = {"read": numbers(2, 8, seed=seed), "bias": ODD[:2], "write": numbers(2, width, seed=seed + 1)}
        return Gate(site=site, reads=options.pop("reads", site), rank=2, **options), fields

    edits: list[Any] = [
        (WeightDelta(site=here + "mlp.out", reads=here + "mlp.h"), {"delta": numbers(8, 12, seed=1)}),
        (
            WeightDelta(site=there + "attn.out", reads=there + "attn.z", layout="sparse", count=3),
            {"rows": [0, 2, 7], "columns": [5, 0, 7], "values": ODD[:3]},
        ),
        (Scale(site=here + "attn.z"), {"factor": [0, 1, 0.5, -0.0]}),
        (Scale(site=there + "k.out", per="channel", bias="scaled"), {"factor": [1, 1e-10, 2, 0.1]}),
        (
            LowRank(site=here + "up.out", reads=here + "mlp.in", rank=2, scope=Scope(last=1)),
            {"read": numbers(2, 8, seed=5), "write": numbers(2, 12, seed=6)},
        ),
        (
            LowRank(site=there + "resid", reads=there + "resid", rank=1, scope=Scope(first=2, last=3)),
            {"read": ODD[None] / 4, "write": numbers(1, 8, seed=7)},
        ),
        gate(there + "mlp.out", 8, 8, reads=there + "mlp.in", normalise=True, scope=Scope(tokens=(0, 7, 23))),
        gate(here + "resid", 8, 9, activation="jump_relu", threshold=1e-7),
        gate("embed.out", 8, 10, activation="step", threshold=5e-324),
        gate("final", 8, 11, activation="silu", threshold=-0.0),
        gate("logits", 24, 12, reads="final", activation="sigmoid", threshold=1e21),
        (SubspaceFilter(site=here + "attn.out", rank=2), {"basis": np.eye(8)[:2], "mean": ODD / 4}),
        (
            SubspaceFilter(
                site=here + "attn.out", part=2, rank=1, oblique=True, scope=Scope(segment="prompt", first=4)
            ),
            {"basis": np.eye(8)[3:4], "dual": np.eye(8)[3:4] + np.eye(8)[5:6], "mean": np.zeros(8)},
        ),
        (SubspaceFilter(site=there + "attn.in", rank=1, onto=True), {"basis": np.eye(8)[:1], "mean": np.zeros(8)}),
        (Offset(site="embed.out"), {"vector": ODD}),
        (Offset(site="logits"), {"vector": numbers(24, seed=13)}),
        (Offset(site=here + "resid", scope=Scope(segment="prompt")), {"vector": numbers(8, seed=14)}),
        (Offset(site=there + "resid", renorm=True, scope=Scope(segment="generated")), {"vector": np.full(8, 0.1)}),
    ]
    for edit, fields in edits:
        if "norm_weight" in edit.shapes(WIDTHS):
            fields.update(norm)
    measured = [
        Measurement(metric=f"{TEXT} {place}", base=number, edited=-number, n=2**53 - 1)
        for place, number in enumerate(FLOATS)
    ]
    return Bundle.create(
        "everything", BASE, edits,
        Provenance(tool="tests.store.golden", method=TEXT, source="https://example.org/?a=1&b=ü",
                   parameters={key: f"{place} {key}" for place, key in enumerate(KEYS)}),
        description=TEXT, label="1.0+é", strength=Strength(minimum=-1e-7, maximum=1e21, default=0.1),
        measurements=[Measurement(metric=GATE_FIRINGS, base=0, edited=0.1, n=1000), *measured],
        created_at=datetime(2025, 12, 31, 23, 59, 59, 123456, tzinfo=timezone(timedelta(hours=5, minutes=30))),
    )  # fmt: skip


def plain(name: str, edits: list[Any], **fields: Any) -> Bundle:
    made = Provenance(tool="tests.store.golden", method="by hand")
    return Bundle.create(name, BASE, edits, made, description=f"What {name} says", created_at=BEGIN, **fields)


def polite(label: str, seed: int) -> Bundle:
    edits = [
        (Offset(site="layers.1.mlp.out"), {"vector": numbers(8, seed=seed)}),
        (
            LowRank(site="layers.0.mlp.out", reads="layers.0.mlp.h", rank=1),
            {"read": numbers(1, 12, seed=seed + 1), "write": numbers(1, 8, seed=seed + 2)},
        ),
    ]
    return plain(
        "polite", edits, label=label, strength=Strength(minimum=0, maximum=1e21, default=1e-7),
        measurements=[Measurement(metric=GATE_FIRINGS, base=0, edited=1e-7, n=1)],
    )  # fmt: skip


def safe() -> Bundle:
    edits = [
        (Offset(site="layers.1.mlp.out"), {"vector": ODD}),
        (Scale(site="layers.1.attn.z"), {"factor": [1, 0, 1, 1]}),
    ]
    return plain("safe", edits, strength=Strength(minimum=-0.5, maximum=1.5))


def bundles() -> dict[str, Bundle]:
    """Every version, by a name of its own."""
    first, second, other = polite("1", 20), polite("2", 30), safe()
    return {
        "everything": everything(), "polite 1": first, "polite 2": second, "safe": other,
        "polite+safe": compose([second, other]),
    }  # fmt: skip


def key_of(person: str) -> SigningKey:
    """A key that everybody knows: it is made of the person's name."""
    return SigningKey(CryptoSigner(Ed25519PrivateKey.from_private_bytes(hashlib.sha256(person.encode()).digest())))


def trust() -> TrustPolicy:
    """Alice may do both, Bob may approve promotions in 2026."""
    return TrustPolicy(
        keys=(
            TrustedKey(name="Alice Ä", public=key_of("alice").public_pem(), roles=(Role.AUTHOR, Role.PROMOTER)),
            TrustedKey(name="bob", public=key_of("bob").public_pem(), roles=(Role.PROMOTER,), not_before=BEGIN,
                       not_after=datetime(2027, 1, 1, tzinfo=UTC)),
        )
    )  # fmt: skip


class _Clock:
    """Stands for `datetime` where the store asks for the time: a minute passes when it is told to."""

    def __init__(self) -> None:
        self.minutes = 0

    def now(self, _: Any) -> datetime:
        return BEGIN + timedelta(minutes=self.minutes)

    def tick(self) -> None:
        self.minutes += 1


@contextmanager
def fixed() -> Iterator[_Clock]:
    """Inside, time stands still between the ticks, and what is drawn by chance is the number of the tick."""
    clock = _Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canonical, "datetime", clock)
        patch.setattr(secrets, "token_hex", lambda size: f"{clock.minutes:0{2 * size}x}")
        yield clock


def make(folder: Path) -> None:
    """Write the store and the trust file into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    trust().save(folder / "trust.json")
    with fixed() as clock:
        _fill(str(folder / "format-1"), clock)


def _fill(url: str, clock: _Clock) -> None:
    signed, unsigned = EditStore(url, create=True, signer=key_of("alice")), EditStore(url)
    who = {"actor": "Alice Ä"}
    versions = {}
    for name, bundle in bundles().items():
        clock.tick()
        versions[name] = (unsigned if name == "safe" else signed).publish(bundle, **who)
    first, second = (f"polite@{versions[name]}" for name in ("polite 1", "polite 2"))

    def tag(operation: str, *words: str, store: EditStore = signed, **options: Any) -> None:
        clock.tick()
        getattr(store, operation)(*words, reason=f"{operation} {TEXT}", **options, **who)

    tag("promote", first)
    tag("promote", second)
    tag("rollback", "polite")
    tag("pin", "polite")
    tag("pin", "polite", remove=True)
    tag("promote", second)
    tag("promote", second, tag="staging.eu-1")
    tag("pin", "polite", tag="staging.eu-1")
    tag("promote", f"everything@{versions['everything']}")
    tag("promote", f"polite+safe@{versions['polite+safe']}")
    tag("promote", f"safe@{versions['safe']}", store=unsigned)
    tag("promote", f"safe@{versions['safe']}", tag="gone")
    tag("withdraw", "safe", tag="gone")
    clock.tick()
    entry = signed.head("polite")
    assert entry is not None
    end = datetime(2026, 7, 1, tzinfo=UTC)
    signed.attest(entry.digest, key_of("bob").sign(Role.PROMOTER, entry.digest, "polite@prod", expires_at=end))
    _experiment(Experiments(signed), clock, versions)


def _experiment(experiments: Experiments, clock: _Clock, versions: dict[str, str]) -> None:
    who = {"actor": "Alice Ä", "reason": TEXT}
    tone = Experiment.parse({
        "name": "tone", "model": "polite", "description": TEXT, "unit_header": "x-unit",
        "arms": [
            {"name": "control", "serves": "polite@prod", "weight": 1 / 3},
            {"name": "milder", "serves": f"polite@{versions['polite 1'][:8]}", "weight": 1 / 3},
            {"name": "all", "serves": f"everything@{versions['everything']}", "weight": 1 - 2 / 3},
        ],
        "coverage": 0.1, "ramp": [{"after": "1h", "coverage": 0.1 + 0.2}, {"after": 1e21, "coverage": 1}],
        "namespace": {"name": "texts", "start": -0.0, "end": 0.1 + 0.2},
        "holdout": {"name": "never", "share": 1e-7},
        "feedback": [{"name": "thumbs", "minimum": -1e21, "maximum": 1.7976931348623157e308, "goal": "decrease"}],
        "guardrails": [
            {"metric": "error", "maximum": 1e-7, "interval": "1m", "warm_up": "30s", "failure_limit": 2},
            {"metric": "thumbs", "minimum": -0.0, "hysteresis": 5e-324},
            {"metric": "first_token_seconds", "maximum_ratio": 1e21}, {"metric": "empty", "minimum_ratio": 1e-7},
            {"metric": GATE_FIRINGS, "maximum_authored_ratio": 1.5},
        ],
        "shadow": {"arm": "milder", "share": 0.1},
    })  # fmt: skip
    style = Experiment.parse({
        "name": "style", "model": "house-style",
        "arms": [
            {"name": "control", "serves": "base", "weight": 0.9}, {"name": "safe", "serves": "safe", "weight": 0.1},
        ],
    })  # fmt: skip

    def change(name: str, operation: Any, **fields: Any) -> None:
        clock.tick()
        experiments.change(ExperimentChange(experiment=name, operation=operation, **fields), **who)

    for document in (tone, style):
        clock.tick()
        experiments.create(document, **who)
    change("tone", "start")
    change("tone", "hold", phase=1)
    change("tone", "widen", coverage=0.1 + 0.2)
    change("tone", "resume")
    change("tone", "withdraw", arm="all", phase=1)
    change("style", "start")
    clock.tick()
    experiments.promote("style", "safe", **who)
    change("tone", "stop")
    change("tone", "start")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
