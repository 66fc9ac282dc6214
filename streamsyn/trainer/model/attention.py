"""Attention within the samples of a packed row, without a T x T mask.

Two attention functions are registered with transformers under our own names. transformers builds no mask for
names that it does not know, so the samples' boundaries, which are passed to each forward pass, are the only
thing that isolates samples. Both functions refuse to run without them. `isolation` checks at the start that
the model complies.

A third one, for models whose masks only transformers builds, is called with these masks, one sample a row.
"""

from importlib.util import find_spec
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from streamsyn.errors import ConfigError

SEGMENTS = "streamsyn_segments"
VARLEN = "streamsyn_varlen"
MASKED = "streamsyn_masked"
_NAMES = {
    "segments": SEGMENTS,
    "varlen": VARLEN,
    "flash_attention_2": "flash_attention_2",
    "flash_attention_3": "flash_attention_3",
}
_WIDEST_HEAD = 256
_FLASH = {
    "flash_attention_3": ("flash_attn_interface", is_flash_attn_3_available),
    "flash_attention_2": ("flash_attn", is_flash_attn_2_available),
}
"""Newest first: the package, and transformers' check of it (version 4 is a different `flash_attn`)."""


def implementation(wanted: str, device: torch.device, *, half: bool) -> str:
    """Register our attention functions, and return transformers' name of the one to use.

    Args:
        wanted: `train.attention`; `auto` takes the fastest that is available.
        device: Where the model runs.
        half: Whether it runs in bf16.

    Raises:
        ConfigError: The device, the precision or the installed packages do not support it.
    """
    AttentionInterface.register(SEGMENTS, segments)
    AttentionInterface.register(VARLEN, varlen)
    AttentionInterface.register(MASKED, masked)
    AttentionMaskInterface.register(MASKED, sdpa_mask)
    if wanted == "auto":
        wanted = _best(device, half=half)
    if wanted != "segments" and (device.type != "cuda" or not half):
        raise ConfigError(f"train.attention: {wanted} needs a GPU and bf16; use segments")
    if wanted in _FLASH and not _FLASH[wanted][1]():
        raise ConfigError(f"train.attention: {wanted} needs the package {_FLASH[wanted][0]}")
    if wanted == "varlen" and not _torch_has_varlen():
        raise ConfigError("train.attention: varlen needs a newer torch; use segments")
    return _NAMES[wanted]


def _best(device: torch.device, *, half: bool) -> str:
    if device.type != "cuda" or not half:
        return "segments"
    for name, (_, is_available) in _FLASH.items():
        if is_available():
            return name
    return "varlen" if _torch_has_varlen() else "segments"


def _torch_has_varlen() -> bool:
    """PyTorch 2.10 added it; sliding windows and grouped key heads came later."""
    if find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention.varlen import varlen_attn

    return {"window_size", "enable_gqa"} <= signature(varlen_attn).parameters.keys()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def segments(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention with one kernel call per sample. Works on any device.

    Args:
        module: The attention layer; only its `is_causal` is read.
        query: `[1, heads, T, width]`.
        key: `[1, key heads, T, width]`; groups of query heads share a key head.
        value: As `key`.
        attention_mask: None.
        scaling: Factor of the products; default 1 / sqrt(width).
        dropout: Dropout probability of attention weights.
        more: `segments`, the boundaries of the samples, and whatever else transformers passes.

    Returns:
        `[1, T, heads, width]`, and None.
    """
    _check(module, attention_mask, more)
    bounds: list[int] = more["segments"].tolist()
    assert query.shape[2] == key.shape[2] == bounds[-1], "a cache was made: use_cache must be False"
    lengths = [end - begin for begin, end in pairwise(bounds)]
    window = more.get("sliding_window")
    # split, not slices: the backward pass then concatenates once, instead of adding a full row per sample.
    parts = [
        _sample_attention(*part, scaling, dropout, window).transpose(1, 2)
        for part in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(parts, dim=1), None


def _sample_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    dropout: float,
    window: int | None,
) -> torch.Tensor:
    """Causal attention within one sample; a token sees the last `window` tokens, itself included."""
    length, grouped = query.shape[2], query.shape[1] != key.shape[1]
    if window is None or length <= window:
        return scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped
        )
    parts = []
    for begin in range(0, length, window):  # in blocks, so that a mask is at most window x 2 window
        end, first = min(begin + window, length), max(0, begin - window + 1)
        back = torch.arange(begin, end, device=query.device)[:, None]
        back = back - torch.arange(first, end, device=query.device)
        parts.append(
            scaled_dot_product_attention(
                query[:, :, begin:end],
                key[:, :, first:end],
                value[:, :, first:end],
                attn_mask=(back >= 0) & (back < window),
                dropout_p=dropout,
                scale=scaling,
                enable_gqa=grouped,
            )
        )
    return torch.cat(parts, dim=2)


def varlen(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """As `segments`, with one call per row to torch's variable-length kernel."""
    from torch.nn.attention.varlen import varlen_attn

    _check(module, attention_mask, more)
    assert query.shape[2] == key.shape[2], "a cache was made: use_cache must be False"
    width = query.shape[-1]
    if width > _WIDEST_HEAD or width % 8 or value.shape[-1] != width:  # not supported by the kernel
        by_sample: tuple[torch.Tensor, None] = segments(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **more
        )
        return by_sample
    if dropout != 0.0:
        raise ConfigError(
            "train.attention: varlen does not support the model's attention dropout; use segments"
        )
    window = more.get("sliding_window")
    # Rotary embeddings leave queries and keys in float32, and autocast does not cover this kernel.
    queries, keys, values = (one[0].transpose(0, 1).to(torch.bfloat16) for one in (query, key, value))
    out: Any = varlen_attn(
        queries,
        keys,
        values,
        more["cu_seq_lens_q"],
        more["cu_seq_lens_k"],
        more["max_length_q"],
        more["max_length_k"],
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),  # causal: no later tokens
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[None], None


def masked(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' `sdpa`, with its masks; `sdpa` ignores silently what is refused here."""
    _check_supported(more)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **more)


def _check(module: torch.nn.Module, mask: torch.Tensor | None, more: dict[str, Any]) -> None:
    """Check that the model needs nothing that these functions leave out.

    Raises:
        ConfigError: It does, or it does not pass the boundaries.
    """
    assert mask is None, "samples are isolated by their boundaries; a mask would be ignored"
    if "segments" not in more:
        raise ConfigError("the model does not pass the boundaries of the samples to its attention")
    if not getattr(module, "is_causal", True):
        raise ConfigError("the model's attention is not causal")
    _check_supported(more)


def _check_supported(more: dict[str, Any]) -> None:
    """Raise ConfigError if attention gets something that torch's kernels do not take."""
    for name in ("softcap", "s_aux", "position_bias"):
        if more.get(name) is not None:
            raise ConfigError(
                f"the model's attention has {name}, which train.attention = segments or varlen does not "
                "support; try flash_attention_2 or flash_attention_3"
            )
