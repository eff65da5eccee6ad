"""The commands `probes add` and `probes show`: what servers prove a version with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_edits.edit_store.bundle import Bundle
from vllm_edits.edit_store.cli.bundles import published, tell_published
from vllm_edits.edit_store.cli.common import (
    STORE_VARIABLE,
    JsonOption,
    KeyOption,
    ReferenceArgument,
    StoreOption,
    app,
    as_script,
    bundle_from,
    explained,
    opened,
    plain,
    show,
)
from vllm_edits.edit_store.cli.probe_maker import made_for
from vllm_edits.edit_store.errors import EditsError
from vllm_edits.edit_store.probes import effect_of

COLUMNS = {"probe": "probe", "strength": "strength", "tokens": "prompt tokens", "places": "places", "effect": "effect"}

probes = typer.Typer(help="Make and show the probes of versions.", no_args_is_help=True)
app.add_typer(probes, name="probes")


@probes.command()
@explained
def add(
    bundle: Annotated[str, typer.Argument(help="Folder of a bundle, or with --store: name, name@tag, name@version.")],
    model: Annotated[Path, typer.Argument(help="Folder of its base model.", exists=True, file_okay=False)],
    texts: Annotated[
        Path | None, typer.Argument(help="JSON lines with a text each, behind which the edits show.", exists=True)
    ] = None,
    *,
    count: Annotated[int, typer.Option(min=1, max=16, help="Number of probes.")] = 4,
    store: Annotated[
        str | None, typer.Option("--store", envvar=STORE_VARIABLE, help="The store to take it from, and publish it to.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write it into, instead of a store.")] = None,
    tag: Annotated[str | None, typer.Option("--tag", help="With --store: also promote it under this tag.")] = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a version with probes out of a bundle: the same edits, which servers can prove.

    The base model and the edited one continue prompts in transformers, in
    float32. Servers compare before the first request. Prompts are the texts,
    those of probes that are there (of a composition, those of its parts), and
    a few ordinary ones; those are taken where the edits change most.

    \b
    Examples:
      vllm-edits probes add polite@prod ./model texts.jsonl --store ./store --tag staging
      vllm-edits probes add ./polite ./model --out ./polite-with-probes
    """
    found = bundle_from(bundle, store)
    if (out is None) == (store is None):
        raise EditsError("expected --out FOLDER, or --store STORE to publish to, and not both")
    made = found.with_probes(made_for(found, model, _texts(texts), count=count, store=store))
    if made.version == found.version:
        raise EditsError("it has these probes already")
    if out is not None:
        made.save(out)
        rows: list[dict[str, str]] = [{"name": made.manifest.name, "version": made.version, "promoted": ""}]
    else:
        rows = [published(opened(store or "", key), made, tag, "the same edits, with probes")]
    if as_json:
        as_script(rows)
        return
    _show(made)
    if out is None:
        tell_published(rows[0])
    else:
        plain(f"written to {out}")


@probes.command(name="show")
@explained
def show_probes(reference: ReferenceArgument, *, store: StoreOption, as_json: JsonOption = False) -> None:
    """Show the probes of a version: how much its edits change behind each prompt.

    \b
    Example:
      vllm-edits probes show polite@prod --store ./store
    """
    found = bundle_from(reference, store)
    if as_json:
        as_script([each.model_dump(mode="json") for each in found.manifest.probes])
    else:
        _show(found)


def _texts(file: Path | None) -> list[str]:
    from vllm_edits.edit_store.authoring.data import Table, TextRow, read

    return read({"texts": Table(TextRow, "texts")}, [file]).texts("texts") if file else []


def _show(bundle: Bundle) -> None:
    rows = [
        {
            "probe": number, "strength": f"{probe.strength:g}", "tokens": len(probe.prompt), "places": probe.places,
            "effect": f"{effect_of(probe):.3g} nats",
        }
        for number, probe in enumerate(bundle.manifest.probes)
    ]  # fmt: skip
    if rows:
        show(rows, COLUMNS, as_json=False)
    else:
        plain("it has no probes. Make some: vllm-edits probes add")
