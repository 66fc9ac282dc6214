"""A checkpoint goes on in the stream that it stands in, and in no other."""

from typing import Any

import pytest

from streamsyn.errors import ConfigError
from streamsyn.trainer.examples import Idle, StepPlan
from streamsyn.trainer.sources.source import Mixed, Sources
from tests.trainer.streams import Arriving, keys, planner, plans, row


async def begun(sources: Sources, steps: int = 3) -> Any:
    """The state of a stream after a few steps."""
    stream = planner(sources)
    made = [await stream.next(1000.0) for _ in range(steps)]
    stream.close()
    assert isinstance(made[-1], StepPlan)
    return made[-1].state


def rows(number: int, **more: Any) -> list[dict[str, Any] | None]:
    """This number of rows; `more` is in each of them."""
    return [row(at, length=30, **more) for at in range(number)]


async def test_a_different_stream_is_refused() -> None:
    """Rows with the same ids and different content, as a different run over the same seeds has them."""
    state = await begun(Sources(Arriving(rows(60))))
    other = planner(Sources(Arriving(rows(60, answer="another"))), state)

    with pytest.raises(
        ConfigError, match=r"row \d+ .*has changed.* this is not the stream of the checkpoint"
    ):
        await other.next(1000.0)
    other.close()


async def test_different_data_in_a_mix_is_refused() -> None:
    """What is mixed in is checked, too."""

    def mixed(**more: Any) -> Sources:
        return Sources(Arriving(rows(60)), [Mixed(Arriving(rows(9, **more), name="mix:chat"), 1.0)])

    state = await begun(mixed())
    other = planner(mixed(answer="another"), state)

    with pytest.raises(ConfigError, match="mix:chat: row"):
        await other.next(1000.0)
    other.close()


async def test_a_stream_that_has_grown_is_the_same() -> None:
    """Only the last row trained on is compared."""
    state = await begun(Sources(Arriving(rows(60))))
    rest = await plans(planner(Sources(Arriving(rows(90))), state))

    assert 90 == 1 + max(key.seq for key in keys(rest))


async def test_a_stream_that_is_not_there_yet_is_waited_for() -> None:
    """A run that was started anew in the directory must reach the checkpoint's row; then it is compared."""
    state = await begun(Sources(Arriving(rows(60))))
    chunks = [(0.01, 5), (0.01, 55)]
    same = planner(Sources(Arriving(rows(60), chunks)), state)
    assert isinstance(await same.next(0.0), Idle)
    assert isinstance(await same.next(5.0), StepPlan)
    same.close()
    other = planner(Sources(Arriving(rows(60, answer="another"), chunks)), state)

    with pytest.raises(ConfigError, match="not the stream"):
        await other.next(5.0)
    other.close()
