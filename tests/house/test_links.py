"""Every link of every Markdown file leads somewhere, and what its text names in code is there."""

from __future__ import annotations

import pytest

from tests.support.documents.markdown import Page
from tests.support.documents.names import faults_of_links, faults_of_names
from tests.support.documents.repository import pages, tracked
from tests.support.documents.sandbox import World

pytestmark = pytest.mark.long


@pytest.mark.parametrize("path", pages())
def test_every_link_leads_somewhere(path: str) -> None:
    found = [f"{path}:{line}: {why}" for line, why in faults_of_links(pages()[path], pages(), tracked())]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("path", pages())
def test_what_is_named_in_code_is_there(path: str, world: World) -> None:
    found = [f"{path}:{line}: {why}" for line, why in faults_of_names(pages()[path], world.reader, tracked())]
    assert not found, "\n" + "\n".join(found)


# -- controls ----------------------------------------------------------------------------------------------------------

OTHER = Page.read("docs/other.md", "# What's *new*? (`x_y`)\n\n## Twice\n\n## Twice\n\n<a id='here'></a>\n")
TRACKED = frozenset(
    {"docs/page.md", "docs/other.md", "plugin/graph/reservation.py", "loadtests/demo/README.md", "a picture.svg"}
)


@pytest.mark.parametrize(
    "link",
    ["[a](other.md)", "[a](../plugin/graph/reservation.py)", "[a](../plugin)", "[a](../loadtests/demo/)",
     "[a](#a-page)",
     "[a](other.md#whats-new-x_y)", "[a](other.md#twice)", "[a](other.md#twice-1)", "[a](other.md#here)", "[a](..)",
     "[a](../a%20picture.svg)", "![a](<../a picture.svg>)", "<img src='../a picture.svg'>", "[a]\n\n[a]: other.md",
     "[a](https://example.org/none)", "[a](mailto:a@example.org)", "`[a](none.md)`"],
)  # fmt: skip
def test_a_link_that_leads_somewhere_passes(link: str) -> None:
    page = Page.read("docs/page.md", f"# A page\n\n{link}\n")
    assert list(faults_of_links(page, {"docs/page.md": page, "docs/other.md": OTHER}, TRACKED)) == []


@pytest.mark.parametrize(
    ("link", "said"),
    [
        ("[a](none.md)", "there is no docs/none.md"),
        ("[a](reservation.py)", "there is no docs/reservation.py, but plugin/graph/reservation.py"),
        ("[a](../demo/README.md)", "there is no demo/README.md, but loadtests/demo/README.md"),
        ("[a](other.md#whats-old)", "docs/other.md has no heading #whats-old"),
        ("[a](other.md#twice-2)", "has no heading #twice-2"),
        ("[a](#none)", "docs/page.md has no heading #none"),
        ("[a]\n\n[a]: none.md", "there is no docs/none.md"),
        ("![a](none.svg)", "there is no docs/none.svg"),
        ("<a href='none.md'>a</a>", "there is no docs/none.md"),
        ("<div>\n<img src='none.svg'></div>", "there is no docs/none.svg"),
    ],
)
def test_a_link_that_leads_nowhere_is_told_with_its_line(link: str, said: str) -> None:
    page = Page.read("docs/page.md", f"# A page\n\n{link}\n")
    ((line, why),) = faults_of_links(page, {"docs/page.md": page, "docs/other.md": OTHER}, TRACKED)
    assert line == 3
    assert said in why


@pytest.mark.parametrize(
    "code",
    ["plugin/graph/reservation.py", "vllm_edits/plugin/graph/reservation.py", "reservation.py",
     "house/test_links.py", "../plugin",
     "edit_store/authoring/", "tests/house/test_*.py", ".cache/rehearsal", "FOLDER/results.jsonl", "trust.json",
     "blobs/sha256/<ab>", "/v1/models", "application/json", "vllm-edits gc --run", "vllm-edits trust …",
     "vllm-edits serve MODEL --any-flag", "vllm serve --grpc", "make bench ARGS='--only idle'", "make pack-gpu DEST=…",
     "python -m loadtests.micro.step", "python -m pytest", "cd kit && python3 kit/unpack.py kit && make test-gpu",
     "edits.slots=4", "edits.safetensors", "--set slots=4", "PUT /v1/edits/{name}", "POST /v1/completions",
     "vllm_edits.EditsScheduler", "vllm_edits.edit_store.EditStore", "vllm_edits_requests_total{variant}",
     "vllm_edits_request_seconds_bucket", "vllm_edits_…", "x-edits-unit", "vllm-edits[cloud,hub]"],
)  # fmt: skip
def test_a_name_that_is_there_passes(code: str, world: World) -> None:
    page = Page.read("docs/page.md", f"# A page\n\nSee `{code}`.\n")
    assert list(faults_of_names(page, world.reader, tracked())) == []


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("plugin/reservation.py", "no such file or folder, but plugin/graph/reservation.py"),
        ("demo/", "no such file or folder, but loadtests/demo"),
        ("test_nothing.py", "no such file"),
        ("tests/house/tests_*.py", "no such file"),
        ("edit_store/nothing", "no such file"),
        ("vllm-edits gc --rum", "no `vllm-edits gc --rum`. Did you mean '--run'"),
        ("vllm-edits trust treshold trust.json", "Did you mean 'threshold'"),
        ("vllm-edits sign 'polite", "No closing quotation"),
        ("make bnch", "make refuses it"),
        ('make bench ARGS="--only idel"', "'idel' is no part"),
        ("python -m loadtests.steps", "no module loadtests.steps"),
        ("vllm serve --grpcc", "refuses it"),
        ("edits.slot", "no setting edits.slot. Did you mean 'slots'"),
        ("--set slot=4", "no setting edits.slot."),
        ("PUT /v1/edits", "no route PUT /v1/edits"),
        ("POST /v1/edits/{names}/rollback", "no route"),
        ("vllm_edits.Scheduler", "vllm_edits has no Scheduler"),
        ("vllm_edits_requests", "no series"),
        ("vllm_edits_slots", "no series vllm_edits_slots."),
        ("x-edits-units", "no header x-edits-units. Did you mean 'x-edits-unit'"),
        ("vllm-edits[clouds]", "no extra 'clouds'"),
    ],
)
def test_a_name_that_is_not_there_is_told_with_its_line(code: str, said: str, world: World) -> None:
    page = Page.read("docs/page.md", f"# A page\n\nSee what\n`{code}` says.\n")
    found = list(faults_of_names(page, world.reader, tracked()))
    assert found, "expected a fault"
    assert found[0][0] == 4
    assert said in found[0][1]
