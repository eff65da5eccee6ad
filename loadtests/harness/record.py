"""What is written beside every figure: when, on what device, with which versions; and where the records lie."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"


def about() -> dict[str, Any]:
    """When, on what device and with which versions."""
    packages = ("vllm-edits", "vllm", "torch", "numpy")
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": _device(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
            "commit": _output("git", "describe", "--always", "--dirty"),
        },
    }


def _device() -> dict[str, Any]:
    cpu, cores = _of_cpu("model name") or platform.machine(), len(os.sched_getaffinity(0))
    memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    return {"name": gpu() or f"{cpu} {cores} cores", "cpu": cpu, "cores": cores, "memory_gib": memory}


def gpu() -> str:
    """The name of the first NVIDIA GPU, or ''."""
    return _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").partition("\n")[0]


def _of_cpu(field: str) -> str:
    found = re.search(rf"^{field}\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else ""


def native_dtype() -> str:
    """A CPU without bfloat16 instructions computes in it ten times slower than in float32: nobody serves that way."""
    return "bfloat16" if gpu() or {"avx512_bf16", "amx_bf16"} & set(_of_cpu("flags").split()) else "float32"


def cores_for(threads: int) -> list[int]:
    """The cores of each engine: the last ones, for the first have the system's own work to do."""
    cores = sorted(os.sched_getaffinity(0))
    return cores[-(threads or max(1, len(cores) - 1)) :]


def _output(*command: str) -> str:
    """What a command prints, '' when it is not there or fails."""
    path = shutil.which(command[0])
    if path is None:
        return ""
    return subprocess.run([path, *command[1:]], capture_output=True, text=True, check=False).stdout.strip()


def free_path(folder: Path, record: Mapping[str, Any], kind: str = "") -> Path:
    """`<date>-<kind>-<device>.json`, numbered from the second run of a day on: no run overwrites another."""
    said = re.sub(r"[^a-z0-9]+", "-", f"{kind} {record['device']['name']}".lower()).strip("-")
    stem, number = f"{record['at'][:10]}-{said}", 1
    path = folder / f"{stem}.json"
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.json"
    return path


def write(record: Mapping[str, Any], path: Path | None = None, *, kind: str = "") -> Path:
    """Write a record as JSON, by default among the results under the first name that is free."""
    path = path or free_path(RESULTS, record, kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
