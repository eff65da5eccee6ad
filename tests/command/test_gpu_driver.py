"""A driver or a GPU that the installed torch cannot use is refused at once, with what was found and what to do."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vllm_edits.plugin.cli.gpu_driver import cuda_of_torch, faults

CUDA = (13, 0)


@dataclass
class Driver:
    """What libcuda.so.1 answers, as it does: into the number that the first argument points to."""

    version: int = 13000
    starts: int = 0
    capabilities: tuple[tuple[int, int], ...] = ((9, 0),)

    def cuDriverGetVersion(self, found: Any) -> int:  # noqa: N802  the driver's own names
        found._obj.value = self.version
        return 0

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.starts

    def cuDeviceGetCount(self, found: Any) -> int:  # noqa: N802
        found._obj.value = len(self.capabilities)
        return 0

    def cuDeviceGetAttribute(self, found: Any, which: int, device: int) -> int:  # noqa: N802
        found._obj.value = self.capabilities[device][{75: 0, 76: 1}[which]]
        return 0


@pytest.mark.parametrize(
    ("driver", "told"),
    [
        (Driver(), []),
        (Driver(version=13020, capabilities=((9, 0), (12, 0))), []),
        (Driver(version=12040), ["built for CUDA 13.0, but the NVIDIA driver supports at most CUDA 12.4. Update"]),
        (Driver(starts=803), ["does not start (error 803): its kernel module and its libraries have different"]),
        (Driver(starts=100), ["error 100): it finds no GPU"]),
        (Driver(starts=999), ["error 999): see the output of dmesg"]),
        (Driver(capabilities=((7, 0), (9, 0), (6, 1))),
         ["GPU 0 has compute capability 7.0, but CUDA 13 needs at least 7.5. Exclude", "GPU 2 has compute"]),
    ],
)  # fmt: skip
def test_what_does_not_run_is_told_with_the_mend(driver: Driver, told: list[str]) -> None:
    found = list(faults(CUDA, lambda: driver))
    assert len(found) == len(told)
    assert all(part in whole for part, whole in zip(told, found, strict=True)), found


def test_without_a_driver_a_torch_for_gpus_is_refused_and_one_for_cpus_is_not() -> None:
    def none() -> Any:
        return ctypes.CDLL("libcuda-that-is-not-there.so.1")

    (found,) = faults(CUDA, none)
    assert "no NVIDIA driver was found" in found
    assert list(faults(None, none)) == []


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("cuda: Optional[str] = '13.0'\nhip = None", (13, 0)),
        ('cuda = "12.8"', (12, 8)),
        ("cuda: str | None = None", None),
    ],
)
def test_the_cuda_of_torch_is_read_without_importing_it(version: str, expected: Any, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise AssertionError('imported')")
    (tmp_path / "torch" / "version.py").write_text(version + "\n")
    script = "from vllm_edits.plugin.cli.gpu_driver import cuda_of_torch; print(cuda_of_torch())"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {script}"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert said == str(expected)


def test_the_torch_that_is_installed_says_what_torch_says() -> None:
    import torch

    found = cuda_of_torch()
    assert (None if found is None else ".".join(map(str, found))) == torch.version.cuda
