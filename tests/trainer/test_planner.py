import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.errors import ConfigError
from streamsyn.simulator.virtual_time import run_virtually
from streamsyn.trainer.examples import Dropped, End, Example, Idle, Key, StepPlan
from streamsyn.trainer.sources.row_files import FileRows
from streamsyn.trainer.sources.source import Mixed, Sources
from streamsyn.trainer.stream.stream_reader import BATCH_ROWS, StreamReader
from tests.examples import examples
from tests.trainer.streams import Arriving, Lengths, keys, planner, plans, row, section

rows = st.lists(
    st.one_of(st.none(), st.integers(1, 120)), max_size=50
)  # None is a bad row, more than 100 tokens are over-long
chunks = st.lists(st.tuples(st.floats(0, 200), st.integers(0, 20)), max_size=8)
options = st.fixed_dictionaries(
    {
        "epochs": st.integers(1, 3),
        "rows_per_step": st.integers(1, 3),
        "shuffle_size": st.integers(1, 12),
        "shuffle_min": st.integers(1, 12),
        "holdout": st.sampled_from([0.0, 0.3]),
    }
)


def made(lengths: Sequence[int | None]) -> list[dict[str, Any] | None]:
    """Rows of these lengths."""
    return [None if length is None else row(number, length) for number, length in enumerate(lengths)]


def layout(steps: list[StepPlan]) -> list[Any]:
    """Everything that matters to a step."""
    return [
        ([[one.key for one in row] for row in step.rows], step.left_steps, step.flushed) for step in steps
    ]


def mixed(weight: float) -> list[Mixed]:
    """Seven rows of general data, one of them bad."""
    return [Mixed(Arriving([*made([3, 20, None, 5, 8, 2, 30])], name="mix"), weight)]


@examples(40)
@given(lengths=rows, options=options, weight=st.sampled_from([0.0, 0.5, 1.7]))
def test_a_killed_trainer_makes_the_same_plans(
    lengths: list[int | None], options: dict[str, Any], weight: float
) -> None:
    """Over a complete log, from the state of any plan exactly the plans follow that would have followed."""

    def sources() -> Sources:
        return Sources(Arriving(made(lengths)), mixed(weight) if weight else [])

    whole = asyncio.run(plans(planner(sources(), **options)))
    for number, step in enumerate(whole):
        rest = asyncio.run(plans(planner(sources(), step.state, **options)))
        assert layout(whole[number + 1 :]) == layout(rest)


@examples(100)
@given(
    lengths=rows,
    options=options,
    arrivals=st.lists(chunks, min_size=6, max_size=6),
    kills=st.lists(st.integers(1, 3), max_size=5),
    weight=st.sampled_from([0.0, 0.5, 1.7]),
)
def test_every_example_is_trained_on_exactly_once(
    lengths: list[int | None],
    options: dict[str, Any],
    arrivals: list[list[tuple[float, int]]],
    kills: list[int],
    weight: float,
) -> None:
    """Killed after any plan, any number of times, with rows arriving in any way: none is lost, none comes
    twice.
    """
    trained: list[StepPlan] = []
    state: Any = None
    kept: set[Key] = set()

    async def some(number: int, left: int | None) -> bool:
        nonlocal state
        sources = Sources(Arriving(made(lengths), arrivals[number]), mixed(weight) if weight else [])
        stream = planner(sources, state, **options)
        while left != 0:
            step = await stream.next(30)
            if isinstance(step, StepPlan):
                trained.append(step)
                state = step.state
                left = None if left is None else left - 1
            kept.update(one.example.key for one in stream.held_out)
            if isinstance(step, End):
                return True
        return False

    ended = any(run_virtually(some(number, left)) for number, left in enumerate(kills))
    if not ended:
        run_virtually(some(len(kills), None))
    good = [seq for seq, length in enumerate(lengths) if length is not None and length <= 100]
    held_out = {key.seq for key in kept}
    wanted = Counter(
        Key("run", epoch, seq) for epoch in range(options["epochs"]) for seq in good if seq not in held_out
    )
    found = Counter(keys(trained))
    general = [key for key in found if key.source == "mix"]

    assert wanted == Counter({key: count for key, count in found.items() if key.source == "run"})
    assert int(wanted.total() * weight + 0.5) == len(general)
    assert set(found.values()) <= {1}
    for step in trained:
        assert options["rows_per_step"] == len(step.rows)
        assert all(sum(one.length for one in packed) <= 100 for packed in step.rows)
        assert step.flushed or all(step.rows)


