"""What a server would reserve and what that takes, told before anything is loaded."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.support.bundles import base_of, publish, random_bundle
from tests.support.every_form import for_every_form
from tests.support.fakes import WIDTHS, TinyModel, edited_model
from tests.support.reserved import Version
from tests.support.tiny_models import make_tiny
from vllm_edits.edit_store import EditStore, LowRank, Offset
from vllm_edits.edit_store.byte_sizes import bytes_of, sized
from vllm_edits.edit_store.errors import SettingsError, UnsupportedHost
from vllm_edits.plugin.cli.commands import app
from vllm_edits.plugin.graph.reservation import Reservation
from vllm_edits.plugin.graph.slot_bytes import slot_bytes
from vllm_edits.plugin.plan import Plan, dtype_of
from vllm_edits.server_config.profile_costs import ProfileCost, profile_costs


@for_every_form()
def test_the_bytes_that_are_foretold_are_those_that_are_taken(pair: Any) -> None:
    """Of every kind at every site in every form, in either width of the model's numbers."""
    reservation = Reservation.for_versions([Version([pair[0]])])
    for dtype in (torch.float32, torch.bfloat16):
        for slots in (1, 7):
            taken = edited_model(TinyModel(), reservation, slots=slots, dtype=dtype).bytes_reserved
            assert Plan.of(reservation, slot_bytes(WIDTHS, dtype)).total(slots) == taken > 0


def test_more_slots_than_memory_are_refused_with_the_largest_number_that_fits() -> None:
    plan = Plan.of(
        Reservation.for_versions([Version([Offset(site="layers.1.resid")])]), slot_bytes(WIDTHS, torch.float32)
    )
    free = 10 * plan.slot + 1
    plan.require(plan.most(free), free)
    with pytest.raises(SettingsError, match=r"edits\.slots = 10 takes .* are free: 9 slots .* fit\. Set edits\.slots"):
        plan.require(plan.most(free) + 1, free)
    with pytest.raises(SettingsError, match=r"0 bytes are free beside all else: no slots .* fit\. Leave them more"):
        plan.require(1, 0, " beside all else")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("LlamaForCausalLM", tmp_path_factory.mktemp("plan") / "tiny")


def planned(checkpoint: Path, store: EditStore, *options: str) -> Any:
    ran = CliRunner().invoke(app, ["plan", str(checkpoint), "--store", store.url, *options])
    assert ran.exit_code == 0, ran.output
    return json.loads(ran.stdout) if "--json" in options else ran.stdout


def test_planning_on_the_command_line(checkpoint: Path, tmp_path: Path) -> None:
    """What the store promotes is what would be reserved; a version that would not fit is told with its reason."""
    store = EditStore(str(tmp_path / "store"), create=True)
    bundle = random_bundle("polite", base_of(checkpoint), seed=1)
    publish(store, bundle)
    told = planned(checkpoint, store, "--set", "slots=8", "--memory", "1MiB", "--dtype", "float32", "--json")
    plan = Plan.of(Reservation.for_versions([bundle.manifest]), slot_bytes(bundle.manifest.base.widths, torch.float32))
    assert (told["bytes_per_slot"], told["bytes"]) == (plan.slot, plan.total(8))
    assert plan.total(told["fit"]) <= 1 << 20 < plan.total(told["fit"] + 1)
    assert sum(row["bytes"] for row in told["groups"]) == plan.slot
    assert told["grows"] == told["refused"] == {}
    each = planned(checkpoint, store, "--dtype", "float32", "--tensor-parallel-size", "2", "--json")
    divided = Plan.of(
        Reservation.for_versions([bundle.manifest]), slot_bytes(bundle.manifest.base.widths, torch.float32, 2)
    )
    assert each["bytes_per_slot"] == divided.slot < plan.slot
    small = json.dumps([{"kind": "offset", "site": "final"}])
    said = planned(checkpoint, store, "--set", f"reserve={small}")
    assert "polite would make the reservation grow after the start: " in said
    assert "would be refused" not in said
    for policy in ("ask", "never"):
        said = planned(checkpoint, store, "--set", f"reserve={small}", "--set", f"grow={policy}")
        assert "polite would be refused: " in said
        assert "grow after" not in said
    assert list(planned(checkpoint, store, "--set", f"reserve={small}", "--json")["grows"]) == ["polite"]
    half = planned(checkpoint, store, "--json")
    assert half["bytes_per_slot"] < plan.slot, "vLLM makes a float32 checkpoint half as wide unless told otherwise"


@pytest.mark.parametrize(
    ("architecture", "workers", "said"),
    [("Olmo2ForCausalLM", 2, "norms of queries and keys go over all heads"), ("LlamaForCausalLM", 3, "4 heads cannot")],
)
def test_a_model_that_cannot_be_divided_so_is_refused_before_the_start(
    architecture: str, workers: int, said: str, tmp_path: Path
) -> None:
    model, store = make_tiny(architecture, tmp_path / "tiny"), EditStore(str(tmp_path / "store"), create=True)
    words = ["plan", str(model), "--store", store.url, "--tensor-parallel-size", str(workers)]
    ran = CliRunner().invoke(app, words)
    assert (ran.exit_code, said in ran.stderr) == (1, True), ran.output
    assert CliRunner().invoke(app, words[:-2]).exit_code == 0


