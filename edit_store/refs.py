"""Names of variants and versions: `polite`, `polite@prod`, `polite@4f1c9a`, and `polite+safe` for a composition."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vllm_edits.edit_store.errors import NotFound

DEFAULT_TAG = "prod"
MIN_PREFIX = 6
JOIN, MAX_COMPOSED = "+", 200
NAME = r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?"
"""Pattern of a name without `+`."""
_PREFIX = re.compile(rf"[0-9a-f]{{{MIN_PREFIX},64}}")


def is_name(text: str) -> bool:
    """True if `text` can name a tag, or a bundle that is not a composition."""
    return re.fullmatch(NAME, text) is not None


def is_bundle_name(text: str) -> bool:
    """True if `text` can name a bundle or a composition."""
    return len(text) <= MAX_COMPOSED and all(map(is_name, text.split(JOIN)))


def is_version_prefix(text: str) -> bool:
    """True if `text` looks like an abbreviated digest. A tag must not look like one."""
    return _PREFIX.fullmatch(text) is not None


def is_digest(text: str) -> bool:
    """True if `text` is a complete version."""
    return len(text) == 64 and is_version_prefix(text)


@dataclass(frozen=True)
class Ref:
    """A parsed reference: a bundle name with a tag or an abbreviated version."""

    name: str
    selector: str = DEFAULT_TAG

    @classmethod
    def parse(cls, text: str, default_tag: str = DEFAULT_TAG) -> Ref:
        """Split `name[@selector]`. NotFound if it is not a valid name."""
        name, at, selector = text.partition("@")
        if not is_bundle_name(name) or (at and not is_name(selector)):
            raise NotFound(
                f"{text!r} is not the name of a variant: expected name, name@tag or name@version, in lower case"
            )
        return cls(name, selector or default_tag)

    @property
    def is_version(self) -> bool:
        return is_version_prefix(self.selector)

    def __str__(self) -> str:
        return f"{self.name}@{self.selector}"