def test_how_rows_arrive_does_not_matter_to_a_trainer_behind() -> None:
    """As long as the stream is ahead, chunks of any size make the same plans."""
    lengths: list[int | None] = [7 * n % 60 + 1 for n in range(200)]
    at_once = asyncio.run(plans(planner(Sources(Arriving(made(lengths))))))
    in_chunks = run_virtually(
        plans(planner(Sources(Arriving(made(lengths), [(0.0, 3)] * 80)), shuffle_min=8, shuffle_size=8))
    )

    assert [one[0] for one in layout(at_once)] == [one[0] for one in layout(in_chunks)]


def test_training_begins_before_the_buffer_is_full() -> None:
    """With `shuffle_min` examples and nothing more, plans are made; with one example less, none is."""

    async def after(count: int) -> Any:
        source = Arriving(made([90] * 20), [(0.0, count), (1000.0, 0)])
        return await planner(Sources(source), max_wait_s=900, shuffle_min=4, shuffle_size=8).next(10)

    assert isinstance(run_virtually(after(3)), Idle)
    assert isinstance(run_virtually(after(4)), StepPlan)


def test_a_paused_stream_is_trained_on_as_it_is() -> None:
    """After `max_wait_s` without anything new, what is there is flushed, and then nothing comes."""

    async def watch() -> list[Any]:
        source = Arriving(made([10, 20, 30]), [(0.0, 3), (10_000.0, 0)])
        stream = planner(Sources(source), max_wait_s=60, stall_s=300, shuffle_min=8)
        loop, seen = asyncio.get_running_loop(), []
        while not isinstance(step := await stream.next(50), End):
            seen.append((round(loop.time()), step))
        return seen

    seen = run_virtually(watch())
    before, (paused_at, step), *after = seen

    assert (50, Idle(50.0, stalled=False)) == before
    assert 60 == paused_at
    assert step.flushed
    assert [Key("run", 0, 0), Key("run", 0, 1), Key("run", 0, 2)] == sorted(keys([step]))
    assert [at >= 300 for at, _ in after] == [idle.stalled for _, idle in after]
    assert any(idle.stalled for _, idle in after)


def test_how_full_a_step_is() -> None:
    """A full step counts as full; what a slow stream brings, or leaves at its end, in proportion to that."""

    async def slow() -> list[StepPlan]:
        source = Arriving(made([90] * 5 + [20] * 2), [(0.0, 5), (100.0, 1), (100.0, 1), (1000.0, 0)])
        return await plans(planner(Sources(source), max_wait_s=60, shuffle_min=5))

    steps = run_virtually(slow())

    assert [180, 180, 90, 20, 20] == [step.tokens for step in steps]
    assert [False, False, True, True, True] == [step.flushed for step in steps]
    assert pytest.approx([1, 1, 90 / 180, 20 / 180, 20 / 180]) == [step.fill for step in steps]
    assert [2.0, 2.0, None, None, None] == [step.usual_count for step in steps]
    assert [2.0, 2.0, None, None, None] == [step.usual_targets for step in steps], "one target each"


def test_how_full_the_first_step_is() -> None:
    """Before any full step, that is compared with what rows hold; a whole stream that is shorter is full."""

    async def slow() -> list[StepPlan]:
        return await plans(planner(Sources(Arriving(made([10] * 4), [(0.0, 1), (100.0, 3)])), max_wait_s=60))

    assert pytest.approx([10 / 200, 30 / 40]) == [step.fill for step in run_virtually(slow())]
    assert [1.0] == [step.fill for step in asyncio.run(plans(planner(Sources(Arriving(made([10] * 4))))))]


