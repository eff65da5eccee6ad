"""The store's commands. `plugin.cli` adds those that need a server."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from edit_store.bundle import Bundle
from edit_store.errors import EditsError
from edit_store.inspection import EditSummary, summarise
from edit_store.refs import DEFAULT_TAG
from edit_store.store import EditStore, TagEntry

PROBLEM = 1

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    help="Make, keep and serve edited variants of one model. Every command explains itself with --help.",
)
console = Console()

StoreOption = Annotated[
    str,
    typer.Option("--store", envvar="VLLM_EDITS_STORE", help="the edit store: a folder, or a URL", show_default=False),
]
TagOption = Annotated[str, typer.Option("--tag", help="the history to append to")]
ReasonOption = Annotated[str, typer.Option("--reason", help="why, for the history")]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON, for scripts")]


def explained(command: Callable[..., None]) -> Callable[..., None]:
    """Turn an error raised on purpose into its message and exit code 1."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except EditsError as error:
            typer.echo(f"vllm-edits: {error}", err=True)
            raise typer.Exit(PROBLEM) from None

    return run


def show(rows: list[dict[str, Any]], columns: dict[str, str], as_json: bool) -> None:
    """Print rows as a table with the given columns (field to heading), or whole as JSON."""
    if as_json:
        json.dump(rows, sys.stdout, indent=2)
        sys.stdout.write("\n")
        return
    table = Table(*columns.values(), box=None, header_style="bold")
    for row in rows:
        table.add_row(*(str(row[field]) for field in columns))
    console.print(table)


@app.command()
@explained
def init(store: StoreOption) -> None:
    """Create an empty store. Harmless if it is there already."""
    typer.echo(f"store ready at {EditStore(store, create=True).url}")


@app.command()
@explained
def publish(
    folder: Annotated[Path, typer.Argument(help="folder with manifest.json and edits.safetensors", exists=True)],
    store: StoreOption,
    tag: Annotated[str | None, typer.Option("--tag", help="promote it under this tag at once")] = None,
    reason: ReasonOption = "",
    as_json: JsonOption = False,
) -> None:
    """Check a bundle and store it. Nothing serves it until it is promoted."""
    bundle, target = Bundle.load(folder), EditStore(store)
    version = target.publish(bundle)
    if tag is not None:
        target.promote(f"{bundle.manifest.name}@{version}", tag=tag, reason=reason)
    row = {"name": bundle.manifest.name, "version": version, "promoted": tag or ""}
    if as_json:
        show([row], {}, as_json)
        return
    typer.echo(f"published {row['name']}@{version[:12]}" + (f", promoted as {tag}" if tag else ""))


@app.command(name="list")
@explained
def list_versions(
    store: StoreOption,
    name: Annotated[str | None, typer.Argument(help="only this name")] = None,
    as_json: JsonOption = False,
) -> None:
    """Every published version, and the tags that promote it."""
    target = EditStore(store)
    heads = target.heads()
    rows = []
    for each in [name] if name else target.names():
        promoted = heads.get(each, {})
        for record in target.versions(each):
            tags = [tag for tag, entry in promoted.items() if entry.version == record.version]
            rows.append({**record.model_dump(mode="json"), "digits": record.version[:12], "tags": " ".join(tags)})
    show(
        rows, {"name": "name", "digits": "version", "label": "label", "tags": "promoted as", "at": "published"}, as_json
    )


@app.command()
@explained
def history(
    name: Annotated[str, typer.Argument(help="name of a bundle")],
    store: StoreOption,
    tag: TagOption = DEFAULT_TAG,
    as_json: JsonOption = False,
) -> None:
    """What was promoted and rolled back under a tag, oldest first, its chain checked."""
    target = EditStore(store)
    target.versions(name)
    rows = [{**entry.model_dump(mode="json"), "digits": entry.version[:12]} for entry in target.history(name, tag)]
    columns = {
        "sequence": "#",
        "operation": "operation",
        "digits": "version",
        "at": "when",
        "actor": "who",
        "reason": "why",
    }
    show(rows, columns, as_json)


@app.command()
@explained
def promote(
    reference: Annotated[str, typer.Argument(help="name@version (or its beginning), or name@tag")],
    store: StoreOption,
    tag: TagOption = DEFAULT_TAG,
    reason: ReasonOption = "",
    as_json: JsonOption = False,
) -> None:
    """Make a version the promoted one of a tag. Servers follow within their poll interval."""
    _told(EditStore(store).promote(reference, tag=tag, reason=reason), as_json)


@app.command()
@explained
def rollback(
    name: Annotated[str, typer.Argument(help="name of a bundle")],
    store: StoreOption,
    tag: TagOption = DEFAULT_TAG,
    reason: ReasonOption = "",
    as_json: JsonOption = False,
) -> None:
    """Return to the version promoted before. Appends to the history; nothing is deleted."""
    _told(EditStore(store).rollback(name, tag=tag, reason=reason), as_json)


@app.command()
@explained
def inspect(
    what: Annotated[str, typer.Argument(help="a bundle folder, or name[@tag or version] in the store")],
    store: Annotated[str | None, typer.Option("--store", envvar="VLLM_EDITS_STORE", help="the edit store")] = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="folder of the base model, to compare norms with its weights")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """What is in a bundle: sites, kinds, ranks, and norms relative to the weights they touch."""
    if Path(what).is_dir():
        bundle = Bundle.load(Path(what))
    elif store is not None:
        target = EditStore(store)
        bundle = target.bundle(target.resolve(what))
    else:
        raise EditsError(f"{what!r} is no folder; to look it up in a store, name one with --store")
    summary = summarise(bundle, model)
    manifest = bundle.manifest
    if not as_json:
        console.print(f"[bold]{manifest.name}[/bold] {bundle.version[:12]}  {manifest.label}  {manifest.description}")
        console.print(f"for {manifest.base.name} ({manifest.base.architecture}), by {manifest.provenance.method}")
        for measured in manifest.measurements:
            console.print(f"  {measured.metric}: {measured.base:.3g} -> {measured.edited:.3g} (n={measured.n})")
    show([row.as_row() for row in summary], EditSummary.columns(relative=model is not None), as_json)


def _told(entry: TagEntry, as_json: bool) -> None:
    if as_json:
        show([entry.model_dump(mode="json")], {}, as_json)
    else:
        typer.echo(f"{entry.name}@{entry.tag} is {entry.version[:12]} (entry {entry.sequence}, {entry.operation})")