def test_versions_for_another_model_reserve_nothing(checkpoint: Path, tmp_path: Path) -> None:
    store = EditStore(str(tmp_path / "store"), create=True)
    publish(
        store, random_bundle("polite", base_of(checkpoint).model_copy(update={"files": {"x.safetensors": "a" * 64}}), 1)
    )
    told = planned(checkpoint, store, "--json")
    assert (told["groups"], told["bytes"]) == ([], 0)
    said = planned(checkpoint, store, "--memory", "1GiB")
    assert "nothing is reserved. With --set reserve=standard" in said
    assert "fit into" not in said, "any number does"


def test_planning_shows_each_profile_and_what_it_costs_at_rest(checkpoint: Path, tmp_path: Path) -> None:
    """In one table after the reservation, the one in use marked; a profile without figures says so."""
    store = EditStore(str(tmp_path / "store"), create=True)
    bundle = random_bundle("polite", base_of(checkpoint), seed=1)
    publish(store, bundle)
    options = ("--set", "slots=8", "--dtype", "float32")
    told = planned(checkpoint, store, *options, "--set", "reserve=standard", "--json")
    rows = {row["profile"]: row for row in told["profiles"]}
    assert list(rows) == ["promoted", "standard", "all"]
    assert [name for name, row in rows.items() if row["in_use"]] == ["standard"]
    assert (rows["standard"]["bytes_per_slot"], rows["standard"]["bytes"]) == (told["bytes_per_slot"], told["bytes"])
    plan = Plan.of(Reservation.for_versions([bundle.manifest]), slot_bytes(bundle.manifest.base.widths, torch.float32))
    assert rows["promoted"]["bytes"] == plan.total(8)
    assert told["grows"] == told["refused"] == {}
    for name, row in rows.items():
        costs = [cost.model_dump(mode="json", exclude={"profile"}) for cost in profile_costs(name)]
        assert row["measured"] == costs
    said = planned(checkpoint, store, *options, "--set", "reserve=standard")
    table = said[said.index("profiles for reserve") :]
    assert re.search(r"^ *standard +yes ", table, re.MULTILINE)
    assert not re.search(r"^ *(promoted|all) +yes ", table, re.MULTILINE)
    mixed = json.dumps(["all", {"kind": "offset", "site": "final"}])
    assert re.search(r"^ *all +and entries ", planned(checkpoint, store, "--set", f"reserve={mixed}"), re.MULTILINE)
    entries = json.dumps([{"kind": "offset", "site": "final"}])
    assert " yes" not in planned(checkpoint, store, "--set", f"reserve={entries}")


