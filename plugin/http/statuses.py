"""The HTTP status of each error that an operator's call can end with."""

from __future__ import annotations

from vllm_edits.edit_store.errors import (
    AmbiguousVersion,
    BundleRefused,
    CannotSign,
    Conflict,
    EditsError,
    NotFound,
    SettingsError,
)
from vllm_edits.plugin.serving.coordinator import NotFollowed

_STATUS = {
    CannotSign: 403, NotFound: 404, AmbiguousVersion: 409, Conflict: 409, BundleRefused: 422, NotFollowed: 422,
    SettingsError: 422,
}  # fmt: skip


def status_of(error: EditsError) -> int:
    """The HTTP status for an error: 503 if it may pass by itself."""
    return next((code for kind, code in _STATUS.items() if isinstance(error, kind)), 503)
