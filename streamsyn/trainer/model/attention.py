"""Attention that keeps the samples of a row apart, without a mask of T x T.

Two functions are made known to transformers under names of ours. For names that it does not know it makes
no mask at all, so the bounds that come with each forward pass are all that keeps samples apart; both
functions refuse to run without them.

Whether a model keeps the samples of a row apart: found out at the start, not believed.

A model may ignore the bounds of the samples, the positions that begin again, or which logits are asked for
(its own attention, a state that runs through the row, a forward of another kind). None of that is an error
anywhere; the samples would be trained on wrongly without a word.
"""

from importlib.util import find_spec
from inspect import signature
from itertools import pairwise
from typing import Any

import numpy
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from streamsyn.errors import ConfigError
from streamsyn.trainer.examples import Example, Key
from streamsyn.trainer.model.batch import make_batch

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


_SINGLE, _HALF = 1e-4, 5e-2
"""How far logits may differ, over their size, in float32 and in bf16: kernels round by the length of a row.
What a trained model sees of another sample changes them by as much as they are."""


@torch.no_grad()
def check_packing_isolation(model: Any, device: torch.device, *, half: bool) -> None:
    """Two forward passes: a sample behind another one has the logits that it has alone. All ranks call it.

    Raises:
        ConfigError: It has others, or some that are not finite, or the model cannot be called with packed
            samples.
    """
    first, second = _sample(0, 37), _sample(1, 26)
    model.eval()
    try:
        behind, alone = (
            model(**make_batch(row, [1.0] * len(row), device).forward_arguments()).logits[0].float()
            for row in ((first, second), (second,))
        )
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise ConfigError(
            f"the model cannot be called with packed samples: {type(error).__name__}: {error}"
        ) from error
    finally:
        model.train()
    targets = second.target_tokens
    if len(alone) != targets or len(behind) != targets + first.target_tokens:
        raise ConfigError("the model does not give the logits of chosen positions (logits_to_keep)")
    if not (alone.isfinite().all() and behind.isfinite().all()):
        raise ConfigError("the model's logits are not finite: its weights hold NaN or infinity, or overflow")
    differ = float((behind[-targets:] - alone).norm() / alone.norm())
    if not differ <= (_HALF if half else _SINGLE):
        raise ConfigError(
            f"the model does not keep the samples of a row apart: a sample's logits differ by {differ:.1%} "
            "with another one before it, so it cannot be trained on packed samples"
        )


def _sample(number: int, length: int) -> Example:
    """Tokens that any vocabulary has; each but the first is a target."""
    tokens = (numpy.arange(length, dtype=numpy.int32) * (7 + 4 * number) + 3) % 61
    return Example(Key("apart", 0, number), "", "", tokens, 1)
