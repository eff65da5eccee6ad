"""Commands about bundles: init, publish, compose, list, show, diff, inspect, sites."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from vllm_edits.edit_store import compose as composing
from vllm_edits.edit_store.bundle import Bundle
from vllm_edits.edit_store.byte_sizes import sized
from vllm_edits.edit_store.cli.common import (
    JsonOption,
    KeyOption,
    ReasonOption,
    ReferenceArgument,
    StoreOption,
    app,
    as_script,
    complete_name,
    complete_reference,
    explained,
    opened,
    plain,
    show,
)
from vllm_edits.edit_store.cli.probe_maker import made_for
from vllm_edits.edit_store.compare import compare
from vllm_edits.edit_store.errors import EditsError
from vllm_edits.edit_store.inspection import EditSummary, sites_of, summarise
from vllm_edits.edit_store.protect import Protect
from vllm_edits.edit_store.refs import Ref
from vllm_edits.edit_store.storage.store import EditStore

ProtectOption = Annotated[
    Path | None,
    typer.Option("--protect", help="Refuse edits that touch an attention head of this list, a build's protect.json."),
]


@app.command()
@explained
def init(store: StoreOption, as_json: JsonOption = False) -> None:
    """Create an empty store.

    Run it once, before the first `publish`. If the store exists already,
    nothing changes.

    \b
    Examples:
      vllm-edits init --store ./store
      vllm-edits init --store s3://bucket/edits
    """
    url = EditStore(store, create=True).url
    if as_json:
        as_script({"url": url})
    else:
        plain(f"store ready at {url}")


@app.command()
@explained
def publish(
    folder: Annotated[
        Path, typer.Argument(help="Bundle: a folder with manifest.json and edits.safetensors.", exists=True)
    ],
    *,
    store: StoreOption,
    tag: Annotated[str | None, typer.Option("--tag", help="Also promote the new version under this tag.")] = None,
    reason: ReasonOption = "",
    protect: ProtectOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a bundle and add it to the store as a new version.

    Servers do not serve a version before it is promoted. With --tag, the
    version is promoted at once. With --protect, a bundle that touches one of
    the listed attention heads is refused.

    \b
    Examples:
      vllm-edits publish ./polite --store ./store
      vllm-edits publish ./polite --store ./store --tag prod --reason "first version"
      vllm-edits publish ./polite --store ./store --protect ./safety/protect.json
    """
    bundle = Bundle.load(folder)
    if protect is not None:
        Protect.load(protect).check(bundle)
    row = published(opened(store, key), bundle, tag, reason)
    if as_json:
        as_script([row])
    else:
        tell_published(row)


def published(target: EditStore, bundle: Bundle, tag: str | None, reason: str) -> dict[str, str]:
    """Publish a bundle, and promote it if a tag is named."""
    name, version = bundle.manifest.name, target.publish(bundle)
    if tag is not None:
        target.promote(f"{name}@{version}", tag=tag, reason=reason)
    return {"name": name, "version": version, "promoted": tag or ""}


def tell_published(row: dict[str, str]) -> None:
    """Print what was published, for people."""
    promoted = f", promoted as {row['promoted']}" if row["promoted"] else ""
    plain(f"published {row['name']}@{row['version'][:12]}{promoted}")


