"""Attention that keeps the samples of a row apart, without a mask of T x T.

Two functions are made known to transformers under names of ours. For names that it does not know it makes
no mask at all, so the bounds that come with each forward pass are all that keeps samples apart; both
functions refuse to run without them.
"""

from importlib.util import find_spec
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from streamsyn.errors import ConfigError

SEGMENTS = "streamsyn_segments"
VARLEN = "streamsyn_varlen"
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
"""Newest first: the package, and whether transformers takes it for what it is (4 is another `flash_attn`)."""


def implementation(wanted: str, device: torch.device, *, half: bool) -> str:
    """The name for transformers of what `train.attention` asks for; `half` with bf16.

    Raises:
        ConfigError: It cannot work here.
    """
    AttentionInterface.register(SEGMENTS, segments)
    AttentionInterface.register(VARLEN, varlen)
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
    """It came with torch 2.10, and windows and shared key heads later."""
    if find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention.varlen import varlen_attn

    return {"window_size", "enable_gqa"} <= signature(varlen_attn).parameters.keys()


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
    """One causal call for each sample. Works on any device.

    Args:
        module: The layer; not used.
        query: `[1, heads, T, width]`.
        key: `[1, key heads, T, width]`; query heads share them in groups.
        value: As `key`.
        attention_mask: None.
        scaling: Of the products, by default one over the root of the width.
        dropout: Share of the attention that is dropped.
        more: `segments`, the bounds of the samples, and what else transformers hands on.

    Returns:
        `[1, T, heads, width]`, and None.
    """
    _check(module, attention_mask, more)
    bounds: tuple[int, ...] = more["segments"]
    assert query.shape[2] == key.shape[2] == bounds[-1], "a cache was made: use_cache must be False"
    lengths = [end - begin for begin, end in pairwise(bounds)]
    window = more.get("sliding_window")
    # Split, and not sliced: the gradient is then put together once, not added up from a full row a sample.
    parts = [
        _one(*part, scaling, dropout, window).transpose(1, 2)
        for part in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(parts, dim=1), None


def _one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    dropout: float,
    window: int | None,
) -> torch.Tensor:
    """Causal attention within one sample; with a window, a token sees so many, itself among them."""
    length, grouped = query.shape[2], query.shape[1] != key.shape[1]
    if window is None or length <= window:
        return scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped
        )
    parts = []
    for begin in range(0, length, window):  # no mask is larger than the window twice over
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
    """One call for the row, by torch's own kernel for sequences of different lengths; as `segments`."""
    from torch.nn.attention.varlen import varlen_attn

    _check(module, attention_mask, more)
    assert query.shape[2] == key.shape[2], "a cache was made: use_cache must be False"
    width = query.shape[-1]
    if width > _WIDEST_HEAD or width % 8 or value.shape[-1] != width:  # the kernel has no such heads
        return segments(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **more)
    if dropout != 0.0:
        raise ConfigError("train.attention: varlen has no dropout, and the model asks for it; use segments")
    window = more.get("sliding_window")
    # Rotary embeddings leave queries and keys in float32, and autocast does not know this kernel.
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
        window_size=(-1 if window is None else window - 1, 0),  # nothing that comes later
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[None], None


def _check(module: torch.nn.Module, mask: torch.Tensor | None, more: dict[str, Any]) -> None:
    """Nothing else is asked for than what is done here.

    Raises:
        ConfigError: It is, by the model.
    """
    assert mask is None, "samples are kept apart by their bounds; a mask would be ignored"
    if "segments" not in more:
        raise ConfigError("the model does not hand the bounds of the samples on to its attention")
    if not getattr(module, "is_causal", True):
        raise ConfigError("the model's attention looks ahead: it is not causal")
    for name in ("softcap", "s_aux", "position_bias"):
        if more.get(name) is not None:
            raise ConfigError(
                f"the model's attention has {name}, which train.attention = segments or varlen leaves out; "
                "flash_attention_2 or flash_attention_3 may know it"
            )
