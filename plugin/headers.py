"""Every HTTP header of the plugin's own, declared once. Names are in lower case, as ASGI has them."""

from __future__ import annotations

from vllm_edits.edit_store.experiments.document import UNIT_HEADER

STRENGTH = "x-edits-strength"
"""Of a request: how strong it wants the edits."""
ARM = "x-edits-arm"
"""Of a request: the arm it wants; set by gateways, flag systems, testers."""
SHADOW = "x-edits-shadow"
"""Of a request: `polite@a,polite@b`: the first answers, the second runs unseen, and where they part is noted."""
UNIT = UNIT_HEADER
"""Of a request: what stays in one arm of an experiment, unless its document names another header."""
ADMIN_TOKEN = "x-edits-admin-token"  # noqa: S105  the header's name
"""Of a request that changes what is served."""

VARIANT = "x-edits-variant"
"""Of an answer: the bundle's name, or `base`."""
VERSION = "x-edits-version"
"""Of an answer: the version's digest, or `base`."""
EXPERIMENT = "x-edits-experiment"
"""Of an answer: `<experiment>/<arm>`, where the request takes part in one."""
REQUEST = "x-edits-request"
"""Of an answer: the id by which feedback on it may come."""

OF_REQUESTS = (STRENGTH, ARM, SHADOW, UNIT, ADMIN_TOKEN)
OF_ANSWERS = (VARIANT, VERSION, EXPERIMENT, REQUEST)
