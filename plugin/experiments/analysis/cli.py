"""The commands `vllm-edits experiment report` (evidence of an experiment) and `replay` (first differences)."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from vllm_edits.edit_store.cli import JsonOption, StoreOption, as_script, counted, explained, plain, show
from vllm_edits.edit_store.cli.experiment import ExperimentArgument, experiment
from vllm_edits.edit_store.errors import NotFound
from vllm_edits.edit_store.experiments.document import Experiment
from vllm_edits.edit_store.experiments.experiment_log import Experiments
from vllm_edits.edit_store.storage.store import EditStore
from vllm_edits.plugin.cli_client import DEFAULT_URL, ApiKeyOption, UrlOption
from vllm_edits.plugin.experiments.analysis.evidence import gather
from vllm_edits.plugin.experiments.analysis.replay import bodies, replay, summary
from vllm_edits.plugin.experiments.analysis.report import ArmShare, as_json, html, picture, remarks, summarise, table


@experiment.command()
@explained
def report(
    name: ExperimentArgument,
    exposures: Annotated[
        list[Path], typer.Argument(help="Exposure logs: folders (the exposure_folder of each server) or files.")
    ],
    *,
    store: StoreOption,
    phase: Annotated[
        int | None, typer.Option(min=1, help="Phase of the experiment to report.", show_default="the last")
    ] = None,
    alpha: Annotated[
        float, typer.Option(min=1e-6, max=0.5, help="Probability that an interval is ever wrong, over all looks.")
    ] = 0.05,
    tuned_for: Annotated[
        int, typer.Option(min=1, help="Number of requests in two arms at which the intervals are narrowest.")
    ] = 5000,
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Also write an HTML page with table and picture to this file.")
    ] = None,
    picture_file: Annotated[
        Path | None, typer.Option("--picture", help="Also write the picture to this file (.png or .svg).")
    ] = None,
    as_data: JsonOption = False,
) -> None:
    """Compare every arm of an experiment with the control, from the exposure logs
    of the servers.

    The intervals are valid for all looks together. So you can run the report
    every hour, and stop the experiment when the result is clear. Requests of
    one unit are counted as one cluster. If the numbers of units do not fit the
    weights of the arms, the report says so first and draws no further
    conclusion.

    \b
    Examples:
      vllm-edits experiment report milder ./exposures --store ./store
      vllm-edits experiment report milder ./host-a ./host-b --store ./store --html report.html
    """
    document, last = _document(EditStore(store), name, phase)
    with counted("reading exposures", in_bytes=True) as update:
        evidence = gather(exposures, name, last, lambda done, total: update(completed=done, total=total))
    arms = [ArmShare(arm.name, arm.weight, arm == document.control) for arm in document.arms]
    goals = {metric: goal for metric, goal in document.metrics().items() if goal}
    found = summarise(evidence, arms, goals=goals, alpha=alpha, tuned_for=tuned_for)
    if html_file is not None:
        html_file.write_text(html(found))
    if picture_file is not None and not picture(found, picture_file):
        plain(f"nothing to draw yet: {picture_file} was not written", err=True)
    if as_data:
        as_script(as_json(found))
        return
    plain(f"{name}, phase {last}")
    for remark in remarks(found):
        plain(remark)
    show(*table(found), as_json=False)


def _document(store: EditStore, name: str, phase: int | None) -> tuple[Experiment, int]:
    """The last document of a phase, and the number of the phase."""
    documents: dict[int, Experiment] = {}
    document, started = None, 0
    for entry in Experiments(store).history(name):
        document = entry.document or document
        started += entry.operation == "start"
        if started and document is not None and entry.operation != "create":
            documents[started] = document
    wanted = phase or max(documents, default=0)
    if wanted not in documents:
        raise NotFound(f"experiment {name!r} has had {len(documents)} phase(s), so phase {wanted} has no evidence")
    return documents[wanted], wanted


@experiment.command(name="replay")
@explained
def replay_prompts(
    prompts: Annotated[
        Path, typer.Argument(help="File of prompts, one per line: text, or JSON with `prompt` or `messages`.")
    ],
    first: Annotated[str, typer.Argument(help="Model name: the base model, a variant, name@tag or name@version.")],
    second: Annotated[str, typer.Argument(help="Model name to compare with, written in the same way.")],
    *,
    url: UrlOption = DEFAULT_URL,
    api_key: ApiKeyOption = "",
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Length of each answer, if the prompt does not set max_tokens.")
    ] = 64,
    as_data: JsonOption = False,
) -> None:
    """Send the same prompts to two versions, and show at which token their answers
    differ first.

    Needs a running server. Answers are greedy unless a prompt sets a
    temperature, so the versions are the only difference.

    \b
    Example:
      vllm-edits experiment replay prompts.txt polite polite@4f1c9a --url http://127.0.0.1:8000
    """
    requests = bodies(prompts)
    with counted("asking", total=len(requests)) as update:
        found = asyncio.run(
            replay(url, (first, second), requests, max_tokens=max_tokens, api_key=api_key,
                   progress=lambda: update(advance=1))
        )  # fmt: skip
    told = summary(found)
    if as_data:
        as_script({"summary": told, "pairs": [asdict(each) for each in found]})
        return
    rows = [
        {"prompt": each.prompt[:40], "place": "-" if each.differs_at is None else each.differs_at,
         first: each.said[0][:40], second: each.said[1][:40]}
        for each in found
    ]  # fmt: skip
    show(rows, {"prompt": "prompt", "place": "differs at token", first: first, second: second}, as_json=False)
    where = "" if told["median_token"] is None else f", at the median at token {told['median_token']:g}"
    plain(f"{told['differ']} of {told['prompts']} answers differ{where}")
