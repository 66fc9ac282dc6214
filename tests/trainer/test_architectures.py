"""Tiny models of transformers' own classes are trained right packed, one sample a row, or refused."""

import pytest

from tests.trainer.architectures import KINDS, outcome

PACKED, ALONE = "packed", "one sample a row"
OUTCOMES = {
    "llama, yarn": (PACKED, "segments"),
    "mistral, window": (PACKED, "segments"),
    "phi3, longrope": (ALONE, "segments"),
    "qwen2_moe, window": (ALONE, "masked"),
    "phimoe, window": (ALONE, "masked"),
    "llama4, chunks": (ALONE, "masked"),
    "qwen3_5": (ALONE, "segments"),
    "lfm2": (ALONE, "segments"),
    "gemma2": (ALONE, "eager"),
    "bert": ("refused", "the model cannot be trained: the model's attention is not causal"),
}


def check(kind: str, *, half: bool) -> None:
    """Logits are those of transformers' own attention for each sample alone, whatever the outcome."""
    found = outcome(kind, half=half)
    assert found.differ < (3e-2 if half else 1e-5)
    assert OUTCOMES.get(kind, (found.how, found.detail)) == (found.how, found.detail)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", OUTCOMES)
def test_no_architecture_is_trained_wrong(kind: str, *, half: bool) -> None:
    """Beyond every window, chunk and original rotary length; also where bf16 hides small differences."""
    check(kind, half=half)


@pytest.mark.torture
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", sorted(KINDS.keys() - OUTCOMES.keys()))
def test_no_further_architecture_is_trained_wrong(kind: str, *, half: bool) -> None:
    """The other architectures of the table."""
    check(kind, half=half)
