"""torch's compiler, told of an NVIDIA H100 that is not there: the kernels it writes for one, and their machine code.

It asks a GPU for nothing but its properties, which are given here. A model is traced on the meta device, where tensors
have shapes and no numbers, and its graph is moved to the GPU before kernels are written. That takes hold of torch in
places that are nobody's interface: do it in a process of its own, with the torch that is pinned here.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import config as inductor
from torch._inductor.codecache import PyCodeCache
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._inductor.virtualized import V
from torch.utils._pytree import tree_map
from triton.backends.compiler import GPUTarget

DEVICE = "NVIDIA H100"
GPU = torch.device("cuda", 0)
_H100 = SimpleNamespace(
    name=DEVICE, gcnArchName="sm_90", major=9, minor=0, multi_processor_count=132, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
)  # fmt: skip
_KERNEL = re.compile(
    r"^(triton_\w+) = async_compile\.triton\('\w+', '''(.*?)''', device_str='cuda'\)", re.MULTILINE | re.DOTALL
)
_CALL = re.compile(r"(triton_\w+)\.run\(|(extern_kernels\.\w+)\(|torch\.ops\.([\w.]+)\(")


@dataclass(frozen=True)
class Written:
    """What the compiler wrote for a model."""

    kernels: dict[str, str]
    """source of each of its kernels, in Triton"""
    calls: list[str]
    """what a forward pass calls, in order: kernels, `extern_kernels.mm` and the like, operators of others"""

    def compile(self) -> dict[str, int]:
        """Bytes of machine code of each kernel, in the first of its configurations. Errors are the compiler's."""
        return {name: _machine_code(name, source) for name, source in self.kernels.items()}


class _Code(Exception):
    """Carries what was written out of the compiler, which would run it next."""


def pretend() -> None:
    """From now on torch's compiler of this process believes in the GPU."""
    properties = {"get_device_properties": staticmethod(lambda _=None: _H100)}
    _replace(CudaInterface.Worker, **properties)
    _replace(
        CudaInterface,
        **properties,
        is_available=staticmethod(lambda: True),
        is_bf16_supported=staticmethod(lambda **_: True),
    )
    _replace(torch.cuda, get_device_properties=lambda _=None: _H100)
    _replace(triton_helpers, set_driver_to_gpu=lambda: None)
    _replace(inductor, use_static_triton_launcher=False)
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32)))
    logging.getLogger("torch._inductor.utils").setLevel(logging.ERROR)  # that the compiler is stopped is meant


def _replace(owner: Any, **attributes: Any) -> None:
    for name, value in attributes.items():
        setattr(owner, name, value)


def written_for(model: nn.Module, *inputs: Tensor) -> Written:
    """What the compiler writes for a model and inputs on the meta device, of any number of rows."""
    torch._dynamo.reset()  # noqa: SLF001
    for each in inputs:
        torch._dynamo.mark_dynamic(each, 0)  # noqa: SLF001
    backend = aot_autograd(fw_compiler=_write, inference_compiler=_write, decompositions=select_decomp_table())
    code = ""
    try:
        with torch.no_grad():
            torch.compile(model, fullgraph=True, backend=backend)(*inputs)
    except Exception as error:
        code = _carried_by(error)
        if not code:
            raise
    calls = _CALL.findall(code[code.index("def call(") :])
    return Written(dict(_KERNEL.findall(code)), [next(filter(None, found)) for found in calls])


def _write(graph: fx.GraphModule, _: Any) -> Any:
    """The compiler's part behind tracing, for the GPU. Ends in `_Code`."""
    values = [node.meta["val"] for node in graph.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    mode: Any = values[0].fake_mode

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        with mode:
            return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=GPU)

    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": GPU}
        if "val" in node.meta:
            node.meta["val"] = tree_map(moved, node.meta["val"])
    graph.recompile()

    def stop(self: GraphLowering) -> Any:
        raise _Code(self.codegen()[0].value)

    _replace(GraphLowering, compile_to_module=stop)
    with V.set_fake_mode(mode):
        return compile_fx_inner(graph, [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"])


def _carried_by(error: BaseException | None) -> str:
    """The code that this error, or what it came from, carries; "" where there is none."""
    while error is not None and not isinstance(error, _Code):
        error = error.__cause__ or error.__context__ or getattr(error, "inner_exception", None)
    return str(error or "")


def _machine_code(name: str, source: str) -> int:
    kernel = getattr(PyCodeCache.load(source), name)
    kernel.precompile(warm_cache_only=True)
    return len(kernel.compile_results[0].kernel.asm["cubin"])
