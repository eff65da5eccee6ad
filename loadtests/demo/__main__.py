"""`make demo`: the story of the product on a real model, with every claim checked."""

from __future__ import annotations

import argparse
import asyncio
import math
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from loadtests.demo.bundles import Exhibit, MeasuredClaim, build
from loadtests.harness.client import stream
from loadtests.harness.growth import until_served
from loadtests.harness.hub_server import HubServer
from loadtests.harness.load import Question, constant_load
from loadtests.harness.metrics import Scrape
from loadtests.harness.model import ensure_model
from loadtests.harness.record import gpu
from loadtests.harness.server import Server, ServerFailed
from vllm_edits.edit_store import Bundle, EditStore, TrustPolicy, identify
from vllm_edits.edit_store.authoring import host
from vllm_edits.edit_store.experiments.document import Experiment
from vllm_edits.edit_store.experiments.experiment_log import Experiments
from vllm_edits.edit_store.experiments.state import ExperimentChange
from vllm_edits.plugin.experiments.analysis.evidence import Logs
from vllm_edits.plugin.experiments.records import Exposure

FOLDER = Path(".cache/demo")
BASE = "smollm2"
EXPOSURES = FOLDER / "exposures"
POLL_SECONDS = 2.0
PAUSE_SECONDS = {False: 1.0, True: 30.0}
"""The longest pause of a growth, on a CPU, and on a GPU, where CUDA graphs are captured again."""
Made = tuple[Exhibit, Bundle]
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


class StatementFails(Exception):
    """The demo said something that is not so."""


class Claims:
    """Says what is so, and ends the demo at the first thing that is not."""

    count = 0

    def __call__(self, claim: str, true: bool, found: object = "") -> None:
        if not true:
            raise StatementFails(f"{claim}; found {found}")
        self.count += 1
        console.print(f"  [green]✓[/green] {claim}" + (f" [dim]({escape(str(found))})[/dim]" if found != "" else ""))


def main() -> int:
    """Tell the story; 0 if every claim held."""
    parser = argparse.ArgumentParser(
        prog="make demo ARGS=…",
        description="Serve edited variants of a small model on this machine, and check every claim about them.",
    )
    parser.add_argument("--keep", action="store_true", help="keep the server running at the end, until Ctrl-C")
    parser.add_argument(
        "--from-hub",
        action="store_true",
        help="let the server fetch the model from a local stand-in for the Hugging Face Hub",
    )
    arguments = parser.parse_args()
    claims = Claims()
    shutil.rmtree(FOLDER, ignore_errors=True)
    try:
        with ExitStack() as hub:
            fetched = served_by_a_hub(hub) if arguments.from_hub else None
            tell(claims, keep=arguments.keep, fetched=fetched)
    except StatementFails as claim:
        console.print(f"  [red]✗ {escape(str(claim))}[/red]")
        console.print(f"The demo ends here: this claim is false. The server's log is {FOLDER}/server.log")
        return 1
    except ServerFailed as failure:
        console.print(f"[red]The server did not start.[/red] The end of {FOLDER}/server.log:\n{escape(str(failure))}")
        return 1
    console.print(f"\n[bold]All {claims.count} claims held.[/bold]")
    return 0


@dataclass(frozen=True)
class Fetched:
    """A model that the server fetches by name."""

    name: str
    environment: Mapping[str, str]


def served_by_a_hub(running: ExitStack) -> Fetched:
    """The demo's model in a repository of a Hub on this machine, and an empty cache for what is fetched."""
    hub = running.enter_context(HubServer({}))
    hub.add("demo/smollm2").commit(
        {path.name: path.read_bytes() for path in ensure_model().iterdir() if path.is_file()}
    )
    home = str((FOLDER / "hub").resolve())
    return Fetched("demo/smollm2", {"HF_ENDPOINT": hub.url, "HF_HOME": home, "HF_HUB_OFFLINE": "0"})