def test_a_state_of_an_older_version_is_understood() -> None:
    """It has what was drawn and what was in open rows apart: all of it is trained on."""
    rows = made([7 * n % 60 + 1 for n in range(100)])
    first = asyncio.run(plans(planner(Sources(Arriving(rows)), shuffle_size=30)))[:3]
    state = orjson.loads(orjson.dumps(first[-1].state))
    held = state["held"]
    older = {**state, "held": held[5:], "drawn": held[:2], "rows": [held[2:4], held[4:5]]}
    rest = asyncio.run(plans(planner(Sources(Arriving(rows)), older)))

    assert len(held) > 5
    assert [Key("run", 0, seq) for seq in range(100)] == sorted(keys([*first, *rest]))


def test_waiting_is_counted() -> None:
    """The statistics have the time waited for the stream, and what its rows became."""

    async def watch() -> dict[str, Any]:
        lengths = [10, None, 300, *[10] * 17]
        stream = planner(Sources(Arriving(made(lengths), [(25.0, 10), (15.0, 0)])))
        await plans(stream)
        return stream.statistics()

    figures = run_virtually(watch())

    assert 40.0 == pytest.approx(figures.pop("waited_s"))
    assert {
        "rows_read": 20,
        "examples": 18,
        "held_out": 0,
        "dropped": {"bad_row": 1, "overlong": 1},
        "changed": {},
        "held": 0,
    } == figures


def test_an_empty_stream_ends_at_once() -> None:
    """Without a row there is no plan, but the end, with a state that a later trainer can resume from."""

    async def end() -> Any:
        return await planner(Sources(Arriving([]), mixed(1.0)), epochs=3).next(0)

    step = asyncio.run(end())
    again = asyncio.run(plans(planner(Sources(Arriving(made([10]))), step.state)))

    assert [Key("run", 0, 0)] == keys(again)


def test_the_steps_left_are_estimated() -> None:
    """Nothing is known while the stream goes on; at its end, the number falls to 0 step by step."""
    lengths: list[int | None] = [7 * n % 60 + 1 for n in range(300)]
    known = asyncio.run(plans(planner(Sources(Arriving(made(lengths)), mixed(0.5)), epochs=2)))
    unknown = run_virtually(plans(planner(Sources(Arriving(made(lengths), [(1.0, 150), (1.0, 0)])))))
    left = [step.left_steps for step in known]

    assert 0 == left[-1]
    assert [
        number
        for number, at in enumerate(reversed(left))
        if at is None or abs(at - number) > 0.25 * number + 2
    ] == []
    assert None is unknown[0].left_steps
    assert 0 == unknown[-1].left_steps


def test_later_passes_have_a_different_order() -> None:
    """The second pass brings everything again, in a different order."""
    steps = asyncio.run(plans(planner(Sources(Arriving(made([10] * 100))), epochs=2)))
    order = [[key.seq for key in keys(steps) if key.epoch == epoch] for epoch in range(2)]

    assert sorted(order[0]) == sorted(order[1]) == list(range(100))
    assert order[0] != order[1]


def test_a_different_shape_of_rows_loses_nothing() -> None:
    """Resumed with more and longer rows: every example is still trained on once."""
    lengths: list[int | None] = [7 * n % 60 + 1 for n in range(100)]
    first = asyncio.run(plans(planner(Sources(Arriving(made(lengths))))))[:5]
    rest = asyncio.run(
        plans(planner(Sources(Arriving(made(lengths))), first[-1].state, rows_per_step=4, seq_len=200))
    )

    assert [Key("run", 0, seq) for seq in range(100)] == sorted(keys([*first, *rest]))


