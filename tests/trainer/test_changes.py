"""How held-out losses have changed, while samples join those that are measured."""

import math
from statistics import fmean

import orjson
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.trainer.evaluation.heldout import CONTROL, WITH, Changes, summary
from streamsyn.trainer.examples import Key

LOSSES = st.lists(st.floats(0, 10), min_size=3, max_size=3)


def keyed(losses: list[float], first: int = 0) -> dict[Key, float]:
    return {Key("run", 0, first + number): loss for number, loss in enumerate(losses)}


@given(st.lists(LOSSES, min_size=1, max_size=6))
def test_on_the_same_samples_it_is_the_difference_of_the_means(evaluations: list[list[float]]) -> None:
    """Whatever lies between the first evaluation and the last."""
    changes = Changes()
    told = [changes.update({WITH: keyed(losses)}) for losses in evaluations]

    assert 0.0 == told[0]["nll_with_context_change"]
    expected = fmean(evaluations[-1]) - fmean(evaluations[0])
    assert math.isclose(told[-1]["nll_with_context_change"], expected, abs_tol=1e-9)


@given(LOSSES, LOSSES, LOSSES)
def test_samples_that_join_change_nothing(first: list[float], then: list[float], joined: list[float]) -> None:
    """However hard they are; from the next evaluation on they count."""
    changes = Changes()
    changes.update({WITH: keyed(first)})
    told = changes.update({WITH: {**keyed(then), **keyed(joined, 3)}})["nll_with_context_change"]
    later = changes.update({WITH: {**keyed(then), **keyed([loss + 1 for loss in joined], 3)}})

    assert math.isclose(told, fmean(then) - fmean(first), abs_tol=1e-9)
    assert math.isclose(later["nll_with_context_change"], told + 0.5, abs_tol=1e-9)


def test_it_goes_on_after_a_restart() -> None:
    """From its state, which is kept as JSON in the checkpoint; kinds are apart from each other."""
    before = Changes()
    before.update({WITH: keyed([3.0, 4.0]), CONTROL: keyed([1.0])})
    before.update({WITH: keyed([2.0, 3.0])})
    after = Changes(orjson.loads(orjson.dumps(before.state())))
    now = {WITH: keyed([2.0, 1.0]), CONTROL: keyed([1.5])}

    expected = {"nll_with_context_change": -2.0, "nll_control_change": 0.5}
    assert expected == after.update(now) == before.update(now)


def test_a_summary_weighs_samples_alike() -> None:
    """Means of each kind, the number of held-out samples; the gain only where both are known."""
    assert {"nll_with_context": 2.0, "held_out": 2} == summary({WITH: keyed([1.0, 3.0])})
    assert {"nll_control": 1.0} == summary({CONTROL: keyed([1.0])})
