from hypothesis import given
from hypothesis import strategies as st

from streamsyn.trainer.stream.packing import ShuffleBuffer
from tests.trainer.streams import example


def drawn(buffer: ShuffleBuffer, numbers: list[int]) -> list[int]:
    """The order in which examples come out of a buffer that is kept full."""
    out = []
    for number in numbers:
        if buffer.is_full:
            out.append(buffer.draw().key.seq)
        buffer.put(example(5, number))
    while buffer:
        out.append(buffer.draw().key.seq)
    return out


@given(size=st.integers(1, 20), count=st.integers(0, 60), seed=st.integers(0, 2**62))
def test_everything_comes_out_once(size: int, count: int, seed: int) -> None:
    """What is put in is drawn exactly once."""
    out = drawn(ShuffleBuffer(size, seed), list(range(count)))

    assert list(range(count)) == sorted(out)


def test_the_seed_decides_the_order() -> None:
    """The same seed gives the same order, a different seed a different one; none keeps the order."""
    orders = [drawn(ShuffleBuffer(16, seed), list(range(64))) for seed in (1, 1, 2)]

    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert orders[0] != list(range(64))


def test_a_buffer_is_restored() -> None:
    """What is held, in its order, and the number of draws are the whole state."""
    buffer = ShuffleBuffer(8, 3)
    for number in range(8):
        buffer.put(example(5, number))
    first = [buffer.draw().key.seq for _ in range(3)]
    other = ShuffleBuffer(8, 3)
    other.restore([example(5, key.seq) for key in buffer.layout()], buffer.draws)

    assert 3 == len(first)
    assert drawn(buffer, [8, 9]) == drawn(other, [8, 9])


def test_draws_are_even() -> None:
    """All examples held are drawn about equally often."""
    first = [0] * 4
    for seed in range(2000):
        buffer = ShuffleBuffer(4, seed)
        for number in range(4):
            buffer.put(example(5, number))
        first[buffer.draw().key.seq] += 1

    assert all(400 < count < 600 for count in first)
