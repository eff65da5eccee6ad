"""Checks that this machine's NVIDIA driver and GPUs run the installed torch, before minutes of loading.

It asks the driver directly. Importing torch takes seconds; and with a driver that is too old, torch only says that
there is no GPU, and then vLLM says that it knows no device.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_CUDA = re.compile(r"^cuda\b[^=\n]*=\s*['\"](\d+)\.(\d+)", re.MULTILINE)
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_…
_WHY = {
    100: "it finds no GPU; check that the machine has one, and that CUDA_VISIBLE_DEVICES includes it",
    803: "its kernel module and its libraries have different versions; reload the module, or restart the machine",
    804: "its forward-compatibility package does not support this GPU; update the driver itself",
}
OLDEST = {12: (7, 0), 13: (7, 5)}
"""The lowest compute capability with kernels in a CUDA version's libraries, by CUDA's major version."""


def cuda_of_torch() -> tuple[int, int] | None:
    """The CUDA version of the installed torch, or None for another build or without torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    found = _CUDA.search(Path(spec.origin).with_name("version.py").read_text())
    return (int(found[1]), int(found[2])) if found else None


def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def faults(cuda: tuple[int, int] | None, driver: Callable[[], Any] = _driver) -> Iterator[str]:
    """Reasons why a torch for this CUDA version does not run here, each with a remedy. None for a torch without it."""
    if cuda is None:
        return
    needed = f"torch is built for CUDA {cuda[0]}.{cuda[1]}"
    try:
        library = driver()
    except OSError as error:
        yield f"{needed}, but no NVIDIA driver was found ({error}). Install a driver, or vLLM's CPU build"
        return
    version = _number(library.cuDriverGetVersion)
    if version // 1000 < cuda[0]:
        yield (
            f"{needed}, but the NVIDIA driver supports at most CUDA {version // 1000}.{version % 1000 // 10}. Update "
            f"the driver, or install a vLLM that is built for CUDA {version // 1000}"
        )
        return
    if (failure := library.cuInit(0)) != 0:
        yield f"the NVIDIA driver does not start (error {failure}): {_WHY.get(failure, 'see the output of dmesg')}"
        return
    oldest = OLDEST.get(cuda[0], max(OLDEST.values()))
    for number in range(_number(library.cuDeviceGetCount)):
        found = tuple(_number(library.cuDeviceGetAttribute, which, number) for which in (_MAJOR, _MINOR))
        if found < oldest:
            yield (
                f"GPU {number} has compute capability {_dotted(found)}, but CUDA {cuda[0]} needs at least "
                f"{_dotted(oldest)}. Exclude this GPU with CUDA_VISIBLE_DEVICES, or use a newer one"
            )


def _number(call: Callable[..., int], *arguments: int) -> int:
    """The number that a call of the driver writes through its first argument."""
    found = ctypes.c_int(0)
    call(ctypes.byref(found), *arguments)
    return found.value


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