def tell(claims: Claims, *, keep: bool, fetched: Fetched | None) -> None:
    """The whole story, top to bottom."""
    model = ensure_model()
    chapter("1. Bundles, computed from the model itself")
    with progress() as bar:
        task = bar.add_task("hashing the model", total=None)
        base = identify(model, name=BASE)
        *made, late = build(model, base, lambda step: bar.update(task, description=step))
    show_bundles([*made, late])
    for exhibit, bundle in (*made, late):
        broken = [
            why
            for claim, row in zip(exhibit.claims, bundle.manifest.measurements, strict=False)
            if (why := claim.broken(row))
        ]
        claims(f"{exhibit.name} {exhibit.label} {exhibit.description}", not broken, broken or "")

    chapter("2. A store, and a server that follows it")
    store = EditStore(str(FOLDER / "store"), create=True)
    # The bundle without copying heads is made by a method that takes safety away where it is used for that.
    TrustPolicy(privileged=True).save(FOLDER / "trust.json")
    first: dict[str, Made] = {}
    store.publish(late[1])
    for each in made:
        store.publish(each[1])
        first.setdefault(each[0].name, each)
    for name, (_, bundle) in first.items():
        entry = store.promote(f"{name}@{bundle.version}", reason="the demo's first version")
        console.print(f"  promoted {name}@{entry.version[:12]} to {entry.tag}")
    server = Server.with_edits(
        fetched.name if fetched else model, FOLDER / "store", FOLDER / "server.log", "--max-model-len", "2048",
        "--enable-prefix-caching", name=BASE,
        # Its own memory of the store: the user's remembers the last demo's, and would call this one rewritten.
        settings={
            "poll_seconds": POLL_SECONDS, "cache_folder": FOLDER / "node", "exposure_folder": EXPOSURES,
            "trust_file": FOLDER / "trust.json",
        },
        environment=fetched.environment if fetched else None,
    )  # fmt: skip
    console.print(f"  [dim]{' '.join(server.command[1:])}[/dim]")
    with progress() as bar:
        bar.add_task("starting vLLM, compiling the model", total=None)
        server.start()
    with server:
        line = next(line for line in server.log_text().splitlines() if " reserved: " in line)
        console.print(f"  [dim]{line.split('] ', 1)[-1]}[/dim]")
        sent = asyncio.run(play(server, store, made, first, claims, late=late))
        if fetched:
            claims("the model was fetched from a Hub", any((FOLDER / "hub").rglob("*.safetensors")))
        chapter("8. Metrics, as Prometheus scrapes them")
        show_metrics(server, sent, claims)
        if keep:
            wait_for_the_player(server, store)


async def play(
    server: Server, store: EditStore, made: list[Made], first: dict[str, Made], claims: Claims, *, late: Made
) -> int:
    """Everything that needs the running server; returns how many requests were sent."""
    limits = httpx.Limits(max_connections=200)
    async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:
        chapter("3. One prompt, every variant, one batch")
        sent = await side_by_side(client, first, claims)
        old, new = [each for each in made if each[0].name == made[0][0].name]
        chapter("4. A new version, promoted while requests run")
        sent += await swap_under_load(client, store, old, new, claims)
        chapter("5. Rolled back, while requests run")
        sent += await swap_under_load(client, store, new, old, claims, rollback=True)
        chapter("6. An experiment: half of the users get the second version")
        sent += await half_and_half(client, store, old, new, claims)
        chapter("7. A variant that nothing is reserved for, promoted while requests run")
        sent += await grow_under_load(client, store, first, late, claims)
    return sent


def show_bundles(made: list[Made]) -> None:
    """What is in each bundle, and what its author measured."""
    table = Table("bundle", "version", "edits", "measured", "unedited", "edited", "n", box=None, header_style="bold")
    for exhibit, bundle in made:
        kinds = Counter(edit.kind for edit in bundle.manifest.edits)
        what = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        for number, row in enumerate(bundle.manifest.measurements):
            head = ("", "", "") if number else (f"{exhibit.name} {exhibit.label}", bundle.version[:12], what)
            table.add_row(*head, row.metric, f"{row.base:.3g}", f"{row.edited:.3g}", str(row.n))
    console.print(table)


async def side_by_side(client: httpx.AsyncClient, first: dict[str, Made], claims: Claims) -> int:
    """Every exhibit's prompt to the base and every variant, concurrently; then every claim, asked of the server."""
    names = [BASE, *first]
    asked = [(exhibit.prompt, name) for exhibit, _ in first.values() for name in names]
    answers = await asyncio.gather(*(stream(client, name, prompt, 12) for prompt, name in asked))
    by_question = dict(zip(asked, answers, strict=True))
    for exhibit, _ in first.values():
        console.print(f"\n  [bold]{escape(exhibit.prompt)}[/bold]")
        for name in names:
            answer = by_question[exhibit.prompt, name]
            console.print(f"    {name:16} [dim]{answer.version[:12]:12}[/dim] {escape(repr(answer.text))}")
    console.print()
    unanswered = [f"{answer.model}: {answer.error}" for answer in answers if not answer.complete]
    claims("every request was answered", not unanswered, "; ".join(unanswered) or f"{len(answers)} requests")
    together = max(answer.token_times[0] for answer in answers) < min(answer.token_times[-1] for answer in answers)
    claims("all were being generated at the same time", together)
    versions = {BASE: "base", **{name: bundle.version for name, (_, bundle) in first.items()}}
    said = all(answer.version == versions[name] for (_, name), answer in by_question.items())
    claims("each says in its headers which version answered", said)
    sent = len(answers)
    for exhibit, _ in first.values():
        sent += await held(client, exhibit, claims)
    return sent


