"""What happens at the start: a server that cannot serve edits exactly does not start, and says why."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import pytest

from loadtests.harness.client import complete
from loadtests.harness.server import ENVIRONMENT, Server, ServerFailed
from tests.proofs.parity import random_numbers
from tests.support.bundles import base_of, bundle_of, publish, random_bundle
from tests.support.engine import USUAL_OR_AS_ON_A_GPU, kind_bundle, wait_until
from tests.support.tiny_models import make_tiny
from vllm_edits.edit_store import EditStore, Scale
from vllm_edits.plugin.graph.reservation import Reservation

pytestmark = pytest.mark.vllm

PROMPT = "One two three"
FLAGS = ("--dtype", "float32", "--max-model-len", "512")


_COMPILER = re.compile(r"(^|-)(cc|c\+\+|cpp|gcc|g\+\+|clang|clang\+\+)(-[\d.]+)?$")


def additional(**settings: object) -> str:
    return json.dumps({"edits": settings})


@pytest.mark.slow
def test_a_compile_cache_that_was_moved_or_is_shared_or_meets_no_compiler(tiny_model: Path, tmp_path: Path) -> None:
    """The same answers from a cache at another place, and for a server with another reservation.

    Without a compiler the start ends with a sentence that says so, also where everything is kept: torch asks for one.
    """
    store, base = EditStore(str(tmp_path / "store"), create=True), base_of(tiny_model)
    bundle = random_bundle("loud", base, seed=1)
    publish(store, bundle)
    caches = {"VLLM_CACHE_ROOT": "cache", "TORCH_EXTENSIONS_DIR": "products", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
    no_compiler = {"PATH": str(_without_compilers(tmp_path / "bin"))}

    def started(place: str, *flags: str, environment: Mapping[str, str] = MappingProxyType({}), **more: str) -> Server:
        places = {name: str(tmp_path / place / folder) for name, folder in caches.items()}
        return Server.with_edits(
            tiny_model, store.url, tmp_path / "log", *FLAGS, *flags, environment={**places, **environment},
            settings={"cache_folder": str(tmp_path / "node"), **more},
        )  # fmt: skip

    def said(server: Server) -> list[str]:
        with server:
            return [complete(server.url, model, PROMPT, 8, ignore_eos=True)["choices"][0]["text"]
                    for model in ("base", "loud")]  # fmt: skip

    reserve = [*Reservation.for_versions([bundle.manifest]).to_settings(), {"kind": "offset", "site": "layers.0.resid"}]
    first = said(started("first"))
    assert first[0] != first[1]
    (tmp_path / "first").rename(tmp_path / "moved")
    assert said(started("moved")) == first
    assert said(started("moved", reserve=json.dumps(reserve))) == first
    with pytest.raises(ServerFailed):
        said(server := started("moved", environment=no_compiler))
    assert "no C++ compiler was found (g++). Install g++" in server.log_text()
    assert said(started("moved", "--enforce-eager", environment=no_compiler)) == first


def _without_compilers(folder: Path) -> Path:
    """Every program that can be called here, but no compiler."""
    folder.mkdir()
    for place in map(Path, os.environ["PATH"].split(os.pathsep)):
        for tool in place.iterdir() if place.is_dir() else ():
            if not _COMPILER.search(tool.name) and not (folder / tool.name).exists():
                (folder / tool.name).symlink_to(tool)
    return folder


@pytest.mark.parametrize("how", USUAL_OR_AS_ON_A_GPU)
def test_a_warm_compile_cache_keeps_edits_in_and_a_plain_start_is_plain(
    tiny_model: Path, tmp_path: Path, how: Mapping[str, str]
) -> None:
    """One cache folder, three starts: cold with edits and then a growth, without the plugin, and warm after the growth.

    The graph that was compiled with edits is never used without them, nor the other way round. What the first server
    compiles for a version that it had no capacity for, the third finds.
    """
    store = EditStore(str(tmp_path / "store"), create=True)
    base = base_of(tiny_model)
    versions = {"loud": publish(store, random_bundle("loud", base, seed=1))}
    grown = kind_bundle("gate", base, 1.0)
    cache = {**how, "VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    answers: dict[str, list[str]] = {"base": [], "loud": [], "gate": []}

    def ask(*names: str) -> None:
        for name in names:
            answer = complete(server.url, name, PROMPT, 8, ignore_eos=True)
            if name in versions:
                assert answer["headers"]["x-edits-version"] == versions[name]
            answers[name].append(answer["choices"][0]["text"])

    for number, plain in enumerate((False, True, False)):
        log = tmp_path / f"start-{number}.log"
        if plain:
            server = Server.plain(tiny_model, log, *FLAGS, environment=cache)
        else:
            server = Server.with_edits(tiny_model, tmp_path / "store", log, *FLAGS, environment=cache)
        with server:
            told = ("Directly load AOT compilation", "uses the compiled code of an earlier start")
            loaded = any(line in server.log_text() for line in told)
            assert loaded == (number == 2), "what is kept is found again, and by no other start"
            ask("base")
            if number == 0:
                ask("base", "loud")
                versions["gate"] = publish(store, grown)
                wait_until(lambda: "swap committed variant=gate" in log.read_text(), "the gate is served", 600)  # noqa: B023
            if not plain:
                ask("loud", "gate")
    for texts in answers.values():
        assert len(set(texts)) == 1
    assert len({texts[0] for texts in answers.values()}) == len(answers)


@dataclass(frozen=True)
class Refused:
    """A start that must end, and a pattern of what its log says."""

    says: str
    flags: tuple[str, ...] = ("--load-format", "edits")
    plugins: str | None = "edits"
    settings: Mapping[str, object] = field(default_factory=dict)


REFUSED = {
    "plugin disabled": Refused("not supported", plugins="none"),
    "plugins not named": Refused("VLLM_PLUGINS", plugins=None),
    "load format not named": Refused("--load-format edits", ("--enforce-eager",)),
    "a configuration not proven exact": Refused("LoRA", ("--load-format", "edits", "--enable-lora")),
    "an unknown setting": Refused("unknown setting. Did you mean 'slots'", settings={"slotz": 3}),
    "a store that is not there": Refused("no edit store at /none", settings={"store": "/none"}),
    "more slots than memory": Refused(
        r"edits\.slots = 4096 takes .* are free: [1-9]\d* slots of .* fit",
        settings={"slots": 4096, "reserve": [{"kind": "low_rank", "site": "*", "rank": 512}]},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_exactly_is_refused_at_the_start(name: str, tiny_model: Path, tmp_path: Path) -> None:
    case = REFUSED[name]
    EditStore(str(tmp_path / "store"), create=True)
    given = additional(**{"store": str(tmp_path / "store"), **case.settings})
    environment = {} if case.plugins is None else {"VLLM_PLUGINS": case.plugins}
    flags = (*FLAGS, *case.flags, "--additional-config", given)
    server = Server.plain(tiny_model, tmp_path / "server.log", *flags, environment=environment)
    with pytest.raises(ServerFailed), server:
        pass
    assert re.search(case.says, server.log_text()), server.log_text()[-3000:]


def test_offline_python_serves_variants_and_survives_a_worker_that_refuses(tiny_model: Path, tmp_path: Path) -> None:
    """`LLM.generate` with variants mixed in one batch; a worker that refuses an install leaves the old version."""
    store = EditStore(str(tmp_path / "store"), create=True)
    base = base_of(tiny_model)
    publish(store, random_bundle("loud", base, seed=1))
    second = publish(store, random_bundle("loud", base, seed=2), tag=None)
    _holds("offline_story.py", tiny_model, store, second)


@pytest.mark.parametrize("processes", ["0", "1"], ids=["one process", "engine and worker in their own"])
def test_requests_with_false_claims_end_alone_and_leave_nothing_in_the_cache(
    tiny_model: Path, tmp_path: Path, processes: str
) -> None:
    """A slot that is emptied under a running request, one that is not there, no claim at all: the others go on."""
    store = EditStore(str(tmp_path / "store"), create=True)
    publish(store, random_bundle("loud", base_of(tiny_model), seed=1))
    _holds("offline_claims.py", tiny_model, store, processes=processes)


def test_a_model_that_goes_past_an_edited_module_is_refused_by_its_site(tmp_path: Path) -> None:
    """Edits there would be installed and counted, and do nothing. The same vLLM as it is starts (positive control)."""
    model = make_tiny("Qwen3ForCausalLM", tmp_path / "model")
    base = base_of(model)
    edit = Scale(site="layers.0.q.out")
    store = EditStore(str(tmp_path / "store"), create=True)
    publish(store, bundle_of("scaled", base, [(edit, random_numbers(edit, base, 1))]))
    _holds("bypassed_norm.py", model, store)


def _holds(script: str, model: Path, store: EditStore, *arguments: str, processes: str = "0") -> None:
    """Run a story in a process of its own."""
    environment = {**ENVIRONMENT, "VLLM_PLUGINS": "edits", "VLLM_ENABLE_V1_MULTIPROCESSING": processes}
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), str(model), store.url, *arguments],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "the story holds" in ran.stdout


def test_a_file_of_requests_is_answered_by_the_variants_that_it_names(tiny_model: Path, tmp_path: Path) -> None:
    """And `vllm run-batch`, which would answer every line by the base or not at all, is refused with the way."""
    store = EditStore(str(tmp_path / "store"), create=True)
    version = publish(store, random_bundle("loud", base_of(tiny_model), seed=1))
    asked, answered = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    chat = {"messages": [{"role": "user", "content": "One two three"}], "max_tokens": 6, "temperature": 0}
    asked.write_text("".join(
        json.dumps({"custom_id": name, "url": "/v1/chat/completions", "body": {"model": name, **chat}}) + "\n"
        for name in ("base", "loud", "absent")
    ))  # fmt: skip
    flags = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "256"]
    environment = {**os.environ, **ENVIRONMENT}
    commands = Path(sys.executable).parent
    command = [str(commands / "vllm-edits"), "run-batch", str(tiny_model), "--store", store.url, "-i", str(asked),
               "-o", str(answered), "--served-model-name", "base", *flags]  # fmt: skip
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert ran.returncode == 1, ran.stderr[-3000:]
    assert "2 of 3 requests answered" in ran.stdout
    answers = {said["custom_id"]: said for said in map(json.loads, answered.read_text().splitlines())}
    texts = {name: answers[name]["response"]["body"]["choices"][0]["message"]["content"] for name in ("base", "loud")}
    assert texts["base"] != texts["loud"]
    assert answers["loud"]["edits"] == {"variant": "loud", "version": version}
    assert answers["absent"]["response"]["status_code"] == 404
    settings = json.dumps({"edits": {"store": store.url}})
    alone = [str(commands / "vllm"), "run-batch", "--model", str(tiny_model), "-i", str(asked),
             "-o", str(answered), "--load-format", "edits", "--additional-config", settings, *flags]  # fmt: skip
    refused = subprocess.run(
        alone, env={**environment, "VLLM_PLUGINS": "edits"}, capture_output=True, text=True, timeout=400, check=False
    )
    assert refused.returncode
    assert "Use `vllm-edits run-batch MODEL" in refused.stdout + refused.stderr
