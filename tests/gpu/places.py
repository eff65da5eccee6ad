"""Where in the plugin a GPU makes a difference, and which of that a rehearsal ran.

A place is a function, or the body of a module, whose code names something that only a GPU has, or that a GPU alone
calls. `PLACES` says what matters at each; a test finds those that are missing, and a rehearsal, by coverage, the lines
of them that no step ran.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("plugin")
WORDS = frozenset(
    ("cuda", "is_cuda", "pin_memory", "pinned", "is_pinned", "pinned_like", "non_blocking", "mem_get_info",
     "synchronize", "get_device_capability", "get_arch_list")
)  # fmt: skip
"""What only a GPU has, as names in code and as text that code compares with."""

PLACES: Mapping[str, str] = {
    "graph/cpu_products.py:products_for": "a GPU multiplies by expressions, which its compiler fuses",
    "graph/device_rows.py:DeviceRows.__init__": "rows of a device tensor are written through pinned buffers",
    "graph/device_rows.py:_pinned_like": "pinned memory, taken once when a server starts",
    "graph/device_rows.py:PinnedTurns.__init__": "three buffers, each with an event",
    "graph/device_rows.py:PinnedTurns.begin": "a buffer is written to when the copy from it is done",
    "graph/device_rows.py:PinnedTurns.end": "a copy that nobody waits for, and an event behind it",
    "graph/edited_model.py:Prepared.nbytes": "torch pins in powers of two, which the host cache counts",
    "graph/edited_model.py:EditedModel.prepare": "a version's row is made in pinned memory, in a thread of its own",
    "graph/edited_model.py:EditedModel.install": "a copy in the order of steps, which reading the row back waits for",
    "cli/gpu_driver.py:_driver": "the driver is asked before anything is loaded",
    "cli/gpu_driver.py:faults": "a driver or a GPU that torch cannot use is refused",
    "cli/gpu_driver.py:cuda_of_torch": "which CUDA torch is built for",
    "weights/plain_weight.py:PlainWeight.__init__": "a GPU computes with the parameter itself",
    "weights/plain_weight.py:PlainWeight.loaded": "the same",
    "weights/plain_weight.py:PlainWeight.copy": "a version's weights wait in pinned memory",
    "weights/plain_weight.py:PlainWeight.exchange": "weights change places at their addresses, which graphs know",
    "weights/plain_weight.py:PlainWeight.fingerprint": "a sum over the weight, where it lies",
    "weights/plain_weight.py:exchange": "through a part of device memory, taken before anything is changed",
    "weights/plain_weight.py:exchange_bias": "the same for a bias",
    "weights/plain_weight.py:fingerprint": "the same",
    "graph/scope_tables.py:_sent": "tables of token ids go to the device when slots change, and are not waited for",
    "graph/slot_rows.py:Layout.rows": "rows on the device, or in pinned memory",
    "vllm_host/device.py:check_device": "a GPU that torch has no kernels for is refused",
    "vllm_host/device.py:check_compiler": "a GPU's compiler is not asked for",
    "vllm_host/device.py:free_for_slots": "device memory that the model, the KV cache and vLLM's share leave",
    "vllm_host/device.py:_cache_of_one_request": "the same",
    "vllm_host/device.py:free_for_growth": "what nothing has taken, and what torch has taken and does not use",
    "vllm_host/compiled.py:can_fork": "a process that uses CUDA is not forked, so a thread compiles",
    "vllm_host/compiled.py:InThread.__init__": "the same",
    "vllm_host/compiled.py:InThread.done": "the same",
    "vllm_host/compiled.py:InThread.stop": "the same",
    "vllm_host/cuda_graphs.py:require_capture_again": "graphs keep the addresses of slot tensors",
    "vllm_host/cuda_graphs.py:capture_again": "the same",
    "vllm_host/cuda_graphs.py:_used": "the same",
    "vllm_host/cuda_graphs.py:_manager": "V2 has a manager of graphs",
    "vllm_host/cuda_graphs.py:_managers": "and another for a model that guesses",
    "vllm_host/growth.py:Growth._end": "the former slots are given back to the device",
    "vllm_host/loader.py:EditsModelLoader.load_model": "the device is checked, then its memory",
    "vllm_host/runner_v1.py:attach": "V1 with full CUDA graphs replays without calling the model: refused",
    "vllm_host/runner_v2.py:use_edits_model_state": "the V2 runner, which GPUs use, is given a model state",
    "vllm_host/runner_v2.py:require_logits": "edits at logits, where workers may divide requests: refused",
    "vllm_host/runner_v2.py:with_token_slots": "that follows requests",
    "vllm_host/weights.py:_live": "a GPU's weight is its parameter",
}
"""By file and name in `plugin/`: why a GPU matters there; what `found` finds, and what no name betrays."""
WHOLE = ("vllm_host/runner_v2.py", "vllm_host/cuda_graphs.py", "weights/plain_weight.py", "vllm_host/device.py")

_REASONS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "a CPU's": {
        "graph/cpu_products.py:products_for": (
            "try:", "return compiled()", 'said = (getattr(error, "stderr", None) or str(error)).strip()',
            "logger.warning(", "return EXPRESSIONS",
        ),
        "vllm_host/device.py:check_device": ("return",),
        "vllm_host/device.py:check_compiler": ("raise UnsupportedHost(",),
        "vllm_host/device.py:free_for_slots": ("return Free(int(psutil.virtual_memory().available))",),
        "vllm_host/device.py:free_for_growth": ("return int(psutil.virtual_memory().available)",),
        "vllm_host/runner_v2.py:use_edits_model_state": ("return",),
        "vllm_host/weights.py:_live": (
            "held = _captured(module)", "if _HANDLER in held:", "return PackedWeight(held[_HANDLER], loaded, bias)",
            "if _TILES in held:", "return TiledWeight(held[_TILES], loaded, bias)", "raise UnsupportedHost(",
        ),
    },
    "another machine: `tests/command/test_gpu_driver.py`": {
        "cli/gpu_driver.py:cuda_of_torch": ("return None",),
        "cli/gpu_driver.py:faults": (
            "return",
            """yield f"{needed}, but no NVIDIA driver was found ({error}). Install a driver, or vLLM's CPU build\"""",
            """yield f"the NVIDIA driver does not start (error {failure}): {_WHY.get(failure, 'see the output of dmesg')}\"""",  # noqa: E501  a line of code
        ),
    },
    "refused by the command before: `tests/graph/test_plan.py`": {
        "vllm_host/device.py:check_device": ("raise UnsupportedHost(",),
    },
    "`--max-model-len auto`: `tests/graph/test_plan.py`": {"vllm_host/device.py:_cache_of_one_request": ("return 0",)},
    "three buffers are not waited for: `tests/graph/test_device_rows.py`": {
        "graph/device_rows.py:PinnedTurns.begin": ("buffer.copied.synchronize()",),
    },
    "no matter of the device: `tests/graph/test_edited_model.py`": {
        "graph/edited_model.py:EditedModel.prepare": (
            """raise InstallRefused(f"version {version[:12]} of {manifest.name!r}", missing)""",
        ),
        "graph/edited_model.py:EditedModel.install": (
            """raise ValueError(f"slot {slot} is not a free slot of 1 to {self.slots}")""",
            """raise RuntimeError(f"slot {slot} does not hold version {prepared.version[:12]} as it was prepared")""",
        ),
    },
    "no matter of the device: `tests/engine/test_start.py`": {
        "vllm_host/loader.py:EditsModelLoader.load_model": ("raise UnsupportedHost(",),
    },
    "a draft model: `tests/proofs/configurations.py`": {
        "vllm_host/loader.py:EditsModelLoader.load_model": (
            "loader = get_model_loader(dataclasses.replace(self.load_config, load_format=settings.inner_load_format))",
            "return loader.load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)",
        ),
    },
    "attached once": {"vllm_host/runner_v1.py:attach": ("return",)},
    "no supported model has a state of its own": {
        "vllm_host/runner_v2.py:use_edits_model_state": (
            "state_class = with_token_slots(model.get_model_state_cls(), loaded)",
        ),
    },
    "`tests/vllm_host/test_runner_v2.py`": {"vllm_host/runner_v2.py:require_logits": ("raise UnsupportedHost(",)},
    "a growth that fails: `tests/vllm_host/test_compiled.py`": {
        "vllm_host/compiled.py:InThread.done": (
            'told = "".join(traceback.format_exception(error))[-_TOLD_BYTES:]',
            'raise EditsError(f"the code could not be compiled: {told}")',
        ),
    },
    "a server without graphs does not grow here: `tests/vllm_host/test_cuda_graphs.py`": {
        "vllm_host/cuda_graphs.py:capture_again": ("return",),
    },
    "an older vLLM: `tests/vllm_host/test_cuda_graphs.py`": {
        "vllm_host/cuda_graphs.py:require_capture_again": ("raise UnsupportedHost(",),
    },
}  # fmt: skip
UNREACHED: Mapping[str, str] = {
    f"{place}: {line}": why for why, places in _REASONS.items() for place, lines in places.items() for line in lines
}
"""By file, name and line of code: why no rehearsal runs it."""


