"""The command `build`: a bundle from a model and data, by the method of a paper. Each method is a command of its own.

The methods need torch, so they are imported when `build` runs, and not by the other commands.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from vllm_edits.edit_store.byte_sizes import sized
from vllm_edits.edit_store.cli.bundles import ProtectOption, published, tell_published
from vllm_edits.edit_store.cli.common import (
    STORE_VARIABLE,
    JsonOption,
    KeyOption,
    app,
    as_script,
    counted,
    explained,
    opened,
    plain,
    show,
    step_by_step,
)
from vllm_edits.edit_store.errors import BundleRefused, EditsError
from vllm_edits.edit_store.private_folder import cache_folder
from vllm_edits.edit_store.protect import Protect
from vllm_edits.edit_store.refs import is_name

if TYPE_CHECKING:
    from vllm_edits.edit_store.authoring.build import Built, Draft
    from vllm_edits.edit_store.authoring.method import Method
    from vllm_edits.edit_store.bundle import Bundle, Strength

RECIPE = "recipe"
_ALL_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(name="build", context_settings=_ALL_PASSED_ON)
def build(context: typer.Context) -> None:
    """Build a bundle from a model and data, by the method of a paper.

    `vllm-edits build --list` shows the methods, and `vllm-edits build METHOD
    --help` what one wants. A build writes the bundle, and a recipe that makes
    it again.

    \b
    Examples:
      vllm-edits build rocr ./model people.jsonl text.jsonl --out ./redirect
      vllm-edits build ./redirect/recipe.yaml --out ./again
    """
    words = list(context.args)
    if words and words[0].endswith((".yaml", ".yml")):
        words.insert(0, RECIPE)
    application()(args=words, prog_name="vllm-edits build")


def application() -> typer.Typer:
    """The commands below `build`: one for each method, and `recipe`."""
    try:
        from vllm_edits.edit_store.authoring import methods
        from vllm_edits.edit_store.authoring.method import METHODS
    except ImportError as error:
        plain(f"vllm-edits: {error}. Install the authoring side: pip install 'vllm-edits[authoring]'", err=True)
        raise typer.Exit(1) from None
    methods.find()
    found = typer.Typer(no_args_is_help=True, add_completion=False, help=inspect.getdoc(build))
    found.callback(invoke_without_command=True)(_main)
    for name, method in METHODS.items():
        found.command(name=name, help=_help(method))(_command(method))
    found.command(name=RECIPE)(recipe)
    return found


def _main(
    context: typer.Context,
    listed: Annotated[
        bool, typer.Option("--list", help="List the methods, what they want, and what they take.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    if listed:
        from vllm_edits.edit_store.authoring.method import METHODS

        show([_row(method) for method in METHODS.values()], COLUMNS, as_json)
    elif context.invoked_subcommand is None:
        plain(context.get_help())


COLUMNS = {"method": "method", "kinds": "edits", "data": "data", "takes": "takes", "source": "source"}


def _row(method: type[Method]) -> dict[str, Any]:
    data = "; ".join(f"{name}: {table}" for name, table in method.tables.items())
    kinds = ", ".join(method.kinds)
    return {"method": method.called(), "kinds": kinds, "data": data, "takes": method.takes, "source": method.source}


def _help(method: type[Method]) -> str:
    tables = "\n".join(
        f"  {name}: {table}: {table.what}{'' if table.least and not table.usual else ' (may be left out)'}"
        for name, table in method.tables.items()
    )
    source = f"Source: {method.source}. Takes {method.takes}."
    return f"{inspect.getdoc(method)}\n\n{source}\n\n\b\nData, as JSON lines with these columns:\n{tables}"


ModelArgument = Annotated[Path, typer.Argument(help="Folder of the base model.", exists=True, file_okay=False)]
DataArgument = Annotated[
    list[str] | None, typer.Argument(help="Files of data: FILE, or TABLE=FILE where the columns do not tell the table.")
]
OutOption = Annotated[Path | None, typer.Option("--out", help="Folder to write the bundle and its recipe into.")]
PublishOption = Annotated[str | None, typer.Option("--publish", help="Also publish it to this store.")]
TagOption = Annotated[str | None, typer.Option("--tag", help="With --publish: also promote it under this tag.")]
OnOption = Annotated[
    str | None,
    typer.Option("--on", help="Build on this variant (name@tag): compute on the model it edits, and compose."),
]
FromStoreOption = Annotated[
    str | None, typer.Option("--store", envvar=STORE_VARIABLE, help="The store with the variant of --on.")
]
DryOption = Annotated[bool, typer.Option("--dry-run", help="Check everything, show what it would take, and stop.")]
StrengthOption = Annotated[
    str | None,
    typer.Option("--strength", help="Strengths that requests may ask for, as LEAST:MOST. Default: 1 alone, as built."),
]
PrivilegedOption = Annotated[
    bool, typer.Option("--privileged", help="Allow a method that takes safety away; the bundle is marked.")
]
ProbesOption = Annotated[
    int, typer.Option("--probes", min=0, max=16, help="Prompts with which servers prove the version. 0: none.")
]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of all random choices.")]
DeviceOption = Annotated[str, typer.Option("--device", help="Device that computes, as torch calls it: cpu, cuda.")]


def _command(method: type[Method]) -> Callable[..., None]:
    """The command of a method: shared parameters, then its own options."""

    @explained
    def run(
        *,
        model: ModelArgument,
        data: DataArgument = None,
        out: OutOption = None,
        name: Annotated[str, typer.Option("--name", help="Name of the bundle. Default: the method's.")] = "",
        description: Annotated[str, typer.Option("--description", help="What it changes, in a sentence.")] = "",
        label: Annotated[str, typer.Option("--label", help="The author's own version, for people.")] = "",
        strength: StrengthOption = None,
        privileged: PrivilegedOption = False,
        probes: ProbesOption = 4,
        seed: SeedOption = 0,
        device: DeviceOption = "cpu",
        on: OnOption = None,
        store: FromStoreOption = None,
        publish: PublishOption = None,
        tag: TagOption = None,
        protect: ProtectOption = None,
        key: KeyOption = None,
        dry_run: DryOption = False,
        as_json: JsonOption = False,
        **options: Any,
    ) -> None:
        from vllm_edits.edit_store.authoring.build import Ask, options_of, prepare

        chosen = options_of(method, {each: value for each, value in options.items() if value is not None})
        _check_targets(out, publish, tag, key, dry_run=dry_run)
        protected = _protected(protect, publish)
        below, on_ref = _below(on, store or publish)
        ask = Ask(
            chosen, model, tuple(data or ()), name=name, description=description, label=label,
            strength=None if strength is None else _bounds(strength), privileged=privileged, probes=probes, seed=seed,
            device=device, on=below, on_ref=on_ref, store=store or publish or "",
        )  # fmt: skip
        with _hashing() as hashed:
            draft = prepare(ask, hashed)
        _finish(draft, out, publish, tag, key, protected=protected, dry_run=dry_run, as_json=as_json)

    hints = get_type_hints(inspect.unwrap(run), include_extras=True)
    shared = [each.replace(annotation=hints[each.name]) for each in inspect.signature(run).parameters.values()][:-1]
    own = [_option(name, info) for name, info in method.model_fields.items()]
    run.__signature__ = inspect.Signature([*shared, *own])  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in (*shared, *own)}
    return run


def _option(name: str, info: Any) -> inspect.Parameter:
    """One option of a method, as the command line has it: what is not given is None."""
    kind = info.annotation if info.annotation in (bool, int, float) else str
    choices = "|".join(get_args(info.annotation)) if get_origin(info.annotation) is Literal else None
    default = False if info.default is None else str(info.default)
    flag = "--" + name.replace("_", "-")
    given = typer.Option(flag, help=info.description, metavar=choices, show_default=default)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, given]
    )


@explained
def recipe(
    file: Annotated[Path, typer.Argument(help="The recipe of a bundle.")],
    *,
    out: OutOption = None,
    publish: PublishOption = None,
    tag: TagOption = None,
    protect: ProtectOption = None,
    key: KeyOption = None,
    dry_run: DryOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make a bundle again from its recipe.

    With the same model, data and packages it has the same bytes on the same
    machine, and so the same version.
    """
    from vllm_edits.edit_store.authoring.build import again
    from vllm_edits.edit_store.authoring.method import METHODS
    from vllm_edits.edit_store.authoring.recipe import Recipe

    found = Recipe.load(file)
    if found.method not in METHODS:
        raise EditsError(f"{file} is a recipe of {found.method!r}, and no such method is installed here")
    _check_targets(out, publish, tag, key, dry_run=dry_run)
    protected = _protected(protect, publish)
    below, _ = _below(found.on or None, found.store or None)
    draft = again(found, METHODS[found.method], below)
    _finish(draft, out, publish, tag, key, protected=protected, dry_run=dry_run, as_json=as_json)


