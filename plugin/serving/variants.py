"""The table of names for a request's `model` field. Pure and frozen: a swap replaces the whole table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from vllm_edits.edit_store.errors import NotFound, nearest
from vllm_edits.edit_store.refs import Ref
from vllm_edits.plugin.experiments.routing import Assignment
from vllm_edits.plugin.version_info import NO_INFO, VersionInfo

BASE = "base"
"""Name of the unedited model in metrics and headers."""


@dataclass(frozen=True)
class Choice:
    """The version for a request, with its strength and its arm. `version` is None for the base model."""

    requested: str
    variant: str
    version: str | None
    strength: float = 1.0
    info: VersionInfo = NO_INFO
    in_weights: bool = False
    """True if the version is in the engine's weights, so that it needs no slot"""
    epoch: int = 0
    """number of the content of the engine's weights; cache blocks of different epochs are never shared"""
    assignment: Assignment | None = None
    """the arm of an experiment, if the request takes part in one"""
    feedback_token: str = ""
    """the id for feedback on the request"""
    shadow: str = ""
    """the name of the shadow that also answers the request"""


@dataclass(frozen=True)
class VersionWanted:
    """A version that a request names by digest. The store must resolve it."""

    ref: Ref


@dataclass(frozen=True)
class VariantTable:
    """The names of the base model, and the promoted version of every tag of every variant.

    While a version is in the engine's weights, nothing else is served: edits are relative to the base model, which is
    not in the weights then.
    """

    base_names: tuple[str, ...]
    default_tag: str
    promoted: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    in_weights: str | None = None
    """the version in the engine's weights"""
    epoch: int = 0

    def resolve(self, model: str) -> Choice | VersionWanted:
        """Look up a name. NotFound lists the served names and similar names."""
        if not model or model in self.base_names:
            return self._require_served(Choice(model or self.base_names[0], BASE, None))
        try:
            ref = Ref.parse(model, self.default_tag)
        except NotFound:
            raise self._unknown(model) from None
        tags = self.promoted.get(ref.name)
        if tags is None or (ref.selector not in tags and not ref.is_version):
            raise self._unknown(model)
        if ref.selector in tags:
            return self._require_served(Choice(model, ref.name, tags[ref.selector]))
        return VersionWanted(ref)

    def choice_of_version(self, model: str, name: str, version: str) -> Choice:
        """The choice for a request that names a version which is not promoted."""
        return self._require_served(Choice(model, name, version))

    def _require_served(self, choice: Choice) -> Choice:
        """The choice, with the content of the weights. NotFound if the weights hold another version."""
        if self.in_weights is not None and choice.version != self.in_weights:
            raise NotFound(
                f"The model `{choice.requested}` is not served now: version {self.in_weights[:12]} is in the engine's "
                f"weights, so only that version is served. Served: {', '.join(self.names())}. Use another server, or "
                "withdraw the variant in the weights"
            )
        return replace(choice, in_weights=self.in_weights is not None, epoch=self.epoch)

    def moved(self, name: str, tag: str, version: str | None) -> VariantTable:
        """The table after a tag was moved. With None, the tag is not served any more."""
        promoted = {each: dict(tags) for each, tags in self.promoted.items()}
        tags = promoted.setdefault(name, {})
        if version is None:
            tags.pop(tag, None)
        else:
            tags[tag] = version
        return replace(self, promoted={each: tags for each, tags in promoted.items() if tags})

    def served(self) -> Iterator[tuple[str, str, str]]:
        """Every name for clients with its variant and version: `polite`, and `polite@<tag>` for other tags.

        Clients may also name versions by digest. These names are not included.
        """
        for name, tags in sorted(self.promoted.items()):
            for tag, version in sorted(tags.items()):
                if self.in_weights in (None, version):
                    yield name if tag == self.default_tag else f"{name}@{tag}", name, version

    def names(self) -> list[str]:
        """Every name for clients, except versions by digest."""
        return [name for name, _, _ in self.served()]

    def versions(self) -> set[str]:
        """Every promoted version."""
        return {version for tags in self.promoted.values() for version in tags.values()}

    def _unknown(self, model: str) -> NotFound:
        served = [*(self.base_names if self.in_weights is None else ()), *self.names()]
        return NotFound(f"The model `{model}` does not exist. Served: {', '.join(served)}.{nearest(model, served)}")
