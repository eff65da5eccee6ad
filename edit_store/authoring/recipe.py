"""The recipe of a bundle: everything that a build was given, in one YAML file, which makes the same bundle again."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import AwareDatetime, Field, ValidationError

from vllm_edits.edit_store.authoring.probing import PROBES
from vllm_edits.edit_store.bundle import Strength
from vllm_edits.edit_store.canonical import Digest
from vllm_edits.edit_store.errors import BundleRefused, Reason
from vllm_edits.edit_store.record import FrozenRecord, field_reasons

RECIPE_FILE = "recipe.yaml"
_HEAD = "# How this bundle was made. `vllm-edits build {file} --out FOLDER` makes it again.\n"


class Source(FrozenRecord):
    """A file with data, and the digest of its rows."""

    file: str
    rows: Digest


class Recipe(FrozenRecord):
    """All that a build was given. On the same machine with the same packages it makes the same bytes again."""

    schema_version: Literal[1] = 1
    method: str
    name: str
    description: str = ""
    label: str = ""
    strength: Strength | None = None
    privileged: bool = False
    probes: int = PROBES
    created_at: AwareDatetime
    model: str
    """folder of the base model"""
    base: dict[str, Digest]
    """digests of its files"""
    data: dict[str, Source] = Field(default_factory=dict)
    """by table"""
    on: str = ""
    """name@version that the edits build on"""
    store: str = ""
    """the store with it"""
    options: dict[str, Any] = Field(default_factory=dict)
    seed: int = 0
    device: str = "cpu"
    threads: int = Field(gt=0)
    """of torch: sums in another order differ in their last bits"""
    packages: dict[str, str] = Field(default_factory=dict)
    """versions of what computes"""

    def save(self, path: Path) -> None:
        """Write it as YAML."""
        text = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        path.write_text(_HEAD.format(file=path.name) + text, encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Read one. BundleRefused lists every invalid field."""
        what = f"recipe {path}"
        try:
            return cls.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise BundleRefused(what, [Reason("no_file", f"{error.strerror}")]) from None
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise BundleRefused(what, [Reason("not_yaml", f"expected YAML, found: {error}")]) from None
        except ValidationError as error:
            raise BundleRefused(what, field_reasons(error)) from None
