"""Fair shares: parts by weight within a place, nobody starves, and what nobody asks for is free for all."""

import math
from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.fleet.shares import PRIORITIES, Share, Shares, next_share
from tests.examples import examples

WEIGHTS = st.lists(st.sampled_from([1 / 8, 0.5, 1.0, 1.0, 2.0, 3.0, 8.0]), min_size=1, max_size=12)


class Places:
    """Places that all shares ask for, more than there are; whose request ends next is drawn."""

    def __init__(self, weights: list[float], places: int, seed: int) -> None:
        self.shares = [Share(weight) for weight in weights]
        self.busy: list[Share] = []
        self.begun: Counter[Share] = Counter()
        self.draw = Random(seed)
        for _ in range(places):
            self.give()

    def give(self) -> None:
        """Give a free place to whose turn it is."""
        share = next_share(self.shares)
        share.begin("http://one")
        self.busy.append(share)
        self.begun[share] += 1

    def end(self) -> None:
        """End some request, and give its place to the next."""
        self.busy.pop(self.draw.randrange(len(self.busy))).end("http://one")
        self.give()

    def part(self, share: Share) -> float:
        """The places that a share should have."""
        return len(self.busy) * share.weight / sum(share.weight for share in self.shares)


@given(WEIGHTS, st.integers(1, 40), st.integers(0, 9))
@examples(200)
def test_each_has_its_part_within_a_place(weights: list[float], places: int, seed: int) -> None:
    """At every moment, beside the fraction that is carried over; whichever requests end."""
    fleet = Places(weights, places, seed)
    for _ in range(200):
        for share in fleet.shares:
            assert share.in_flight <= fleet.part(share) + 1 + 0.5
        fleet.end()
    shortest = min(share.in_flight - fleet.part(share) for share in fleet.shares)
    assert shortest >= -2


@given(WEIGHTS, st.integers(1, 8), st.integers(0, 9))
@examples(100)
def test_none_starves(weights: list[float], places: int, seed: int) -> None:
    """A share never waits for longer than ten times what its part is worth."""
    fleet = Places(weights, places, seed)
    rounds = math.ceil(10 * sum(weights) / min(weights)) + places
    for _ in range(2):
        fleet.begun.clear()
        for _ in range(rounds):
            fleet.end()
        assert all(fleet.begun[share] for share in fleet.shares)


def test_a_part_of_less_than_a_place_is_had_in_turn() -> None:
    """Of one place, priorities low and normal get a ninth and the rest."""
    fleet = Places([PRIORITIES["low"], PRIORITIES["normal"]], 1, seed=0)
    for _ in range(899):
        fleet.end()
    low, normal = fleet.shares
    assert 100 == pytest.approx(fleet.begun[low], abs=2)
    assert 800 == pytest.approx(fleet.begun[normal], abs=2)


def test_who_did_not_ask_is_owed_nothing() -> None:
    """A run that comes later is not behind, and one that used an idle fleet is not ahead."""
    alone, late = Share(), Share()
    for _ in range(1_000):
        assert alone is next_share([alone])
    got = Counter(next_share([alone, late]) for _ in range(10))
    assert {alone: 5, late: 5} == got


def asking(shares: Shares, weight: float, wanted: int) -> Share:
    """A share that could use `wanted` places."""
    share = shares.open(weight)
    share.waiting = wanted
    return share


def test_capacity() -> None:
    """All for a run alone or beside idle ones; else its part, and what the others cannot use of theirs."""
    shares = Shares()
    one = asking(shares, 1.0, 0)
    assert 64 == shares.capacity(one, 64)
    other = asking(shares, 3.0, 0)
    assert [64, 64] == [shares.capacity(share, 64) for share in (one, other)]
    one.waiting = other.waiting = 100
    assert [16, 48] == [shares.capacity(share, 64) for share in (one, other)]
    one.waiting = 4
    assert [16, 60] == [shares.capacity(share, 64) for share in (one, other)]
    shares.close(other)
    assert 64 == shares.capacity(one, 64)
    assert 0 == shares.capacity(one, 0)


@given(
    st.lists(st.tuples(st.floats(0.1, 10), st.integers(0, 300)), min_size=1, max_size=8), st.integers(0, 500)
)
@examples(100)
def test_capacities_leave_no_place_unused_and_queue_little(
    runs: list[tuple[float, int]], places: int
) -> None:
    """Runs that ask for all of their capacities use every place; together they ask for few more."""
    shares = Shares()
    opened = [asking(shares, weight, wanted) for weight, wanted in runs]
    for _ in range(20):  # each sizes itself by what the others ask for, in turn
        for share in opened:
            share.waiting = shares.capacity(share, places)
    asked = sum(share.wanted for share in opened)
    assert places <= asked <= places + len(opened)
