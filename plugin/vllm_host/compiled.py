"""The compiled code of a model: where vLLM keeps it, how it is loaded, and how code for other edits is made beside it.

vLLM compiles the decorated part of a model ahead of time, once, and keeps the code as `aot_compiled_fn` of that module
and in a file. The code reads parameters and slot tensors through the module when it is called. So it is exchanged by
one assignment, and the same module can have code for other edits.

Compiling takes a minute of Python. So a growing worker does it elsewhere. On a CPU that is a forked child of lower
priority: it has the model and its weights without a copy, attaches the new edits for itself, compiles, and writes the
file. It computes nothing, because the threads of a forked process cannot. After CUDA is in use, a process cannot be
forked. There a thread compiles a copy of the module tree, which shares all parameters.
"""

from __future__ import annotations

import copy
import ctypes
import hashlib
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch._dynamo.aot_compile import AOTCompiledFunction
from vllm import envs
from vllm.compilation.caching import aot_compile_hash_factors
from vllm.compilation.decorators import (
    _model_hash_key,
    _verify_source_unchanged,
    maybe_use_cudagraph_partition_wrapper,
)
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.config import set_current_vllm_config

from vllm_edits.edit_store.errors import EditsError
from vllm_edits.plugin.short_turns import in_daemon
from vllm_edits.plugin.vllm_host.seams import optional

logger = logging.getLogger("vllm.edits")

COMPILE_SECONDS = 3600.0
"""time limit for compiling"""
_NICENESS = 5
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
_BINDING = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PROC_BIND", "OMP_PLACES")
_TOLD_BYTES = 4000
"""of a child's error, the last ones"""


