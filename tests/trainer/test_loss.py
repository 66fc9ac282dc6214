"""The loss of a step, against simple reference implementations."""

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.trainer.examples import Example, PackedRow
from streamsyn.trainer.model.attention import implementation
from streamsyn.trainer.model.loss import LossKind, denominator, make_batch, target_weights, token_losses
from tests.examples import examples
from tests.trainer.tiny import example, furthest, gradients, model

CPU = torch.device("cpu")
Rows = Sequence[PackedRow]
ROWS: Rows = (
    (example(9, 3, 1), example(40, 12, 2)),
    (example(17, 16, 3),),
    (example(12, 1, 4), example(8, 2, 5), example(20, 5, 6)),
    (),
)


def losses_of(tuned: torch.nn.Module, one: Example) -> torch.Tensor:
    """Minus the log-probability of each target of a sample alone."""
    ids = torch.from_numpy(one.tokens).long()
    logits = tuned(input_ids=ids[None], use_cache=False).logits[0]
    logs = logits.log_softmax(-1)
    return torch.stack([-logs[at - 1, ids[at]] for at in range(one.loss_from, len(ids))])


def sequence(tuned: torch.nn.Module, rows: Rows) -> torch.Tensor:
    """The mean over samples of the mean over targets."""
    return torch.stack([losses_of(tuned, one).mean() for row in rows for one in row]).mean()


def token(tuned: torch.nn.Module, rows: Rows) -> torch.Tensor:
    """The mean over all targets."""
    return torch.cat([losses_of(tuned, one) for row in rows for one in row]).mean()


def longwriter(tuned: torch.nn.Module, rows: Rows) -> torch.Tensor:
    """The mean over rows of the mean over the row's targets, times the number of samples in it over 30."""
    means = [torch.cat([losses_of(tuned, one) for one in row]).mean() * len(row) / 30 for row in rows if row]
    return torch.stack(means).mean()


REFERENCES: dict[LossKind, Callable[[torch.nn.Module, Rows], torch.Tensor]] = {
    "sequence": sequence,
    "token": token,
    "longwriter": longwriter,
}


def ours(tuned: torch.nn.Module, rows: Rows, kind: LossKind) -> float:
    """The loss as the loop computes it, one row after the other; gradients are left in the model."""
    whole, total = denominator(rows, kind), 0.0
    for row in rows:
        batch = make_batch(row, target_weights(row, kind), CPU)
        losses = token_losses(tuned(**batch.forward_arguments()).logits, batch.labels)
        part = (losses * batch.weights).sum() / whole
        part.backward()
        total += float(part.detach())
    return total


@pytest.mark.parametrize("kind", REFERENCES)
def test_loss_and_gradients_are_those_of_the_reference(kind: LossKind) -> None:
    """Packed rows, taken one by one, give what the formula gives for separate samples."""
    tuned, plain = model(implementation("segments", CPU, half=False)), model("eager")
    expected = REFERENCES[kind](plain, ROWS)
    expected.backward()

    assert pytest.approx(float(expected.detach()), rel=1e-5) == ours(tuned, ROWS, kind)
    assert furthest(gradients(plain), gradients(tuned)) < 1e-5


@pytest.mark.parametrize("kind", ["sequence", "token"])
@examples(20)
@given(st.randoms(use_true_random=False))
def test_the_loss_does_not_depend_on_packing(kind: LossKind, rng: random.Random) -> None:
    """Any distribution of the same samples over rows, empty ones among them, has the same loss."""
    tuned = model(implementation("segments", CPU, half=False))
    samples = [one for row in ROWS for one in row]
    rows: list[list[Example]] = [[] for _ in range(5)]
    for one in rng.sample(samples, len(samples)):
        rng.choice(rows).append(one)

    assert pytest.approx(ours(tuned, ROWS, kind), rel=1e-5) == ours(tuned, [tuple(row) for row in rows], kind)


def test_probabilities_are_in_float32() -> None:
    """Logits in bf16 are turned into losses at full precision."""
    assert torch.float32 == token_losses(torch.randn(1, 3, 9).bfloat16(), torch.tensor([1, 2, 3])).dtype


def test_a_row_without_samples_weighs_nothing() -> None:
    """Its pass runs, and its gradients are zero."""
    tuned = model(implementation("segments", CPU, half=False))
    batch = make_batch((), [], CPU)
    losses = token_losses(tuned(**batch.forward_arguments()).logits, batch.labels)
    (losses * batch.weights).sum().backward()

    assert all(float(one.abs().max()) == 0 for one in gradients(tuned).values())
