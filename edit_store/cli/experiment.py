"""Commands about experiments: write one, start it, watch how it stands, widen it, end it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vllm_edits.edit_store.canonical import now
from vllm_edits.edit_store.cli.common import (
    JsonOption,
    KeyOption,
    ReasonOption,
    StoreOption,
    abbreviated,
    app,
    as_script,
    explained,
    known_store,
    opened,
    plain,
    show,
)
from vllm_edits.edit_store.experiments.document import Experiment
from vllm_edits.edit_store.experiments.durations import spoken
from vllm_edits.edit_store.experiments.experiment_log import Experiments
from vllm_edits.edit_store.experiments.state import ExperimentChange, Standing, need
from vllm_edits.edit_store.refs import DEFAULT_TAG
from vllm_edits.edit_store.signing import SigningKey

experiment = typer.Typer(
    no_args_is_help=True, help="Share the requests for one model name among arms, and end that with evidence."
)
app.add_typer(experiment, name="experiment")


def _complete(context: typer.Context, incomplete: str) -> list[str]:
    store = known_store(context)
    return [name for name in Experiments(store).standings()[0] if name.startswith(incomplete)] if store else []


def _complete_arm(context: typer.Context, incomplete: str) -> list[str]:
    store = known_store(context)
    standing = Experiments(store).standings()[0].get(context.params.get("name") or "") if store else None
    return [arm.name for arm in standing.document.arms if arm.name.startswith(incomplete)] if standing else []


ExperimentArgument = Annotated[str, typer.Argument(metavar="NAME", help="the experiment", autocompletion=_complete)]
ArmArgument = Annotated[str, typer.Argument(help="one of its arms", autocompletion=_complete_arm)]


@experiment.command()
@explained
def create(
    document: Annotated[Path, typer.Argument(help="YAML or JSON document, see edit_store/EXPERIMENTS.md")],
    *,
    store: StoreOption,
    reason: ReasonOption = "",
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write an experiment into the store, or another document for one. Nothing is served by it before `start`.

    An experiment that runs takes only what moves no unit: a wider ramp, other guardrails, more feedback.
    """
    found = Experiment.load(document)
    _told(Experiments(opened(store, key)).create(found, reason=reason), as_json)


def _plain(operation: Literal["start", "hold", "resume", "stop"], told: str) -> None:
    """A command that needs the experiment's name alone."""

    @experiment.command(name=operation, help=told)
    @explained
    def command(
        name: ExperimentArgument,
        *,
        store: StoreOption,
        reason: ReasonOption = "",
        key: KeyOption = None,
        as_json: JsonOption = False,
    ) -> None:
        _changed(store, key, ExperimentChange(experiment=name, operation=operation), reason, as_json)


_plain("start", "Begin a new phase: servers assign units from their next look on. One that was stopped begins anew.")
_plain("hold", "Let the ramp stand still. Units stay in their arms.")
_plain("resume", "Let a ramp that was held go on from where it stood.")
_plain("stop", "End an experiment: its model name means again what it means without it. The evidence stays.")


