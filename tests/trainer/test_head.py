"""The head in pieces: the losses and gradients of whole logits, which never exist."""

from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
)

from streamsyn.trainer.model import head
from streamsyn.trainer.model.attention import implementation
from streamsyn.trainer.model.head import LossHead, target_losses
from streamsyn.trainer.model.loss import Batch, make_batch, token_losses
from tests.trainer import tiny

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": None,
}
CONFIGS = {
    "capped": Gemma2Config(**SIZES, final_logit_softcapping=2.0, attn_logit_softcapping=None),
    "scaled": CohereConfig(**SIZES, logit_scale=0.25),
    "divided": GraniteConfig(**SIZES, logits_scaling=4.0),
}
TARGETS = 50


def batch() -> Batch:
    return make_batch((tiny.example(40, 20, 1), tiny.example(60, 30, 2)), [0.5, 1.0], CPU)


def made(kind: str) -> Any:
    """A random model; calls with one kind return equal models."""
    attention = implementation("segments", CPU, half=False)
    if kind in ("tied", "own head"):
        return tiny.model(attention, tie_word_embeddings=kind == "tied")
    torch.manual_seed(0)
    config: PreTrainedConfig = CONFIGS[kind]
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()


def checked(model: Any) -> LossHead:
    found = LossHead(model)
    found.check(model, CPU, half=False)
    return found


class MostLogits(TorchDispatchMode):
    """Notes for how many tokens any operation returns logits, in the backward pass too."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tokens = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape[-1:] == (tiny.VOCABULARY,):
            self.tokens = max(self.tokens, result.numel() // tiny.VOCABULARY)
        return result


@pytest.mark.parametrize("kind", ["tied", "own head", *CONFIGS])
def test_losses_and_gradients_equal_those_of_whole_logits(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """In pieces of 7 targets, the last of which is shorter, for heads with and without more behind them."""
    plain, tuned, row = made(kind), made(kind), batch()
    expected = token_losses(plain(**row.forward_arguments()).logits, row.labels)
    (expected * row.weights).sum().backward()
    assert checked(tuned).in_pieces
    monkeypatch.setattr(head, "_PIECE", 7 * tiny.VOCABULARY)
    found = target_losses(tuned, row)
    (found * row.weights).sum().backward()

    assert torch.allclose(expected, found, atol=1e-6)
    whole, pieces = tiny.gradients(plain), tiny.gradients(tuned)
    assert tiny.furthest(whole, pieces) < 2e-7 * max(float(one.norm()) for one in whole.values())


@pytest.mark.parametrize("pieces", [1, 10])
def test_whole_logits_never_exist(monkeypatch: pytest.MonkeyPatch, pieces: int) -> None:
    """No operation, forward or backward, returns logits of more targets than are in a piece."""
    row, size = batch(), TARGETS // pieces
    narrow: dict[str, Any] = {
        "hidden_size": 4,
        "intermediate_size": 4,
        "num_key_value_heads": 1,
        "num_attention_heads": 2,
    }
    model = tiny.model(implementation("segments", CPU, half=False), **narrow)
    checked(model)
    monkeypatch.setattr(head, "_PIECE", size * tiny.VOCABULARY)
    with MostLogits() as most:
        target_losses(model, row).sum().backward()

    assert most.tokens == size


def test_without_gradients_losses_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in evaluations."""
    model, row = made("tied"), batch()
    checked(model)
    expected = token_losses(model(**row.forward_arguments()).logits, row.labels)
    monkeypatch.setattr(head, "_PIECE", 7 * tiny.VOCABULARY)
    with torch.no_grad():
        assert torch.allclose(expected, target_losses(model, row), atol=1e-6)


class Shifted(LlamaForCausalLM):
    """Does to its logits what no model that we know does."""

    def forward(self, *given: Any, **named: Any) -> Any:
        found = super().forward(*given, **named)
        found.logits = found.logits + torch.arange(tiny.VOCABULARY) / 100
        return found


def test_a_model_that_changes_its_logits_has_whole_ones() -> None:
    """The check at the start notices it, and the losses are right."""
    shifted: Any = Shifted
    model, row = shifted(tiny.model(implementation("segments", CPU, half=False)).config), batch()
    expected = token_losses(model(**row.forward_arguments()).logits, row.labels)
    with capture_logs() as logs:
        assert not checked(model).in_pieces

    assert ["train.whole_logits"] == [one["event"] for one in logs]
    assert torch.equal(expected, target_losses(model, row))
