"""Commands that move versions over the Hugging Face Hub: hub push, hub pull."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from vllm_edits.edit_store.cli.common import (
    JsonOption,
    StoreOption,
    abbreviated,
    app,
    as_script,
    complete_reference,
    explained,
    moving,
    opened,
)
from vllm_edits.edit_store.hub import push_pull as channel
from vllm_edits.edit_store.hub.hub_repo import DEFAULT_REVISION

hub = typer.Typer(no_args_is_help=True, help="The Hugging Face Hub: publish versions in a model repo, fetch them back.")
app.add_typer(hub, name="hub")

RepoArgument = Annotated[str, typer.Argument(help="model repo of the Hub, owner/name")]
RevisionOption = Annotated[str, typer.Option("--revision", help="branch of the repo (pull: or a tag, or a commit)")]


@hub.command()
@explained
def push(
    repo: RepoArgument,
    references: Annotated[
        list[str], typer.Argument(help="name, name@tag or name@version; several", autocompletion=complete_reference)
    ],
    store: StoreOption,
    *,
    revision: RevisionOption = DEFAULT_REVISION,
    private: Annotated[
        bool, typer.Option("--private", help="make the repo a private one; a public one is refused")
    ] = False,
    message: Annotated[str, typer.Option("--message", "-m", help="of the commit; by default, what is added")] = "",
    parent: Annotated[
        str | None, typer.Option("--parent", help="push only if the branch is still at this commit", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Add versions, their records and signatures to a model repo, in one commit, and write its model card.

    Makes the repo if there is none. Nothing in it is replaced but the card; what is there already is not pushed again.
    Who commits at the same time is not overwritten: then push again. Log in with `hf auth login`, or set HF_TOKEN.
    """
    source = opened(store)
    _no_second_bars()
    with moving("pushing") as progress:
        done = channel.push(
            source, references, repo, revision=revision, private=private, message=message, parent=parent,
            progress=progress,
        )  # fmt: skip
    if as_json:
        as_script(asdict(done))
        return
    for each in done.present:
        typer.echo(f"{abbreviated(each)} is there already")
    for each in done.added:
        typer.echo(f"pushed {abbreviated(each)}")
    ended = "commit" if done.committed else "nothing to push; head is"
    typer.echo(f"{repo} ({revision}): {ended} {done.commit[:12]}")


@hub.command()
@explained
def pull(
    repo: RepoArgument,
    store: StoreOption,
    references: Annotated[
        list[str] | None, typer.Argument(help="name or name@version; several; by default, all")
    ] = None,
    revision: RevisionOption = DEFAULT_REVISION,
    as_json: JsonOption = False,
) -> None:
    """Fetch versions from a model repo, check them as an import does, and store them. Promote them yourself.

    All are checked before the first one is stored. For a private repo log in with `hf auth login`, or set HF_TOKEN.
    """
    target = opened(store)
    _no_second_bars()
    with moving("pulling") as progress:
        done = channel.pull(repo, target, references=references or [], revision=revision, progress=progress)
    if as_json:
        as_script(asdict(done))
        return
    for each in done.versions:
        typer.echo(f"pulled {abbreviated(each)}")
    typer.echo(f"from {repo} ({revision}), commit {done.commit[:12]}")


def _no_second_bars() -> None:
    """huggingface_hub draws bars of its own; one is enough."""
    try:
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]
    except ImportError:
        return  # the command itself says that it is missing
    disable_progress_bars()