@dataclass
class FirstCall:
    """The arguments of a model's first forward: their types and shapes, for which vLLM compiles."""

    shapes: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    @staticmethod
    def of(model: nn.Module) -> FirstCall:
        """The first call of a model, noted when it comes."""
        call = FirstCall()

        def note(_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call.note(args, kwargs)
            hook.remove()

        hook = model.register_forward_pre_hook(note, with_kwargs=True)
        return call

    def note(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the types and shapes of arguments."""
        self.shapes = tuple(map(_shape_of, args)), {name: _shape_of(each) for name, each in kwargs.items()}

    def made(self, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments like those of the first call, with any content."""
        if self.shapes is None:
            raise EditsError("the model was never called, so it is unknown what to compile it for")
        args, kwargs = self.shapes
        return tuple(_made(each, device) for each in args), {name: _made(each, device) for name, each in kwargs.items()}


def _shape_of(argument: Any) -> Any:
    return argument.to("meta") if isinstance(argument, Tensor) else argument


def _made(argument: Any, device: torch.device) -> Any:
    return torch.zeros_like(argument, device=device) if isinstance(argument, Tensor) else argument


def compiled_module(model: nn.Module) -> Any:
    """The module of a model that vLLM compiles; None if it compiles nothing.

    EditsError if the code is not compiled ahead of time, because such code cannot be exchanged.
    """
    found = _compiled_modules(model)
    if not found:
        return None
    if len(found) > 1 or optional(found[0], "aot_compiled_fn") is None:
        raise EditsError(
            f"vLLM has compiled {len(found)} parts of this model, and not ahead of time, so its code cannot be "
            "exchanged. Start with VLLM_USE_AOT_COMPILE=1, or with --enforce-eager"
        )
    return found[0]


def _compiled_modules(model: nn.Module) -> list[Any]:
    every: Iterable[Any] = model.modules()
    return [each for each in every if isinstance(each, TorchCompileWithNoGuardsWrapper) and not each.do_not_compile]


def with_additional(config: Any, additional: Mapping[str, Any]) -> Any:
    """A copy of vLLM's config with another additional config, for code with another key in vLLM's compile cache."""
    other = copy.copy(config)
    other.additional_config = dict(additional)
    other.compilation_config = copy.copy(config.compilation_config)
    other.compilation_config.cache_dir = other.compilation_config.local_cache_dir = ""
    return other


def code_file(module: Any, config: Any) -> Path:
    """The file in which vLLM keeps a compiled module, for this config."""
    factors = [*aot_compile_hash_factors(config), _model_hash_key(module.forward)]
    key = hashlib.sha256(str(factors).encode()).hexdigest()
    parallel = config.parallel_config
    rank = f"rank_{parallel.rank}_{parallel.data_parallel_index}"
    return Path(envs.VLLM_CACHE_ROOT) / "torch_compile_cache" / "torch_aot_compile" / key / rank / "model"


def load(module: Any, config: Any) -> Callable[..., Any]:
    """Load compiled code from vLLM's cache. Any exception means that the file cannot be used."""
    file = code_file(module, config)
    with set_current_vllm_config(config), file.open("rb") as stream:
        loaded = torch.compiler.load_compiled_function(stream, f_globals=module.forward.__globals__)
    code = cast(AOTCompiledFunction, loaded)
    _verify_source_unchanged(code.source_info(), config)
    if not config.compilation_config.dynamic_shapes_config.evaluate_guards:
        code.disable_guard_check()
    serialized = code._artifacts.compiled_fn  # noqa: SLF001
    finalize = optional(serialized, "VllmSerializableFunction.finalize_loading")  # not where inductor alone compiles
    if finalize is not None:
        with maybe_use_cudagraph_partition_wrapper(config):
            finalize(config)
    found: Callable[..., Any] = code
    return found


def load_before_first_call(model: nn.Module, config: Any) -> None:
    """Give a model its code of an earlier start with the same config, if there is any, when it is called.

    Only on a CPU: there vLLM saves the code, but cannot load it, and would compile again at every start.
    """

    def load_all(_model: nn.Module, _args: tuple[Any, ...]) -> None:
        hook.remove()
        _load_all(model, config)

    if config.device_config.device_type == "cpu":
        hook = model.register_forward_pre_hook(load_all)


def _load_all(model: nn.Module, config: Any) -> None:
    for module in _compiled_modules(model):
        if code_file(module, config).is_file() and not envs.VLLM_DISABLE_COMPILE_CACHE:
            try:
                module.aot_compiled_fn = load(module, config)
            except Exception:
                logger.warning("the compiled code of an earlier start cannot be used", exc_info=True)
            else:
                logger.info("the model uses the compiled code of an earlier start")


# -- compiling ---------------------------------------------------------------------------------------------------------


class _Saved(BaseException):
    """Ends the call of a module after its code was compiled and saved, before it computes anything."""


def compile_and_save(model: nn.Module, module: Any, config: Any, call: FirstCall, device: torch.device) -> None:
    """Compile a module of a model for this config, and save the code. Nothing is computed."""
    args, kwargs = call.made(device)
    module.vllm_config, module.compilation_config = config, config.compilation_config
    module.aot_compiled_fn, module.was_aot_compile_fn_loaded_from_disk = None, False
    code_file(module, config).unlink(missing_ok=True)

    def save_and_end() -> NoReturn:
        type(module).save_aot_compiled_function(module)
        raise _Saved

    module.save_aot_compiled_function = save_and_end
    with set_current_vllm_config(config), torch.inference_mode():
        TorchCompileWithNoGuardsWrapper.__init__(module, module._compile_prefix, module._is_encoder)  # noqa: SLF001
        with suppress(_Saved):
            model.forward(*args, **kwargs)
    if not code_file(module, config).is_file():
        raise EditsError("vLLM compiled the model, but could not save the code. See the log above")


def can_fork(device: torch.device) -> bool:
    """True if a child of this process can compile: CUDA cannot be used in a forked process."""
    return device.type != "cuda"


class Compiling:
    """The compilation of code, in another place than the thread that serves."""

    def done(self) -> bool:
        """True if the code is saved. EditsError if it could not be compiled, or took too long."""
        raise NotImplementedError

    def stop(self) -> None:
        """End it, if it runs."""
        raise NotImplementedError


class InChild(Compiling):
    """Compiles in a forked child. It is made in the thread that serves, so that no step runs while it is forked."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._since = time.monotonic()
        self._told = tempfile.TemporaryFile()  # noqa: SIM115  closed when it has ended
        self._status: int | None = None
        parent = os.getpid()
        self._child = os.fork()
        if self._child == 0:
            self._run(work, parent)

    def _run(self, work: Callable[[], None], parent: int) -> NoReturn:
        status = 1
        try:
            _become_background(parent)
            work()
            status = 0
        except BaseException:  # noqa: BLE001  the parent tells it
            os.write(self._told.fileno(), traceback.format_exc().encode()[-_TOLD_BYTES:])
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def done(self) -> bool:
        if self._status is None:
            child, status = os.waitpid(self._child, os.WNOHANG)
            if not child:
                if time.monotonic() - self._since > COMPILE_SECONDS:
                    self.stop()
                    raise EditsError(f"the code was not compiled within {COMPILE_SECONDS:g} s")
                return False
            self._status = status
        if self._status == 0:
            self._told.close()
            return True
        raise EditsError(f"the code could not be compiled: {self._reason()}")

    def _reason(self) -> str:
        self._told.seek(0)
        told = self._told.read().decode(errors="replace").strip()
        self._told.close()
        ended = os.waitstatus_to_exitcode(self._status or 0)
        return told or (f"the compiling process was ended by signal {-ended}" if ended < 0 else "no reason")

    def stop(self) -> None:
        if self._status is None:
            with suppress(ProcessLookupError):
                os.killpg(self._child, signal.SIGKILL)
            with suppress(ProcessLookupError):
                os.kill(self._child, signal.SIGKILL)  # where it is not yet the leader of a group
            self._status = os.waitpid(self._child, 0)[1]
        self._told.close()


def _become_background(parent: int) -> None:
    """Make a forked child end with its parent, give way to it, and use any core."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setsid()  # the compilers that it starts are ended together with it
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    os.nice(_NICENESS)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))  # the engine's thread is bound to one core
    for name in _BINDING:  # else the OpenMP library that vLLM preloads would bind the compiler to that core too
        os.environ.pop(name, None)


class InThread(Compiling):
    """Compiles in a thread, where no child can be forked."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = in_daemon(work)

    def done(self) -> bool:
        if not self._work.done():
            return False
        if (error := self._work.exception()) is not None:
            told = "".join(traceback.format_exception(error))[-_TOLD_BYTES:]
            raise EditsError(f"the code could not be compiled: {told}")
        return True

    def stop(self) -> None:
        """Do nothing: a thread cannot be ended. What it compiles is not used."""
