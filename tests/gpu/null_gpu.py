"""A CUDA driver that accepts every call and computes nothing, made of `driver/` for the libraries that will ask it.

Everything above the driver is the real thing: torch, Triton and vLLM believe in an NVIDIA H100, allocate, capture and
replay graphs, and write machine code for it. Preloaded, the driver stands before CUDA's runtime, cuBLAS, NCCL and NVML.
Kernels are counted and not run, so numbers mean nothing; copies are made, in the order of their streams.

    python tests/gpu/null_gpu.py FOLDER SITE_PACKAGES …     make it for these packages, and print its environment
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parent / "driver"
WANTED = re.compile(r"^(__)?cuda|^cublas|^nccl|^nvml|^cu[A-Z]")
_COMPILER = ["-std=c++20", "-O1", "-fPIC", "-w"]
_SMI = """#!/bin/sh
case "$*" in
*query-gpu=name*) echo "NVIDIA H100 that is not there" ;;
*) echo "a driver, no GPU" ;;
esac
"""


def build(packages: Sequence[Path], folder: Path) -> dict[str, str]:
    """The environment in which a process meets the driver, which is made first where there is none for these sources.

    packages: the folders where torch, Triton and vLLM are installed; what their libraries ask of CUDA, and `driver/`
    does not have, returns success and does nothing.
    """
    sources = [Path(__file__), *sorted(SOURCES.glob("*.?pp"))]
    versions = sorted(
        path.name for path in _in(packages, "*.dist-info") if re.match(r"(torch|triton|vllm)-", path.name)
    )
    known = hashlib.sha256(b"\0".join([*(path.read_bytes() for path in sources), *map(str.encode, versions)]))
    made = folder / known.hexdigest()[:16]
    if not (made / "bin").is_dir():
        made.mkdir(parents=True, exist_ok=True)
        _compile(packages, made, [path for path in sources if path.suffix == ".cpp"])
    return {
        "NULL_GPU": "1",
        "LD_PRELOAD": str(made / "libcuda.so.1"),
        "LD_LIBRARY_PATH": str(made),
        "TRITON_LIBCUDA_PATH": str(made),
        "VLLM_NCCL_SO_PATH": str(made / "libcuda.so.1"),
        "PATH": os.pathsep.join([str(made / "bin"), os.environ.get("PATH", "")]),
    }


def _in(packages: Sequence[Path], pattern: str) -> list[Path]:
    return [path for folder in packages for path in sorted(folder.glob(pattern))]


def _compile(packages: Sequence[Path], made: Path, sources: Iterable[Path]) -> None:
    headers = [f"-I{path}" for each in ("nvidia/cu13/include", "triton/backends/nvidia/include")
               for path in _in(packages, each)]  # fmt: skip
    objects = []
    for source in sources:
        objects.append(made / f"{source.stem}.o")
        subprocess.run(["g++", *_COMPILER, *headers, "-c", str(source), "-o", str(objects[-1])], check=True)
    libraries = [str(path) for part in ("torch/lib", "vllm") for path in _in(packages, f"{part}/**/*.so*")]
    asked = {name for name in _symbols("--undefined-only", *libraries) if WANTED.search(name)}
    (declares,), (looks_up,) = (_in(packages, each) for each in
                                ("nvidia/cu13/include/cuda.h", "torch/lib/libc10_cuda.so"))  # fmt: skip
    declared = re.findall(r"CUDAAPI (cu[A-Z]\w+)", declares.read_text())
    looked_up = re.findall(rb"\0(nvml[A-Z]\w+)", looks_up.read_bytes())
    rest = {*asked, *declared, *map(bytes.decode, looked_up)} - _symbols("--defined-only", *map(str, objects))
    stubs = made / "rest.c"
    stubs.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(rest)))
    objects.append(made / "rest.o")
    subprocess.run(["gcc", "-fPIC", "-w", "-fno-builtin", "-c", str(stubs), "-o", str(objects[-1])], check=True)
    library = made / "libcuda.so.1"
    command = ["g++", "-shared", "-Wl,-soname,libcuda.so.1", "-o", str(library), *map(str, objects), "-ldl"]
    subprocess.run(command, check=True)
    for name in ("libcuda.so", "libnvidia-ml.so.1"):
        (made / name).unlink(missing_ok=True)
        (made / name).symlink_to(library.name)
    (made / "bin").mkdir()
    smi = made / "bin" / "nvidia-smi"
    smi.write_text(_SMI)
    smi.chmod(0o755)


def _symbols(which: str, *files: str) -> set[str]:
    dynamic = ["-D"] if which == "--undefined-only" else []
    found = subprocess.run(["nm", *dynamic, which, *files], capture_output=True, text=True, check=False).stdout
    names = (line.split()[-1] for line in found.splitlines() if " " in line.strip())
    return {name.partition("@")[0] for name in names}


def counts(*, kernels: bool = False) -> dict[str, Any]:
    """What this process has asked of the driver so far; `kernels`: also how often each kernel by its name.

    Nothing where the driver is another one.
    """
    library = ctypes.CDLL("libcuda.so.1")
    if not hasattr(library, "null_gpu_counts"):
        return {}
    library.null_gpu_counts.restype = ctypes.c_size_t
    size = library.null_gpu_counts(None, ctypes.c_size_t(0), int(kernels))
    text = ctypes.create_string_buffer(size + 4096)
    library.null_gpu_counts(text, ctypes.c_size_t(len(text)), int(kernels))
    found: dict[str, Any] = json.loads(text.value)
    return found


def less(after: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked between two counts."""
    return {
        name: less(count, before.get(name, {})) if isinstance(count, Mapping) else count - before.get(name, 0)
        for name, count in after.items()
    }


if __name__ == "__main__":
    for name, value in build([Path(word) for word in sys.argv[2:]], Path(sys.argv[1])).items():
        print(f"export {name}={value!r}")
