"""An authoring method: options with defaults from its source, the data it wants, its cost, and how it makes edits.

A method is one module in `methods/`, which is found without a list: a subclass of `Method`, and `build.register` of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BeforeValidator, PlainSerializer
from torch import Tensor

from vllm_edits.edit_store.authoring.chat import asked
from vllm_edits.edit_store.authoring.data import Data, Table, TextRow
from vllm_edits.edit_store.authoring.host import Edits, Host, edited
from vllm_edits.edit_store.authoring.kept import Kept
from vllm_edits.edit_store.authoring.statistics import Statistics
from vllm_edits.edit_store.base_ref import BaseModelRef
from vllm_edits.edit_store.bundle import Measurement
from vllm_edits.edit_store.errors import Reason
from vllm_edits.edit_store.progress import StepDone
from vllm_edits.edit_store.record import FrozenRecord
from vllm_edits.edit_store.registry import Registry

T = TypeVar("T")


def _parse_layers(given: object) -> object:
    """Layers as a list, or as in `4-6,9`."""
    if not isinstance(given, str):
        return given
    found: list[int] = []
    for part in given.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"expected layers such as 4-6 or 3,5,8, found {given!r}")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)


def _show_layers(layers: Sequence[int] | None) -> str | None:
    return None if layers is None else ",".join(map(str, layers))


Layers = Annotated[tuple[int, ...], BeforeValidator(_parse_layers), PlainSerializer(_show_layers)]
"""Numbers of layers, from 0, in the order in which a method edits them. As text: `4-6,9`."""


@dataclass(frozen=True)
class Inputs:
    """Everything that is known before the model is loaded."""

    data: Data
    base: BaseModelRef
    tokenizer: Any

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text."""
        return [list(map(int, ids)) for ids in self.tokenizer(list(texts))["input_ids"]]

    def count(self, texts: Sequence[str]) -> int:
        """The number of tokens of all texts."""
        return sum(map(len, self.tokens(texts))) if texts else 0

    def layers_from(self, given: Sequence[int] | None, depth: float) -> tuple[int, ...]:
        """The given layers, or all from a depth on, from 0 at the first layer to 1 behind the last."""
        count = self.base.widths.layers
        return tuple(given) if given is not None else tuple(range(int(depth * count), count))

    def layers(self, given: Sequence[int] | None, first: float, last: float) -> tuple[int, ...]:
        """The given layers, or those between two depths, from 0 at the first layer to 1 behind the last."""
        count = self.base.widths.layers
        return tuple(given) if given is not None else tuple(range(round(first * count), round(last * count) + 1))


@dataclass(frozen=True)
class Cost:
    """The cost of a build, as far as it is known before."""

    forward_tokens: int
    """tokens that pass through the model"""
    backward_tokens: int = 0
    """of them, those that gradients are computed for"""
    statistics_bytes: int = 0
    """of matrices that are kept while it runs"""


@dataclass
class Work:
    """Everything that a method works with."""

    inputs: Inputs
    host: Host
    statistics: Statistics
    seed: int
    step: StepDone
    measurements: list[Measurement] = field(default_factory=list)
    """figures of the method, for the manifest"""
    notes: dict[str, bytes] = field(default_factory=dict)
    """more files that it writes beside the bundle, by name"""
    kept: Kept = field(default_factory=Kept)
    """results that an interrupted build goes on with"""

    @property
    def data(self) -> Data:
        return self.inputs.data

    def each(self, what: str, items: Sequence[T], compute: Callable[[T], Tensor]) -> Iterator[Tensor]:
        """compute(item) for every item, in order, with progress shown. An interrupted build goes on behind the last.

        what: the step's name, which no other step of the build has
        compute: depends on nothing but the item, the build, and the results before
        """
        found = self.kept.begin(what)
        for number, item in enumerate(items):
            self.step(what, number, len(items))
            if (key := str(number)) not in found:
                found[key] = compute(item)
                self.kept.save(what, found.copy, ended=number == len(items) - 1)
            yield found[key].to(self.host.device)
        self.step(what, len(items), len(items))

    def measure(self, metric: str, edits: Edits, figure: Callable[[], float], n: int) -> None:
        """Take a figure without the edits and with them, for the manifest. n: the rows that it is of."""
        base = figure()
        with edited(self.host.model, edits):
            now = figure()
        self.measurements.append(Measurement(metric=metric, base=base, edited=now, n=n))


class Method(FrozenRecord):
    """A method of making edits. The fields of a subclass are its options; its docstring is its help."""

    source: ClassVar[str]
    """the paper"""
    kinds: ClassVar[tuple[str, ...]]
    """of edits that it makes"""
    tables: ClassVar[Mapping[str, Table]]
    """the data that it wants"""
    takes: ClassVar[str]
    """its cost, in a few words"""
    privileged: ClassVar[bool] = False
    """True if its edits always take safety away"""

    @classmethod
    def called(cls) -> str:
        """Name in commands: that of its module."""
        return cls.__module__.rpartition(".")[2].replace("_", "-")

    @classmethod
    def summary(cls) -> str:
        """First sentence of its help."""
        return (cls.__doc__ or "").split("\n")[0].strip()

    def changes(self, inputs: Inputs) -> int:
        """The number of concepts, facts or behaviours that it changes."""
        return 1

    def takes_safety(self, inputs: Inputs) -> bool:
        """True if the bundle takes safety away."""
        return self.privileged

    def problems(self, inputs: Inputs) -> Iterator[Reason]:
        """Every reason why it cannot work, told before the model is loaded."""
        yield from ()

    def probe_prompts(self, inputs: Inputs) -> Iterator[str]:
        """Prompts behind which its edits may show, for the probes of the bundle."""
        for name, table in self.tables.items():
            for row in () if table.apart_from or table.row is TextRow else inputs.data[name]:
                text = getattr(row, "said", "") or getattr(row, "prompt", "") or next(iter(row.model_dump().values()))
                chat = getattr(self, "chat", False) or getattr(row, "chat", False)
                yield asked(inputs.tokenizer, str(text)) if chat else str(text)

    def cost(self, inputs: Inputs) -> Cost:
        """The cost on these inputs."""
        raise NotImplementedError

    def make(self, work: Work) -> Edits:
        """The edits."""
        raise NotImplementedError


def layer_problems(layers: Sequence[int], inputs: Inputs) -> Iterator[Reason]:
    """Layers that the model does not have, none at all, or one twice."""
    count = inputs.base.widths.layers
    absent = [layer for layer in layers if layer >= count]
    if absent or not layers:
        yield Reason("layers", f"expected layers from 0 to {count - 1}, found {_show_layers(layers) or 'none'}")
    if len(set(layers)) < len(layers):
        yield Reason("layers", f"expected every layer once, found {_show_layers(layers)}")


METHODS: Registry[type[Method]] = Registry("method", key=lambda method: method.called())
"""By the name in commands. `methods.find` imports those that this package brings."""