def _bounds(given: str) -> Strength:
    """Bounds such as -2:2, with 1 or the nearest to it as the default."""
    from vllm_edits.edit_store.bundle import Strength

    try:
        least, most = map(float, given.split(":"))
        return Strength(minimum=least, maximum=most, default=min(max(1.0, least), most))
    except ValueError:
        raise EditsError(f"--strength {given}: expected two numbers as LEAST:MOST, for example -1:2") from None


def _check_targets(
    out: Path | None, publish: str | None, tag: str | None, key: Path | None, *, dry_run: bool
) -> None:  # fmt: skip
    """EditsError for places that could not take the bundle, before hours are spent on it."""
    if publish is not None:
        opened(publish, key)
    elif tag is not None:
        raise EditsError(f"--tag {tag}: expected --publish STORE, which has the tag")
    if tag is not None and not is_name(tag):
        raise EditsError(f"--tag {tag!r}: expected small letters and digits, with . _ - between them")
    if out is None and publish is None and not dry_run:
        raise EditsError("expected --out FOLDER, --publish STORE, or both: else the bundle would be lost")
    if out is not None and out.exists() and any(out.iterdir()):
        raise EditsError(f"{out} has files already. Name a new folder, or remove them")


def _protected(file: Path | None, publish: str | None) -> Protect | None:
    """The list of heads that what is published must not touch."""
    if file is not None and publish is None:
        raise EditsError(f"--protect {file}: expected --publish STORE, which the bundle is kept out of")
    return None if file is None else Protect.load(file)