@dataclass(frozen=True)
class Function:
    """A function of the plugin, by its qualified name."""

    file: str
    name: str
    node: ast.FunctionDef | ast.AsyncFunctionDef

    @property
    def place(self) -> str:
        return f"{self.file}:{self.name}"

    def names_a_gpu(self) -> bool:
        return any(_word(node) in WORDS for node in ast.walk(self.node))

    def lines(self) -> dict[int, str]:
        """First lines of the statements in it, without its docstring and what only declares."""
        source = (ROOT / self.file).read_text().splitlines()
        body = [node for part in self.node.body for node in ast.walk(part) if isinstance(node, ast.stmt)]
        return {node.lineno: source[node.lineno - 1].strip() for node in body if not _only_declares(node)}


def functions() -> Iterator[Function]:
    """Every function of the plugin that is not inside another."""
    for path in sorted(ROOT.rglob("*.py")):
        file = str(path.relative_to(ROOT))
        yield from (Function(file, name, node) for name, node in _functions(ast.parse(path.read_text()), ""))


def _functions(
    node: ast.Module | ast.ClassDef, prefix: str
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for each in node.body:
        if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + each.name, each
        elif isinstance(each, ast.ClassDef):
            yield from _functions(each, f"{prefix}{each.name}.")


def found() -> list[Function]:
    """The functions where a GPU makes a difference, as far as names tell, and all of the modules that are a GPU's."""
    return [each for each in functions() if each.file in WHOLE or each.names_a_gpu()]


def _word(node: ast.AST) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.keyword):
        return node.arg or ""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _only_declares(node: ast.stmt) -> bool:
    return isinstance(node, ast.Global | ast.Nonlocal | ast.Pass) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    )