async def held(client: httpx.AsyncClient, exhibit: Exhibit, claims: Claims) -> int:
    """Every claim of an exhibit, asked of the server; returns how many requests were sent."""
    sent = 0
    for claim in exhibit.claims:
        before, after = await asyncio.gather(*(ask(client, model, claim) for model in (BASE, exhibit.name)))
        found = claim.measure(lambda *_, said=before: said, lambda *_, said=after: said)
        sent += 2 * len(claim.prompts)
        figures = f"{found.base:.2f} → {found.edited:.2f}"
        claims(f"{exhibit.name}, served: {claim.metric}", not claim.broken(found), figures)
    return sent


async def ask(client: httpx.AsyncClient, model: str, claim: MeasuredClaim) -> list[host.Generated]:
    """What a served model says to a claim's prompts, as the author's side would see it."""

    async def one(prompt: str) -> host.Generated:
        body = {"model": model, "prompt": prompt, "max_tokens": claim.tokens, "temperature": 0, "logprobs": 20}
        answer = await client.post("/v1/completions", json=body)
        answer.raise_for_status()
        choice = answer.json()["choices"][0]
        first = choice["logprobs"]["top_logprobs"][0]
        return host.Generated(choice["text"], {token: math.exp(logprob) for token, logprob in first.items()})

    return list(await asyncio.gather(*map(one, claim.prompts)))


async def swap_under_load(
    client: httpx.AsyncClient, store: EditStore, old: Made, new: Made, claims: Claims, *, rollback: bool = False
) -> int:
    """Promote (or roll back) while streams run; the server notices by itself."""
    name, prompts = old[0].name, old[0].claims[0].prompts
    questions = [Question(name, prompt, 24) for prompt in prompts] + [Question(BASE, prompts[0], 24)]
    async with constant_load(client, questions) as answers:
        await asyncio.sleep(1)
        changed = time.monotonic()
        if rollback:
            entry = await asyncio.to_thread(store.rollback, name, reason="the demo changes its mind")
        else:
            reference = f"{name}@{new[1].version}"
            entry = await asyncio.to_thread(store.promote, reference, reason="the demo's second version")
        while not any(  # noqa: ASYNC110
            (answer.version == entry.version and answer.started > changed) or not answer.complete for answer in answers
        ):
            await asyncio.sleep(0.05)
    swap: dict[str, Any] = (await client.get("/v1/edits")).json()["last_swap"]
    counts = Counter(answer.version[:12] for answer in answers)
    console.print(f"  answers by version: {dict(counts)}")
    failed = [answer for answer in answers if not answer.complete]
    claims("no request failed", not failed, failed[:1] or f"{len(answers)} requests")
    first_new = min(a.token_times[0] for a in answers if a.version == entry.version and a.started > changed)
    console.print(
        f"  first token of the new version {first_new - changed:.2f} s after; seconds by phase {swap['seconds']}"
    )
    seen = {answer.version for answer in answers if answer.model == name}
    claims("every answer came from exactly one of the two versions", seen == {old[1].version, new[1].version})
    claims("the base model kept answering as itself", {a.version for a in answers if a.model == BASE} == {"base"})
    claims("the store's last entry is what answers now", swap["to_version"] == entry.version == new[1].version)
    longest = max(answer.token_times[-1] - answer.started for answer in answers)
    claims("it was followed within the poll interval and one request", first_new - changed < POLL_SECONDS + longest + 1)
    claim = new[0].claims[0]
    before, after = await asyncio.gather(*(ask(client, model, claim) for model in (BASE, name)))
    found = claim.measure(lambda *_: before, lambda *_: after)
    claims(f"asked again: {claim.metric}", not claim.broken(found), f"{found.base:.2f} → {found.edited:.2f}")
    return len(answers) + 2 * len(claim.prompts)


async def half_and_half(client: httpx.AsyncClient, store: EditStore, old: Made, new: Made, claims: Claims) -> int:
    """Users get their arms, the same ones again; the second version is withdrawn, and everybody gets the first."""
    name, users = old[0].name, [f"user-{number}" for number in range(20)]
    serves = {"control": f"{name}@{old[1].version}", "treatment": f"{name}@{new[1].version}"}
    arms = [{"name": arm, "serves": version, "weight": 0.5} for arm, version in serves.items()]
    log = Experiments(store)
    log.create(Experiment.parse({"name": "trial", "model": name, "arms": arms}))

    async def change(operation: Any, serving: str, **fields: Any) -> None:
        log.change(ExperimentChange(experiment="trial", operation=operation, **fields), reason="the demo")
        while serving not in (await client.get("/v1/edits/experiments")).text:  # noqa: ASYNC110
            await asyncio.sleep(0.05)

    async def versions() -> list[str]:
        prompt = old[0].claims[0].prompts[0]
        answers = await asyncio.gather(*(stream(client, name, prompt, 4, user=user) for user in users))
        return [answer.version for answer in answers]

    await change("start", "running")
    first, second = await versions(), await versions()
    both = {old[1].version, new[1].version}
    counts = Counter(version[:12] for version in first)
    claims("some users get the first version and some the second", set(first) == both, dict(counts))
    claims("every user gets the same one again", first == second)
    await change("withdraw", "withdrawn", arm="treatment")
    lines = Counter(record.version for record in Logs([EXPOSURES]) if isinstance(record, Exposure))
    claims("each of these answers left a line of evidence", lines == Counter(first + second), f"{lines.total()} lines")
    claims("withdrawn: everybody gets the first version", set(await versions()) == {old[1].version})
    await change("stop", "stopped")
    return 3 * len(users)


