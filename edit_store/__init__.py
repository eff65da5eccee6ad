"""Edit bundles and the versioned store that holds them. Needs neither torch nor vLLM."""

from vllm_edits.edit_store.base_model import identify
from vllm_edits.edit_store.base_ref import BaseModelRef
from vllm_edits.edit_store.bundle import Bundle, Manifest, Measurement, Provenance, Strength
from vllm_edits.edit_store.edits import Edit
from vllm_edits.edit_store.kinds import KINDS
from vllm_edits.edit_store.kinds.gate import Gate
from vllm_edits.edit_store.kinds.low_rank import LowRank
from vllm_edits.edit_store.kinds.offset import Offset
from vllm_edits.edit_store.kinds.scale import Scale
from vllm_edits.edit_store.kinds.subspace_filter import SubspaceFilter
from vllm_edits.edit_store.kinds.weight_delta import WeightDelta
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