def test_a_speed_that_was_not_measured_is_told_so(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a profile without any record, and of a record that has decoding only. Several records are a range."""
    store = EditStore(str(tmp_path / "store"), create=True)
    about = {"device": "abacus", "shape": "tiny", "reserved": "all of it", "date": "2026-11-28", "record": "r.json"}
    found = (("standard", 0.98765, None), ("all", 0.5, 0.75), ("all", 1.25, 0.75))
    costs = [
        ProfileCost.model_validate({"profile": profile, "decode": decode, "prefill": prefill, **about})
        for profile, decode, prefill in found
    ]
    monkeypatch.setattr("vllm_edits.server_config.profile_costs.read_costs", lambda: tuple(costs))
    said = planned(checkpoint, store)
    for line in (
        r" promoted .* bytes +not measured +not measured",
        r" standard .* 0\.988 +not measured",
        r" all .* 0\.500–1\.250 +0\.750",
        r"standard on abacus, tiny, all of it: decode 0\.988, prefill not measured",
        r"all on abacus, tiny, all of it: decode 0\.500, prefill 0\.750",
    ):
        assert re.search(rf"^(?:{line}) *$", said, re.MULTILINE), (line, said)


def test_an_unknown_profile_is_refused_with_the_nearest(checkpoint: Path, tmp_path: Path) -> None:
    store = EditStore(str(tmp_path / "store"), create=True)
    ran = CliRunner().invoke(app, ["plan", str(checkpoint), "--store", store.url, "--set", "reserve=standrad"])
    assert ran.exit_code == 1
    assert "edits.reserve.0: unknown profile 'standrad'. Did you mean 'standard'?" in ran.stderr


@pytest.mark.parametrize(("asked", "meant"), [("auto", "bfloat16"), ("half", "float16"), ("float32", "float32")])
def test_dtypes_as_vllm_names_them(asked: str, meant: str, checkpoint: Path) -> None:
    assert dtype_of(checkpoint, asked) == getattr(torch, meant)


def test_what_is_no_dtype_and_no_size_is_refused(checkpoint: Path) -> None:
    with pytest.raises(SettingsError, match="expected auto, half"):
        dtype_of(checkpoint, "float33")
    assert bytes_of("8GiB") == 8 << 30
    with pytest.raises(SettingsError, match=r"expected a number with a unit, e\.g\. 8GiB"):
        bytes_of("a lot")


def test_ranks_cost_what_they_read_and_write() -> None:
    def slot(rank: int) -> int:
        edit = LowRank(site="layers.1.mlp.out", reads="layers.1.mlp.h", rank=rank)
        return Plan.of(Reservation.for_versions([Version([edit])]), slot_bytes(WIDTHS, torch.float32)).slot

    assert slot(4) == 4 * 4 * (WIDTHS.mlp + WIDTHS.hidden)
    assert slot(8) == 2 * slot(4)


@pytest.mark.parametrize("reserved", [[], [1], [4]])
def test_a_refusal_says_what_the_advice_would_cost(reserved: list[int]) -> None:
    """Beyond what there is already: for a group where there was none, and for a higher rank."""
    capacity_bytes = slot_bytes(WIDTHS, torch.float32)

    def version(rank: int) -> Version:
        return Version([LowRank(site="layers.1.mlp.out", reads="layers.1.mlp.h", rank=rank)])

    have, enough = Reservation.for_versions(map(version, reserved)), Reservation.for_versions([version(16)])
    (reason,) = have.missing(version(16), capacity_bytes)
    more = Plan.of(enough, capacity_bytes).slot - Plan.of(have, capacity_bytes).slot
    assert reason.message.endswith(f"to edits.reserve ({sized(more)} more per slot)")


@pytest.mark.parametrize(
    ("cache", "longest", "expected", "said"),
    [
        ({"gpu_memory_utilization": 0.9, "kv_cache_memory_bytes": None}, 8192, 70 - 2 * 7, "8192 tokens"),
        ({"gpu_memory_utilization": 0.9, "kv_cache_memory_bytes": None}, -1, 70, "the share"),
        ({"gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": None}, 8192, 0, "--gpu-memory-utilization 0.3"),
        ({"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 30}, 8192, 50, "--kv-cache-memory-bytes"),
    ],
)
def test_slots_get_what_the_model_and_the_smallest_cache_leave(
    cache: dict[str, Any], longest: int, expected: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """80 of 100 are free on a GPU that is described here, two of three layers cache 7 for a request; on a CPU none of
    that matters."""
    from vllm_edits.plugin.vllm_host import device
    from vllm_edits.plugin.vllm_host.device import free_for_slots

    class Attention(torch.nn.Module):
        def __init__(self, shares: str | None) -> None:
            super().__init__()
            self.kv_sharing_target_layer_name = shares

        def get_kv_cache_spec(self, _: Any) -> Any:
            return SimpleNamespace(max_memory_usage_bytes=lambda _: 7)

    monkeypatch.setattr(device, "Attention", Attention)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (80, 100))
    model = torch.nn.ModuleList([Attention(None), Attention(None), Attention("0")])
    length = SimpleNamespace(max_model_len=longest, original_max_model_len=longest)
    config: Any = SimpleNamespace(cache_config=SimpleNamespace(**cache), model_config=length)
    free = free_for_slots(config, model, torch.device("cuda"))
    assert free.size == expected
    assert said in free.beside
    assert free_for_slots(config, model, torch.device("cpu")).size > 1 << 20


@pytest.mark.parametrize(
    ("capability", "known", "runs"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 9), ["sm_80", "sm_90"], True),
        ((12, 0), ["sm_90"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((6, 1), ["sm_75", "sm_90", "compute_90"], False),
        ((7, 0), ["sm_75"], False),
    ],
)
def test_a_gpu_without_kernels_is_refused(
    capability: tuple[int, int], known: list[str], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_edits.plugin.vllm_host.device import check_device

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: known)
    check_device(torch.device("cpu"))
    refused = pytest.raises(UnsupportedHost, match=f"capability {capability[0]}.{capability[1]}, but this torch has")
    with nullcontext() if runs else refused:
        check_device(torch.device("cuda"))


@pytest.mark.parametrize(
    ("device", "mode", "backend", "refused"),
    [("cpu", 2, "inductor", True), ("cpu", 0, "inductor", False), ("cpu", 2, "eager", False), ("cuda", 3, "", False)],
)
def test_a_start_that_compiles_for_a_cpu_needs_a_compiler(
    monkeypatch: pytest.MonkeyPatch, device: str, mode: int, backend: str, refused: bool
) -> None:
    import torch

    from vllm_edits.plugin.vllm_host.device import check_compiler

    asked = torch.device(device), SimpleNamespace(mode=mode, backend=backend)
    check_compiler(*asked)  # there is one here
    monkeypatch.setenv("CXX", "absent-compiler")
    with pytest.raises(UnsupportedHost, match=r"absent-compiler.*--enforce-eager") if refused else nullcontext():
        check_compiler(*asked)
