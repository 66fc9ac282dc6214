"""Attention that keeps the samples of a row apart, without a mask of T x T.

Two functions are made known to transformers under names of ours. For names that it does not know it makes
no mask at all, so the bounds that come with each forward pass are all that keeps samples apart; both
functions refuse to run without them.
"""

from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from streamsyn.errors import ConfigError

SEGMENTS = "streamsyn_segments"
VARLEN = "streamsyn_varlen"
_NAMES = {
    "segments": SEGMENTS,
    "varlen": VARLEN,
    "flash_attention_2": "flash_attention_2",
    "flash_attention_3": "flash_attention_3",
}
_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


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
    if wanted in _PACKAGES and find_spec(_PACKAGES[wanted]) is None:
        raise ConfigError(f"train.attention: {wanted} needs the package {_PACKAGES[wanted]}")
    return _NAMES[wanted]


def _best(device: torch.device, *, half: bool) -> str:
    if device.type != "cuda" or not half:
        return "segments"
    for name in ("flash_attention_3", "flash_attention_2"):
        if find_spec(_PACKAGES[name]) is not None:
            return name
    return "varlen" if find_spec("torch.nn.attention.varlen") is not None else "segments"


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
    del module
    bounds = _bounds(query, key, attention_mask, more)
    grouped = query.shape[1] != key.shape[1]
    parts = [
        scaled_dot_product_attention(
            query[:, :, begin:end],
            key[:, :, begin:end],
            value[:, :, begin:end],
            dropout_p=dropout,
            is_causal=True,
            scale=scaling,
            enable_gqa=grouped,
        )
        for begin, end in pairwise(bounds)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


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

    del module
    _bounds(query, key, attention_mask, more)
    assert dropout == 0.0, "torch's varlen attention has no dropout; set train.attention to segments"
    out: Any = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        more["cu_seq_lens_q"],
        more["cu_seq_lens_k"],
        more["max_length_q"],
        more["max_length_k"],
        scale=scaling,
        window_size=(-1, 0),  # causal
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[None], None


def _bounds(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, more: dict[str, Any]
) -> tuple[int, ...]:
    """The bounds of the samples, once it is sure that nothing else is asked for than what is done here."""
    assert mask is None, "samples are kept apart by their bounds; a mask would be ignored"
    assert "segments" in more, "this model does not hand the bounds of the samples on to its attention"
    bounds: tuple[int, ...] = more["segments"]
    assert query.shape[0] == 1
    assert query.shape[2] == key.shape[2] == bounds[-1], "a cache was made: use_cache must be False"
    window = more.get("sliding_window")
    assert window is None or more["max_length_q"] <= window, (
        f"the model's attention slides over {window} tokens and a sample is longer; "
        "set train.attention to flash_attention_2"
    )
    for name in ("softcap", "s_aux", "position_bias"):
        assert more.get(name) is None, f"the model's attention has {name}, which is not done here"
    return bounds
