"""The feedback token: the id with which a client can later send feedback on a request of an experiment.

The token contains the arm and the unit of the request. So no process needs to remember requests: another process,
another server with the same key, and this server after a restart can all read it. A code keeps clients from inventing
tokens.

    token = base64url(seed[4] arm[1] how[1] unit[8] nonce[8] code[8])       code = HMAC-SHA256(key, all before)[:8]
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from vllm_edits.edit_store.errors import NotFound, SettingsError
from vllm_edits.edit_store.experiments.state import Standings
from vllm_edits.plugin.experiments.records import How
from vllm_edits.plugin.experiments.routing import Assignment

_FORM = struct.Struct(">4sBB8s8s")
_CODE = 8
_HANDLE = re.compile(r"(?:[a-z]+[-_])?([A-Za-z0-9_-]{40})(?:-[0-9]+)?")
"""A token, with or without vLLM's prefix and suffix: `chatcmpl-…`, `cmpl-…-0`."""
MIN_KEY_BYTES = 16
_HOW = get_args(How)


@dataclass(frozen=True)
class FeedbackToken:
    """The content of a feedback token."""

    request: str
    experiment: str
    phase: int
    arm: str
    unit: str
    evidence: bool
    """True if the hash chose the arm"""


def _seed(experiment: str, phase: int) -> bytes:
    return hashlib.sha256(f"{experiment}/{phase}".encode()).digest()[:4]


class FeedbackTokens:
    """Makes and reads feedback tokens with one key."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @classmethod
    def of(cls, file: Path | None) -> FeedbackTokens:
        """Use the key in a file, or a new key without a file. SettingsError if the file contains no key."""
        if file is None:
            return cls(secrets.token_bytes(32))
        try:
            key = file.read_bytes().strip()
        except OSError as error:
            raise SettingsError(f"edits.feedback_key_file: {file} cannot be read: {error.strerror}") from None
        if len(key) < MIN_KEY_BYTES:
            raise SettingsError(
                f"edits.feedback_key_file: expected at least {MIN_KEY_BYTES} bytes in {file}, found {len(key)}. "
                "Make one with: openssl rand -hex 32"
            )
        return cls(key)

    def make(self, assignment: Assignment, arm: int) -> str:
        """Make a token. arm: the arm's number in the document."""
        said = _FORM.pack(_seed(assignment.experiment, assignment.phase), arm, _HOW.index(assignment.how),
                          bytes.fromhex(assignment.unit), secrets.token_bytes(8))  # fmt: skip
        return base64.urlsafe_b64encode(said + self._code(said)).decode()

    def read(self, text: str, standings: Standings) -> FeedbackToken:
        """Read a token, with or without vLLM's prefix and suffix. NotFound if it is not valid here."""
        unknown = NotFound(
            f"no request of an experiment has the id {text!r}: expected the `id` of an answer, or its x-edits-request"
        )
        match = _HANDLE.fullmatch(text)
        if match is None:
            raise unknown
        data = base64.urlsafe_b64decode(match[1])
        said, code = data[: _FORM.size], data[_FORM.size :]
        if not hmac.compare_digest(code, self._code(said)):
            raise unknown
        seed, arm, how, unit, _ = _FORM.unpack(said)
        for name, standing in standings.items():
            if _seed(name, standing.phase) == seed and arm < len(standing.document.arms):
                evidence = _HOW[how] == "hash"
                return FeedbackToken(
                    match[1], name, standing.phase, standing.document.arms[arm].name, unit.hex(), evidence
                )
        raise NotFound(
            f"the request {text!r} belongs to an experiment that does not exist any more, or to an earlier phase"
        )

    def _code(self, said: bytes) -> bytes:
        return hmac.digest(self._key, said, "sha256")[:_CODE]
