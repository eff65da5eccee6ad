"""The package as others get it: built, installed where nothing else is, used from an empty folder, removed again."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
from collections.abc import Collection
from dataclasses import dataclass
from importlib.metadata import PathDistribution, distribution
from pathlib import Path
from zipfile import Path as ZipPath
from zipfile import ZipFile

import pytest
import yaml
from packaging.requirements import Requirement

from vllm_edits.server_config import read_settings

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
FOLDERS = ("edit_store", "plugin", "server_config")
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
INFO = f"vllm_edits-{VERSION}.dist-info"
THIRD_PARTY = Path(sysconfig.get_path("purelib"))
"""Where the tests' own packages are. Who has this folder on the path, and not as a site, does not see our project."""
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def clean(home: Path, **more: str) -> dict[str, str]:
    """An environment that says nothing of this project."""
    return {"PATH": "/usr/bin:/bin", "HOME": str(home), "COLUMNS": "200", "PYTHONDONTWRITEBYTECODE": "1", **more}


# -- built -------------------------------------------------------------------------------------------------------------


def cloned(folder: Path, only: Collection[str] = ()) -> Path:
    """The project as somebody else gets it, without what git ignores; or only what is named of its top level."""
    lines = (ROOT / ".gitignore").read_text().splitlines()
    ignored = shutil.ignore_patterns(".git", *(line.rstrip("/") for line in lines if line and line[0] != "#"))

    def left_out(where: str, names: list[str]) -> set[str]:
        others = set(names) - set(only) if only and Path(where) == ROOT else set()
        return ignored(where, names) | others

    shutil.copytree(ROOT, folder, symlinks=True, ignore=left_out)
    return folder


def build(what: str, tree: Path, into: Path) -> Path:
    """The sdist or the wheel of a tree, by the calls that pip and build make; the tree is not on Python's path."""
    into.mkdir()
    shutil.rmtree(tree / "build", ignore_errors=True)  # setuptools would take in what an earlier one left there
    command = [sys.executable, "-P", "-c", BUILD, f"build_{what}", str(into)]
    done = subprocess.run(command, cwd=tree, env=clean(into), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return into / done.stdout.splitlines()[-1]


def contents(wheel: Path) -> dict[str, bytes]:
    with ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cloned(tmp_path_factory.mktemp("clone") / "vllm-edits")


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tree, tmp_path_factory.mktemp("built") / "wheel")


def wheel_of_archive(tree: Path, into: Path) -> Path:
    """What pip makes of the source archive of a tree."""
    archive = build("sdist", tree, into)
    with tarfile.open(archive) as members:
        assert not [member.name for member in members if member.issym() or member.islnk()]
    command = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation", str(archive)]
    subprocess.run([*command, "--wheel-dir", str(into)], env=clean(into), check=True, capture_output=True)
    [made] = into.glob("*.whl")
    return made


def test_a_source_archive_makes_the_same_wheel_as_the_tree(tree: Path, wheel: Path, tmp_path: Path) -> None:
    """In the tree the packages are links, in an archive folders; what is built of either is the same, byte by byte."""
    assert (tree / "vllm_edits" / "plugin").is_symlink()
    assert contents(wheel_of_archive(tree, tmp_path / "whole")) == contents(wheel)
    less = cloned(tmp_path / "less")
    (less / "vllm_edits" / "py.typed").unlink()
    assert contents(wheel_of_archive(less, tmp_path / "made")) != contents(wheel)


def test_the_image_is_built_from_all_that_the_wheel_needs(wheel: Path, tmp_path: Path) -> None:
    """Docker sees what its allow-list names, and its first stage copies some of that."""
    dockerfile, allowed = ((ROOT / "docker" / name).read_text() for name in ("Dockerfile", "Dockerfile.dockerignore"))
    copied = [name for line in re.findall("^COPY (.+) ", dockerfile, re.MULTILINE) for name in line.split()]
    assert {f"!{name}" for name in copied} <= set(allowed.splitlines())
    assert contents(build("wheel", cloned(tmp_path / "src", copied), tmp_path / "wheel")) == contents(wheel)
    copied.remove("LICENSE")
    assert contents(build("wheel", cloned(tmp_path / "unlicensed", copied), tmp_path / "less")) != contents(wheel)


