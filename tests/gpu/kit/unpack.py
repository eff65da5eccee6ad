"""On a GPU host without a network: make `.venv` of a checkout out of a kit and the host's own packages, in seconds.

    python3 unpack.py KIT [CHECKOUT]     KIT: the folder that pack.py made; CHECKOUT: default the current folder

It needs nothing but the host's Python, and makes what `make setup` makes: afterwards the project's commands work there,
`.venv/bin/python -m tests.gpu.first_light` first.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import tarfile
import tomllib
from pathlib import Path

ALONE = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # no flashinfer in the kit, without which an engine would not start
    "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    "VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo",
}  # fmt: skip
"""What vLLM must be told where there is neither a network nor flashinfer, unless the environment says otherwise."""


def verify(kit: Path) -> None:
    """End where a file of the kit is not what was packed."""
    for line in (kit / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        if hashlib.sha256((kit / name).read_bytes()).hexdigest() != digest:
            raise SystemExit(f"{kit / name} is damaged: its sha256 is not the one in SHA256SUMS. Bring it again")


def make_venv(folder: Path) -> Path:
    """What `python3 -m venv` makes, by hand, since on some hosts that lacks what it needs. Returns site-packages."""
    shutil.rmtree(folder, ignore_errors=True)
    version, base = f"python3.{sys.version_info.minor}", Path(sys._base_executable)  # type: ignore[attr-defined]
    packages = folder / "lib" / version / "site-packages"
    packages.mkdir(parents=True)
    (folder / "bin").mkdir()
    for name in ("python", "python3", version):
        (folder / "bin" / name).symlink_to(base)
    config = {"home": base.parent, "include-system-site-packages": "false", "version": sys.version.split()[0]}
    (folder / "pyvenv.cfg").write_text("".join(f"{name} = {value}\n" for name, value in config.items()))
    return packages


def add_hosts(packages: Path, checkout: Path) -> None:
    """The kit's packages come first, then the host's, then the checkout."""
    hosts = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    lines = [f"import site; site.addsitedir({path!r})" for path in hosts] + [str(checkout)]
    lines += [f"import os; os.environ.setdefault({name!r}, {value!r})" for name, value in ALONE.items()]
    (packages / "zz_host.pth").write_text("\n".join(lines) + "\n")


def add_project(packages: Path, checkout: Path, bin_folder: Path) -> None:
    """The project as if it were installed: its name, its version, its entry points, its commands."""
    project = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]
    named = packages / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    named.mkdir()
    (named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = {"console_scripts": project["scripts"], **project["entry-points"]}
    text = [line for group, of in groups.items() for line in (f"[{group}]", *(f"{k} = {v}" for k, v in of.items()))]
    (named / "entry_points.txt").write_text("\n".join(text) + "\n")
    for command, target in {**project["scripts"], "vllm": "vllm.entrypoints.cli.main:main"}.items():
        module, function = target.split(":")
        script = bin_folder / command
        # Engines are started as processes that import this file.
        script.write_text(f"#!{bin_folder}/python\nimport sys\nfrom {module} import {function}\n"
                          f"if __name__ == '__main__':\n    sys.exit({function}())\n")  # fmt: skip
        script.chmod(0o755)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kit", type=Path)
    parser.add_argument("checkout", type=Path, nargs="?", default=Path())
    asked = parser.parse_args()
    kit, checkout = asked.kit.resolve(), asked.checkout.resolve()
    verify(kit)
    os.chdir(checkout)
    folder = checkout / ".venv"
    packages = make_venv(folder)
    with tarfile.open(kit / "kit.tar.xz") as archive:
        archive.extractall(packages, filter="tar")
    add_hosts(packages, checkout)
    add_project(packages, checkout, folder / "bin")
    for stamp in (".installed-gpu", ".project"):  # what make takes for installed
        (folder / stamp).touch()
    print(f"{packages}: {sum(1 for _ in packages.iterdir())} entries; next: .venv/bin/python -m tests.gpu.first_light")


if __name__ == "__main__":
    main()
