"""What the store costs, on a folder and on a real object store: `make bench-store`.

Every figure is the median of single operations by one client. A folder's writes are synced to the disk, so its figures
are the disk's; the object store runs on the same machine, so its figures have no network in them.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from loadtests.harness.object_servers import BUCKET, seaweedfs
from loadtests.harness.record import about, write
from vllm_edits.edit_store import BaseModelRef, Bundle, EditStore, Offset, Provenance, Widths
from vllm_edits.edit_store.canonical import canonical_json
from vllm_edits.edit_store.reading.follow import Follower
from vllm_edits.edit_store.storage.store import Published, version_key
from vllm_edits.edit_store.upkeep.audit import audit

HIDDEN = 2048
BASE = BaseModelRef(
    name="bench", architecture="LlamaForCausalLM", files={"model.safetensors": "a" * 64},
    widths=Widths(layers=24, hidden=HIDDEN, mlp=8192, heads=32, kv_heads=8, head_dim=64, vocab=32000),
)  # fmt: skip
MADE_AT = datetime(2026, 1, 1, tzinfo=UTC)
SMALL_REPEATS = 30
PUBLISHED = 20
VERIFY = f"verify {PUBLISHED} versions of 0.2 MB"
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def bundle(number: int, layers: int = 24) -> Bundle:
    """An offset at every layer: 24 vectors of 2048, 0.2 MB."""
    vectors = np.random.default_rng(number).normal(size=(layers, HIDDEN)).astype(np.float32)
    edits = [(Offset(site=f"layers.{layer}.resid"), {"vector": vector}) for layer, vector in enumerate(vectors)]
    return Bundle.create("bench", BASE, edits, Provenance(tool="bench", method="random"), created_at=MADE_AT)


def timed(act: Callable[[], Any], repeats: int = 1) -> list[float]:
    """Seconds of each repetition."""
    samples = []
    for _ in range(repeats):
        begin = time.perf_counter()
        act()
        samples.append(time.perf_counter() - begin)
    return samples


def measure(url: str, entries: int, versions: int, progress: Progress) -> dict[str, Any]:
    """All figures of one store, in seconds but where the name says otherwise."""
    store = EditStore(url, create=True)
    numbers = iter(range(10**9))
    task = progress.add_task(url.split(":", maxsplit=1)[0], total=7)

    def done(what: str) -> None:
        progress.update(task, description=f"{url.split(':', 1)[0][:12]}: {what}", advance=1)

    done("publish")
    published: list[str] = []
    seconds = {
        "publish a bundle of 0.2 MB": timed(lambda: published.append(store.publish(bundle(next(numbers)))), PUBLISHED)
    }
    done("verify")
    found = audit(store)
    seconds[VERIFY] = timed(lambda: audit(store), 3)
    done("promote")
    turn = iter(range(10**9))
    promote = timed(lambda: store.promote(f"bench@{published[next(turn) % PUBLISHED]}"), SMALL_REPEATS)
    seconds["promote"] = promote
    seconds["resolve name@tag"] = timed(lambda: store.resolve("bench@prod"), SMALL_REPEATS)
    done(f"history of {entries}")
    log = store.tag_log("bench", "prod")
    while (head := log.head()) is not None and head.sequence < entries:
        for _ in range(entries - head.sequence):
            head = log.append(
                head, name="bench", tag="prod", version=published[0], operation="promote", reason="", actor="b"
            )
    seconds[f"resolve name@tag after {entries} entries"] = timed(lambda: store.resolve("bench@prod"), SMALL_REPEATS)
    seconds[f"history of {entries} entries, chain checked"] = timed(lambda: store.history("bench"), 3)
    follower = Follower(store)
    seconds["first look of a server, 1 tag"] = timed(follower.look)
    seconds["look at 1 unchanged tag"] = timed(follower.look, SMALL_REPEATS)
    done("tags")
    for number in range(99):
        store.promote(f"bench@{published[0]}", tag=f"tag-{number}")
    follower.look()
    seconds["look at 100 unchanged tags"] = timed(follower.look, 10)
    seconds[f"verify the same with {entries} entries and 100 tags"] = timed(lambda: audit(store))
    done(f"list of {versions}")
    digests = (f"{number:064x}" for number in range(versions))
    for digest in digests:
        record = Published(name="many", version=digest, label="", actor="bench", at=MADE_AT)
        store.backend.create(version_key("many", digest), canonical_json(record.model_dump(mode="json")))
    seconds[f"list {versions} versions with their records"] = timed(lambda: store.versions("many"), 3)
    seconds[f"resolve a prefix among {versions} versions"] = timed(lambda: store.resolve(f"many@{1:064x}"), 3)
    done("done")
    progress.remove_task(task)
    figures: dict[str, Any] = {
        what: {"median": statistics.median(samples), "largest": max(samples), "n": len(samples)}
        for what, samples in seconds.items()
    }
    if not found.clean:
        raise RuntimeError(f"the store does not verify: {found.findings}")
    return {"seconds": figures, "verified_bytes": found.bytes}


@contextmanager
def places(folder: Path) -> Iterator[dict[str, str]]:
    """A store's URL by what it is on."""
    with seaweedfs(folder) as environment:
        os.environ.update(environment)
        yield {"folder": str(folder / "store"), "SeaweedFS (S3), same machine": f"s3://{BUCKET}/bench"}


@app.command()
def main(
    *,
    entries: Annotated[int, typer.Option(min=40, help="Number of entries in the long history.")] = 1000,
    versions: Annotated[int, typer.Option(min=10, help="Number of versions to list.")] = 10_000,
    output: Annotated[Path | None, typer.Option(help="File to write.", show_default="in loadtests/results/")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record instead of the table.")] = False,
) -> None:
    """Measure publish, resolve, history, listing, polling and verification on a folder and on an object store."""
    record: dict[str, Any] = {**about(), "what": "store", "entries": entries, "versions": versions, "stores": {}}
    with tempfile.TemporaryDirectory() as folder, places(Path(folder)) as found, Progress(transient=True) as progress:
        for name, url in found.items():
            record["stores"][name] = measure(url, entries, versions, progress)
    if as_json:
        typer.echo(json.dumps(record, indent=2))
    else:
        show(record)
    typer.echo(f"written: {write(record, output, kind='store')}", err=True)


def show(record: dict[str, Any]) -> None:
    """Print the figures of all stores side by side."""
    table = Table("milliseconds, median", *record["stores"], title="The store, one client")
    for what in next(iter(record["stores"].values()))["seconds"]:
        cells = (f"{stored['seconds'][what]['median'] * 1000:.1f}" for stored in record["stores"].values())
        table.add_row(what, *cells)
    rates = (
        f"{stored['verified_bytes'] / 1e6 / stored['seconds'][VERIFY]['median']:.0f} MB/s"
        for stored in record["stores"].values()
    )
    table.add_row("verify, throughput", *rates)
    Console(highlight=False).print(table)


if __name__ == "__main__":
    app()
