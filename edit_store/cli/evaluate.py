"""The command `evaluate`: what a version does, measured by suites, beside its base model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_edits.edit_store.cli.common import (
    STORE_VARIABLE,
    JsonOption,
    app,
    as_script,
    bundle_from,
    complete_reference,
    explained,
    plain,
    show,
    step_by_step,
)
from vllm_edits.edit_store.errors import EditsError

if TYPE_CHECKING:
    from vllm_edits.edit_store.evaluation.figure import Figure, Report

COLUMNS = {"name": "figure", "base": "base", "edited": "edited", "interval": "95 % interval", "n": "rows"}


@app.command()
@explained
def evaluate(
    variant: Annotated[
        str,
        typer.Argument(help="name, name@tag, name@version; with --model also a bundle's folder.",
                       autocompletion=complete_reference),
    ],
    *,
    suites: Annotated[
        list[str] | None,
        typer.Option("--suite", help="Suite: a YAML file, or one by name (standard, capital). May be given again."),
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="Evaluate in transformers, on this base model.", exists=True)
    ] = None,
    url: Annotated[str | None, typer.Option("--url", help="Evaluate on this running server.")] = None,
    store: Annotated[
        str | None, typer.Option("--store", envvar=STORE_VARIABLE, help="With --model: the store with the version.")
    ] = None,
    strength: Annotated[float | None, typer.Option("--strength", help="With --model: strength of the edits.")] = None,
    api_key: Annotated[str, typer.Option("--api-key", envvar="VLLM_API_KEY", help="The server's API key.")] = "",
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write a report of each suite into.")] = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Measure what a version does, beside its base model: effect in every form,
    what stays, collapse, general ability, safety.

    A suite is a file that names measures and the data beside it. `standard` is
    what every edit should leave alone.

    \b
    Examples:
      vllm-edits evaluate polite@staging --suite standard --model ./model --store ./store
      vllm-edits evaluate polite --suite standard --suite ./polite.yaml --url http://127.0.0.1:8000
    """
    try:
        from vllm_edits.edit_store.evaluation import evaluate as running
        from vllm_edits.edit_store.evaluation import suite
    except ImportError as error:
        raise EditsError(f"{error}. Install the authoring side: pip install 'vllm-edits[authoring]'") from None
    loaded = [suite.load(each) for each in suites or ["standard"]]
    with step_by_step("evaluate") as step:
        if model is not None and url is None:
            bundle = bundle_from(variant, store)
            reports = [running.in_process(bundle, model, each, step, strength=strength) for each in loaded]
        elif url is not None and model is None and strength is None:
            reports = [running.on_server(variant, url, each, step, api_key=api_key) for each in loaded]
        else:
            raise EditsError("expected --model FOLDER, with --strength or without, or --url URL, and not both")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for report in reports:
            (out / f"{report.suite}.json").write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
    if as_json:
        as_script([report.model_dump(mode="json") for report in reports])
        return
    for report in reports:
        _tell(report)


def _tell(report: Report) -> None:
    plain(f"{report.suite}: {report.variant}@{report.version[:12]} by {report.measured_by}")
    show([_row(figure) for figure in report.figures], COLUMNS, as_json=False)


def _row(figure: Figure) -> dict[str, str]:
    interval = figure.interval
    return {
        "name": f"{figure.name} ({figure.better} is better)", "base": f"{figure.base:.3g}",
        "edited": f"{figure.edited:.3g}", "n": str(figure.n),
        "interval": "" if interval is None else f"{interval.low:.3g} to {interval.high:.3g}",
    }  # fmt: skip