def _below(on: str | None, store: str | None) -> tuple[tuple[Bundle, ...], str]:
    """The bundles that the edits build on (one, or the parts of a composition), and the variant as name@version."""
    if on is None:
        return (), ""
    if store is None:
        raise EditsError(f"--on {on}: expected --store STORE, which has it")
    target = opened(store)
    bundle = target.bundle(target.resolve(on))
    parts = [target.bundle(part.version) for part in bundle.manifest.parts]
    return tuple(parts or [bundle]), f"{bundle.manifest.name}@{bundle.version}"


@contextmanager
def _hashing() -> Iterator[Callable[[int], None]]:
    with counted("digest of the base model", in_bytes=True) as update:
        yield lambda done: update(advance=done)


def _finish(
    draft: Draft, out: Path | None, publish: str | None, tag: str | None, key: Path | None, *,
    protected: Protect | None, dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    if protected is not None and (reasons := protected.misfits(draft.inputs.base)):
        raise BundleRefused("the list of --protect", reasons)
    cost = draft.cost
    if dry_run:
        facts = {
            "method": draft.ask.method.called(), "forward_tokens": cost.forward_tokens,
            "backward_tokens": cost.backward_tokens, "statistics_bytes": cost.statistics_bytes,
        }  # fmt: skip
        if as_json:
            as_script(facts)
        else:
            plain(f"everything is in order. {draft.ask.method.called()} would take:")
            plain(
                f"  {cost.forward_tokens:,} tokens through the model, {cost.backward_tokens:,} of them with gradients"
            )
            plain(f"  {sized(cost.statistics_bytes)} for statistics, beside the model in float32")
        return
    with step_by_step("build") as step:
        built = draft.make(step)
    if out is not None:
        built.save(out)
    with _saved_if_refused(built, out):
        if protected is not None:
            protected.check(built.bundle)
        rows = _publish(built, publish, tag, key)
    if as_json:
        as_script({**_facts(built, out), "published": rows})
        return
    _tell(built, out)
    for row in rows:
        tell_published(row)


@contextmanager
def _saved_if_refused(built: Built, out: Path | None) -> Iterator[None]:
    """Save a bundle which is not published in the end, and say where it is: it may have taken hours."""
    try:
        yield
    except BaseException:  # an interrupt loses it too
        if out is None:
            out = cache_folder() / "built" / f"{built.bundle.manifest.name}-{built.bundle.version[:12]}"
            built.save(out)
        plain(f"not published; the bundle is in {out}, and `vllm-edits publish` takes it from there", err=True)
        raise


def _publish(built: Built, publish: str | None, tag: str | None, key: Path | None) -> list[dict[str, str]]:
    """Publish the bundle; with --on, first what is new by itself, as a part of the composition."""
    if publish is None:
        return []
    target = opened(publish, key)
    alone = [published(target, built.alone, None, "")] if built.alone is not built.bundle else []
    return [*alone, published(target, built.bundle, tag, f"built by {built.recipe.method}")]


def _facts(built: Built, out: Path | None) -> dict[str, Any]:
    manifest = built.bundle.manifest
    return {
        "name": manifest.name, "version": built.bundle.version, "edits": len(manifest.edits),
        "folder": None if out is None else str(out),
        "measurements": [each.model_dump(mode="json") for each in built.alone.manifest.measurements],
    }  # fmt: skip


def _tell(built: Built, out: Path | None) -> None:
    facts = _facts(built, out)
    where = "" if out is None else f", written to {out}"
    plain(f"built {facts['name']}@{facts['version'][:12]}: {facts['edits']} edits{where}")
    for row in facts["measurements"]:
        plain(f"  {row['metric']}: {row['base']:.4g} without the edits, {row['edited']:.4g} with them (n = {row['n']})")
