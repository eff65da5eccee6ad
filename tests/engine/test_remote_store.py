"""A real server whose store is a bucket, and whose trust file asks for two promoters: it follows what both have signed,
keeps a copy on its node, and outlives the bucket's absence."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtests.harness.client import complete
from loadtests.harness.metrics import Scrape
from loadtests.harness.object_servers import BUCKET, moto
from loadtests.harness.server import Server
from tests.engine.network import Line
from tests.support.bundles import base_of, publish, random_bundle
from tests.support.engine import wait_until
from vllm_edits.edit_store import Bundle, EditStore, Role, SigningKey, TrustedKey, TrustPolicy

pytestmark = pytest.mark.vllm

POLL_SECONDS = 0.5


ALICE, BOB = SigningKey.generate(), SigningKey.generate()


def trust_file(path: Path) -> Path:
    """Alice writes bundles; she and Bob promote them together."""
    keys = (
        TrustedKey(name="alice", public=ALICE.public_pem(), roles=(Role.AUTHOR, Role.PROMOTER)),
        TrustedKey(name="bob", public=BOB.public_pem(), roles=(Role.PROMOTER,)),
    )
    TrustPolicy(keys=keys, promoters_needed=2).save(path)
    return path


def agree(store: EditStore) -> None:
    """Bob signs what Alice has promoted."""
    head = store.head("polite")
    assert head is not None
    store.attest(head.digest, BOB.sign(Role.PROMOTER, head.digest, "polite"))


def publish_together(store: EditStore, bundle: Bundle) -> str:
    version = publish(store, bundle)
    agree(store)
    return version


def test_a_server_on_a_bucket(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promotions are followed by polling; with the bucket away everything goes on; it recovers by itself."""
    with moto(tmp_path) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        url = f"s3://{BUCKET}/served"
        store, base = EditStore(url, create=True, signer=ALICE), base_of(tiny_model)
        first = publish_together(store, random_bundle("polite", base, seed=1))
        line, node = Line(environment["AWS_ENDPOINT_URL"]), tmp_path / "node"
        trust = trust_file(tmp_path / "trust.json")
        settings = {"poll_seconds": POLL_SECONDS, "cache_folder": str(node), "trust_file": str(trust)}
        flags = ("--dtype", "float32", "--max-model-len", "512")
        server = Server.with_edits(
            tiny_model, url, tmp_path / "server.log", *flags, settings=settings,
            environment={"AWS_ENDPOINT_URL": line.url},
        )  # fmt: skip
        with server:

            def ask(model: str = "polite") -> tuple[str, str]:
                answer = complete(server.url, model, "One two three", 8, ignore_eos=True)
                return answer["headers"].get("x-edits-version", ""), answer["choices"][0]["text"]

            def metric(name: str, **labels: str) -> float:
                return Scrape.of(server.url).sum(name, **labels)

            base_text = ask("base")[1]
            assert ask()[0] == first
            assert ask()[1] != base_text
            second = publish(store, random_bundle("polite", base, seed=2))
            wait_until(
                lambda: metric("vllm_edits_bundles_rejected_total", reason="below_threshold") == 1, "the refusal"
            )
            assert ask()[0] == first, "one promoter of two is not enough"
            agree(store)
            wait_until(lambda: ask()[0] == second, "the second version")
            blobs = {store.manifest(version).tensors.sha256 for version in (first, second)}
            assert {path.name for path in (node / "blobs").iterdir()} == blobs
            before = ask()
            with line.cut():
                wait_until(lambda: metric("vllm_edits_store_errors_total") > 0, "the outage")
                third = publish_together(store, random_bundle("polite", base, seed=3))
                wait_until(lambda: metric("vllm_edits_store_head_age_seconds") > 2, "staleness")
                assert ask() == before
                assert ask("base")[1] == base_text
            wait_until(lambda: ask()[0] == third, "recovery")
            wait_until(lambda: metric("vllm_edits_store_head_age_seconds") < POLL_SECONDS + 1, "a fresh head")
