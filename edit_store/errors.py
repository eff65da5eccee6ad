"""Every error that this project raises on purpose. It imports nothing, so every module may import it.

EditsError
├── BundleRefused      a bundle breaks rules; the error lists every reason
│   ├── NotTrusted     a promotion or its version lacks signatures that the trust file asks for
│   ├── InstallRefused a worker cannot hold a version; the old version keeps serving
│   └── ExperimentRefused  an experiment, or a change of one, breaks rules; running experiments continue
├── NotFound           a name, tag, version or object does not exist; the error lists similar names
├── AmbiguousVersion   an abbreviated version matches several versions
├── Conflict           another writer changed the same object first; nothing was written
│   └── Overtaken      another writer wrote the next entry of the log first
├── StoreUnavailable   the store cannot be reached, read or written
├── StoreCorrupt       stored bytes do not match their digest or their chain
├── SettingsError      a setting is unknown or invalid
├── UnsupportedHost    this vLLM, or the way it was started, cannot serve edits exactly
├── CannotSign         entries must be signed, but there is no signing key
├── NotServed          a variant is promoted, but this server refuses it
├── RequestRefused     a request asks for something that its variant or experiment does not allow
│   ├── ArmRefused     a request asks for an arm that does not exist or is not served
│   └── ShadowRefused  a request asks for a comparison that is not possible
└── FeedbackRefused    feedback that its experiment does not accept
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar


class EditsError(Exception):
    """Base of every error raised on purpose. Its text says what was expected, what was found, and what to do."""

    lasting: ClassVar[bool] = False
    """True if the same attempt would fail again, so that it is not repeated by itself."""


@dataclass(frozen=True)
class Reason:
    """One broken rule. `code` is a short fixed word (a metric label); `message` is for people."""

    code: str
    message: str

    def __str__(self) -> str:
        return f"{self.message} [{self.code}]"


class BundleRefused(EditsError):
    """A bundle breaks one or more rules. Nothing was changed."""

    lasting: ClassVar[bool] = True

    def __init__(self, what: str, reasons: Iterable[Reason]) -> None:
        self.what = what
        self.reasons = tuple(reasons)
        lines = "\n".join(f"  - {reason}" for reason in self.reasons)
        super().__init__(f"{what} is refused, {len(self.reasons)} reason(s):\n{lines}")


class NotTrusted(BundleRefused):
    """Signatures are missing, wrong or expired. It is checked again later, because signatures may be added."""

    lasting: ClassVar[bool] = False


class InstallRefused(BundleRefused):
    """A version cannot be held by this server as it is now. The old version keeps serving."""


class ExperimentRefused(BundleRefused):
    """An experiment, or a change of one, breaks one or more rules. Running experiments continue."""


class NotFound(EditsError):
    """A name, tag, version or stored object does not exist."""


class AmbiguousVersion(EditsError):
    """An abbreviated version matches several versions. Give more digits."""


class Conflict(EditsError):
    """Another writer was first. Nothing was written: read the new state, then try again."""


class Overtaken(Conflict):
    """Another writer wrote the next entry of the log first: read the log again, then try again."""


class StoreUnavailable(EditsError):
    """The store cannot be opened, read or written."""


class StoreCorrupt(EditsError):
    """Stored bytes do not match their digest or their chain."""


class CannotSign(EditsError):
    """Entries must be signed, but there is no signing key."""


class NotServed(EditsError):
    """A variant is promoted, but this server refuses it."""


class RequestRefused(EditsError):
    """A request asks for something that its variant does not allow."""


class ArmRefused(RequestRefused):
    """A request asks for an arm that does not exist for its model name, or that is not served."""


class ShadowRefused(RequestRefused):
    """A request asks for a comparison that is not possible."""


class FeedbackRefused(EditsError):
    """Feedback with a metric or a value that its experiment does not accept. It was not counted."""


class SettingsError(EditsError):
    """A setting is unknown, or its value is invalid."""


class UnsupportedHost(EditsError):
    """This vLLM, or the way it was started, cannot serve edits exactly."""


def nearest(name: str, known: Iterable[str]) -> str:
    """' Did you mean …?' for the closest of `known`, or '' when nothing is close."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(match) for match in close)}?" if close else ""
