"""Every command and every block of Python in every Markdown file is run, or says why not; documents are valid.

How a page says so is told in tests/support/documents/markdown.py, and what a command finds in sandbox.py beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.documents.blocks import faults, files_shown
from tests.support.documents.markdown import Page
from tests.support.documents.repository import ROOT, pages
from tests.support.documents.sandbox import World

pytestmark = pytest.mark.long

Judge = Callable[[str], list[str]]


@pytest.mark.parametrize("path", [path for path, page in pages().items() if page.blocks])
def test_every_block_runs_or_says_why_not(
    path: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = faults(pages()[path], world, tmp_path, files_shown(pages().values()), monkeypatch)
    assert not found, "\n" + "\n".join(found)


# -- controls ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def judge(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Judge:
    """What is found wrong with a page of that text."""

    def found(text: str) -> list[str]:
        page = Page.read("a/page.md", text)
        return faults(page, world, tmp_path, files_shown([page]), monkeypatch)

    return found


STARTS = "<!-- not run (vllm-edits serve): it would start vLLM -->\n"
ASKS = "<!-- not run (curl): it needs a server -->\n"
LEFT_OUT = "<!-- not run: it needs a network -->\n"


def console(text: str, note: str = "") -> str:
    return f"# A page\n\n{note}```console\n{text}\n```\n"


def python(text: str, note: str = "") -> str:
    return f"# A page\n\n{note}```python\n{text}\n```\n"


def yaml(text: str, note: str = "") -> str:
    return f"# A page\n\n{note}```yaml\n{text}\n```\n"


SOUND = {
    "commands of the store": console(
        "vllm-edits init --store ./new\nvllm-edits publish ./polite --store ./new --tag staging   # a comment"
    ),
    "the version that pages have as an example": console(
        "vllm-edits promote polite@4f1c9a2b --store store && vllm-edits rollback polite --store store"
    ),
    "a variable that a block before has set": console("export VLLM_EDITS_STORE=./store")
    + console("vllm-edits show polite --json > shown\ngrep() { cat; }\ncat shown | grep"),
    "a prompt, and what was answered": console(
        "$ vllm-edits list \\\n    --store store\nname  version\n$ ls store/store.json\nstore/store.json"
    ),
    "a key": console("vllm-edits keygen alice.key\nvllm-edits publish ./safe --key alice.key --store store"),
    "a block that begins anew": console("vllm-edits withdraw polite --store store")
    + console("vllm-edits show polite@prod --store store", "<!-- begins anew -->\n"),
    "a model": console("vllm-edits plan MODEL --store store --memory 1MiB\nvllm-edits sites MODEL"),
    "a server": console("vllm-edits serve MODEL --store ./store --set slots=4 --max-model-len 512", STARTS),
    "a batch": console(
        "vllm-edits run-batch MODEL --store store -i requests.jsonl -o answers.jsonl --enforce-eager",
        "<!-- not run (vllm-edits run-batch): it would start vLLM -->\n",
    ),
    "vLLM itself": console(
        "VLLM_PLUGINS=edits vllm serve --config server_config/examples/one-machine.yaml",
        "<!-- not run (vllm): it would start vLLM -->\n",
    ),
    "a server that is asked": console(
        "curl localhost:8000/v1/models -i\nvllm-edits status", "<!-- not run (curl, vllm-edits status): no server -->\n"
    ),
    "one of our routes": console(
        "curl -X PUT 127.0.0.1:8000/v1/edits/polite -H 'x-edits-admin-token: x' --json '{\"version\": \"4f1c9a\"}'",
        ASKS,
    ),
    "one of vLLM's": console(
        'curl localhost:8000/v1/completions -H \'x-edits-unit: me\' \\\n -d \'{"model": "polite", "seed": 1}\'', ASKS
    ),
    "what needs a network": console("pip install 'vllm-edits[server]'\nvllm-edits init --store s3://edits/a", LEFT_OUT),
    "a command in a container": console(
        "docker compose -f docker/compose.yaml exec server vllm-edits list --json", LEFT_OUT
    ),
    "a server in a container": console(
        "docker run -p 8000:8000 vllm-edits MODEL --load-format edits "
        '--additional-config \'{"edits": {"store": "/store"}}\'',
        LEFT_OUT,
    ),
    "targets and modules": console(
        "make bench ARGS='--only idle'\npython -m loadtests.bench.plot FILE", "<!-- not run (make, python): slow -->\n"
    ),
    "Python, and names of a block before": python("from vllm_edits.edit_store import EditStore\na = EditStore('store')")
    + python("assert a.resolve('polite@4f1c9a').startswith('4f1c9a')"),
    "Python that needs an engine": python("from vllm import LLM\nfrom vllm_edits import Variants", LEFT_OUT)
    + python("Variants(llm)", LEFT_OUT),
    "flags of vLLM": yaml("load-format: edits\nadditional-config: {edits: {store: ./store, slots: 2}}"),
    "settings": yaml("edits: {store: ./store}"),
    "a compose file": yaml("services: {server: {image: vllm-edits}}"),
    "Prometheus": yaml("scrape_configs: [{job_name: edits, static_configs: [{targets: ['server:8000']}]}]"),
    "a document of others": yaml("apiVersion: v1\nkind: Service", "<!-- not run: there is no cluster -->\n"),
    "a file that a command reads": yaml(
        "name: tone\nmodel: polite\narms:\n  - {name: one, serves: base, weight: 0.5}\n"
        "  - {name: two, serves: polite@4f1c9a2b, weight: 0.5}",
        "<!-- file: tone.yaml -->\n",
    )
    + console("vllm-edits experiment create tone.yaml --store store"),
    "requests": '```jsonl\n{"custom_id": "1", "url": "/v1/completions", "body": {"model": "a", "prompt": "x"}}\n```\n',
    "output, and another language": f"```text\nanything\n```\n\n{LEFT_OUT}```toml\na = 1\n```\n",
}


@pytest.mark.parametrize("text", SOUND.values(), ids=SOUND)
def test_a_sound_page_passes(judge: Judge, text: str) -> None:
    assert judge(text) == []


WRONG = [
    (console("vllm-edits init --store x\nvllm-edits pubish ./polite"), 5, "No such command 'pubish'"),
    (console("vllm-edits list --stor store"), 4, "--stor"),
    (console("vllm-edits promote polite@ffffff --store store"), 4, "has no version ffffff"),
    (console("vllm-edits show no --store store || true"), 4, "ends with 1"),
    (console("ls nowhere && true\ntrue"), 4, "ends with 2"),
    (console("true\nfalse"), 5, "ends with 1: false"),
    (console("vllm-edits list [another's store]"), 4, "unexpected EOF"),
    (console("./there-is-none"), 4, "ends with 127"),
    (console("pip install vllm-edits"), 4, "blocks are run without `pip`"),
    (console("pip install vllm-edits", "<!-- not run -->\n"), 3, "no reason is given"),
    (console("vllm-edits list --store s", "<!-- not run: too dear -->\n"), 3, "can be run: remove the comment"),
    (console("curl localhost:8000/v1/models"), 4, "say why above the block, as <!-- not run (curl): why -->"),
    (console("vllm-edits serve MODEL --store store"), 4, "<!-- not run (vllm-edits serve): why -->"),
    (console("vllm-edits experiment replay prompts.jsonl a b"), 4, "<!-- not run (vllm-edits experiment replay)"),
    (console("vllm-edits list --store store", ASKS), 3, "no `curl` below is left out"),
    (console("vllm-edits list --store store", "<!-- not run (vllm-edits list): no -->\n"), 3, "is left out"),
    (f"# A page\n\n{LEFT_OUT}\nText.\n", 3, "stands above no block"),
    (console("vllm-edits serve MODEL --store store --max-model-length 5", STARTS), 5, "unrecognized arguments"),
    (console("vllm-edits serve MODEL --store store --set slot=5", STARTS), 5, "Did you mean 'slots'"),
    (console("vllm-edits serve MODEL --store nowhere", STARTS), 5, "vllm-edits init"),
    (console("vllm serve MODEL --load-format edits --additional-config '{\"edits\": {\"slots\": 1}}'", LEFT_OUT), 5,
     "edits.store"),
    (console("vllm serve --config server_config/none.yaml", LEFT_OUT), 5, "refuses it"),
    (console("vllm serve MODEL --load-format edits --additional-config '{\"edits\": {\"store\": \"s\"}}' "
             "--scheduler-cls vllm_edits.Scheduler", LEFT_OUT), 5, "expected vllm_edits.EditsScheduler"),
    (console("curl localhost:8000/v1/edits/feedbak -d '{}'", ASKS), 5, "no route POST /v1/edits/feedbak"),
    (console("curl localhost:8000/v1/edits/feedback", ASKS), 5, "no route GET /v1/edits/feedback"),
    (console("curl localhost:8000/v1/model", ASKS), 5, "Did you mean '/v1/models'"),
    (console("curl localhost:8000/v1/models -H 'x-edits-unitt: me'", ASKS), 5, "Did you mean 'x-edits-unit'"),
    (console("curl localhost:8000/v1/completions -d '{\"modell\": \"polite\"}'", ASKS), 5, "no field modell"),
    (console("curl localhost:8000/v1/edits/feedback -d '{\"metric\": 1}'", ASKS), 5, "its body is refused"),
    (console("curl localhost:8000/v1/models --fale", ASKS), 5, "curl: unrecognized arguments: --fale"),
    (console("docker compose -f docker/composed.yaml up", LEFT_OUT), 5, "there is no docker/composed.yaml"),
    (console("docker compose -f docker/compose.yaml exec serve vllm-edits list", LEFT_OUT), 5, "no service 'serve'"),
    (console("docker compose -f docker/compose.yaml exec server vllm-edits lst", LEFT_OUT), 5, "no `vllm-edits lst`"),
    (console("docker run vllm-edits MODEL --load-fmt edits", LEFT_OUT), 5, "unrecognized arguments"),
    (console("make bnch", LEFT_OUT), 5, "make refuses it"),
    (console("make bench ARG=--quick", LEFT_OUT), 5, "no variable ARG"),
    (console("make bench ARGS='--only idel'", LEFT_OUT), 5, "'idel' is no part"),
    (console("make test-gpu ARGS='--of x'", LEFT_OUT), 5, "no option --of"),
    (console("python -m loadtests.demo.server", LEFT_OUT), 5, "no module loadtests.demo.server"),
    (console("if true; then", LEFT_OUT), 5, "the shell cannot read it"),
    (python("x = 1\nassert x == 2"), 5, "ends with AssertionError"),
    (python("from vllm_edits.edit_store import EditShop"), 4, "ImportError"),
    (python("x ="), 4, "no Python"),
    (python("from vllm import LLM"), 4, "no engine is started for a page"),
    (python("import json", LEFT_OUT), 3, "so it can be run"),
    (python("from vllm import LLM\nfrom vllm_edits import Variant", LEFT_OUT), 6, "vllm_edits has no Variant"),
    (python("x =", LEFT_OUT), 5, "no Python"),
    (yaml("name: tone\nmodel: polite\narms: []"), 4, "it is an experiment, and would be refused"),
    (yaml("load-format: edits\nadditional-config: {edits: {slots: 2}}"), 4, "edits.store"),
    (yaml("load-format: edits\nmax-model-length: 5"), 4, "it is flags of vLLM, and would be refused"),
    (yaml("edits: {store: s, slot: 1}"), 4, "it is settings, and would be refused"),
    (yaml("schema_version: 1\nkeys: [{name: alice}]"), 4, "it is a trust file, and would be refused"),
    (yaml("services: {server: {imag: vllm-edits}}"), 4, "it is a compose file, and would be refused"),
    (yaml("apiVersion: v1"), 4, "it is none of an experiment"),
    (yaml("edits: {store: s}", LEFT_OUT), 3, "it is settings, and was checked: remove"),
    (yaml("a: ["), 4, "neither YAML nor JSON"),
    ('```json\n{"previous_sha256": null, "tag": "prod", "version": "4f"}\n```\n', 2, "it is an entry of a tag"),
    ('```json\n{"model": "polite", "promt": "x", "prompt": "y"}\n```\n', 2, "has no field promt"),
    ("```toml\na = 1\n```\n", 2, "nobody knows how to run 'toml'"),
    ("```\na\n```\n", 2, "'a block without a language'"),
    ("Text.\n\n    indented\n", 3, "'a block without a language'"),
    (f"{LEFT_OUT}```text\na\n```\n", 1, "is never run: remove"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line", "said"), WRONG, ids=[said for *_, said in WRONG])
def test_what_is_wrong_with_a_page_is_told_with_its_line(judge: Judge, text: str, line: int, said: str) -> None:
    found = judge(text)
    assert len(found) == 1, found
    assert found[0].startswith(f"a/page.md:{line}: ")
    assert said in found[0]


def test_nothing_that_a_page_does_reaches_the_repository(world: World, tmp_path: Path) -> None:
    """Its folder is its own, and so are its home and what it finds on its PATH."""
    sandbox = world.sandbox(tmp_path / "sandbox", {}, {})
    ran = sandbox.run('touch() { > "$1"; }\ntouch left-behind\ncd docker\nrm compose.yaml\necho $HOME $PATH')
    assert ran.code == 0, ran.said
    assert (tmp_path / "sandbox" / "left-behind").exists()
    assert str(tmp_path) in ran.said
    assert "/usr/bin" not in ran.said
    assert (ROOT / "docker/compose.yaml").exists()
    assert sandbox.run("echo $PWD").said.strip() == str(tmp_path / "sandbox" / "docker")
