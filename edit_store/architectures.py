"""The table of supported architectures, one entry for each.

An entry names the modules behind the sites as both transformers and vLLM call them. Authors, the checks at publish time
and the server read the same entry. A projection that only one of the two libraries fuses (`qkv_proj`, `gate_up_proj`)
is found in either form. `vllm-edits sites MODEL` shows the sites that an entry gives a model.

To add one, see CONTRIBUTING.md. A package outside this one calls `register`, in every process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from vllm_edits.edit_store.errors import UnsupportedHost, nearest
from vllm_edits.edit_store.registry import Registry
from vllm_edits.edit_store.sites import READS, Site, Widths, every_site

ModuleEnd = Literal["input", "output"]
_QKV, _GATE_UP = ("q.out", "k.out", "v.out"), ("gate.out", "up.out")
"""Order of the parts in fused projections."""
_PROJECTED = ("q.proj", "k.proj", *_QKV, *_GATE_UP)


@dataclass(frozen=True)
class ModuleSide:
    """One side of a module, and the part of the vector there that is a site (all of it where `start` is None).

    `path` is relative to the decoder layer, or to the whole model for sites outside the layers; '' is the layer itself.
    """

    path: str
    side: ModuleEnd
    start: int | None = None


@dataclass(frozen=True)
class Architecture:
    """Names and order of the modules of one family of models. The defaults are Llama's."""

    name: str
    decoder: str = "model"
    layers: str = "layers"
    attention: str = "self_attn"
    fused_qkv: str = "qkv_proj"
    output: str = "o_proj"
    qk_norm: bool = False
    heads_first: bool = False
    """True if transformers puts heads before tokens at the norms of queries and keys"""
    mlp: str = "mlp"
    fused_gate_up: str = "gate_up_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    gated: bool = True
    experts: bool = False
    post_norms: tuple[str, str] | None = None
    """norms after attention and MLP, before their outputs join the residual stream"""
    final_norm: str = "norm"
    transposed: bool = False
    """True if checkpoints hold weights as [in, out]"""
    undivided: str = ""
    """the reason if tensor parallel divides such a model in another way than the others, else ''"""
    notes: str = field(default="", compare=False)

    def hidden(self, point: str) -> str | None:
        """Reason why this architecture has no such point, with the nearest that exists; None if it has the point."""
        if point in ("q.proj", "k.proj") and not self.qk_norm:
            return f"{self.name} has no QK-norm, so this is {point[0]}.out"
        if point in ("attn.post", "mlp.post") and self.post_norms is None:
            return f"{self.name} has no norm there, so this is {point.removesuffix('post')}out"
        if self.experts and point in ("gate.out", "up.out", "mlp.h"):
            return (
                f"in {self.name} this is inside the experts, and each token goes through other experts; the nearest "
                "points are mlp.in and mlp.out"
            )
        if point == "gate.out" and not self.gated:
            return f"{self.name} has no gate projection; the nearest point is up.out"
        return None

    def reads(self, point: str) -> tuple[str, ...]:
        """Other points that an edit at `point` may read: none where a norm is between a projection and its point."""
        if self.qk_norm and point in ("q.out", "k.out"):
            return ()
        return tuple(read for read in READS.get(point, ()) if self.hidden(read) is None)

    def projections(self) -> dict[str, str]:
        """Output point of each projection of a layer, and the point that it reads. Experts have none."""
        queries, keys = ("q.proj", "k.proj") if self.qk_norm else ("q.out", "k.out")
        found = {queries: "attn.in", keys: "attn.in", "v.out": "attn.in", "attn.out": "attn.z"}
        mlp = {"gate.out": "mlp.in", "up.out": "mlp.in", "mlp.out": "mlp.h"}
        inside = {point: read for point, read in mlp.items() if not self.experts and self.hidden(point) is None}
        return found | inside

    def modules(self) -> dict[str, tuple[str, ...]]:
        """Output points of each projection of a layer, by its path in transformers, alone and fused."""
        alone = {f"{self.attention}.{point[0]}_proj": (point,) for point in _QKV}
        return {
            **alone, f"{self.attention}.{self.fused_qkv}": _QKV, f"{self.attention}.{self.output}": ("attn.out",),
            f"{self.mlp}.gate_proj": ("gate.out",), f"{self.mlp}.{self.up}": ("up.out",),
            f"{self.mlp}.{self.fused_gate_up}": _GATE_UP, f"{self.mlp}.{self.down}": ("mlp.out",),
        }  # fmt: skip

    def sites(self, layers: int) -> list[Site]:
        """Every site of such a model."""
        return [site for site in every_site(layers) if self.hidden(site.point) is None]

    def layer_path(self, layer: int) -> str:
        """Path of the decoder layer of that number."""
        return f"{self.decoder}.{self.layers}.{layer}"

    def side_of(self, point: str, widths: Widths, has: Callable[[str], bool]) -> ModuleSide:
        """Place of `point`. `has` tells if a path, relative as in `ModuleSide`, exists in the given model."""
        if point in _PROJECTED and not (self.qk_norm and point in ("q.out", "k.out")):
            return self._projection(point, widths, has)
        norms = self.post_norms or ("", "")
        sides: dict[str, tuple[str, ModuleEnd]] = {
            "embed.out": (self.layer_path(0), "input"),
            "attn.in": (self._fused_or(self.fused_qkv, self.attention, self.attention, has), "input"),
            "q.out": (f"{self.attention}.q_norm", "output"),
            "k.out": (f"{self.attention}.k_norm", "output"),
            "attn.z": (f"{self.attention}.{self.output}", "input"),
            "attn.out": (f"{self.attention}.{self.output}", "output"),
            "attn.post": (norms[0], "output"),
            "mlp.in": (self._fused_or(self.fused_gate_up, self.mlp, self.mlp, has), "input"),
            "mlp.h": (f"{self.mlp}.{self.down}", "input"),
            "mlp.out": (self.mlp if self.experts else f"{self.mlp}.{self.down}", "output"),
            "mlp.post": (norms[1], "output"),
            "resid": ("", "output"),
            "final": (f"{self.decoder}.{self.final_norm}", "output"),
            "logits": ("", "output"),
        }
        return ModuleSide(*sides[point])

    def _projection(self, point: str, widths: Widths, has: Callable[[str], bool]) -> ModuleSide:
        """Place of a projection: a module of its own, or a part of a fused one."""
        if point in _GATE_UP:
            block, fused, before = self.mlp, self.fused_gate_up, _GATE_UP[: _GATE_UP.index(point)]
            alone = self.up if point == "up.out" else "gate_proj"
        else:
            block, fused, before = self.attention, self.fused_qkv, _QKV[: "qkv".index(point[0])]
            alone = f"{point[0]}_proj"
        path = self._fused_or(fused, block, f"{block}.{alone}", has)
        return ModuleSide(path, "output", sum(map(widths.of, before)) if path.endswith(fused) else None)

    @staticmethod
    def _fused_or(fused: str, block: str, alone: str, has: Callable[[str], bool]) -> str:
        return f"{block}.{fused}" if has(f"{block}.{fused}") else alone


