"""Has vLLM's CPU build use Triton's kernels, in Triton's own interpreter. Python imports this by its name at its start.

vLLM takes a Triton with a backend named `cpu` for one that works there. None is in Triton's packages; the interpreter
(TRITON_INTERPRET=1) needs none, so this one only has to be found, and is never active.
"""

import triton.backends as triton_backends
from triton.backends import Backend
from triton.backends.compiler import BaseBackend
from triton.backends.driver import DriverBase


class NeverActive(DriverBase):
    """The driver of a device that nothing is compiled for."""

    @staticmethod
    def is_active() -> bool:
        return False


triton_backends.backends["cpu"] = Backend(compiler=BaseBackend, driver=NeverActive)
