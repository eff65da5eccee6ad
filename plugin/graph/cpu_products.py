"""`SlotProducts` for a CPU, in C++: cpu_products.cpp, compiled where it runs and kept.

The loops that torch's compiler makes of the expressions read and convert x once for each rank, and wait for each sum
and for memory in turn. With one rank that costs little, and a call of a library would cost more (DECISIONS.md).
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch import library as torch_library
from torch.utils.cpp_extension import include_paths, library_paths

from vllm_edits.edit_store.private_folder import cache_folder
from vllm_edits.plugin.graph.slot_products import EXPRESSIONS, SlotProducts

logger = logging.getLogger("vllm.edits")

SOURCE = Path(__file__).with_suffix(".cpp")
DTYPES = (torch.float32, torch.bfloat16)


def products_for(device: torch.device, dtype: torch.dtype) -> SlotProducts:
    """The compiled products; the expressions if they are as fast, or if there is no compiler."""
    if device.type != "cpu" or dtype not in DTYPES:
        return EXPRESSIONS
    try:
        return compiled()
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip()
        logger.warning(
            "edits of a rank above one are slower than they could be: %s could not be compiled or loaded (%s). "
            "Install g++ or name a compiler with CXX; TORCH_EXTENSIONS_DIR is where the result is kept",
            SOURCE.name, said[-500:],
        )  # fmt: skip
        return EXPRESSIONS


@functools.cache
def compiled() -> SlotProducts:
    """The products in C++. OSError or CalledProcessError when they cannot be compiled."""
    torch.ops.load_library(_library())  # type: ignore[no-untyped-call]
    for operator, shape in _SHAPES.items():
        torch_library.register_fake(f"vllm_edits::{operator}", shape)
    operators = torch.ops.vllm_edits
    return SlotProducts("compiled", operators.slot_dots.default, operators.slot_combine.default)


_SHAPES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "slot_dots": lambda x, read, _: x.new_empty((x.shape[0], read.shape[1]), dtype=torch.float32),
    "slot_combine": lambda strengths, write, _: strengths.new_empty((strengths.shape[0], write.shape[2])),
}
"""Shapes and types of the results, for torch's compiler."""


def _library() -> Path:
    """The library for this source, torch and processor. The first process that needs it compiles it."""
    command = [
        os.environ.get("CXX", "g++"), "-O3", "-march=native", "-std=c++20", "-fopenmp", "-fPIC", "-shared",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-isystem{path}" for path in include_paths()), str(SOURCE),
        *(f"-L{path}" for path in library_paths()), "-lc10", "-ltorch_cpu",
    ]  # fmt: skip
    known = [*command, torch.__version__, _processor(), SOURCE.read_text()]
    name = hashlib.sha256("\0".join(known).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache_folder()) / "vllm_edits"
    library = folder / f"{SOURCE.stem}-{name}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as building:
            made = Path(building, library.name)
            subprocess.run([*command, "-o", str(made)], check=True, capture_output=True, text=True)
            made.replace(library)  # whole or not at all, also if another process makes it at the same time
    return library


def _processor() -> str:
    """Name of the processor that `-march=native` compiles for."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return torch.backends.cpu.get_cpu_capability()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