def test_held_examples_that_no_longer_fit_are_dropped_and_counted() -> None:
    """Resumed with shorter rows: held examples that are too long now are counted as over-long."""
    lengths: list[int | None] = [90, 10] * 20
    first = asyncio.run(plans(planner(Sources(Arriving(made(lengths))))))[:2]
    stream = planner(Sources(Arriving(made(lengths))), first[-1].state, seq_len=50)
    rest = asyncio.run(plans(stream))
    short = {key.seq for key in keys([*first, *rest]) if lengths[key.seq] == 10}
    long = {key.seq for key in keys(first) if lengths[key.seq] == 90}

    assert set(range(1, 40, 2)) == short
    assert 20 - len(long) == stream.statistics()["dropped"]["overlong"]


def test_held_out_seeds_are_kept_for_evaluation() -> None:
    """The share is about as configured, the same in a later run, and never trained on."""
    source = Arriving(made([10] * 400))
    stream = planner(Sources(source), holdout=0.25, holdout_samples=20)
    steps = asyncio.run(plans(stream))
    trained = {key.seq for key in keys(steps)}
    later = planner(Sources(Arriving(made([10] * 400))), steps[-1].state, holdout=0.25, holdout_samples=20)
    asyncio.run(plans(later))

    assert 60 < 400 - len(trained) < 140
    assert 20 == len(stream.held_out)
    assert not {one.example.key.seq for one in stream.held_out} & trained
    assert [one.row for one in stream.held_out] == [one.row for one in later.held_out]
    assert source.closed
    fewer = planner(Sources(Arriving(made([10] * 400))), steps[-1].state, holdout=0.25, holdout_samples=7)
    asyncio.run(plans(fewer))
    assert 7 == len(fewer.held_out)
    assert {one.row["id"] for one in fewer.held_out} < {one.row["id"] for one in stream.held_out}


def test_a_mix_keeps_its_weight_step_by_step() -> None:
    """After k examples of the stream there were round(k * weight) of the mix, whatever was dropped."""
    lengths: list[int | None] = [None if n % 3 == 0 else 10 for n in range(90)]
    sources = Sources(Arriving(made(lengths)), mixed(0.5))
    reader = StreamReader(section(), sources, Lengths(100), None)

    order: list[str] = []

    async def read() -> None:
        while one := await reader.next():
            order.append(one.key.source)

    asyncio.run(read())
    reader.close()

    assert Counter(run=60, mix=30) == Counter(order)
    for end in range(1, len(order) + 1):
        stream_so_far = order[:end].count("run")
        assert order[:end].count("mix") in (int(stream_so_far * 0.5), int(stream_so_far * 0.5 + 0.5))


@pytest.mark.parametrize("size", [2 * BATCH_ROWS - 1, 2 * BATCH_ROWS])
def test_where_a_mix_ends_makes_no_difference(tmp_path: Path, size: int) -> None:
    """The number of rows of a file is known only at its end, which may be where a read ends. A resumed
    training makes the same plans anyway.
    """
    for name, number in (("stream", 300), ("mix", size)):
        lines = [orjson.dumps(row(n), option=orjson.OPT_APPEND_NEWLINE) for n in range(number)]
        (tmp_path / f"{name}.jsonl").write_bytes(b"".join(lines))

    def sources() -> Sources:
        stream, general = (str(tmp_path / f"{name}.jsonl") for name in ("stream", "mix"))
        mix = Mixed(FileRows(general, "mix", "train.mix", count=False), 0.5)
        return Sources(FileRows(stream, "files", "--from", count=True), [mix])

    whole = asyncio.run(plans(planner(sources(), shuffle_size=150)))
    for number in (0, 1, 4):
        rest = asyncio.run(plans(planner(sources(), whole[number].state, shuffle_size=150)))
        assert keys(whole[number + 1 :]) == keys(rest)


