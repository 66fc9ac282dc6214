"""Sequence parallelism: several ranks share each packed row (DeepSpeed-Ulysses, arXiv 2309.14509).

Every rank of a group holds the same number of consecutive tokens of a row. Whatever works on single tokens
works on a share as it does on the row. For attention the ranks exchange: each gets all tokens of a share of
the heads, runs the model's own attention function over whole samples, and gives back the heads of its tokens.

A model that passes anything else from token to token (a recurrent state, a convolution) would silently train
on wrong states. `check_sequence_parallel` refuses what is known to, and compares logits at the start.
"""

from collections.abc import Callable
from dataclasses import replace
from math import gcd
from typing import Any, Self

import numpy
import torch
import torch.distributed as dist
from torch.nn.functional import pad
from transformers import AttentionInterface

from streamsyn.errors import ConfigError
from streamsyn.trainer.examples import Example, Key
from streamsyn.trainer.model.loss import Batch, make_batch

KEY = "train.sequence_parallel"
_HEADS, _TOKENS = 1, 2
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
_LENGTH_DEPENDENT = {"dynamic", "longrope"}
"""Kinds of rotary embeddings whose frequencies depend on the highest position of a call."""


class SequenceGroup:
    """The ranks that share the rows of this rank.

    Args:
        degree: `train.sequence_parallel`: their number; with 1 nothing is shared.
        place: Number of this rank among them.
        group: torch's group of them; None for a rank alone.
    """

    def __init__(self, degree: int, place: int, group: Any = None) -> None:
        self.degree = degree
        self._place = place
        self._group = group

    @classmethod
    def join(cls, degree: int, rank: int) -> Self:
        """Make the group of `degree` consecutive ranks that this rank of the training belongs to.

        A collective: all ranks call it. `degree` divides their number.
        """
        return cls(degree, rank % degree, dist.new_subgroups(degree)[0] if degree > 1 else None)

    def share(self, batch: Batch) -> Batch:
        """Return this rank's tokens and targets of a row. The bounds stay those of the whole row.

        The row is filled up to a multiple of the degree with a sample that has no targets.
        """
        if self.degree == 1:
            return batch
        length = batch.bounds[-1]
        padding = -length % self.degree
        filled = torch.arange(padding, device=batch.input_ids.device)[None]
        tokens = torch.cat((batch.input_ids, torch.zeros_like(filled)), 1).chunk(self.degree, 1)
        positions = torch.cat((batch.position_ids, filled), 1).chunk(self.degree, 1)
        mine = self.holds(batch)
        return replace(
            batch,
            input_ids=tokens[self._place],
            position_ids=positions[self._place],
            bounds=(*batch.bounds, length + padding) if padding else batch.bounds,
            at=batch.at[mine] - self._place * tokens[0].shape[1],
            labels=batch.labels[mine],
            weights=batch.weights[mine],
            owner=batch.owner[mine],
            is_shared=True,
        )

    def holds(self, batch: Batch) -> torch.Tensor:
        """Return `[N]`: whether this rank's share has the logits of each target of a whole row."""
        size = -(-batch.bounds[-1] // self.degree)
        found: torch.Tensor = batch.at // size == self._place
        return found

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Each value summed over the group."""
        if self._group is not None:
            dist.all_reduce(values, group=self._group)
        return values

    def wrap_attention(self, name: str) -> None:
        """Make the attention function that is registered as `name` exchange heads for rows that are shared.

        Rows that are not (prompts that the model answers) are attended to as before.
        """
        if self.degree == 1:
            return
        registered: Any = AttentionInterface()[name]
        attend: Callable[..., Any] = getattr(registered, "unshared", registered)

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def shared(
            module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **more: Any
        ) -> tuple[torch.Tensor, None]:
            if not more.pop("is_shared", False):
                whole: tuple[torch.Tensor, None] = attend(module, query, key, value, mask, **more)
                return whole
            for given in ("s_aux", "position_bias"):
                if more.get(given) is not None:
                    raise ConfigError(
                        f"{KEY}: the model's attention has {given}, which cannot be divided; use 1"
                    )
            heads = query.shape[_HEADS]
            divisible = self._with_divisible_heads(query, key, value)
            query, key, value = (self._exchange(one, _HEADS, _TOKENS) for one in divisible)
            out = attend(module, query, key, value, mask, **more)[0]
            return self._exchange(out.transpose(1, 2), _TOKENS, _HEADS).transpose(1, 2)[:, :, :heads], None

        shared.unshared = attend
        AttentionInterface.register(name, shared)

    def _with_divisible_heads(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Repeat key heads, and add heads of zeros behind the others, until the degree divides all."""
        heads, key_heads = query.shape[_HEADS], key.shape[_HEADS]
        missing = -heads % self.degree
        # Groups of query heads stay consecutive; with heads of zeros, each query head has a key head.
        repeats = heads // key_heads if missing else self.degree // gcd(key_heads, self.degree)
        if repeats > 1:
            key, value = (one.repeat_interleave(repeats, _HEADS) for one in (key, value))
        if missing == 0:
            return query, key, value
        return tuple(pad(one, (0, 0, 0, 0, 0, missing)) for one in (query, key, value))

    def _exchange(self, values: torch.Tensor, give: int, take: int) -> torch.Tensor:
        out: torch.Tensor = _Exchange.apply(values, give, take, self._group)  # type: ignore[no-untyped-call]
        return out


class _Exchange(torch.autograd.Function):
    """Divides dimension `give` of `[1, heads, tokens, width]` among the ranks, and joins `take` from them."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, give: int, take: int, group: Any) -> torch.Tensor:
        ctx.back = take, give, group
        degree = dist.get_world_size(group)
        parts = torch.stack(values.chunk(degree, give))
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=group)
        return torch.cat(received.unbind(), take)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _Exchange.forward(ctx, gradients[0], *ctx.back), None, None, None


_SINGLE, _HALF = 1e-4, 5e-2
"""Largest relative difference of logits in float32 and in bf16. A model that misses the tokens of other ranks
differs by about 1."""


def check_sequence_parallel(
    model: Any, plain: Any, sequence: SequenceGroup, device: torch.device, *, half: bool
) -> None:
    """Check that a model can be called with a part of each row.

    A collective: all ranks call it.

    Args:
        model: The callable, on its devices.
        plain: The model of transformers or peft itself.
        sequence: The group of this rank.
        device: Where the model is.
        half: Whether it runs in bf16.

    Raises:
        ConfigError: It cannot.
    """
    if sequence.degree == 1:
        return
    config = plain.config.get_text_config()
    kinds = {"recurrent"} if getattr(plain, "_is_stateful", False) else set()
    kinds |= {"convolution"} if any(isinstance(one, torch.nn.Conv1d) for one in plain.modules()) else set()
    kinds |= set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS
    if kinds:
        raise ConfigError(
            f"{KEY}: the model has layers other than attention that pass on states from token to token "
            f"({', '.join(sorted(kinds))}), so its rows cannot be divided; use 1"
        )
    rotary = getattr(config, "rope_parameters", None) or {}
    by_layer = [one for one in rotary.values() if isinstance(one, dict)] or [rotary]
    if found := sorted(_LENGTH_DEPENDENT.intersection(one.get("rope_type") for one in by_layer)):
        raise ConfigError(
            f"{KEY}: the model's rotary embeddings ({found[0]}) depend on the length of a row, of which a "
            "rank sees a part; use 1"
        )
    _compare_logits(model, sequence, device, half=half)


@torch.no_grad()
def _compare_logits(model: Any, sequence: SequenceGroup, device: torch.device, *, half: bool) -> None:
    """Compare the logits of a short row that the group shares with those of the same row on one rank."""
    row = (_sample(0, 6 * sequence.degree), _sample(1, 2 * sequence.degree - 1))
    batch = make_batch(row, [1.0, 1.0], device)
    model.eval()
    try:
        whole, part = (
            model(**one.forward_arguments()).logits[0].float() for one in (batch, sequence.share(batch))
        )
        expected = whole[sequence.holds(batch)]
        errors = torch.stack(((part - expected).square().sum(), expected.square().sum())).double()
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, RuntimeError) as error:
        raise ConfigError(
            f"{KEY}: the model cannot be called with a part of a row: {type(error).__name__}: {error}; use 1"
        ) from error
    finally:
        model.train()
    difference, size = sequence.sum(errors).sqrt().tolist()
    if not difference <= (_HALF if half else _SINGLE) * size:
        raise ConfigError(
            f"{KEY}: the model passes more than attention from token to token (its logits differ by "
            f"{difference / size:.1%} when {sequence.degree} ranks share a row); use 1"
        )


def _sample(number: int, length: int) -> Example:
    """Tokens that any vocabulary has; all but the first are targets."""
    tokens = (numpy.arange(length, dtype=numpy.int32) * (5 + 6 * number) + 2) % 61
    return Example(Key("sequence", 0, number), "", "", tokens, 1)
