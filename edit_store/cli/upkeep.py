"""Commands for transfer and maintenance of a store: copy, export, import, verify, gc."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from vllm_edits.edit_store.byte_sizes import sized
from vllm_edits.edit_store.cli.common import (
    PROBLEM,
    JsonOption,
    ReferenceArgument,
    StoreOption,
    abbreviated,
    app,
    as_script,
    complete_reference,
    counted,
    explained,
    moving,
    opened,
    plain,
    show,
)
from vllm_edits.edit_store.storage.store import EditStore
from vllm_edits.edit_store.upkeep import audit as auditing
from vllm_edits.edit_store.upkeep import collect, transfer


@app.command()
@explained
def copy(
    references: Annotated[
        list[str],
        typer.Argument(help="One or more of: name, name@tag, name@version.", autocompletion=complete_reference),
    ],
    *,
    store: StoreOption,
    to: Annotated[str, typer.Option("--to", help="The store to copy to.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Copy versions to another store, with their records and signatures.

    The other store does not promote the copied versions. Promote them there
    with `promote`.

    \b
    Example:
      vllm-edits copy polite@prod --store ./store --to s3://bucket/edits
    """
    source, target = opened(store), opened(to)
    with moving("copying") as progress:
        copied = transfer.copy(source, target, references, progress)
    if as_json:
        as_script(copied)
    else:
        for each in copied:
            plain(f"copied {abbreviated(each)} to {target.url}")


@app.command(name="export")
@explained
def export_version(
    reference: ReferenceArgument,
    *,
    store: StoreOption,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write.", show_default="<name>-<version>.edits.tar")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a version with its signatures into one file.

    Use it to carry a version to a site without a network. There, add it to a
    store with `import`.

    \b
    Example:
      vllm-edits export polite@prod --store ./store -o polite.edits.tar
    """
    source = opened(store)
    version = source.resolve(reference)
    path = output or Path(f"{reference.partition('@')[0]}-{version[:12]}{transfer.SUFFIX}")
    transfer.export(source, reference, path)
    if as_json:
        as_script({"file": str(path), "version": version, "bytes": path.stat().st_size})
    else:
        plain(f"written: {path} ({sized(path.stat().st_size)}), version {version[:12]}")


@app.command(name="import")
@explained
def import_version(
    files: Annotated[list[Path], typer.Argument(help="Files that `vllm-edits export` wrote.", exists=True)],
    *,
    store: StoreOption,
    as_json: JsonOption = False,
) -> None:
    """Check exported versions and add them to the store.

    All files are checked before the first one is stored. The store does not
    promote the versions: use `promote`.

    \b
    Example:
      vllm-edits import polite.edits.tar --store ./store
    """
    target = opened(store)
    packages = []
    with counted("checking", total=sum(file.stat().st_size for file in files), in_bytes=True) as update:
        for file in files:
            packages.append(transfer.read_export(file))
            update(advance=file.stat().st_size)
    rows = []
    with counted("storing", total=sum(len(each.bundle.tensor_bytes) for each in packages), in_bytes=True) as update:
        for package in packages:
            rows.append({"name": package.record.name, "version": package.put(target)})
            update(advance=len(package.bundle.tensor_bytes))
    if as_json:
        as_script(rows)
    else:
        for row in rows:
            plain(f"imported {row['name']}@{row['version'][:12]}")


@app.command()
@explained
def verify(store: StoreOption, as_json: JsonOption = False) -> None:
    """Check the whole store: all digests, records, histories and signatures.

    It changes nothing. The exit code is 1 if it finds a problem. Use it on a
    schedule, or after a restore of a backup.

    \b
    Example:
      vllm-edits verify --store ./store
    """
    target = opened(store)
    with counted("checking") as update:
        found = auditing.audit(target, lambda what, done, total: update(description=what, completed=done, total=total))
    if as_json:
        as_script({"clean": found.clean, **asdict(found)})
    else:
        if found.findings:
            columns = {"object": "object", "problem": "problem", "fix": "what to do"}
            show([asdict(each) for each in found.findings], columns, as_json=False)
        plain(
            f"{found.versions} versions ({sized(found.bytes)}), {found.tags} tags with {found.entries} entries, "
            f"{found.signatures} signatures: {'clean' if found.clean else f'{len(found.findings)} finding(s)'}"
        )
        if found.garbage:
            plain(f"{len(found.garbage)} objects without a reference. Delete them with: vllm-edits gc")
    if not found.clean:
        raise typer.Exit(PROBLEM)


@app.command()
@explained
def gc(
    *,
    store: StoreOption,
    run: Annotated[bool, typer.Option("--run", help="Delete. Without it, only list what would be deleted.")] = False,
    grace_hours: Annotated[
        float, typer.Option("--grace-hours", min=0, help="Keep objects that are younger than this.")
    ] = collect.DEFAULT_GRACE_HOURS,
    as_json: JsonOption = False,
) -> None:
    """Delete versions that were never promoted, and files that interrupted
    commands left in the store.

    Without --run, nothing is deleted: the objects are only listed. A version
    that is in the history of a tag or of an experiment is always kept. To keep
    a version that was never promoted, promote it under a tag of its own.

    \b
    Examples:
      vllm-edits gc --store ./store
      vllm-edits gc --store ./store --run
      vllm-edits promote polite@4f1c9a --store ./store --tag keep
    """
    target = opened(store)
    garbage = _collected(target, grace_hours) if run else collect.plan(target, grace_hours)
    if as_json:
        as_script({"deleted": run, "versions": garbage.versions, "bytes": garbage.bytes,
                   "objects": [item.key for item in garbage.items]})  # fmt: skip
        return
    for version in garbage.versions:
        plain(f"  version {version[:12]}, never promoted")
    told = f"{len(garbage.items)} objects, {sized(garbage.bytes)}, {len(garbage.versions)} versions"
    plain(f"deleted: {told}" if run else f"would delete: {told}. Delete with: vllm-edits gc --run")


def _collected(store: EditStore, grace_hours: float) -> collect.Garbage:
    with counted("deleting") as update:
        return collect.collect(store, grace_hours, lambda done, total: update(completed=done, total=total))
