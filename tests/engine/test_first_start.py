"""A server whose base model lies on the Hub and was never fetched: it starts, and serves what was made for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from loadtests.harness.client import complete
from loadtests.harness.hub_server import HubServer
from loadtests.harness.server import Server, ServerFailed
from tests.support.bundles import base_of, publish, random_bundle
from vllm_edits.edit_store import EditStore

pytestmark = pytest.mark.vllm
REPO = "ada/tiny"


@pytest.fixture(scope="module")
def hub(tiny_model: Path) -> Iterator[HubServer]:
    """A Hub with the model, and beside it what authors leave there."""
    with HubServer({}) as server:
        repo = server.add(REPO)
        files = {path.name: path.read_bytes() for path in tiny_model.iterdir() if path.is_file()}
        strays = {"consolidated.safetensors": files["model.safetensors"], "adapter_model.safetensors": b"none"}
        repo.commit({**files, **strays})
        yield server


@pytest.fixture
def store(tiny_model: Path, tmp_path: Path) -> EditStore:
    made = EditStore(str(tmp_path / "store"), create=True)
    publish(made, random_bundle("loud", base_of(tiny_model), seed=1))
    return made


@pytest.mark.parametrize("flags", [(), ("--download-dir", "weights", "--revision", "main")], ids=["usual", "elsewhere"])
def test_a_model_that_was_never_fetched_is_served_with_its_variants(
    hub: HubServer, store: EditStore, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    """The Hub's cache is empty at first; the weights are identified when vLLM has them, wherever it puts them."""
    flags = tuple(str(tmp_path / "weights") if flag == "weights" else flag for flag in flags)
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
    run = ("--enforce-eager", "--dtype", "float32", "--max-model-len", "128")
    server = Server.with_edits(REPO, store.url, tmp_path / "server.log", *run, *flags, environment=environment)
    with server:
        answers = {name: complete(server.url, name, "One two three", 6) for name in ("base", "loud")}
        assert answers["loud"]["headers"]["x-edits-variant"] == "loud"
        assert answers["loud"]["choices"][0]["text"] != answers["base"]["choices"][0]["text"]
    fetched = {path.name for path in tmp_path.rglob("*.safetensors")}
    assert "model.safetensors" in fetched
    assert "consolidated.safetensors" not in fetched, "half of what is downloaded would be for nothing"


def test_a_model_that_cannot_be_fetched_ends_the_start(hub: HubServer, store: EditStore, tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
    server = Server.with_edits("ada/absent", store.url, tmp_path / "server.log", environment=environment)
    with pytest.raises(ServerFailed, match="ada/absent"), server:
        pass
