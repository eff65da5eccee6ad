"""Every error this project raises on purpose. Imports nothing, so anything may import it.

EditsError
├── BundleRefused      a bundle breaks rules; carries every reason at once
│   ├── NotTrusted     a promotion or its version lacks signatures that the trust file asks for
│   ├── InstallRefused a worker cannot hold a version; the old one keeps serving
│   └── ExperimentRefused  so does an experiment, or a change of one; what runs goes on
├── NotFound           a name, tag, version or object does not exist; names the nearest that do
├── AmbiguousVersion   an abbreviated version fits several
├── Conflict           somebody else changed the same thing first; nothing was written
│   └── Overtaken      somebody else wrote the log's next entry
├── StoreUnavailable   the store cannot be reached, read or written
├── StoreCorrupt       stored bytes do not match the digest or chain that names them
├── SettingsError      a setting is unknown or impossible
├── UnsupportedHost    this vLLM, or the way it was started, cannot serve edits exactly
├── CannotSign         entries must be signed, and there is no key to sign them with
├── NotServed          a promoted variant that this server refuses
├── RequestRefused     a request asks for what its variant or experiment does not allow
│   ├── ArmRefused     an arm that is not there, or not served
│   └── ShadowRefused  two answers that cannot be compared
└── FeedbackRefused    feedback that its experiment does not take
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


class EditsError(Exception):
    """Base of every error raised on purpose; its text says what was expected, what was found, what to do."""


@dataclass(frozen=True)
class Reason:
    """One broken rule: `code` is a short fixed word (a metric label), `message` is for people."""

    code: str
    message: str

    def __str__(self) -> str:
        return f"{self.message} [{self.code}]"


class BundleRefused(EditsError):
    """A bundle breaks one or more rules. Nothing was changed."""

    def __init__(self, what: str, reasons: Iterable[Reason]) -> None:
        self.what = what
        self.reasons = tuple(reasons)
        lines = "\n".join(f"  - {reason}" for reason in self.reasons)
        super().__init__(f"{what} is refused, {len(self.reasons)} reason(s):\n{lines}")


class NotTrusted(BundleRefused):
    """Signatures are missing, wrong or run out. More may come, so it is looked at again."""


class InstallRefused(BundleRefused):
    """A version cannot be held by this server as it was started. The old version keeps serving."""


class ExperimentRefused(BundleRefused):
    """An experiment, or a change of one, breaks one or more rules. What runs goes on."""


class NotFound(EditsError):
    """A name, tag, version or stored object does not exist."""


class AmbiguousVersion(EditsError):
    """An abbreviated version fits more than one; write more digits."""


class Conflict(EditsError):
    """Somebody else wrote first. Read the new state, decide again; nothing was written."""


class Overtaken(Conflict):
    """Somebody else wrote the entry first that this one was to be: decide on what stands now."""


class StoreUnavailable(EditsError):
    """The store cannot be opened, read or written."""


class StoreCorrupt(EditsError):
    """Stored bytes do not match the digest that names them."""


class CannotSign(EditsError):
    """Entries must be signed, and there is no key to sign them with."""


class NotServed(EditsError):
    """A variant is promoted, and this server refuses it."""


class RequestRefused(EditsError):
    """A request asks for something that its variant does not allow."""


class ArmRefused(RequestRefused):
    """A request asks for an arm that no experiment about its model has, or that is not served."""


class ShadowRefused(RequestRefused):
    """A request asks to compare what cannot be compared."""


class FeedbackRefused(EditsError):
    """Feedback of a metric, or a value, that its experiment does not have; nothing was counted."""


class SettingsError(EditsError):
    """A setting is unknown or its value is impossible."""


class UnsupportedHost(EditsError):
    """This vLLM, or the way it was started, cannot serve edits exactly."""


def nearest(name: str, known: Iterable[str]) -> str:
    """' Did you mean …?' for the closest of `known`, or '' when nothing is close."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(match) for match in close)}?" if close else ""
