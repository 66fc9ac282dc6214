"""Stands in for `sgl_kernel`, of which PyPI has CUDA builds only (1.2 GB unpacked).

On a CPU without AMX sglang computes with plain torch, but imports these ten names at module level. All belong
to speculative decoding, which a CPU server here does not do; called, each raises. Only these ten exist, on
purpose: a module that answered to every name would make sglang take optional kernels for available.
"""

from collections.abc import Callable
from typing import Any, NoReturn


def _no_cpu_build(name: str) -> Callable[..., NoReturn]:
    def kernel(*_args: Any, **_kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} has no CPU build")

    return kernel


assign_draft_cache_locs_contiguous_cpu = _no_cpu_build("assign_draft_cache_locs_contiguous_cpu")
assign_extend_cache_locs_cpu = _no_cpu_build("assign_extend_cache_locs_cpu")
assign_req_to_token_pool_cpu = _no_cpu_build("assign_req_to_token_pool_cpu")
build_draft_decode_metadata_cpu = _no_cpu_build("build_draft_decode_metadata_cpu")
build_tree_kernel_efficient_cpu = _no_cpu_build("build_tree_kernel_efficient_cpu")
copy_all_layer_kv_cache_cpu = _no_cpu_build("copy_all_layer_kv_cache_cpu")
fill_accept_out_cache_loc_cpu = _no_cpu_build("fill_accept_out_cache_loc_cpu")
fill_bonus_tokens_cpu = _no_cpu_build("fill_bonus_tokens_cpu")
rotate_input_ids_cpu = _no_cpu_build("rotate_input_ids_cpu")
verify_tree_greedy_cpu = _no_cpu_build("verify_tree_greedy_cpu")
