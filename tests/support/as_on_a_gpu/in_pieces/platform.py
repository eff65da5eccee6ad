"""The platform. Nothing of vLLM but platforms can be imported while it looks for one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.platforms.cpu import CpuPlatform

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class InPieces(CpuPlatform):  # type: ignore[misc]
    """Compilation stays what vLLM makes it by default."""

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        from vllm.config import CompilationMode

        compilation = vllm_config.compilation_config
        asked = compilation.mode
        super().check_and_update_config(vllm_config)
        if asked == CompilationMode.VLLM_COMPILE:
            compilation.mode = asked
            compilation.inductor_compile_config.pop("dce")
            compilation.compile_sizes = []  # what setting up CUDA graphs makes of None
            passes = compilation.pass_config  # these are of kernels that a CPU does not have
            passes.fuse_norm_quant = passes.fuse_act_quant = passes.fuse_attn_quant = False

    @classmethod
    def get_pass_manager_cls(cls) -> str:
        return "in_pieces.passes.Passes"