@experiment.command()
@explained
def widen(
    name: ExperimentArgument,
    coverage: Annotated[float, typer.Argument(min=0, max=1, help="share of the units that take part from now on")],
    *,
    store: StoreOption,
    reason: ReasonOption = "",
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let more units take part at once. Nobody changes arms; to narrow, stop and start anew."""
    _changed(store, key, ExperimentChange(experiment=name, operation="widen", coverage=coverage), reason, as_json)


@experiment.command(name="withdraw")
@explained
def withdraw_arm(
    name: ExperimentArgument,
    arm: ArmArgument,
    *,
    store: StoreOption,
    reason: ReasonOption = "",
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Serve an arm's units by the control from now on. The others stay; the ramp is held."""
    _changed(store, key, ExperimentChange(experiment=name, operation="withdraw", arm=arm), reason, as_json)


@experiment.command(name="promote")
@explained
def promote_arm(
    name: ExperimentArgument,
    arm: ArmArgument,
    *,
    store: StoreOption,
    tag: Annotated[str, typer.Option("--tag", help="tag of the variant to promote the arm's version as")] = DEFAULT_TAG,
    reason: ReasonOption = "",
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give everybody an arm.

    If it serves the variant that clients ask for, its version becomes the promoted one and the experiment ends. Else
    the experiment gives every unit that arm, until it is stopped.
    """
    _told(Experiments(opened(store, key)).promote(name, arm, tag=tag, reason=reason), as_json)


@experiment.command(name="sign")
@explained
def sign_entries(
    name: ExperimentArgument,
    *,
    store: StoreOption,
    key: Annotated[Path, typer.Option("--key", envvar="VLLM_EDITS_KEY", help="private key")],
    as_json: JsonOption = False,
) -> None:
    """Vouch as a promoter for all that was done to an experiment: for servers that ask for several promoters."""
    target, signer = opened(store), SigningKey.load(key)
    signed = Experiments(target).sign(name, signer)
    if as_json:
        as_script({"experiment": name, "signed": signed, "keyid": signer.keyid})
    else:
        typer.echo(f"signed {len(signed)} entries of {name}")


@experiment.command(name="list")
@explained
def list_all(store: StoreOption, as_json: JsonOption = False) -> None:
    """Every experiment and how it stands."""
    standings, troubles = Experiments(opened(store)).standings()
    rows = [_row(standing) for _, standing in sorted(standings.items())]
    columns = {"name": "experiment", "model": "model", "status": "status", "phase": "phase", "coverage": "coverage",
               "began_at": "since", "reason": "why"}  # fmt: skip
    show(rows, columns, as_json)
    for trouble in troubles:
        typer.echo(f"note: {trouble}", err=True)


@experiment.command(name="show")
@explained
def show_one(name: ExperimentArgument, store: StoreOption, as_json: JsonOption = False) -> None:
    """One experiment: its arms with the units that each has now, its ramp, and its document."""
    standing = need(Experiments(opened(store)).standings()[0], name)
    if as_json:
        as_script(_row(standing) | {"document": standing.document.model_dump(mode="json", exclude_defaults=True)})
        return
    row = _row(standing)
    plain(f"{name}: {row['status']}, phase {row['phase']}, for requests for {row['model']}{_why(standing)}")
    arms = [arm | {"of_all": f"{arm['share']:.2%}"} for arm in row["arms"]]
    show(
        arms, {"name": "arm", "serves": "serves", "weight": "weight", "of_all": "units now", "state": ""}, as_json=False
    )
    for step in standing.document.steps:
        mark = "  <- now" if step.coverage == row["coverage"] and standing.status == "running" else ""
        plain(f"coverage {step.coverage:g} {spoken(step.after)} after the start{mark}")
    if standing.status == "running" and standing.ramping_since is None:
        plain(f"the ramp is held, {spoken(round(standing.ramped))} in")
    for rule in standing.document.guardrails:
        limits = rule.model_dump(include={"maximum", "minimum", "maximum_ratio", "minimum_ratio"}, exclude_none=True)
        limit = " ".join(f"{name} {value:g}" for name, value in limits.items())
        plain(
            f"guardrail: {rule.metric} {limit}, every {spoken(rule.interval)}, {rule.failure_limit} failures tolerated"
        )


@experiment.command(name="history")
@explained
def history_of(
    store: StoreOption,
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", help="the experiment; all without it", autocompletion=_complete)
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Everything that was done to an experiment, oldest first, the chain checked."""
    entries = Experiments(opened(store)).history(name or None)
    rows = [entry.model_dump(mode="json", exclude_none=True) for entry in entries]
    told = [row | {"what": _what(row)} for row in rows]
    columns = {
        "sequence": "#",
        "experiment": "experiment",
        "what": "what",
        "at": "when",
        "actor": "who",
        "reason": "why",
    }
    show(rows if as_json else told, columns, as_json)


def _what(row: dict[str, Any]) -> str:
    return " ".join(str(row[field]) for field in ("operation", "arm", "coverage") if field in row)


def _changed(store: str, key: Path | None, change: ExperimentChange, reason: str, as_json: bool) -> None:
    _told(Experiments(opened(store, key)).change(change, reason=reason), as_json)


def _told(standing: Standing, as_json: bool) -> None:
    row = _row(standing)
    if as_json:
        as_script([row])
        return
    said = f"{row['name']} is {row['status']}"
    if standing.status == "running":
        shares = ", ".join(f"{arm['name']} {arm['share']:.2%}" for arm in row["arms"])
        said += f", phase {standing.phase}; of all units {shares}"
    if standing.everyone:
        said += f"; everybody gets {standing.everyone}"
    typer.echo(said)


def _row(standing: Standing) -> dict[str, Any]:
    document, coverage = standing.document, standing.coverage(now())
    outside = 1.0 if document.namespace is None else document.namespace.end - document.namespace.start
    outside *= 1.0 if document.holdout is None else 1 - document.holdout.share
    return {
        "name": document.name, "model": document.model, "status": standing.status, "phase": standing.phase,
        "coverage": coverage, "began_at": standing.began_at.isoformat() if standing.began_at else "",
        "reason": standing.reason, "everyone": standing.everyone, "held": standing.ramping_since is None,
        "arms": [
            {"name": arm.name, "serves": abbreviated(arm.serves), "weight": arm.weight,
             "share": arm.weight * coverage * outside if standing.status == "running" else 0.0,
             "state": "withdrawn" if arm.name in standing.withdrawn else "control" if arm == document.control else ""}
            for arm in document.arms
        ],
    }  # fmt: skip


def _why(standing: Standing) -> str:
    return f" ({standing.reason})" if standing.reason else ""
