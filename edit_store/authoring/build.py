"""From a method, a model and data to a bundle, in three steps: prepare, make, save.

prepare   read and check everything that is small: options, data, digests of the base model, tokenizer
make      load the model, and compute the edits
save      write the bundle, with the recipe that makes it again, into a folder
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from transformers import AutoTokenizer

from vllm_edits.edit_store import verify
from vllm_edits.edit_store.architectures import supported
from vllm_edits.edit_store.authoring import data as tables
from vllm_edits.edit_store.authoring.host import Edits, Host, edited
from vllm_edits.edit_store.authoring.kept import Kept
from vllm_edits.edit_store.authoring.method import METHODS, Cost, Inputs, Method, Work
from vllm_edits.edit_store.authoring.probing import PROBES, probes_of
from vllm_edits.edit_store.authoring.recipe import RECIPE_FILE, Recipe, Source
from vllm_edits.edit_store.authoring.statistics import Statistics
from vllm_edits.edit_store.base_model import identify
from vllm_edits.edit_store.bundle import Bundle, Provenance, Strength
from vllm_edits.edit_store.compose import compose
from vllm_edits.edit_store.errors import BundleRefused, EditsError, Reason, UnsupportedHost
from vllm_edits.edit_store.progress import BytesDone, StepDone
from vllm_edits.edit_store.refs import is_name

PACKAGES = ("vllm-edits", "torch", "transformers", "numpy")
"""Packages with their versions in a recipe."""
M = TypeVar("M", bound=Method)


_PRIVILEGED = (
    "{} takes safety away from a model. Say that this is meant (--privileged); the bundle is marked, and trust files "
    "refuse it unless they allow privileged versions"
)


def _silent(_what: str, _done: int, _total: int) -> None: ...


@dataclass(frozen=True)
class Ask:
    """The order for one build."""

    method: Method
    model: Path
    files: tuple[str | Path, ...] = ()
    """of data, each as `table=file` or as a file whose columns say the table"""
    name: str = ""
    """of the bundle; '' for the method's"""
    description: str = ""
    label: str = ""
    strength: Strength | None = None
    """strengths that requests may ask for"""
    privileged: bool = False
    """True if the edits may take safety away"""
    probes: int = PROBES
    """probes of the bundle; 0 for none"""
    seed: int = 0
    device: str = "cpu"
    threads: int = field(default_factory=torch.get_num_threads)
    on: tuple[Bundle, ...] = ()
    """bundles that the edits build on, in order"""
    on_ref: str = ""
    """the variant of `on`, as name@version"""
    store: str = ""
    created_at: datetime | None = None
    cache: Path | None = None
    """folder of statistics and of what interrupted builds go on with; None for that of the user"""


@dataclass(frozen=True)
class Built:
    """A bundle that was made, and how."""

    bundle: Bundle
    """with `on`, the composition of that and `alone`"""
    alone: Bundle
    recipe: Recipe
    notes: Mapping[str, bytes] = field(default_factory=dict)
    """more files that the method writes, by name"""

    def save(self, folder: Path) -> None:
        """Write the bundle, its recipe, and what else the method wrote, into `folder`."""
        self.bundle.save(folder)
        if self.alone is not self.bundle:
            self.alone.save(folder / self.alone.manifest.name)
        self.recipe.save(folder / RECIPE_FILE)
        for name, content in self.notes.items():
            (folder / name).write_bytes(content)


@dataclass(frozen=True)
class Draft:
    """A build of which everything small is checked."""

    ask: Ask
    inputs: Inputs

    @property
    def cost(self) -> Cost:
        """The cost of the build."""
        return self.ask.method.cost(self.inputs)

    def make(self, step: StepDone = _silent) -> Built:
        """Load the model and compute the edits. BundleRefused if they break a rule."""
        ask, base = self.ask, self.inputs.base
        step("load the model", 0, 1)
        with _deterministic(ask):
            host = Host.load(ask.model, device=ask.device)
            step("load the model", 1, 1)
            below: Edits = [pair for bundle in ask.on for pair in pairs_of(bundle)]
            edited_by = "+".join(bundle.version for bundle in ask.on)
            statistics = Statistics(host, base, step, edited_by=edited_by, folder=ask.cache)
            work = Work(self.inputs, host, statistics, ask.seed, step, kept=self._kept(edited_by))
            with edited(host.model, below):
                edits = ask.method.make(work)
            prompts = list(ask.method.probe_prompts(self.inputs)) if ask.probes else []
            probing = partial(probes_of, host, prompts=prompts, strength=ask.strength, count=ask.probes)
            step("probes", 0, 1)
            alone_probes, probes = probing(edits), probing([*below, *edits]) if below else ()
            step("probes", 1, 1)
        digests = self.inputs.data.digests()
        recipe = self._recipe(digests)
        alone = Bundle.create(
            recipe.name, base, edits, self._provenance(digests), description=ask.description, label=ask.label,
            strength=ask.strength, measurements=work.measurements, privileged=ask.method.takes_safety(self.inputs),
            cumulative_edits=ask.method.changes(self.inputs), probes=alone_probes, created_at=recipe.created_at,
        )  # fmt: skip
        verify.check(alone, base)
        work.kept.forget()
        bundle = compose([*ask.on, alone]).with_probes(probes) if ask.on else alone
        return Built(bundle, alone, recipe, work.notes)

    def _kept(self, edited_by: str) -> Kept:
        """Results of the steps of this very build."""
        recipe = self._recipe(self.inputs.data.digests()).model_dump(mode="json")
        decide = {name: recipe[name] for name in ("method", "base", "options", "seed", "device", "threads", "packages")}
        rows = {table: source["rows"] for table, source in recipe["data"].items()}
        return Kept.of({**decide, "data": rows, "on": edited_by}, self.ask.cache)

    def _recipe(self, digests: Mapping[str, str]) -> Recipe:
        ask, files = self.ask, self.inputs.data.files
        return Recipe(
            method=ask.method.called(), name=ask.name or ask.method.called(), description=ask.description,
            label=ask.label, strength=ask.strength, privileged=ask.privileged, probes=ask.probes,
            created_at=ask.created_at or datetime.now(UTC).replace(microsecond=0), model=str(ask.model),
            base=dict(self.inputs.base.files),
            data={table: Source(file=str(path), rows=digests[table]) for table, path in files.items()},
            on=ask.on_ref, store=ask.store, options=ask.method.model_dump(mode="json"), seed=ask.seed,
            device=ask.device, threads=ask.threads, packages={name: version_of(name) for name in PACKAGES},
        )  # fmt: skip

    def _provenance(self, digests: Mapping[str, str]) -> Provenance:
        ask = self.ask
        options = {name: "" if value is None else str(value) for name, value in ask.method.model_dump().items()}
        rows = {f"data.{table}": digest for table, digest in digests.items()}
        on = {"on": " + ".join(f"{each.manifest.name}@{each.version}" for each in ask.on)} if ask.on else {}
        return Provenance(
            tool="vllm-edits build", method=f"{ask.method.called()}: {ask.method.summary()}",
            source=ask.method.source, parameters={**options, **rows, **on, "seed": str(ask.seed)},
        )  # fmt: skip


