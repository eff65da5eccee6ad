"""Commands about experiments: create, start, show, widen, withdraw, promote, stop."""

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
    no_args_is_help=True, help="Divide the requests for one model name among several arms, and measure the difference."
)
app.add_typer(experiment, name="experiment")


def _complete(context: typer.Context, incomplete: str) -> list[str]:
    store = known_store(context)
    return [name for name in Experiments(store).standings()[0] if name.startswith(incomplete)] if store else []


def _complete_arm(context: typer.Context, incomplete: str) -> list[str]:
    store = known_store(context)
    standing = Experiments(store).standings()[0].get(context.params.get("name") or "") if store else None
    return [arm.name for arm in standing.document.arms if arm.name.startswith(incomplete)] if standing else []


ExperimentArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of the experiment.", autocompletion=_complete)
]
ArmArgument = Annotated[str, typer.Argument(help="Name of an arm of the experiment.", autocompletion=_complete_arm)]


@experiment.command()
@explained
def create(
    document: Annotated[Path, typer.Argument(help="Document in YAML or JSON. Its fields: edit_store/EXPERIMENTS.md.")],
    *,
    store: StoreOption,
    reason: ReasonOption = "",
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Create an experiment from a document, or replace the document of an
    experiment.

    The experiment changes no answer before `start`. While an experiment runs, a
    new document is accepted only if every unit keeps its arm: a wider ramp,
    other guardrails, more feedback metrics.

    \b
    Example:
      vllm-edits experiment create milder.yaml --store ./store
    """
    found = Experiment.load(document)
    _told(Experiments(opened(store, key)).create(found, reason=reason), as_json)


def _plain(operation: Literal["start", "hold", "resume", "stop"], told: str) -> None:
    """Register a command that needs only the experiment's name."""

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


_plain(
    "start",
    """Start an experiment, or start a new phase of a stopped experiment.

    Servers assign units to arms as soon as they read the store again, within
    their poll interval. In a new phase, units are assigned independently of
    earlier phases.

    \b
    Example:
      vllm-edits experiment start milder --store ./store
    """,
)
_plain(
    "hold",
    """Hold the ramp of an experiment: the coverage stops growing.

    Units stay in their arms. `resume` continues the ramp.

    \b
    Example:
      vllm-edits experiment hold milder --store ./store --reason "checking complaints"
    """,
)
_plain(
    "resume",
    """Resume a ramp that was held, from the point where it was held.

    \b
    Example:
      vllm-edits experiment resume milder --store ./store
    """,
)
_plain(
    "stop",
    """Stop an experiment: requests for its model name get the promoted version
    again.

    The exposure logs are kept, so `report` still works.

    \b
    Example:
      vllm-edits experiment stop milder --store ./store --reason "no difference"
    """,
)


@experiment.command()
@explained
def widen(
    name: ExperimentArgument,
    coverage: Annotated[
        float, typer.Argument(min=0, max=1, help="New share of the units that take part, from 0 to 1.")
    ],
    *,
    store: StoreOption,
    reason: ReasonOption = "",
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Widen an experiment at once: a larger share of the units takes part.

    No unit changes its arm. To make an experiment smaller, stop it, create it
    again and start it.

    \b
    Example:
      vllm-edits experiment widen milder 0.5 --store ./store
    """
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
    """Withdraw an arm: the control serves its units from now on.

    Units of other arms keep their arm. The ramp is held.

    \b
    Example:
      vllm-edits experiment withdraw milder candidate --store ./store --reason "too many empty answers"
    """
    _changed(store, key, ExperimentChange(experiment=name, operation="withdraw", arm=arm), reason, as_json)


@experiment.command(name="promote")
@explained
def promote_arm(
    name: ExperimentArgument,
    arm: ArmArgument,
    *,
    store: StoreOption,
    tag: Annotated[str, typer.Option("--tag", help="Tag under which the arm's version is promoted.")] = DEFAULT_TAG,
    reason: ReasonOption = "",
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Serve one arm to all units.

    If the arm serves a version of the variant that clients name, that version
    is promoted and the experiment ends. Else the experiment gives every unit
    this arm, until the experiment is stopped.

    \b
    Example:
      vllm-edits experiment promote milder candidate --store ./store
    """
    _told(Experiments(opened(store, key)).promote(name, arm, tag=tag, reason=reason), as_json)


@experiment.command(name="sign")
@explained
def sign_entries(
    name: ExperimentArgument,
    *,
    store: StoreOption,
    key: Annotated[Path, typer.Option("--key", envvar="VLLM_EDITS_KEY", help="Private key to sign with.")],
    as_json: JsonOption = False,
) -> None:
    """Sign all entries of an experiment as a promoter.

    Use it to approve changes as second promoter, if the servers' trust file
    asks for several promoters.

    \b
    Example:
      vllm-edits experiment sign milder --store ./store --key bob.key
    """
    target, signer = opened(store), SigningKey.load(key)
    signed = Experiments(target).sign(name, signer)
    if as_json:
        as_script({"experiment": name, "signed": signed, "keyid": signer.keyid})
    else:
        plain(f"signed {len(signed)} entries of {name}")


@experiment.command(name="list")
@explained
def list_all(store: StoreOption, as_json: JsonOption = False) -> None:
    """List all experiments with their status, phase and coverage.

    \b
    Example:
      vllm-edits experiment list --store ./store
    """
    standings, without_effect = Experiments(opened(store)).standings()
    rows = [_row(standing) for _, standing in sorted(standings.items())]
    columns = {"name": "experiment", "model": "model", "status": "status", "phase": "phase", "coverage": "coverage",
               "began_at": "since", "reason": "why"}  # fmt: skip
    show(rows, columns, as_json)
    for note in without_effect:
        plain(f"note: {note}", err=True)


@experiment.command(name="show")
@explained
def show_one(name: ExperimentArgument, store: StoreOption, as_json: JsonOption = False) -> None:
    """Show one experiment: its arms and their shares of the units, its ramp and
    its guardrails.

    \b
    Example:
      vllm-edits experiment show milder --store ./store
    """
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
        plain(f"the ramp is held, after {spoken(round(standing.ramped))}")
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
        str, typer.Argument(metavar="[NAME]", help="Name of an experiment. Default: all.", autocompletion=_complete)
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Show all changes of an experiment, oldest first. The chain of hashes over
    the entries is checked.

    \b
    Example:
      vllm-edits experiment history milder --store ./store
    """
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
    if standing.promoted_arm:
        said += f"; all units get {standing.promoted_arm}"
    plain(said)


def _row(standing: Standing) -> dict[str, Any]:
    document, coverage = standing.document, standing.coverage(now())
    outside = 1.0 if document.namespace is None else document.namespace.end - document.namespace.start
    outside *= 1.0 if document.holdout is None else 1 - document.holdout.share
    return {
        "name": document.name, "model": document.model, "status": standing.status, "phase": standing.phase,
        "coverage": coverage, "began_at": standing.began_at.isoformat() if standing.began_at else "",
        "reason": standing.reason, "promoted_arm": standing.promoted_arm, "held": standing.ramping_since is None,
        "arms": [
            {"name": arm.name, "serves": abbreviated(arm.serves), "weight": arm.weight,
             "share": arm.weight * coverage * outside if standing.status == "running" else 0.0,
             "state": "withdrawn" if arm.name in standing.withdrawn else "control" if arm == document.control else ""}
            for arm in document.arms
        ],
    }  # fmt: skip


def _why(standing: Standing) -> str:
    return f" ({standing.reason})" if standing.reason else ""