def test_the_wheel_holds_every_file_of_the_package_and_no_other(wheel: Path) -> None:
    """A new kind of file of which setuptools was not told is missed here; pages for people stay out."""
    ours = {
        f"vllm_edits/{path.relative_to(ROOT)}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".md" and path.parent.name != "__pycache__"
    }
    found = {name for name in contents(wheel) if not name.startswith(f"{INFO}/")}
    assert found == ours | {"vllm_edits/__init__.py", "vllm_edits/py.typed"}
    kinds = {".py", ".cpp", ".json", ".jsonl", ".yaml", ".typed"}
    assert {Path(name).suffix or Path(name).name for name in found} == kinds


def information(wheel: Path) -> PathDistribution:
    return PathDistribution(ZipPath(wheel, f"{INFO}/"))


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    about = information(wheel).metadata
    assert (about["Name"], about["Version"], about["License-Expression"]) == ("vllm-edits", VERSION, "Apache-2.0")
    assert contents(wheel)[f"{INFO}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert information(wheel).read_text("METADATA").endswith((ROOT / "README.md").read_text())


# -- installed ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Environment:
    """A virtual environment of its own, and an empty folder to stand in."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Environment:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
        (folder / "empty").mkdir()
        return cls(folder)

    @property
    def packages(self) -> Path:
        [found] = self.folder.glob("env/lib/python*/site-packages")
        return found

    def pip(self, *words: str) -> None:
        """The tests' pip, at work on this environment."""
        python = str(self.folder / "env" / "bin" / "python")
        command = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", *words]
        subprocess.run(command, check=True, capture_output=True)

    def install(self, wheel: Path) -> Environment:
        self.pip("install", "--no-index", "--no-deps", str(wheel))
        return self

    def run(self, program: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """What a program of this environment does, started in the empty folder."""
        environment = clean(self.folder / "empty", **variables)
        command = [str(self.folder / "env" / "bin" / program), *words]
        return subprocess.run(
            command, cwd=self.folder / "empty", env=environment, capture_output=True, text=True, check=False
        )

    def said(self, program: str, *words: str, **variables: str) -> str:
        """The same where it must succeed: what is on its standard output."""
        done = self.run(program, *words, **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def files(self) -> set[str]:
        """Everything in it, by what is above it."""
        top = self.folder / "env"
        return {str(path.relative_to(top)) for path in top.rglob("*")}


def needed(requirements: Collection[str], extras: Collection[str] = ("",)) -> set[str]:
    """Distributions that these requirements bring, and what those bring."""
    found: set[str] = set()
    for each in map(Requirement, requirements):
        if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in extras):
            mine = distribution(each.name)
            found |= {mine.name, *needed(mine.requires or (), each.extras or ("",))}
    return found


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The wheel with what it asks for, and nothing else: neither torch nor vLLM."""
    made = Environment.make(tmp_path_factory.mktemp("bare")).install(wheel)
    for name in needed(information(wheel).requires or ()):
        for top in {file.parts[0] for file in distribution(name).files or ()} - {"..", "__pycache__"}:
            (made.packages / top).symlink_to(THIRD_PARTY / top)
    return made


@pytest.fixture(scope="module")
def server(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The wheel with everything that is installed here, but for the project itself."""
    made = Environment.make(tmp_path_factory.mktemp("server")).install(wheel)
    (made.packages / "third_party.pth").write_text(f"{THIRD_PARTY}\n")
    return made


MAKE = """
import sys, numpy, vllm_edits
from importlib.util import find_spec
from pathlib import Path
from vllm_edits.edit_store import BaseModelRef, Bundle, Offset, Provenance, Widths, check

widths = Widths(layers=2, hidden=8, mlp=16, heads=2, kv_heads=1, head_dim=4, vocab=24)
base = BaseModelRef(name="tiny", architecture="LlamaForCausalLM", widths=widths, files={"model.safetensors": "a" * 64})
edit = Offset(site="layers.0.resid"), {"vector": numpy.full(8, 0.5)}
bundle = Bundle.create("polite", base, [edit], Provenance(tool="numpy", method="by hand"))
check(bundle)
bundle.save(Path("polite"))
print(vllm_edits.__file__, bundle.version, find_spec("torch"), find_spec("vllm"))
"""


def test_the_store_works_with_nothing_but_what_the_wheel_asks_for(bare: Environment) -> None:
    """From an empty folder: a bundle by the API, then every step to a promotion by the command."""
    file, version, *others = bare.said("python", "-c", MAKE).split()
    assert Path(file) == bare.packages / "vllm_edits" / "__init__.py"
    assert others == ["None", "None"], "neither torch nor vLLM is there"
    store = {"VLLM_EDITS_STORE": "store"}

    def command(*words: str) -> str:
        return bare.said("vllm-edits", *words, **store)

    assert "Usage: vllm-edits" in command("--help")
    assert "Start `vllm serve MODEL` with the plugin" in command("serve", "--help")
    assert command("init").startswith("store ready at ")
    assert command("publish", "polite") == f"published polite@{version[:12]}\n"
    assert command("promote", f"polite@{version}") == f"polite@prod is {version[:12]} (entry 1, promote)\n"
    assert [(row["version"], row["tags"]) for row in json.loads(command("list", "--json"))] == [(version, "prod")]
    command("verify")
    for words, wanted in ((("serve", "model"), "Install vLLM"), (("hub", "pull", "a/b"), "vllm-edits[hub]")):
        done = bare.run("vllm-edits", *words, **store)
        assert done.returncode == 1
        assert wanted in done.stderr


SERVE = """
import json, sys, vllm_edits
from importlib.metadata import entry_points
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER as loaders
from vllm.plugins import load_plugins_by_group
from vllm_edits.plugin.graph import cpu_products

load_plugins_by_group("vllm.general_plugins")["edits"]()
endpoints = load_plugins_by_group("vllm.endpoint_plugins")["edits"]()
cpu_products._library()
json.dump({
    "imported": sorted({module.__file__ for name, module in sys.modules.items() if name.startswith("vllm_edits")}),
    "loader": loaders["edits"].__module__,
    "endpoints": type(endpoints).__module__,
    "compiled": str(cpu_products.SOURCE),
}, sys.stdout)
"""
COMPILER = """#!/bin/sh
printf '%s\\n' "$@" > "$0.words"
for last; do :; done
: > "$last"
"""
"""Notes what it is asked and makes an empty file: what g++ makes of it takes a while, and other tests run it."""


def test_vllm_finds_the_plugin_and_all_of_it_is_the_installed_one(server: Environment, tmp_path: Path) -> None:
    """vLLM's own search for plugins, in a process that sees our project nowhere else."""
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    variables = {"VLLM_PLUGINS": "edits", "HF_HUB_OFFLINE": "1", "CXX": str(compiler), "TORCH_EXTENSIONS_DIR": "made"}
    told = json.loads(server.said("python", "-c", SERVE, **variables).splitlines()[-1])
    installed = server.packages / "vllm_edits"
    assert len(told["imported"]) > 40
    assert all(Path(file).is_relative_to(installed) for file in told["imported"])
    assert told["loader"] == "vllm_edits.plugin.vllm_host.loader"
    assert told["endpoints"] == "vllm_edits.plugin.vllm_host.frontend"
    source = installed / "plugin" / "graph" / "cpu_products.cpp"
    assert Path(told["compiled"]) == source
    assert str(source) in Path(f"{compiler}.words").read_text().splitlines()
    assert source.read_bytes() == (ROOT / "plugin" / "graph" / "cpu_products.cpp").read_bytes()


def test_the_example_configurations_are_installed(server: Environment) -> None:
    examples = sorted((server.packages / "vllm_edits" / "server_config" / "examples").iterdir())
    assert [path.name for path in examples] == sorted(path.name for path in (ROOT / "server_config/examples").iterdir())
    for path in examples:
        assert read_settings(yaml.safe_load(path.read_text())["additional-config"]).store


def test_what_is_removed_leaves_nothing(wheel: Path, tmp_path: Path) -> None:
    """One package, one command and what is told of them is all that an installation claims."""
    place = Environment.make(tmp_path)
    before = place.files()
    added = place.install(wheel).files() - before
    inside = place.packages.relative_to(tmp_path / "env")
    roots = [inside / "vllm_edits", inside / INFO, Path("bin/vllm-edits")]
    assert {next((root for root in roots if Path(path).is_relative_to(root)), path) for path in added} == set(roots)
    place.pip("uninstall", "--yes", "vllm-edits")
    assert place.files() == before