def test_what_was_held_is_read_again_a_few_rows_at_a_time() -> None:
    """A large buffer of long samples is never in memory as text all at once."""
    sizes: list[int] = []

    class Counting(Lengths):
        def render_batch(self, rows: Sequence[tuple[dict[str, Any], Key]]) -> list[Example | Dropped]:
            sizes.append(len(rows))
            return super().render_batch(rows)

    given: dict[str, Any] = {"shuffle_size": 120, "shuffle_min": 120}
    first = asyncio.run(plans(planner(Sources(Arriving(made([10] * 300))), **given)))
    stream = planner(Sources(Arriving(made([10] * 300))), first[0].state, Counting(100), **given)

    assert keys(first[1:]) == keys(asyncio.run(plans(stream)))
    assert [BATCH_ROWS] * 3 == sizes[:3]
    assert max(sizes) == BATCH_ROWS


def test_a_mix_that_holds_nothing_is_refused() -> None:
    """An empty file, or one without a usable row, is not read in an endless cycle."""
    for general in ([], made([None, 500])):
        sources = Sources(Arriving(made([10] * 50)), [Mixed(Arriving(general, name="general.jsonl"), 1.0)])

        with pytest.raises(ConfigError, match=r"train.mix: general.jsonl has no row"):
            asyncio.run(plans(planner(sources)))


def test_the_state_of_a_different_stream_is_refused() -> None:
    """A checkpoint of a run is not one of a pipe; nor are its examples there without their source."""
    state = asyncio.run(plans(planner(Sources(Arriving(made([10] * 60)), mixed(1.0)))))[0].state

    with pytest.raises(ConfigError, match="kind 'run', not 'stdin'"):
        planner(Sources(Arriving([], name="stdin")), state)
    with pytest.raises(ConfigError, match=r"examples of mix, which is no longer in train.mix"):
        asyncio.run(plans(planner(Sources(Arriving(made([10] * 60))), state)))


def test_rows_are_divided_among_ranks() -> None:
    """The plans of two ranks are those of one, in an order in which row i is for rank i % 2."""
    lengths: list[int | None] = [7 * n % 60 + 1 for n in range(100)]
    one = asyncio.run(plans(planner(Sources(Arriving(made(lengths))), rows_per_step=4)))
    two = asyncio.run(plans(planner(Sources(Arriving(made(lengths))), rows_per_step=4, ranks=2)))

    assert [sorted(keys([step])) for step in one] == [sorted(keys([step])) for step in two]
    assert [step.tokens for step in one] == [step.tokens for step in two]


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_sample_a_row_trains_on_the_same_samples_a_step(ranks: int) -> None:
    """Each sample has its own row; ranks get equally many, and at the same time rows of like length."""
    lengths: list[int | None] = [7 * n % 60 + 1 for n in range(100)]
    packed = asyncio.run(plans(planner(Sources(Arriving(made(lengths))), ranks=ranks)))
    alone = asyncio.run(plans(planner(Sources(Arriving(made(lengths))), ranks=ranks, packing="none")))

    assert [sorted(keys([step])) for step in packed] == [sorted(keys([step])) for step in alone]
    assert [step.state for step in packed] == [step.state for step in alone]
    for step in alone:
        assert {0, 1} >= set(map(len, step.rows))
        assert len(step.rows) == step.count + -step.count % ranks
        for rank in range(ranks):
            lengths_of_rank = [sum(one.length for one in row) for row in step.rows[rank::ranks]]
            assert sorted(lengths_of_rank, reverse=True) == lengths_of_rank


def test_a_cancelled_wait_loses_nothing() -> None:
    """A caller that gives up while rows are read may call again."""

    async def impatient() -> list[StepPlan]:
        stream = planner(Sources(Arriving(made([10] * 60), [(1.0, 20), (1.0, 20), (1.0, 0)])))
        made_so_far: list[StepPlan] = []
        while True:
            try:
                async with asyncio.timeout(0.3):
                    step = await stream.next(30)
            except TimeoutError:
                continue
            if isinstance(step, End):
                return made_so_far
            assert isinstance(step, StepPlan)
            made_so_far.append(step)

    assert list(range(60)) == sorted(key.seq for key in keys(run_virtually(impatient())))
