"""Whether a model keeps the samples of a row apart: found out at the start, not believed.

A model may ignore the bounds of the samples, the positions that begin again, or which logits are asked for
(its own attention, a state that runs through the row, a forward of another kind). None of that is an error
anywhere; the samples would be trained on wrongly without a word.
"""

from typing import Any

import numpy
import torch

from streamsyn.errors import ConfigError
from streamsyn.trainer.model.batch import make_batch
from streamsyn.trainer.stream.examples import Example, Key

_SINGLE, _HALF = 1e-4, 5e-2
"""How far logits may differ, over their size, in float32 and in bf16: kernels round by the length of a row.
What a trained model sees of another sample changes them by as much as they are."""


@torch.no_grad()
def check_apart(model: Any, device: torch.device, *, half: bool) -> None:
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