_GEMMA = ("post_attention_layernorm", "post_feedforward_layernorm")

ARCHITECTURES: Registry[Architecture] = Registry("architecture")
"""By the name in a checkpoint's config.json."""


def register(architecture: Architecture) -> None:
    """Make an architecture known. ValueError when another entry has its name."""
    ARCHITECTURES.add(architecture.name, architecture)


for _entry in (
    Architecture("LlamaForCausalLM"),
    Architecture("MistralForCausalLM"),
    Architecture("Qwen2ForCausalLM", notes="biases on q, k and v"),
    Architecture("Qwen3ForCausalLM", qk_norm=True),
    Architecture("Qwen3MoeForCausalLM", qk_norm=True, experts=True),
    Architecture("Gemma2ForCausalLM", post_norms=_GEMMA, notes="norms scale by 1 + w; soft caps"),
    Architecture(
        "Gemma3ForCausalLM", qk_norm=True, heads_first=True, post_norms=_GEMMA, notes="norms scale by 1 + w"
    ),
    Architecture("Phi3ForCausalLM", notes="fused checkpoints"),
    Architecture(
        "Olmo2ForCausalLM", qk_norm=True, post_norms=_GEMMA,
        undivided="its norms of queries and keys go over all heads, which vLLM gathers for them",
        notes="no norm before attention and MLP",
    ),
    Architecture("GraniteForCausalLM", notes="multipliers at embeddings, residual stream and logits"),
    Architecture(
        "GPT2LMHeadModel", decoder="transformer", layers="h", attention="attn", fused_qkv="c_attn",
        output="c_proj", up="c_fc", down="c_proj", gated=False, final_norm="ln_f", transposed=True,
        notes="LayerNorm, biases everywhere, learned positions",
    ),
):  # fmt: skip
    register(_entry)


def supported(name: str) -> Architecture:
    """The table's entry. UnsupportedHost names the nearest, and all that are supported."""
    if name not in ARCHITECTURES:
        raise UnsupportedHost(
            f"architecture {name} is not supported.{nearest(name, ARCHITECTURES)} "
            f"Supported: {', '.join(ARCHITECTURES)}. A new one is an entry in edit_store/architectures.py"
        )
    return ARCHITECTURES[name]
