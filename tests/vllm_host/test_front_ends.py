"""Which commands start an engine that the plugin's HTTP side cannot be part of."""

from __future__ import annotations

import pytest

from vllm_edits.edit_store.errors import UnsupportedHost
from vllm_edits.plugin.vllm_host import front_ends


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("python /opt/bin/vllm serve MODEL --grpc", "--grpc"),
        ("python -m vllm.entrypoints.grpc_server --model MODEL", "--grpc"),
        ("python -m vllm.entrypoints.launchers.grpc_server", "--grpc"),
        ("/opt/bin/vllm run-batch -i in -o out --model MODEL", "vllm-edits run-batch"),
        ("python /opt/bin/vllm run-batch -i in -o out", "vllm-edits run-batch"),
        ("python -m vllm.entrypoints.openai.run_batch -i in", "vllm-edits run-batch"),
        ("python -P /opt/bin/vllm run-batch -i in", "vllm-edits run-batch"),
        ("python -m vllm.entrypoints.cli.main run-batch -i in", "vllm-edits run-batch"),
        ("env A=1 vllm serve MODEL --grpc", "--grpc"),
        ("supervisor --grpc 50051 -- vllm-edits serve MODEL", ""),
        ("python -m company.jobs.run_batch", ""),
        ("python /opt/bin/vllm-edits run-batch MODEL --store s -i in -o out", ""),
        ("/opt/bin/vllm-edits run-batch MODEL --store s", ""),
        ("python /opt/bin/vllm serve MODEL", ""),
        ("python /opt/bin/vllm serve run-batch", ""),
        ("python -m vllm.entrypoints.openai.api_server", ""),
        ("VLLM::EngineCore", ""),
        ("", ""),
    ],
)
def test_a_front_end_without_the_plugin_is_told_by_its_command(command: str, said: str) -> None:
    found = front_ends.refused(command.split())
    assert (said in found) if said else not found


@pytest.mark.parametrize(("value", "refused"), [("1", True), ("0", False), ("", False)])
def test_the_frontend_in_rust_is_refused(monkeypatch: pytest.MonkeyPatch, value: str, refused: bool) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", value)
    monkeypatch.setattr(front_ends, "_commands", list)
    if refused:
        with pytest.raises(UnsupportedHost, match="VLLM_USE_RUST_FRONTEND"):
            front_ends.require_http()
    else:
        front_ends.require_http()