async def grow_under_load(
    client: httpx.AsyncClient, store: EditStore, first: dict[str, Made], late: Made, claims: Claims
) -> int:
    """Promote a variant that the server has no capacity for, while the base model and all variants stream."""
    exhibit, bundle = late
    versions = {BASE: "base", **{name: made.version for name, (_, made) in first.items()}}
    begun: dict[str, float] = {}

    def tell_phase(phase: str) -> None:
        begun[phase] = time.monotonic()
        console.print(f"  {phase} …")

    async def reserved() -> str:
        return str((await client.get("/v1/edits/reservation")).raise_for_status().json()["size"])

    before = await reserved()
    async with constant_load(client, [Question(name, exhibit.prompt, 24) for name in versions]) as answers:
        await asyncio.sleep(1)
        reference = f"{exhibit.name}@{bundle.version}"
        await asyncio.to_thread(store.promote, reference, reason="the demo needs gates")
        error, growth = await until_served(client, bundle.version, tell_phase)
        served = time.monotonic()
    grew = growth.get("phase") == "done" and not error
    claims("the reservation grew for it, without a restart", grew, error or f"{before} → {await reserved()}")
    console.print(f"  seconds by phase {growth['seconds']}")
    failed = [answer for answer in answers if not answer.complete]
    claims("no request failed", not failed, failed[:1] or f"{len(answers)} requests")
    during = Counter(
        answer.model for answer in answers for at in answer.token_times if begun["planned"] <= at <= served
    )
    claims("the base model and all variants kept answering meanwhile", during.keys() == versions.keys(), dict(during))
    same = all(answer.version == versions[answer.model] for answer in answers)
    claims("each answered as the version that it was", same)
    pause, gap = growth["longest_pause_seconds"], max(answer.longest_gap for answer in answers)
    claims(
        f"no worker stood longer than {PAUSE_SECONDS[bool(gpu())]:g} s between two steps, says the server",
        pause <= PAUSE_SECONDS[bool(gpu())],
        f"{pause * 1000:.0f} ms; the longest time between two tokens of a stream was {gap * 1000:.0f} ms",
    )
    answer = await stream(client, exhibit.name, exhibit.prompt, 12)
    unedited = next(each.text for each in answers if each.model == BASE)
    console.print(f"    {BASE:16} {escape(repr(unedited[:40]))}\n    {exhibit.name:16} {escape(repr(answer.text))}")
    new = answer.complete and answer.version == bundle.version
    claims("it answers as the version that was promoted", new, answer.error or answer.version[:12])
    return len(answers) + 1 + await held(client, exhibit, claims)


def show_metrics(server: Server, sent: int, claims: Claims) -> None:
    """The plugin's series, without buckets, and whether they agree with what was sent."""
    metrics = Scrape.of(server.url)
    for line in metrics.text.splitlines():
        if line.startswith("vllm_edits_") and "_bucket{" not in line and "_created" not in line:
            console.print(f"  [dim]{escape(line)}[/dim]")
    counted = metrics.sum("vllm_edits_requests_total")
    claims("the metrics count every request the demo sent, and no other", counted == sent, f"{counted:.0f} of {sent}")


def wait_for_the_player(server: Server, store: EditStore) -> None:
    """Leave the server up until Ctrl-C, with commands to play on."""
    console.print(
        f"""
[bold]The server is at {server.url}.[/bold] Try:
  curl {server.url}/v1/models
  .venv/bin/vllm-edits status --url {server.url}
  .venv/bin/vllm-edits history capital --store {store.url}
  .venv/bin/vllm-edits rollback capital --store {store.url}
Ctrl-C ends it."""
    )
    try:
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        console.print("ending the server")


def chapter(title: str) -> None:
    """A heading."""
    console.print(f"\n[bold]{title}[/bold]")


def progress() -> Progress:
    """What is going on and for how long."""
    return Progress(SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), transient=True)


if __name__ == "__main__":
    sys.exit(main())
