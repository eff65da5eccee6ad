"""What the project says of itself before anybody runs it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet

from vllm_edits.edit_store.canonical import sha256

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
APACHE_2 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
"""Digest of the text as the Apache Software Foundation publishes it."""


def test_the_licence_is_apaches_own_text() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    assert PROJECT["license-files"] == ["LICENSE"]
    text = (ROOT / "LICENSE").read_bytes()
    assert sha256(text) == APACHE_2
    assert sha256(text.strip()) != APACHE_2, "a text that was touched is another"


def pythons(specifier: str) -> list[str]:
    """Classifiers of the versions of Python that a specifier admits."""
    admitted = [f"3.{minor}" for minor in range(40) if f"3.{minor}" in SpecifierSet(specifier)]
    return [f"Programming Language :: Python :: {version}" for version in admitted]


@pytest.mark.parametrize("specifier", [PROJECT["requires-python"], ">=3.11,<3.14"])
def test_the_classifiers_name_the_versions_of_python_that_are_required(specifier: str) -> None:
    told = [line for line in PROJECT["classifiers"] if line.startswith("Programming Language :: Python :: 3.")]
    assert (told == pythons(specifier)) is (specifier == PROJECT["requires-python"])


def told_of(changelog: str) -> list[str]:
    """Versions that have a heading, newest first."""
    return re.findall(r"^## \[(.+?)\] - (?:Unreleased|\d{4}-\d\d-\d\d)$", changelog, re.MULTILINE)


def test_the_changelog_begins_with_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert told_of(changelog)[0] == PROJECT["version"]
    assert told_of(changelog.replace(f"## [{PROJECT['version']}] - ", "## [0.0.1] - "))[0] != PROJECT["version"]


def missing(page: str) -> set[str]:
    """What a page names that is not there: targets of make, files and folders."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    made = set(re.findall(r"`?make ([a-z-]+)", page)) - set(targets)
    files = re.findall(r"`([\w.-]+/[\w./-]*)`", page) + re.findall(r"\]\(([\w./-]+)\)", page)
    return made | {name for name in files if not (ROOT / name).exists()}


def test_the_page_for_contributors_names_only_what_is_there() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    assert missing(page) == set()
    invented = "`make nothing` [so](no/where.md) `edit_store/nothing.py`"
    assert missing(page + invented) >= {"nothing", "no/where.md", "edit_store/nothing.py"}
