"""Declares every HTTP header of the plugin. Names are in lower case, as in ASGI."""

from __future__ import annotations

from vllm_edits.edit_store.experiments.document import UNIT_HEADER

STRENGTH = "x-edits-strength"
"""In a request: the strength of the edits."""
ARM = "x-edits-arm"
"""In a request: the arm to use. Gateways, flag systems and testers set it."""
SHADOW = "x-edits-shadow"
"""In a request, e.g. `polite@a,polite@b`: the first answers, the second runs as a shadow, and the first difference is
logged."""
UNIT = UNIT_HEADER
"""In a request: the unit, which stays in one arm of an experiment. An experiment's document may name another header."""
ADMIN_TOKEN = "x-edits-admin-token"  # noqa: S105  the header's name
"""In a request that promotes, rolls back or withdraws a version: the admin token."""

VARIANT = "x-edits-variant"
"""In an answer: the variant's name, or `base`."""
VERSION = "x-edits-version"
"""In an answer: the version's digest, or `base`."""
EXPERIMENT = "x-edits-experiment"
"""In an answer to a request of an experiment: `<experiment>/<arm>`."""
REQUEST = "x-edits-request"
"""In an answer: the id for feedback on it."""

OF_REQUESTS = (STRENGTH, ARM, SHADOW, UNIT, ADMIN_TOKEN)
OF_ANSWERS = (VARIANT, VERSION, EXPERIMENT, REQUEST)
