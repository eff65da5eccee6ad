"""The command line, as typed: what it prints, what it changes, and what it says when it cannot."""

from __future__ import annotations

import json
import os
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

import vllm_edits.plugin.cli  # noqa: F401  adds serve and status
from tests.support.bundles import random_bundle
from tests.support.fakes import BASE
from vllm_edits.edit_store import Bundle, EditStore
from vllm_edits.edit_store.cli import app
from vllm_edits.edit_store.cli.common import complete_name, complete_reference

Run = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Types a command, on a wide terminal, with the store in the environment."""
    monkeypatch.setenv("VLLM_EDITS_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(app, list(words))


@pytest.fixture
def store(tmp_path: Path) -> EditStore:
    return EditStore(str(tmp_path / "store"), create=True)


def saved(folder: Path, seed: int, label: str = "") -> Bundle:
    made = random_bundle("polite", BASE, seed, label=label)
    made.save(folder)
    return made


@pytest.fixture
def two(store: EditStore, tmp_path: Path) -> list[str]:
    """Two published versions; the first is promoted."""
    versions = [store.publish(saved(tmp_path / f"bundle-{seed}", seed, label=f"v{seed}")) for seed in (1, 2)]
    store.promote(f"polite@{versions[0]}", reason="first")
    return versions


def test_a_newcomers_first_commands(run: Run, tmp_path: Path) -> None:
    """init, publish with a tag, list: from nothing to a promoted version; init again is harmless."""
    made = saved(tmp_path / "bundle", seed=1, label="v1")
    assert run("init").stdout == f"store ready at {tmp_path / 'store'}\n"
    result = run("publish", "bundle", "--tag", "prod", "--reason", "ready")
    assert (result.exit_code, result.stdout) == (0, f"published polite@{made.version[:12]}, promoted as prod\n")
    assert run("init").exit_code == 0
    listed = run("list").stdout.splitlines()
    assert listed[0].split() == ["name", "version", "label", "promoted", "as", "published"]
    assert listed[1].split()[:4] == ["polite", made.version[:12], "v1", "prod"]


def test_promote_and_rollback_append_to_the_history(run: Run, two: list[str], store: EditStore) -> None:
    result = run("promote", f"polite@{two[1][:8]}", "--reason", "milder")
    assert (result.exit_code, result.stdout) == (0, f"polite@prod is {two[1][:12]} (entry 2, promote)\n")
    assert run("rollback", "polite").stdout == f"polite@prod is {two[0][:12]} (entry 3, rollback)\n"
    assert store.resolve("polite") == two[0]
    rows = [line.split() for line in run("history", "polite").stdout.splitlines()[1:]]
    assert [row[:3] for row in rows] == [
        ["1", "promote", two[0][:12]],
        ["2", "promote", two[1][:12]],
        ["3", "rollback", two[0][:12]],
    ]
    assert rows[1][-1] == "milder"


def test_a_withdrawn_tag_promotes_nothing_until_it_is_rolled_back(run: Run, two: list[str], store: EditStore) -> None:
    assert run("withdraw", "polite", "--reason", "leak").stdout == (
        "polite@prod is not served any more (entry 2, withdraw)\n"
    )
    assert {row["tags"] for row in json.loads(run("list", "--json").stdout)} == {""}
    assert "was withdrawn by" in run("show", "polite").output
    assert run("withdraw", "polite").exit_code == 1
    assert run("rollback", "polite").stdout == f"polite@prod is {two[0][:12]} (entry 3, rollback)\n"
    assert store.resolve("polite") == two[0]


def test_every_reading_command_speaks_json(run: Run, two: list[str]) -> None:
    """Whole digests and the same fields, one list of objects each, and nothing else on the output."""
    listed = json.loads(run("list", "--json").stdout)
    assert {(row["version"], row["tags"]) for row in listed} == {(two[0], "prod"), (two[1], "")}
    assert [row["version"] for row in json.loads(run("history", "polite", "--json").stdout)] == [two[0]]
    assert json.loads(run("promote", f"polite@{two[1]}", "--json").stdout)[0]["version"] == two[1]
    assert json.loads(run("rollback", "polite", "--json").stdout)[0]["operation"] == "rollback"
    assert json.loads(run("publish", "bundle-2", "--json").stdout) == [
        {"name": "polite", "version": two[1], "promoted": ""}
    ]
    edits = json.loads(run("inspect", "polite", "--json").stdout)
    assert [edit["kind"] for edit in edits] == ["low_rank", "scale", "subspace_filter", "offset"]
    assert json.loads(run("inspect", "bundle-1", "--json").stdout) == edits


def test_inspect_shows_what_is_in_a_bundle(run: Run, two: list[str]) -> None:
    """By folder, name, tag or version: sites, kinds, ranks and norms."""
    shown = run("inspect", "bundle-1").stdout
    for reference in ("polite", "polite@prod", f"polite@{two[0][:6]}"):
        assert run("inspect", reference).stdout == shown
    assert shown.splitlines()[0].split()[:3] == ["polite", two[0][:12], "v1"]
    assert "for tiny (LlamaForCausalLM), by random" in shown
    for edit in random_bundle("polite", BASE, 1).manifest.edits:
        assert any(line.split()[:2] == [edit.site, edit.kind] for line in shown.splitlines())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["promote", "polit@abcdef"], "Did you mean 'polite'"),
        (["promote", "polite@ffffff"], "has no version ffffff"),
        (["promote", "polite", "--tag", "deadbeef"], "cannot be a tag"),
        (["rollback", "polite"], "no earlier version"),
        (["rollback", "polit"], "Did you mean"),
        (["withdraw", "polit"], "Did you mean"),
        (["withdraw", "polite", "--tag", "beta"], "nothing to withdraw"),
        (["history", "polit"], "Did you mean 'polite'"),
        (["list", "polit"], "Did you mean 'polite'"),
        (["inspect", "polite@nightly"], "vllm-edits promote polite@<version> --tag nightly"),
        (["inspect", "no/such/folder"], "is not the name of a variant"),
        (["publish", "store"], "expected manifest.json"),
        (["list", "--store", "nowhere"], "vllm-edits init --store nowhere"),
        (["list", "--store", "ftp://bucket"], "expected a folder"),
        (["history", "../polite"], "cannot be a name"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_message_and_changes_nothing(
    run: Run, two: list[str], store: EditStore, words: list[str], said: str
) -> None:
    """On stderr, with exit code 1 and no traceback."""
    result = run(*words)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("vllm-edits: ")
    assert said in result.stderr
    assert [entry.version for entry in store.history("polite")] == two[:1]


def test_a_broken_bundle_is_refused_with_all_reasons(run: Run, store: EditStore, tmp_path: Path) -> None:
    saved(tmp_path / "bundle", seed=1)
    path = tmp_path / "bundle" / "edits.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    result = run("publish", "bundle", "--tag", "prod")
    assert result.exit_code == 1
    assert "[digest]" in result.stderr
    assert "[tensor_file]" in result.stderr
    assert store.names() == []


def test_no_command_shows_help(run: Run) -> None:
    shown = run().output
    assert all(
        name in shown
        for name in (
            "init",
            "publish",
            "list",
            "history",
            "inspect",
            "promote",
            "rollback",
            "withdraw",
            "serve",
            "status",
        )
    )


# -- serve and status --------------------------------------------------------------------------------------------------


class HandedOver(Exception):
    """What `serve` would have become."""


@pytest.fixture(autouse=True)
def no_process_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a refusal failed to come, this test process would become a vLLM server."""

    def hand_over(_command: str, arguments: list[str], environment: dict[str, str]) -> None:
        raise HandedOver(arguments[1:], environment["VLLM_PLUGINS"])

    monkeypatch.setattr(os, "execve", hand_over)


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listening:
        listening.bind(("", 0))
        listening.listen()
        yield listening.getsockname()[1]


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def test_serve_becomes_vllm_with_the_plugin_and_every_other_flag(
    run: Run, store: EditStore, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positive control of the refusals below. Other plugins that were asked for stay."""
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    result = run("serve", "MODEL", "--set", "slots=4", "--port", str(free_port), "--dtype=float32", "--enforce-eager")
    assert isinstance(result.exception, HandedOver)
    arguments, plugins = result.exception.args
    settings = json.dumps({"edits": {"store": store.url, "slots": 4}})
    assert arguments == [
        "serve", "MODEL", "--load-format", "edits",
        "--scheduler-cls", "vllm_edits.EditsScheduler",
        "--additional-config", settings, "--port", str(free_port), "--dtype=float32", "--enforce-eager",
    ]  # fmt: skip
    assert plugins == "other,edits"


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--store", "nowhere"], "vllm-edits init --store nowhere"),
        (["--set", "slot=4"], "edits.slot: unknown setting. Did you mean 'slots'"),
        (["--set", "slots=0"], "edits.slots: Input should be greater than or equal to 1, found 0"),
        (["--set", "slots"], "expected name=value"),
        (["--set", "slots=0", "--set", "colour=red"], "edits.colour: unknown setting"),
        (["--set", "trust_file=none.json"], "trust file none.json cannot be read"),
        (["--set", "signatures=require"], "no key is trusted"),
        (["--set", "signing_key_file=none.key"], "none.key is not a private key"),
        (["--port", "nonsense"], "port nonsense cannot be used"),
        (["--port", "70000"], "port 70000 cannot be used"),
    ],
)
def test_serve_refuses_before_anything_is_loaded(run: Run, words: list[str], said: str) -> None:
    result = run("serve", "MODEL", *words)
    assert (result.exit_code, result.stdout) == (1, "")
    assert said in result.stderr


@pytest.mark.parametrize(
    ("flags", "file", "behind"),
    [
        (["--additional-config", '{"theirs": 1}'], "", ["--enforce-eager"]),
        (['--additional-config={"theirs": 1}'], "", ["--enforce-eager"]),
        (['--additional_config={"theirs": 1}', "--load-format=edits"], "", ["--load-format=edits", "--enforce-eager"]),
        (["--config", "server.yaml"], "additional-config: {theirs: 1}\nload-format: edits\n",
         ["--config", "server.yaml", "--enforce-eager"]),
    ],
)  # fmt: skip
def test_serve_keeps_the_operators_own_additional_config(
    run: Run, store: EditStore, tmp_path: Path, *, flags: list[str], file: str, behind: list[str]
) -> None:
    """vLLM takes the last of equal flags, and a flag before a file: one of the two would be lost."""
    (tmp_path / "server.yaml").write_text(file)
    result = run("serve", "MODEL", *flags, "--enforce-eager")
    arguments, _ = result.exception.args  # type: ignore[union-attr]
    given = arguments.index("--additional-config")
    assert json.loads(arguments[given + 1]) == {"theirs": 1, "edits": {"store": store.url}}
    assert arguments[given + 2 :] == behind


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--load-format", "dummy"],
            "'dummy', but edits need 'edits': leave it out, and set inner_load_format with",
        ),
        (["--scheduler_cls=my.Scheduler"], "--scheduler-cls is 'my.Scheduler'"),
        (["--config", "server.yaml"], "--load-format is 'auto'"),
        (["--additional-config", '{"edits": {"slots": 3}}'], "give them with --set"),
        (["--additional-config", "{"], "expected JSON"),
        (["--additional-config=[1]"], "expected an object"),
        (["--additional-config.theirs", "1"], "give --additional-config as one JSON object"),
        (["--additional-conf.theirs=1"], "give --additional-config as one JSON object"),
        (["--load-form", "auto"], "--load-form: write the flag in full, as --load-format"),
        (["--scheduler-c=x"], "--scheduler-c: write the flag in full, as --scheduler-cls"),
        (["--config", "dotted.yaml"], "--additional-config.edits.store: give --additional-config as one JSON object"),
        (["--config", "dotted.yaml"], "--load-form: write the flag in full, as --load-format"),
        (["--config", "dotted.yaml"], "--grpc: vLLM does not load the plugin"),
        (["--grpc"], "--grpc: vLLM does not load the plugin"),
        (["--config=none.yaml"], "--config none.yaml cannot be read"),
        (["--load-format", "dummy", "--scheduler-cls", "x"], "'dummy'"),
        (["--load-format", "dummy", "--scheduler-cls", "x"], "--scheduler-cls is 'x'"),
    ],
)
def test_serve_refuses_flags_that_would_overrule_the_plugins(
    run: Run, tmp_path: Path, flags: list[str], said: str
) -> None:
    (tmp_path / "server.yaml").write_text("load_format: auto\n")
    (tmp_path / "dotted.yaml").write_text("additional_config.edits.store: /other\nload-form: auto\ngrpc: true\n")
    result = run("serve", "MODEL", *flags)
    assert (result.exit_code, result.stdout) == (1, "")
    assert said in result.stderr


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    ("named", "turned_on", "said"),
    [
        ("other, edits", "other,edits", "names 'other', which is not installed"),
        (" edits ", "edits", ""),
        ("Edits", "Edits,edits", "did you mean 'edits'"),
        ("", "edits", ""),
        (None, None, "all installed plugins stay enabled: edits, "),
    ],
)
def test_serve_turns_no_other_plugin_off(
    run: Run, free_port: int, monkeypatch: pytest.MonkeyPatch, *, named: str | None, turned_on: str | None, said: str
) -> None:
    """Without VLLM_PLUGINS vLLM loads all that are installed; naming edits alone would end that."""
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if named is not None:
        monkeypatch.setenv("VLLM_PLUGINS", named)
    result = run("serve", "MODEL", "--port", str(free_port))
    _, plugins = result.exception.args  # type: ignore[union-attr]
    assert said in result.stderr
    if turned_on is not None:
        assert plugins == turned_on
    else:
        installed = {each.name for each in entry_points(group="vllm.general_plugins")}
        assert set(plugins.split(",")) >= installed > {"edits"}


@pytest.mark.usefixtures("store")
def test_serve_looks_at_the_address_that_it_will_use(run: Run, taken_port: int) -> None:
    """A port of another address is free, whoever listens on this one."""
    with socket.socket() as elsewhere:
        elsewhere.bind(("127.0.0.2", 0))
        elsewhere.listen()
        port = elsewhere.getsockname()[1]
        assert isinstance(run("serve", "MODEL", "--host", "127.0.0.1", "--port", str(port)).exception, HandedOver)
        refused = run("serve", "MODEL", "--host=127.0.0.2", "--port", str(port))
        assert f"port {port} of 127.0.0.2 cannot be used" in refused.stderr
    assert "cannot be used" in run("serve", "MODEL", "--host", "no.such.host.", "--port", str(taken_port)).stderr


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("flag", ["--port {}", "--port={}"])
def test_serve_refuses_a_taken_port_with_the_mend(run: Run, taken_port: int, flag: str) -> None:
    result = run("serve", "MODEL", *flag.format(taken_port).split())
    assert result.exit_code == 1
    assert f"port {taken_port} cannot be used" in result.stderr
    assert "--port" in result.stderr


@pytest.mark.usefixtures("store")
def test_serve_looks_at_the_port_that_vllm_will_use(run: Run, tmp_path: Path, taken_port: int) -> None:
    (tmp_path / "server.yaml").write_text(f"port: {taken_port}\n")
    result = run("serve", "MODEL", "--config", "server.yaml")
    assert f"port {taken_port} cannot be used" in result.stderr


def test_status_without_a_server_says_so(run: Run, free_port: int) -> None:
    result = run("status", "--url", f"http://127.0.0.1:{free_port}")
    assert result.exit_code == 1
    assert "Check that the server runs, or name its address with --url" in result.stderr


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate")
def test_a_certificate_of_ones_own_authority_is_named_in_the_environment(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1",
            "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]  # fmt: skip
    subprocess.run(made, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"https://127.0.0.1:{server.server_port}"
        assert (
            "Set SSL_CERT_FILE to the certificate of the authority that signed it" in run("status", "--url", url).stderr
        )
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert "/v1/edits answered 501" in run("status", "--url", url).stderr
        server.shutdown()


def test_help_is_there_for_every_command(run: Run) -> None:
    for command in (
        "init",
        "publish",
        "list",
        "history",
        "inspect",
        "promote",
        "rollback",
        "withdraw",
        "serve",
        "status",
    ):
        assert run(command, "--help").exit_code == 0


@pytest.mark.usefixtures("store")
def test_the_environment_can_name_the_store(run: Run, tmp_path: Path) -> None:
    """VLLM_EDITS_STORE stands in for --store, and --store wins over it."""
    EditStore(str(tmp_path / "other"), create=True).publish(random_bundle("strict", BASE, seed=1))
    assert json.loads(run("list", "--json").stdout) == []
    listed: Any = json.loads(run("list", "--json", "--store", "other").stdout)
    assert [row["name"] for row in listed] == ["strict"]


# -- a day of an author, a promoter and an operator --------------------------------------------------------------------


def test_show_tells_everything_about_one_version(run: Run, two: list[str]) -> None:
    shown = run("show", "polite").stdout
    for part in (two[0], "v1", "tiny", "low_rank", "random", "prod", "none"):
        assert part in shown
    found = json.loads(run("show", f"polite@{two[1][:7]}", "--json").stdout)
    assert (found["version"], found["promoted_as"]) == (two[1], [])
    assert found["manifest"]["base"]["name"] == BASE.name


def test_diff_names_what_moved(run: Run, two: list[str]) -> None:
    lines = run("diff", "polite", f"polite@{two[1][:8]}").stdout.splitlines()
    assert "label: v1 -> v2" in lines
    assert sum("changed" in line for line in lines) == 4
    found = json.loads(run("diff", "polite", "polite", "--json").stdout)
    assert found["fields"] == {}
    assert {edit["change"] for edit in found["edits"]} == {"same"}


def test_a_pinned_tag_says_who_why_and_how_to_free_it(run: Run, two: list[str]) -> None:
    assert "pin)" in run("pin", "polite", "--reason", "incident 7").stdout
    refused = run("promote", f"polite@{two[1]}")
    assert refused.exit_code == 1
    assert "incident 7" in refused.stderr
    assert "vllm-edits pin polite --tag prod --remove" in refused.stderr
    assert run("pin", "polite", "--remove").exit_code == 0
    assert run("promote", f"polite@{two[1]}").exit_code == 0


def test_a_version_travels_by_copy_and_by_file(run: Run, two: list[str], tmp_path: Path) -> None:
    run("init", "--store", "mirror")
    run("init", "--store", "island")
    assert run("copy", "polite", "--to", "mirror").exit_code == 0
    written = json.loads(run("export", f"polite@{two[1]}", "--json").stdout)
    assert written["version"] == two[1]
    assert json.loads(run("import", written["file"], "--store", "island", "--json").stdout) == [
        {"name": "polite", "version": two[1]}
    ]
    assert EditStore("mirror").version_digests("polite") == [two[0]]
    assert EditStore("island").version_digests("polite") == [two[1]]
    for each in ("mirror", "island"):
        assert run("verify", "--store", each).exit_code == 0
    (tmp_path / "broken.tar").write_bytes(Path(written["file"]).read_bytes()[:-9000])
    refused = run("import", "broken.tar", "--store", "mirror")
    assert refused.exit_code == 1
    assert "refused" in refused.stderr


def test_verify_finds_gc_says_what_it_would_do(run: Run, two: list[str], store: EditStore) -> None:
    assert "clean" in run("verify").stdout
    dry = run("gc", "--grace-hours", "0").stdout
    assert f"version {two[1][:12]}, never promoted" in dry
    assert "vllm-edits gc --run" in dry
    assert len(store.version_digests("polite")) == 2
    assert json.loads(run("gc", "--grace-hours", "0", "--run", "--json").stdout)["versions"] == [two[1]]
    assert store.version_digests("polite") == [two[0]]
    blob = store.manifest(two[0]).tensors.sha256
    Path(store.url, "blobs/sha256", blob[:2], blob).write_bytes(b"?")
    found = run("verify", "--json")
    assert found.exit_code == 1
    assert json.loads(found.stdout)["findings"][0]["object"] == f"version {two[0][:12]}"


def test_two_promoters_from_keys_to_belief(run: Run, two: list[str]) -> None:
    for who in ("alice", "bob"):
        assert f"{who}.pub" in run("keygen", f"{who}.key").stdout
    assert (
        "servers cannot use this file yet" in run("trust", "add", "trust.json", "alice.pub", "--role", "author").stderr
    )
    run("trust", "add", "trust.json", "bob.pub", "--role", "promoter", "--days", "30")
    run("trust", "remove", "trust.json", "alice")
    run("trust", "add", "trust.json", "alice.pub", "--role", "author", "--role", "promoter")
    assert run("trust", "threshold", "trust.json", "promoter", "2").exit_code == 0
    keys = json.loads(run("trust", "list", "trust.json", "--json").stdout)
    assert {key["name"]: key["roles"] for key in keys} == {"alice": "author promoter", "bob": "promoter"}

    def trusted() -> bool:
        return bool(json.loads(run("trust", "check", "polite", "--trust", "trust.json", "--json").stdout)["trusted"])

    assert run("sign", f"polite@{two[1]}", "--key", "alice.key").exit_code == 0
    assert run("promote", f"polite@{two[1]}", "--key", "alice.key").exit_code == 0
    assert not trusted()
    assert "below_threshold" in run("trust", "check", "polite", "--trust", "trust.json").stdout
    assert "as promoter" in run("sign", "polite@prod", "--as", "promoter", "--key", "bob.key").stdout
    assert trusted()
    assert "signed by keys" in run("show", "polite").stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sign", "polite@abcdef", "--as", "promoter", "--key", "a.key"], "A promoter signs the present"),
        (["sign", "polite", "--key", "nobody.key"], "is not a private key"),
        (["keygen", "a.key"], "never overwritten"),
        (["trust", "list", "nothing.json"], "cannot be read"),
        (["trust", "remove", "empty.json", "carol"], "no key 'carol'"),
        (["trust", "add", "empty.json", "a.key", "--role", "author"], "was not changed"),
        (["copy", "polite", "--to", "nowhere"], "vllm-edits init --store nowhere"),
        (["export", "polite", "-o", "taken.tar"], "is not overwritten"),
        (["import", "taken.tar"], "is refused"),
        (["diff", "polite", "rude"], "nothing is published under 'rude'"),
        (["pin", "polite", "--tag", "beta"], "nothing to pin"),
    ],
)
@pytest.mark.usefixtures("two")
def test_what_cannot_be_done_says_why(run: Run, tmp_path: Path, words: list[str], said: str) -> None:
    run("keygen", "a.key")
    (tmp_path / "empty.json").write_text('{"schema_version": 1}')
    (tmp_path / "taken.tar").write_text("x")
    result = run(*words)
    assert result.exit_code == 1
    assert said in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.usefixtures("run")
def test_names_tags_and_versions_complete(two: list[str]) -> None:
    context = typer.Context(get_command(app))
    assert complete_name(context, "po") == ["polite"]
    assert complete_name(context, "x") == []
    assert set(complete_reference(context, "polite@")) == {"polite@prod", *(f"polite@{each[:12]}" for each in two)}
    assert complete_reference(context, f"polite@{two[1][:4]}") == [f"polite@{two[1][:12]}"]


def test_completion_without_a_store_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_EDITS_STORE", raising=False)
    assert complete_name(typer.Context(get_command(app)), "po") == []


def commands(group: object, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        found += commands(command, (*path, name)) if hasattr(command, "commands") else [(*path, name)]
    return found


@pytest.mark.parametrize("words", commands(get_command(app)), ids=" ".join)
def test_every_command_explains_itself_and_speaks_json(run: Run, words: tuple[str, ...]) -> None:
    shown = run(*words, "--help")
    assert shown.exit_code == 0
    assert len(shown.stdout) > 200
    if words != ("serve",):
        assert "--json" in shown.stdout


@pytest.mark.parametrize("flag", ["-cc.mode=0", "-sc.method=ngram", "-tp"])
def test_short_flags_of_vllms_are_refused_where_they_would_be_read_as_ours(run: Run, flag: str) -> None:
    """click finds `-o` in the first."""
    ran = run("run-batch", "MODEL", "--store", "s", "-i", "in", "-o", "out", flag)
    assert ran.exit_code == 2
    assert "write vLLM's flags in full" in ran.output


@pytest.mark.parametrize("flags", [["--headless"], ["--uds", "x"], ["--ssl-certfile=c"], ["--config", "tls.yaml"]])
def test_a_batch_is_refused_where_its_server_would_answer_elsewhere(run: Run, tmp_path: Path, flags: list[str]) -> None:
    """Otherwise the command would wait for it for ever."""
    EditStore(str(tmp_path / "store"), create=True)
    (tmp_path / "tls.yaml").write_text("ssl-certfile: c\n")
    (tmp_path / "in").write_text(json.dumps({"custom_id": "1", "url": "/v1/completions", "body": {}}))
    ran = run("run-batch", "MODEL", "--store", "store", "-i", "in", "-o", "out", *flags)
    assert ran.exit_code == 1
    assert "answers on its own socket" in ran.output