@app.command()
@explained
def compose(
    references: Annotated[
        list[str],
        typer.Argument(help="Two or more of: name, name@tag, name@version.", autocompletion=complete_reference),
    ],
    *,
    store: StoreOption,
    tag: Annotated[str | None, typer.Option("--tag", help="Also promote the new version under this tag.")] = None,
    reason: ReasonOption = "",
    model: Annotated[
        Path | None,
        typer.Option("--probes", help="Folder of the base model: also make probes of the composition.", exists=True),
    ] = None,
    allow_conflicts: Annotated[
        bool, typer.Option("--allow-conflicts", help="Publish although some edits do not simply add up.")
    ] = False,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Publish several variants together as one new variant.

    `compose polite safe` makes the variant `polite+safe` from the present
    versions of `polite` and `safe`. It does not change when `polite` or `safe`
    is promoted again. To include their new versions, run `compose` again.

    Some pairs of edits do not simply add up: for example, one undoes part of
    the other. Such conflicts are listed, and the variant is published only with
    --allow-conflicts. Probes of the parts say nothing of the whole; --probes
    makes new ones.

    \b
    Examples:
      vllm-edits compose polite safe --store ./store --tag prod
      vllm-edits compose polite safe --store ./store --probes ./model
    """
    target = opened(store, key)
    bundle = composing.compose([target.bundle(target.resolve(reference)) for reference in references])
    found = composing.conflicts(bundle)
    if found and not allow_conflicts:
        told = "\n".join(f"  - {line}" for line in composing.named(found))
        raise EditsError(
            f"{bundle.manifest.name} was not published, because some edits do not simply add up:\n{told}\n"
            "To publish it anyway, add --allow-conflicts"
        )
    if model is not None:
        bundle = bundle.with_probes(made_for(bundle, model, store=store))
    row = published(target, bundle, tag, reason)
    if as_json:
        as_script([{**row, "conflicts": [asdict(each) for each in found]}])
        return
    tell_published(row)
    for line in composing.named(found):
        plain(f"  {line}")


@app.command(name="list")
@explained
def list_versions(
    *,
    store: StoreOption,
    name: Annotated[str | None, typer.Argument(help="List only this variant.", autocompletion=complete_name)] = None,
    as_json: JsonOption = False,
) -> None:
    """List the published versions, with the tags that promote them.

    \b
    Examples:
      vllm-edits list --store ./store
      vllm-edits list polite --store ./store --json
    """
    target = opened(store)
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


@app.command(name="show")
@explained
def show_version(reference: ReferenceArgument, store: StoreOption, as_json: JsonOption = False) -> None:
    """Show one version: its base model, its author's measurements, its tags,
    its signatures, and whether it takes safety away.

    Use `inspect` for the edits in the version.

    \b
    Example:
      vllm-edits show polite@prod --store ./store
    """
    target, ref = opened(store), Ref.parse(reference)
    version = target.resolve(reference)
    manifest = target.manifest(version)
    record = target.record(ref.name, version)
    tags = [tag for tag, entry in target.heads().get(ref.name, {}).items() if entry.version == version]
    signed = target.signatures(version)
    if as_json:
        as_script({
            "version": version, "manifest": manifest.model_dump(mode="json"), "promoted_as": tags,
            "published": record.model_dump(mode="json"),
            "signatures": [{"keyid": each.keyid, **each.statement.model_dump(mode="json")} for each in signed],
        })  # fmt: skip
        return
    base, origin = manifest.base, manifest.provenance
    rows = {
        "version": version, "label": manifest.label, "description": manifest.description,
        "base model": f"{base.name} ({base.architecture}), {len(base.files)} files by digest",
        "edits": f"{len(manifest.edits)}: " + ", ".join(sorted({edit.kind for edit in manifest.edits})),
        "changes": f"{manifest.cumulative_edits} concepts, facts or behaviours"
        if manifest.cumulative_edits else "not counted",
        "privileged": "yes: it takes safety away" if manifest.privileged else "no",
        "probes": f"{len(manifest.probes)}" if manifest.probes else "none: no server can prove it",
        "tensors": f"{sized(manifest.tensors.size)}, sha256 {manifest.tensors.sha256[:12]}",
        "made": f"{manifest.created_at:%Y-%m-%d %H:%M} by {origin.tool}: {origin.method}",
        "published": f"{record.at:%Y-%m-%d %H:%M} by {record.actor}",
        "promoted as": " ".join(tags) or "nothing",
        "signed by keys": " ".join(each.keyid[:12] for each in signed) or "none",
    }  # fmt: skip
    show([{"field": field, "value": value} for field, value in rows.items()], {"field": "", "value": ""}, as_json)
    for measured in manifest.measurements:
        plain(f"  {measured.metric}: {measured.base:.3g} -> {measured.edited:.3g} (n={measured.n})")


@app.command()
@explained
def diff(
    old: ReferenceArgument,
    new: Annotated[
        str,
        typer.Argument(help="The version to compare with, written in the same way.", autocompletion=complete_reference),
    ],
    *,
    store: StoreOption,
    as_json: JsonOption = False,
) -> None:
    """Compare two versions: sites, kinds, ranks, and how far each edit moved.

    Use it before a promotion, to see how the new version differs from the
    served one.

    \b
    Example:
      vllm-edits diff polite polite@4f1c9a --store ./store
    """
    target = opened(store)
    found = compare(*(target.bundle(target.resolve(reference)) for reference in (old, new)))
    rows = [change.as_row() for change in found.edits]
    if as_json:
        as_script({"fields": found.fields, "edits": rows})
        return
    for field, (before, after) in found.fields.items():
        plain(f"{field}: {before or '(none)'} -> {after or '(none)'}")
    columns = {"site": "site", "kind": "kind", "change": "change", "rank": "rank", "moved": "moved by"}
    show(rows, columns, as_json)


@app.command()
@explained
def inspect(
    what: Annotated[str, typer.Argument(help="A bundle folder; or name, name@tag or name@version in the store.")],
    store: Annotated[str | None, typer.Option("--store", envvar="VLLM_EDITS_STORE", help="The edit store.")] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model", help="Folder of the base model. With it, norms are also shown relative to its weights."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the edits of a bundle: sites, kinds, ranks and norms.

    Use it on a bundle that you made, before you publish it. Or use it on
    another author's version, before you promote it.

    \b
    Examples:
      vllm-edits inspect ./polite
      vllm-edits inspect polite@prod --store ./store --model ./model
    """
    if Path(what).is_dir():
        bundle = Bundle.load(Path(what))
    elif store is not None:
        target = EditStore(store)
        bundle = target.bundle(target.resolve(what))
    else:
        raise EditsError(f"{what!r} is not a folder. To inspect a version in a store, name the store with --store")
    summary = summarise(bundle, model)
    manifest = bundle.manifest
    if not as_json:
        plain(f"{manifest.name} {bundle.version[:12]}  {manifest.label}  {manifest.description}")
        plain(f"for {manifest.base.name} ({manifest.base.architecture}), by {manifest.provenance.method}")
        for measured in manifest.measurements:
            plain(f"  {measured.metric}: {measured.base:.3g} -> {measured.edited:.3g} (n={measured.n})")
    show([row.as_row() for row in summary], EditSummary.columns(relative=model is not None), as_json)


@app.command()
@explained
def sites(
    model: Annotated[Path, typer.Argument(help="Folder of a checkpoint, or its config.json.", exists=True)],
    *,
    every: Annotated[
        bool, typer.Option("--all", help="Show every layer. Without it, only the first layer is shown.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List the sites of a model: where edits can be, with widths and possible
    kinds of edits.

    Use it when you write a bundle, or a `reserve` setting.

    \b
    Example:
      vllm-edits sites ./model
    """
    found = sites_of(model)
    if as_json:
        as_script(found)
        return
    rows = [{**row, "kinds": ", ".join(row["kinds"]), "reads": ", ".join(row["reads"])} for row in found["sites"]]
    if not every:
        rows = [{**row, "site": row["site"].replace("layers.0.", "layers.<n>.")} for row in rows
                if row["layer"] in {None, 0}]  # fmt: skip
    plain(f"{found['architecture']}, layers 0 to {found['layers'] - 1}")
    show(
        rows,
        {"site": "site", "width": "width", "heads": "heads", "reads": "may also read", "kinds": "kinds"},
        as_json=False,
    )
    for point, why in found["hidden"].items():
        plain(f"no {point}: {why}")
