"""Edits: the base class of all kinds, and all that a kind declares. The kinds are in `kinds/`, a module for each.

An edit record is frozen and small; its numbers live in the bundle's tensor file under `<site>/<kind>/<field>`, as
float32 (indices as int32). A kind's `apply` computes the edit in numpy, one token per row; tests compare the served
form with it.

Several edits may meet at one site. They apply in the order that their kinds declare (`Edit.order`), not in that of the
bundle. EDITS.md has the order of the product's kinds, and what each may do.

An edit that reads another point of its layer reads it after that point's own edits. `scope` says for which tokens an
edit counts. The strength s of a request, within the bundle's bounds, multiplies the vector that an edit adds (a factor
becomes 1 + s (factor - 1)).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from vllm_edits.edit_store.architectures import Architecture
from vllm_edits.edit_store.base_ref import BaseModelRef
from vllm_edits.edit_store.errors import Reason
from vllm_edits.edit_store.linear import AffineMap
from vllm_edits.edit_store.scope import ALL, Scope
from vllm_edits.edit_store.sites import POINTS, READS, Site, Widths

Array = NDArray[np.float32]
Tensors = dict[str, Any]
Fields = Mapping[str, Any]
"""An edit's numbers by tensor field."""
SiteName = Annotated[str, AfterValidator(lambda text: str(Site.parse(text)))]

MAX_RANK = 512
MAX_PARTS = 64

IN_PLACE = tuple(point for point in POINTS if point != "logits")


class Order(NamedTuple):
    """Turn of a kind's edits at their site: stage after stage, and within a stage by `place`."""

    stage: int
    place: int = 0


class Measure(NamedTuple):
    """Size of an edit, in the unit of its kind: a number, and the name of the quantity."""

    norm: float
    of: str
    of_weight: bool = False
    """True if it is the Frobenius norm of a change of the weight between the point that is read and the site"""


Broken = tuple[str, str, str]
"""Code, field and reason of a rule that numbers break."""