def prepare(ask: Ask, progress: BytesDone | None = None) -> Draft:
    """Check everything that can be checked before the model is loaded. BundleRefused lists every reason.

    progress: called with the number of bytes of the model that were just hashed.
    """
    data = tables.read(ask.method.tables, ask.files)
    base = identify(ask.model, progress=progress)
    supported(base.architecture)
    inputs = Inputs(data, base, _tokenizer(ask.model))
    reasons = [*ask.method.problems(inputs), *_problems(ask)]
    if ask.method.takes_safety(inputs) and not ask.privileged:
        reasons.append(Reason("privileged", _PRIVILEGED.format(ask.method.called())))
    for bundle in ask.on:
        reasons += verify.base_mismatch(bundle.manifest.base, base)
    if reasons:
        raise BundleRefused(f"the build of {ask.name or ask.method.called()!r}", reasons)
    return Draft(ask, inputs)


def _problems(ask: Ask) -> Iterator[Reason]:
    """A name or a device that would end the build after it has computed everything, or as it begins."""
    if ask.name and not is_name(ask.name):
        yield Reason("name", f"expected a name of small letters, digits and . _ - between them, found {ask.name!r}")
    try:
        there = torch.device(ask.device).type != "cuda" or torch.cuda.is_available()
    except RuntimeError:
        there = False
    if not there:
        yield Reason("device", f"expected a device that torch has here, such as cpu, found {ask.device!r}")


def _tokenizer(model: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UnsupportedHost(f"expected a tokenizer in {model} that transformers can load, found: {error}") from None


def options_of(method: type[M], options: Mapping[str, Any]) -> M:
    """A method with options, as text or as values. BundleRefused lists every option that is wrong."""
    try:
        return method.model_validate(dict(options))
    except ValidationError as error:
        reasons = [
            Reason("option", f"{'.'.join(map(str, each['loc']))}: {each['msg']}, found {each['input']!r}")
            for each in error.errors()
        ]
        raise BundleRefused(f"the options of {method.called()}", reasons) from None


def again(recipe: Recipe, method: type[Method], on: Sequence[Bundle] = ()) -> Draft:
    """The build that a recipe describes. EditsError if the model or the data are not those that it had."""
    draft = prepare(Ask(
        options_of(method, recipe.options), Path(recipe.model),
        tuple(f"{table}={source.file}" for table, source in recipe.data.items()),
        on=tuple(on), on_ref=recipe.on,
        **{name: getattr(recipe, name) for name in ("name", "description", "label", "strength", "seed", "device",
                                                    "threads", "created_at", "store", "privileged", "probes")},
    ))  # fmt: skip
    digests = draft.inputs.data.digests()
    differ = [f"table {table}: {source.file} has other rows" for table, source in recipe.data.items()
              if digests[table] != source.rows]  # fmt: skip
    if dict(draft.inputs.base.files) != recipe.base:
        differ.append(f"{recipe.model} is another model")
    if differ:
        told = "\n".join(f"  - {each}" for each in differ)
        raise EditsError(
            f"this recipe cannot be followed:\n{told}\nGive it what it was written with, or build without the recipe"
        )
    return draft


def pairs_of(bundle: Bundle) -> Edits:
    """The edits of a bundle with their numbers."""
    tensors, widths = verify.check(bundle), bundle.manifest.base.widths
    return [(edit, {name: array.copy() for name, array in edit.numbers(tensors, widths).items()})
            for edit in bundle.manifest.edits]  # fmt: skip


def register(method: type[Method]) -> Callable[..., Built]:
    """Make a method known. Returns its function `build`: model, data files, then its options and those of `Ask`."""
    METHODS.add(method.called(), method)

    def build(model: str | Path, *files: str | Path, step: StepDone = _silent, **options: Any) -> Built:
        own = {name: options.pop(name) for name in list(options) if name in method.model_fields}
        return prepare(Ask(options_of(method, own), Path(model), files, **options)).make(step)

    build.__doc__ = method.__doc__
    return build


@contextmanager
def _deterministic(ask: Ask) -> Iterator[None]:
    """Seeds, threads and algorithms, so that the same build makes the same bytes; afterwards as they were."""
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(ask.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(ask.seed)
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)
