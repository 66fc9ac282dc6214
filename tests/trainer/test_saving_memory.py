"""What saves memory changes no training, and saves it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from streamsyn.config.command_sections import TrainSection
from streamsyn.trainer.model.activations import is_recomputed, offload, recompute
from streamsyn.trainer.model.attention import implementation
from streamsyn.trainer.model.head import LossHead, target_losses
from streamsyn.trainer.model.loss import make_batch
from streamsyn.trainer.model.optimizer import make_optimizer, parked_moments
from tests.trainer import tiny
from tests.trainer.by_hand import plans, section, train, weights

CPU = torch.device("cpu")
STEPS = 4


def trained(out: Path, **given: Any) -> dict[str, torch.Tensor]:
    """The weights of a tiny model after some steps."""
    out.mkdir()
    return weights(train(out, section(**given), plans(STEPS))[2])


@pytest.mark.parametrize(
    "given",
    [
        {"gradient_checkpointing": "selective"},
        {"activation_offload": True},
        {"activation_offload": True, "lora": {"rank": 4}},
        {"optimizer_offload": True},
    ],
)
def test_the_weights_are_the_same(tmp_path: Path, given: dict[str, Any]) -> None:
    """To the bit, with each of the options as without."""
    lora = {"lora": given["lora"]} if "lora" in given else {}
    plain, saving = trained(tmp_path / "plain", **lora), trained(tmp_path / "saving", **given)

    assert tiny.furthest(plain, saving) == 0


def test_moments_in_bf16_are_close(tmp_path: Path) -> None:
    """The weights differ by less than a fiftieth of what the training changes in them."""
    first = trained(tmp_path / "first", learning_rate=1e-12)
    plain, half = trained(tmp_path / "plain"), trained(tmp_path / "half", moments="bf16")
    norm = sum(float((plain[name] - one).norm() ** 2) for name, one in first.items()) ** 0.5
    differ = sum(float((plain[name] - one).norm() ** 2) for name, one in half.items()) ** 0.5

    assert 0 < differ < norm / 50


@pytest.mark.parametrize("given", [{"optimizer_offload": True}, {"moments": "bf16"}])
def test_moments_are_parked_during_passes_only(given: dict[str, Any]) -> None:
    """The optimizer has none meanwhile, and has them again afterwards, as copies."""
    model, settings = torch.nn.Linear(4, 4), section(**given)
    optimizer = make_optimizer(model, settings)
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    before = {id(one): dict(state) for one, state in optimizer.state.items()}
    with parked_moments(optimizer, settings):
        assert all(["step"] == list(state) for state in optimizer.state.values())

    for one, state in optimizer.state.items():
        assert ["step", "exp_avg", "exp_avg_sq"] == list(state)
        for name in ("exp_avg", "exp_avg_sq"):
            was = before[id(one)][name]
            rounded = was.bfloat16().float() if "moments" in given else was
            assert torch.equal(rounded, state[name])
            assert state[name].dtype == was.dtype


def test_rows_from_8k_on_are_recomputed() -> None:
    """By default; a value of the user's is kept."""
    assert [False, True] == [is_recomputed(TrainSection(seq_len=length)) for length in (8191, 8192)]
    assert not is_recomputed(TrainSection(seq_len=8192, gradient_checkpointing=False))
    assert is_recomputed(TrainSection(seq_len=16, gradient_checkpointing=True))
    assert is_recomputed(TrainSection(seq_len=16, activation_offload=True))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"activation_offload": True, "gradient_checkpointing": False}, "activation_offload needs"),
        ({"moments": "bf16", "betas": (0.9, 0.999)}, "second beta of at most 0.99, not 0.999"),
    ],
)
def test_keys_that_do_not_fit_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainSection(**given)


@contextmanager
def saved_elements() -> Iterator[list[int]]:
    """A list with the number of elements that the graph keeps for the backward pass, without weights."""
    seen: dict[int, torch.Tensor] = {}
    found: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and tensor._base is None:
            seen[tensor.data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda one: one):
        yield found
    found.append(sum(one.numel() for one in seen.values()))


def kept(**given: Any) -> int:
    """What a model with four heads of their own keeps of a row, in elements."""
    settings = section(**given)
    model = tiny.model(implementation("segments", CPU, half=False), num_key_value_heads=4)
    recompute(model, settings)
    LossHead(model, offload(settings, CPU))
    batch = make_batch((tiny.example(60, 20),), [1.0], CPU)
    with saved_elements() as elements:
        losses = target_losses(model, batch)
    losses.sum().backward()
    return elements[0]


def test_less_is_kept_for_the_backward_pass() -> None:
    """Everything, results of attention, or inputs of layers alone; offloaded, not even those."""
    everything, inputs = kept(), kept(gradient_checkpointing=True)
    offloaded = kept(activation_offload=True)

    assert offloaded < inputs < everything / 3


class AttentionCalls(TorchDispatchMode):
    """Counts how often attention is computed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "times"), [(False, 1), ("selective", 1), (True, 2)])
def test_selective_computes_attention_once(kind: Any, times: int) -> None:
    """In each of the two layers; full recomputation does so twice."""
    model = tiny.model(implementation("segments", CPU, half=False), num_key_value_heads=4)
    recompute(model, section(gradient_checkpointing=kind))
    LossHead(model)
    with AttentionCalls() as calls:
        target_losses(model, make_batch((tiny.example(60, 20),), [1.0], CPU)).sum().backward()

    assert 2 * times == calls.count