class Edit(BaseModel):
    """One edit. `site` is where it writes; `part` tells several of one kind at one site apart.

    A kind is a subclass with a field `kind: Literal["name"] = "name"`, registered by `kinds.register`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    points: ClassVar[tuple[str, ...]]
    """Points where this kind has a meaning."""
    order: ClassVar[Order]
    """Its turn among the kinds at one site. All edits of one stage read the result of the stage before."""
    in_turn: ClassVar[bool] = False
    """True if each edit of its stage reads the result of the edit before instead."""
    transforms: ClassVar[bool] = False
    """True if it changes the results of other edits at its site, and does not only add to them."""
    only_in_weights: ClassVar[str] = ""
    """Reason not to serve it per request, as the end of a sentence about an edit; empty where there is none."""
    features: ClassVar[tuple[str, ...]] = ()
    """Names of what some of its edits need, beside a rank, and a server must reserve."""
    adds_constant: ClassVar[bool] = False
    """True if it may need a bias where it is put into a weight."""
    integers: ClassVar[tuple[str, ...]] = ()
    """Tensor fields of integers; all others are float32."""

    kind: str
    site: SiteName
    part: int = Field(default=1, ge=1, le=MAX_PARTS)
    scope: Scope = ALL

    @classmethod
    def name(cls) -> str:
        """The kind's name, which its records give as `kind`. TypeError when it has none of its own."""
        field = cls.model_fields["kind"]
        if not isinstance(field.default, str):
            raise TypeError(f"{cls.__name__}: expected a field `kind: Literal['name'] = 'name'`, found {field!r}")
        return field.default

    @property
    def capacity(self) -> int:
        """Part of a server's reservation that this edit needs: its rank, or 1 where rank has no meaning."""
        return getattr(self, "rank", 1)

    @property
    def label(self) -> str:
        """Name among the edits of its kind, for people: its site, and its part where there are more."""
        return self.site if self.part == 1 else f"{self.site}.{self.part}"

    @property
    def ranked(self) -> bool:
        """True where rank has a meaning: ranks of edits that are computed together add up."""
        return hasattr(self, "rank")

    @property
    def source(self) -> str:
        """The site whose vector the edit reads."""
        return getattr(self, "reads", None) or self.site

    @classmethod
    def sources(cls, site: Site, besides: Iterable[str]) -> list[Site]:
        """Sites that this kind may read at `site`, the usual one first; `besides`: other points that are read there."""
        return [site]

    @abstractmethod
    def shapes(self, widths: Widths) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor field for a model of these widths."""

    def misplaced(self) -> str | None:
        """Reason why this kind cannot stand at its site, or None."""
        point = Site.parse(self.site).point
        if point in self.points:
            return None
        return f"kind {self.kind!r} has no meaning at {self.site}; it can stand at {', '.join(self.points)}"

    def tensor_name(self, field: str) -> str:
        """Name of a tensor field in the bundle's tensor file."""
        return f"{self.site}/{self.kind}{'' if self.part == 1 else f'.{self.part}'}/{field}"

    def numbers(self, tensors: Mapping[str, Any], widths: Widths) -> dict[str, Any]:
        """This edit's own of a bundle's tensors, by field."""
        return {field: tensors[self.tensor_name(field)] for field in self.shapes(widths)}

    # -- what a bundle must keep (verify.py) -------------------------------------------------------------------------

    def rules_of_model(self, base: BaseModelRef, architecture: Architecture) -> Iterator[Reason]:
        """Reasons why this edit cannot stand at its site in that model, beside those that hold for every kind."""
        yield from ()

    def rules_of_numbers(self, fields: Fields, widths: Widths) -> Iterator[Broken]:
        """Rules that its numbers break, once they are finite and have their shapes."""
        yield from ()

    def hint(self, field: str) -> str:
        """Sentence about a tensor field that is missing, with a space before it; empty where there is none to say."""
        return ""

    # -- what is said of it (inspection.py, compare.py, compose.py) ---------------------------------------------------

    @abstractmethod
    def measure(self, fields: Fields) -> Measure:
        """Its size."""

    def moved(self, new: Self, before: Fields, after: Fields) -> float | None:
        """||new - old|| / ||old|| of the edit as a map, not of its numbers; None where the kind has no measure.

        new: the same edit in another version; before, after: numbers of both, in float64
        """
        if {field: array.shape for field, array in before.items()} != {
            field: array.shape for field, array in after.items()
        }:
            return None
        size = float(np.sqrt(sum(np.sum(array**2) for array in before.values())))
        distance = float(np.sqrt(sum(np.sum((after[field] - array) ** 2) for field, array in before.items())))
        return distance / size if size else float(distance > 0)

    def adds(self, fields: Fields) -> Any | None:
        """Vectors [n, width] at its site of which it adds multiples; None if it does anything else."""
        return None

    def beside(self, fields: Fields, other: Edit, other_fields: Fields) -> str | None:
        """Effect of it and another bundle's edit at one site on each other; None if both work as they do alone."""
        return None

    # -- how it is served (plugin/graph/reservation.py, plugin/serving/version_info.py) -------------------------------

    def needs(self, together: int) -> frozenset[str]:
        """The `features` that it needs when that many edits are computed together."""
        return frozenset()

    @property
    def alone(self) -> bool:
        """True where it cannot be computed together with another of its kind that reads the same point."""
        return False

    @property
    def fires(self) -> bool:
        """True if it changes few tokens only, so that these are worth counting."""
        return False

    @classmethod
    @abstractmethod
    def usual(cls, layer: int, rank: int = 1) -> Self:
        """One edit of this rank, if rank has a meaning, where published methods put it in a layer."""

    # -- in a weight (plugin/weights/weight_form.py) ------------------------------------------------------------------

    def formless(self) -> str | None:
        """Reason why no weight can hold it at any site, and what to do instead; None if one can."""
        if self.scope.everything:
            return None
        return "it has a scope, and a weight is the same for every token. Serve it per request"

    @classmethod
    def linear(cls, numbers: Sequence[tuple[Self, Fields]], width: int) -> AffineMap:
        """Map of the vector at a site by edits of this kind that read it, together, in their order.

        NotImplementedError where every edit is `formless`.
        """
        raise NotImplementedError(f"{cls.__name__} has no linear form")

    def weight_change(self, fields: Fields, shape: Sequence[int]) -> tuple[Any, ...]:
        """Change of the weight [out, in] between what it reads and its site: a matrix, or the two factors of one.

        NotImplementedError where it reads its own site, or is `formless`.
        """
        raise NotImplementedError(f"{type(self).__name__} is no change of a weight")

    # -- examples, for proofs and benchmarks --------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def forms(cls, site: Site, width: int) -> Iterator[tuple[str, Self]]:
        """One edit for each form of the kind that may make sense at a site of this width, and the form's name."""

    def sample(self, random: np.random.Generator, widths: Widths, strength: float) -> dict[str, Any]:
        """Random numbers, about `strength` of activations of size 1; the lower it is, the less a model changes."""
        return {field: random.normal(size=shape) * strength for field, shape in self.shapes(widths).items()}

    @abstractmethod
    def weakened(self, fields: Fields, strength: float) -> dict[str, Any]:
        """Numbers of the same edit at a strength between 0, at which it does least, and 1, as it is."""

    def _width(self, widths: Widths) -> int:
        return widths.of(Site.parse(self.site).point)


EditsWithNumbers = Sequence[tuple[Edit, Fields]]
"""Edits in the order in which they apply, each with its numbers."""


class ReadingEdit(Edit):
    """An edit that reads one point and adds to another of the same layer, or reads the point it changes."""

    reads: SiteName

    def misplaced(self) -> str | None:
        if why := super().misplaced():
            return why
        site, reads = Site.parse(self.site), Site.parse(self.reads)
        allowed = self._readable(site)
        if reads in allowed:
            return None
        return f"a {self.kind} edit at {self.site} must read {' or '.join(map(str, allowed))}, not {self.reads}"

    @classmethod
    def sources(cls, site: Site, besides: Iterable[str]) -> list[Site]:
        in_place = [site] if site.point in IN_PLACE else []
        return [site.beside(point) for point in besides] + in_place

    @classmethod
    def _readable(cls, site: Site) -> list[Site]:
        """Sites that it may read at a site in some architecture."""
        return cls.sources(site, READS.get(site.point, ()))

    def _source_width(self, widths: Widths) -> int:
        return widths.of(Site.parse(self.reads).point)


def order_at_site(edit: Edit) -> tuple[Order, str, int]:
    """Sorting key of the edits that meet at one site."""
    return edit.order, edit.kind, edit.part
