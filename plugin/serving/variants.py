"""What the names in a request's `model` field mean. Pure and frozen: a swap replaces the whole table by a new one."""

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
    """What a request asked for. `version` is None for the base model."""

    requested: str
    variant: str
    version: str | None
    strength: float = 1.0
    info: VersionInfo = NO_INFO
    in_weights: bool = False
    """whether the version is in the engine's weights, so that it needs no slot"""
    epoch: int = 0
    """counts what has been in the engine's weights: what was computed with others is never shared"""
    assignment: Assignment | None = None
    """the arm of an experiment that this is, where the request takes part in one"""
    feedback_token: str = ""
    """the id by which feedback on it may come"""
    shadow: str = ""
    """what answers the request too, unseen by the client"""


@dataclass(frozen=True)
class VersionWanted:
    """A request named a version by its digest; the store must say which one that is."""

    ref: Ref


@dataclass(frozen=True)
class VariantTable:
    """Names of the base model, and the promoted version of every tag of every variant.

    While a version is in the engine's weights it is all that is served: edits are relative to the base model, and that
    is not there then.
    """

    base_names: tuple[str, ...]
    default_tag: str
    promoted: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    in_weights: str | None = None
    """the version in the engine's weights"""
    epoch: int = 0

    def resolve(self, model: str) -> Choice | VersionWanted:
        """Look a name up. NotFound lists what is served and the nearest names."""
        if not model or model in self.base_names:
            return self._served(Choice(model or self.base_names[0], BASE, None))
        try:
            ref = Ref.parse(model, self.default_tag)
        except NotFound:
            raise self._unknown(model) from None
        tags = self.promoted.get(ref.name)
        if tags is None or (ref.selector not in tags and not ref.is_version):
            raise self._unknown(model)
        if ref.selector in tags:
            return self._served(Choice(model, ref.name, tags[ref.selector]))
        return VersionWanted(ref)

    def chosen(self, model: str, name: str, version: str) -> Choice:
        """What a request gets that named a version which is not promoted."""
        return self._served(Choice(model, name, version))

    def _served(self, choice: Choice) -> Choice:
        if self.in_weights is not None and choice.version != self.in_weights:
            raise NotFound(
                f"The model `{choice.requested}` is not served now: version {self.in_weights[:12]} is in the engine's "
                f"weights, so only that version is served. Served: {', '.join(self.names())}. Use another server, or "
                "withdraw the variant in the weights"
            )
        return replace(choice, in_weights=self.in_weights is not None, epoch=self.epoch)

    def moved(self, name: str, tag: str, version: str | None) -> VariantTable:
        """The table after a tag was moved; with None it is not served any more."""
        promoted = {each: dict(tags) for each, tags in self.promoted.items()}
        tags = promoted.setdefault(name, {})
        if version is None:
            tags.pop(tag, None)
        else:
            tags[tag] = version
        return replace(self, promoted={each: tags for each, tags in promoted.items() if tags})

    def served(self) -> Iterator[tuple[str, str, str]]:
        """Every name a client may send, its variant and its version: `polite`, and `polite@<tag>` for other tags.

        Versions by digest are names too, and not among these.
        """
        for name, tags in sorted(self.promoted.items()):
            for tag, version in sorted(tags.items()):
                if self.in_weights in (None, version):
                    yield name if tag == self.default_tag else f"{name}@{tag}", name, version

    def names(self) -> list[str]:
        """Every name a client may send, versions by digest apart."""
        return [name for name, _, _ in self.served()]

    def versions(self) -> set[str]:
        """Every promoted version."""
        return {version for tags in self.promoted.values() for version in tags.values()}

    def _unknown(self, model: str) -> NotFound:
        served = [*(self.base_names if self.in_weights is None else ()), *self.names()]
        return NotFound(f"The model `{model}` does not exist. Served: {', '.join(served)}.{nearest(model, served)}")
