"""Commands for the Hugging Face Hub: hub push, hub pull."""

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
    plain,
)
from vllm_edits.edit_store.hub import push_pull as channel
from vllm_edits.edit_store.hub.hub_repo import DEFAULT_REVISION

hub = typer.Typer(
    no_args_is_help=True, help="Push versions to a model repo on the Hugging Face Hub, and pull them from there."
)
app.add_typer(hub, name="hub")

RepoArgument = Annotated[str, typer.Argument(help="Model repo on the Hub, as owner/name.")]
RevisionOption = Annotated[
    str, typer.Option("--revision", help="Branch of the repo. For `pull` also a tag or a commit.")
]


@hub.command()
@explained
def push(
    repo: RepoArgument,
    references: Annotated[
        list[str],
        typer.Argument(help="One or more of: name, name@tag, name@version.", autocompletion=complete_reference),
    ],
    store: StoreOption,
    *,
    revision: RevisionOption = DEFAULT_REVISION,
    private: Annotated[
        bool,
        typer.Option("--private", help="Create the repo as a private repo. A repo that is public already is refused."),
    ] = False,
    message: Annotated[
        str, typer.Option("--message", "-m", help="Message of the commit. Default: the added versions.")
    ] = "",
    parent: Annotated[
        str | None,
        typer.Option("--parent", help="Push only if the branch is still at this commit.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Push versions with their records and signatures to a model repo, in one
    commit.

    The command creates the repo if it does not exist, and writes its model
    card. It replaces no other file. It does not push versions that are in the
    repo already. If another commit arrives at the same time, the push fails:
    push again. Log in with `hf auth login`, or set HF_TOKEN.

    \b
    Example:
      vllm-edits hub push owner/polite-edits polite@prod --store ./store --private
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
        plain(f"{abbreviated(each)} is in the repo already")
    for each in done.added:
        plain(f"pushed {abbreviated(each)}")
    ended = "commit" if done.committed else "nothing to push, head is"
    plain(f"{repo} ({revision}): {ended} {done.commit[:12]}")


@hub.command()
@explained
def pull(
    repo: RepoArgument,
    store: StoreOption,
    references: Annotated[
        list[str] | None, typer.Argument(help="Any number of: name, name@version. Default: all versions in the repo.")
    ] = None,
    revision: RevisionOption = DEFAULT_REVISION,
    as_json: JsonOption = False,
) -> None:
    """Pull versions from a model repo into the store.

    Each version is checked as `import` checks it. All versions are checked
    before the first one is stored. The store does not promote them: use
    `promote`. For a private repo, log in with `hf auth login`, or set HF_TOKEN.

    \b
    Examples:
      vllm-edits hub pull owner/polite-edits --store ./store
      vllm-edits hub pull owner/polite-edits polite@4f1c9a --store ./store --revision v2
    """
    target = opened(store)
    _no_second_bars()
    with moving("pulling") as progress:
        done = channel.pull(repo, target, references=references or [], revision=revision, progress=progress)
    if as_json:
        as_script(asdict(done))
        return
    for each in done.versions:
        plain(f"pulled {abbreviated(each)}")
    plain(f"from {repo} ({revision}), commit {done.commit[:12]}")


def _no_second_bars() -> None:
    """Disable the progress bars of huggingface_hub, because the command shows its own."""
    try:
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]
    except ImportError:
        return  # the command itself reports that it is missing
    disable_progress_bars()
