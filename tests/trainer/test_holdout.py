"""What is held out is never trained on, whatever it comes from, and does not depend on the stream's order."""

import asyncio
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from streamsyn.config.command_sections import TrainSection
from streamsyn.errors import ConfigError
from streamsyn.records import digest, is_held_out
from streamsyn.trainer.evaluation.heldout import control_examples
from streamsyn.trainer.examples import Example, HeldOut, Key, row_is_held_out
from streamsyn.trainer.sources.locate import open_sources
from streamsyn.trainer.sources.source import Mixed, Sources
from streamsyn.trainer.stream.render import Renderer
from streamsyn.trainer.stream.stream_reader import HeldOutChoice
from tests.examples import examples
from tests.trainer import tiny
from tests.trainer.streams import Arriving, keys, planner, plans, row

HOLDOUT = 0.3


def chat(question: str, answer: str, **more: Any) -> dict[str, Any]:
    """A row of chat data."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **more}


def test_mixed_rows_of_held_out_seeds_are_not_trained_on() -> None:
    """The seeds that the stream holds out are left out of `train.mix` as well, and counted."""
    general = [row(number) for number in range(100, 140)]
    sources = Sources(Arriving([row(n) for n in range(100)]), [Mixed(Arriving(general, name="mix"), 0.4)])
    stream = planner(sources, holdout=HOLDOUT)
    trained = asyncio.run(plans(stream))
    mixed = {key.seq for key in keys(trained) if key.source == "mix"}
    kept_out = {seq for seq in range(40) if is_held_out(f"seed-{100 + seq}", HOLDOUT)}

    assert kept_out
    assert mixed
    assert not mixed & kept_out
    assert stream.statistics()["dropped"]["held_out"] >= len(kept_out)  # the mix is read in a cycle
    assert all(one.example.key.source == "run" for one in stream.held_out)


def test_a_pair_without_an_id_is_known_by_its_text() -> None:
    """Its id is the one that the pair has as a seed without an id; system messages do not count."""
    held_out = 0
    for number in range(40):
        pair = (f"Why {number}?", "Because.")
        one = chat(*pair)
        expected = is_held_out(digest(*pair).hex(), HOLDOUT)
        with_system = {"messages": [{"role": "system", "content": "Be kind."}, *one["messages"]]}
        held_out += expected

        assert expected == row_is_held_out(one, HOLDOUT) == row_is_held_out(with_system, HOLDOUT)
        assert is_held_out("a", HOLDOUT) == row_is_held_out({**one, "id": "a"}, HOLDOUT)
    assert 0 < held_out < 40
    for foreign in ({}, {"messages": "text"}, {"messages": [1, 2]}, {"messages": [{"role": "user"}]}):
        assert not row_is_held_out(foreign, HOLDOUT)


def test_control_rows_of_held_out_seeds_are_left_out(tmp_path: Path) -> None:
    """The rows after them are taken instead; a file of nothing else is refused."""
    out, kept = (
        [
            chat("Why?", "So.", id=f"seed-{n}")
            for n in range(60)
            if is_held_out(f"seed-{n}", HOLDOUT) is wanted
        ]
        for wanted in (True, False)
    )
    path = tmp_path / "control.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in out[:3] + kept[:4]))
    renderer = Renderer(tiny.tokenizer(), 64, "drop")

    assert [3, 4] == [one.key.seq for one in control_examples(str(path), 2, renderer, HOLDOUT)]
    path.write_text("".join(json.dumps(one) + "\n" for one in out[:3]))
    with pytest.raises(ConfigError, match=r"no row can be evaluated \(held_out: 3\)"):
        control_examples(str(path), 2, renderer, HOLDOUT)


def kept(number: int, task: str) -> HeldOut:
    """A held-out sample."""
    made = Example(Key("run", 0, number), f"row-{number}", task, numpy.zeros(4, dtype=numpy.int32), 2)
    return HeldOut(made, {})


@examples(100)
@given(
    tasks=st.lists(st.sampled_from("abcde"), max_size=40),
    size=st.integers(1, 12),
    chance=st.randoms(use_true_random=False),
)
def test_the_evaluated_samples_do_not_depend_on_their_order(
    tasks: list[str], size: int, chance: random.Random
) -> None:
    """In any order the same are chosen: of each task about as many, and those with the smallest hashes."""
    added = [kept(number, task) for number, task in enumerate(tasks)]
    chosen = []
    for _ in range(2):
        choice = HeldOutChoice(size)
        for one in added:
            choice.add(one)
        chosen.append([one.example.key for one in choice.samples()])
        chance.shuffle(added)
    available, found = Counter(tasks), Counter(tasks[key.seq] for key in chosen[0])

    assert chosen[0] == chosen[1]
    assert min(size, len(tasks)) == found.total()
    for task, count in available.items():
        others = max((found[other] for other in available if other != task), default=0)
        assert found[task] in (count, *range(others - 1, count))
        hashes = sorted(digest("evaluate", f"row-{n}") for n, of in enumerate(tasks) if of == task)
        taken = sorted(digest("evaluate", f"row-{key.seq}") for key in chosen[0] if tasks[key.seq] == task)
        assert hashes[: found[task]] == taken


def test_a_frequent_task_does_not_fill_the_evaluated_set() -> None:
    """Of three tasks, one of them rare and late, each has its part; a resumed trainer has the same set."""
    tasks = ["a"] * 150 + ["b"] * 60 + ["c"] * 30
    rows = [row(number, task=task) for number, task in enumerate(tasks)]
    stream = planner(Sources(Arriving(rows)), holdout=HOLDOUT, holdout_samples=9)
    steps = asyncio.run(plans(stream))
    later = planner(Sources(Arriving(rows)), steps[len(steps) // 2].state, holdout=HOLDOUT, holdout_samples=9)
    asyncio.run(plans(later))

    assert Counter(a=3, b=3, c=3) == Counter(one.example.task for one in stream.held_out)
    assert [one.row for one in stream.held_out] == [one.row for one in later.held_out]


@pytest.mark.parametrize(
    ("assembly", "leaks"),
    [
        ({}, True),
        ({"holdout": 0.05}, True),
        ({"holdout": 0.1}, False),
        ({"distractors": "corpus"}, False),
    ],
)
def test_a_run_whose_samples_leak_is_named(tmp_path: Path, assembly: dict[str, Any], leaks: bool) -> None:
    """A run that was assembled with a smaller share than is held out now is warned of; no other is."""
    folder = tmp_path / "run"
    (folder / "contexts").mkdir(parents=True)
    saved = {"format": 1, "fingerprint": {}, "config": {"assembly": assembly}}
    (folder / "run.json").write_bytes(orjson.dumps(saved))
    with capture_logs() as logs:
        sources = open_sources(str(folder), TrainSection(holdout=0.1), tmp_path / "out")
    sources.stream.close()

    assert leaks == any(
        line["event"] == "stream.holdout" and "assembly.holdout = 0.1" in line["why"] for line in logs
    )
