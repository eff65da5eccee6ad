"""Models and bundles that tests share."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from loadtests.harness.model import ensure_model, made_whole
from tests.support import tiny_models
from tests.support.lanes import Lane

os.environ.setdefault("HF_HUB_OFFLINE", "1")
settings.register_profile("no-clock", deadline=None)  # how long an example takes says more of the machine than of us
settings.load_profile("no-clock")

LANE = Lane.here()
if LANE:
    LANE.stay()  # before torch counts cores
    # Where readline is loaded, as pytest does, it tells its children how large it takes the terminal to be. A console
    # that is made at an import would have that size for ever.
    for size in ("COLUMNS", "LINES"):
        os.environ.pop(size, None)


def devices_of(item: pytest.Item) -> int:
    """How many workers or engines a test runs at once."""
    return max((mark.args[0] for mark in item.iter_markers("devices")), default=1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    if LANE is None:
        return (yield)
    with LANE.turn(alone=devices_of(item) > 1):
        return (yield)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if (count := devices_of(item)) > 1:
        import torch

        if 0 < torch.cuda.device_count() < count:
            pytest.skip(f"needs {count} GPUs")


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A folder that every user may enter, as pytest's own may not be."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, converted once."""
    return ensure_model()


@pytest.fixture(scope="session")
def tiny_model(smollm2: Path) -> Path:
    """A four-layer Llama with random weights and SmolLM2's tokenizer: it compiles in seconds.

    It stays where it is, because its path is in the key of vLLM's compile cache, which all tests and runs share.
    """
    code = hashlib.sha256(Path(tiny_models.__file__).read_bytes()).hexdigest()[:12]
    folder = Path(f".cache/tests/tiny-llama-{code}").resolve()
    if not folder.is_dir():
        with made_whole(folder) as made:
            tiny_models.make_tiny_llama(made, smollm2)
    return folder
