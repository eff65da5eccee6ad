"""Edit bundles and the versioned store that holds them. Needs neither torch nor vLLM."""

from vllm_edits.edit_store.base_model import identify
from vllm_edits.edit_store.bundle import BaseModelRef, Bundle, Manifest, Measurement, Provenance, Strength
from vllm_edits.edit_store.edits import KINDS, Edit, Gate, LowRank, Offset, Scale, SubspaceFilter, WeightDelta
from vllm_edits.edit_store.scope import Scope
from vllm_edits.edit_store.signing import Role, SigningKey
from vllm_edits.edit_store.sites import Site, Widths
from vllm_edits.edit_store.storage.store import EditStore, Published, TagEntry
from vllm_edits.edit_store.trust import Enforcement, TrustedKey, TrustPolicy
from vllm_edits.edit_store.verify import check

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
