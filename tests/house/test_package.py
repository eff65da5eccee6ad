"""One import package: what it offers by name, and that none of its files is imported under two names."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vllm_edits

ROOT = Path(__file__).parents[2]
FOLDERS = ("edit_store", "plugin", "server_config")


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_of_the_top_level_is_a_package_of_vllm_edits(folder: str) -> None:
    link = ROOT / "vllm_edits" / folder
    assert link.readlink() == Path("..", folder)
    assert link.resolve() == (ROOT / folder).resolve()


@pytest.mark.long
def test_no_file_is_imported_under_two_names() -> None:
    """What is imported as `plugin.x` and as `vllm_edits.plugin.x` would be two modules, and two of every class."""
    code = (
        "import sys, vllm_edits; vllm_edits.Variants, vllm_edits.EditsScheduler\n"
        "import vllm_edits.plugin.cli, vllm_edits.plugin.vllm_host.frontend, vllm_edits.plugin.vllm_host.loader\n"
        f"assert 'vllm_edits.plugin.cli' in sys.modules\n"
        f"print(sorted(name for name in sys.modules if name.partition('.')[0] in {FOLDERS}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_public_name_is_found_where_it_is_defined() -> None:
    for name in vllm_edits.__all__:
        assert getattr(vllm_edits, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'Reconciler'"):
        _ = vllm_edits.Reconciler


def test_importing_the_package_imports_no_engine() -> None:
    code = "import sys, vllm_edits; print(sorted({'torch', 'vllm'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_no_test_imports_from_a_test() -> None:
    """What tests share is in tests/support: a test that moves breaks no other."""
    found = [
        f"{path.relative_to(ROOT)}: {node.module}"
        for path in (ROOT / "tests").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        and node.module
        and node.module.startswith("tests.")
        and node.module.rpartition(".")[2].startswith("test_")
    ]
    assert found == []
