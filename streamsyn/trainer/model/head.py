"""Losses computed inside the model's forward pass, with its head applied to a piece of the targets at a time.

The logits of a row of chat data would take tens of gigabytes: 131,072 targets of a vocabulary of 128,256 are
31 GiB in bf16 alone, and their gradient as much again. Inside the head's own call FSDP2 has its weights
whole, so the head and the losses are computed there, piece by piece, and once more in the backward pass.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import numpy
import structlog
import torch
from torch.utils.checkpoint import checkpoint

from streamsyn.trainer.examples import Example, Key
from streamsyn.trainer.model.loss import Batch, make_batch, token_losses

log = structlog.get_logger()

_PIECE = 2**26
"""Logits in memory at a time: 256 MiB in float32, 523 targets with a vocabulary of 128,256."""
_SINGLE, _HALF = 1e-4, 5e-2
"""Largest relative difference of losses in float32 and in bf16."""


class LossHead:
    """Gives a model of transformers a `forward` that also takes `targets`, and returns their losses then.

    Args:
        model: The model itself, with adapters if it has any, before it is wrapped.
        offload: Makes the context around what comes before the head: see `activations`.

    Attributes:
        in_pieces: Whether logits are computed piece by piece; otherwise those of a row are whole.
    """

    def __init__(self, model: Any, offload: Callable[[], AbstractContextManager[Any]] | None = None) -> None:
        self._offload = offload or nullcontext
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._decoder = plain.base_model
        self._head = plain.get_output_embeddings()
        self._finish = _after_head(plain)
        self._logits = plain.forward
        self.in_pieces = self._decoder is not plain and self._head is not None
        plain.forward = self._forward_of(plain)
        if self.in_pieces:
            self._apply = self._head.forward
            self._head.forward = self._head_forward

    def check(self, model: Any, device: torch.device, *, half: bool) -> None:
        """Check that losses equal those of the model's own logits; if not, compute logits whole from now on.

        Models differ in what they do before and after the head. A collective: all ranks call it.

        Args:
            model: The model as the training calls it.
            device: Where the model runs.
            half: Whether it runs in bf16.
        """
        if not self.in_pieces:
            return
        tokens = (numpy.arange(33, dtype=numpy.int32) * 11 + 5) % 61  # any vocabulary has these
        batch = make_batch((Example(Key("head", 0, 0), "", "", tokens, 1),), [1.0], device)
        with torch.no_grad():
            expected = token_losses(model(**batch.forward_arguments()).logits, batch.labels)
            try:
                differ = (target_losses(model, batch) - expected).norm() / expected.norm()
                self.in_pieces = float(differ) <= (_HALF if half else _SINGLE)
            except (TypeError, ValueError, KeyError, AttributeError, IndexError):
                self.in_pieces = False
        if not self.in_pieces:
            log.warning(
                "train.whole_logits",
                why="the model changes logits in a way of its own, so those of a row are computed at once",
            )

    def _forward_of(self, plain: Any) -> Callable[..., Any]:
        logits = self._logits

        @wraps(plain.forward)
        def forward(*given: Any, targets: torch.Tensor | None = None, **named: Any) -> Any:
            if targets is None:
                return logits(*given, **named)
            if not self.in_pieces:
                with self._offload():
                    whole = logits(*given, **named).logits[0]
                return _in_pieces(token_losses, whole, targets, whole.shape[-1])
            at = named.pop("logits_to_keep")
            with self._offload():
                hidden = self._decoder(*given, **named)[0][0, at]
            return self._head(hidden, targets)

        return forward

    def _head_forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """The head's own result; with `targets`, their losses."""
        if targets is None:
            whole: torch.Tensor = self._apply(hidden)
            return whole
        return _in_pieces(self._losses, hidden, targets, self._head.weight.shape[0])

    def _losses(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return token_losses(self._finish(self._apply(hidden)), targets)


def target_losses(model: Any, batch: Batch) -> torch.Tensor:
    """Return `[N]`: the loss of each target of a batch, from a model with a `LossHead`, wrapped or not."""
    found: torch.Tensor = model(**batch.forward_arguments(), targets=batch.labels)
    return found


def _in_pieces(
    compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    values: torch.Tensor,
    targets: torch.Tensor,
    vocabulary: int,
) -> torch.Tensor:
    """The losses that `compute` returns for values of targets, piece by piece.

    With more than one piece, each is computed again in the backward pass.
    """
    size = max(1, _PIECE // vocabulary)
    if len(targets) <= size:
        return compute(values, targets)
    parts = zip(values.split(size), targets.split(size), strict=True)
    return torch.cat([checkpoint(compute, *part, use_reentrant=False) for part in parts])


def _after_head(plain: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a model does to the logits of its head: scale them (Cohere, Granite) and cap them (Gemma)."""
    config = plain.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)

    def finish(logits: torch.Tensor) -> torch.Tensor:
        scaled = logits if scale == 1.0 else logits * scale
        return scaled if cap is None else torch.tanh(scaled / cap) * cap

    return finish
