"""Edit bundles and the versioned store that holds them. Needs neither torch nor vLLM."""

from edit_store.base_model import identify
from edit_store.bundle import BaseModelRef, Bundle, Manifest, Measurement, Provenance, Strength
from edit_store.edits import KINDS, Edit, Gate, LowRank, Offset, Scale, SubspaceFilter, WeightDelta
from edit_store.scope import Scope
from edit_store.signing import Role, SigningKey
from edit_store.sites import Site, Widths
from edit_store.store import EditStore, Published, TagEntry
from edit_store.trust import Enforcement, TrustedKey, TrustPolicy
from edit_store.verify import check

__all__ = [
    "KINDS",
    "BaseModelRef",
    "Bundle",
    "Edit",
    "EditStore",
    "Enforcement",
    "Gate",
    "LowRank",
    "Manifest",
    "Measurement",
    "Offset",
    "Provenance",
    "Published",
    "Role",
    "Scale",
    "Scope",
    "SigningKey",
    "Site",
    "Strength",
    "SubspaceFilter",
    "TagEntry",
    "TrustPolicy",
    "TrustedKey",
    "WeightDelta",
    "Widths",
    "check",
    "identify",
]
