"""Samples longer than a row lose distractors, not their relevant passage."""

import asyncio
from pathlib import Path
from typing import Any

import numpy
from hypothesis import assume, given
from hypothesis import strategies as st

from streamsyn.trainer.examples import Dropped, Example, Key
from streamsyn.trainer.sources.run_samples import RunSamples
from streamsyn.trainer.sources.source import Sources
from streamsyn.trainer.stream.render import Renderer
from streamsyn.trainer.stream.shortening import context_seqs, shortened
from tests.builders import context, opened, sample, sink
from tests.examples import examples
from tests.trainer import tiny
from tests.trainer.streams import planner, plans

KEY = Key("run", 0, 3)
ROOM = 200


def render(row: dict[str, Any], key: Key) -> Example | Dropped:
    """A token for each character; longer than ROOM is cut."""
    asked, answer = (message["content"] for message in row["messages"])
    if len(answer) > ROOM - 16:
        return Dropped("overlong", "")
    cut = len(asked) + len(answer) > ROOM
    text = (asked[: ROOM - len(answer)] if cut else asked) + answer
    codes = numpy.array([ord(one) for one in text], dtype=numpy.int32)
    return Example(key, row["id"], "qa", codes, len(text) - len(answer), cut=cut)


def text_of(made: Example | Dropped | None) -> str:
    """The text of an example."""
    assert isinstance(made, Example)
    return "".join(map(chr, made.tokens))


def row_of(texts: list[str], relevant: int, between: str = "\n\n") -> dict[str, Any]:
    """A sample of these passages; every third one after the first is of a corpus."""
    user = f"Read: {between.join(texts)} That was it. Why?"
    seqs = [None if at % 3 == 2 and at != relevant else 100 - at for at in range(len(texts))]
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": "So."}]
    return {"id": "one", "messages": turns, "context_seqs": seqs, "relevant_index": relevant}


@examples(100)
@given(
    lengths=st.lists(st.integers(3, 90), min_size=1, max_size=12),
    relevant=st.integers(0, 11),
    between=st.sampled_from(["\n\n", " Passage: "]),
)
def test_the_relevant_passage_stays_whole(lengths: list[int], relevant: int, between: str) -> None:
    """With its question and answer, wherever it is, unless it is too long without any distractor."""
    relevant %= len(lengths)
    texts = [chr(0x4E00 + at) * length for at, length in enumerate(lengths)]
    row = row_of(texts, relevant, between)
    assume(len(row["messages"][0]["content"]) + 3 > ROOM)
    named = [text for text, seq in zip(texts, row["context_seqs"], strict=True) if seq is not None]
    made = shortened(row, KEY, named, render)
    found = text_of(made)
    assert isinstance(made, Example)

    assert found.endswith("So.")
    kept = [text for text in named if text in found]
    if not made.cut:
        assert texts[relevant] in kept
        assert "That was it. Why?" in found
        assert 0 < len(named) - len(kept)
    else:
        assert [texts[relevant]] == named or sum(map(len, texts)) > ROOM - 60


def test_a_sample_whose_passages_are_not_found_is_left_to_be_cut() -> None:
    """A template may change them, and rows of other origin do not name them."""
    row = row_of(["abc", "def"], 0)

    assert shortened(row, KEY, ["abc", "xyz"], render) is None
    assert context_seqs({**row, "context_seqs": None}) is None
    assert context_seqs({**row, "relevant_index": 7}) is None
    assert context_seqs({**row, "context_seqs": [None, 4]}) is None
    assert [4] == context_seqs({**row, "context_seqs": [None, 4], "relevant_index": 1})


def test_a_run_is_trained_on_with_fewer_distractors(tmp_path: Path) -> None:
    """The texts come from the log of the run; a resumed training cuts the same."""
    texts = [f"<{number}>" + chr(65 + number) * 60 for number in range(8)]

    def written(number: int) -> Any:
        seqs = [*range(8)]
        user = "\n\n".join(texts) + f"\n\nWhat is {number}?"
        turns = [{"role": "user", "content": user}, {"role": "assistant", "content": "This."}]
        return sample(number, messages=turns, context_seqs=seqs, relevant_index=number)

    with opened(tmp_path / "run", sink()) as log:
        log.append([context(number, context=text) for number, text in enumerate(texts)])
        log.samples.append([written(number) for number in range(8)])
        log.seal_outcomes()
        log.finish()
    tokenizer = tiny.tokenizer()

    def steps(state: Any = None) -> list[list[tuple[int, str]]]:
        sources = Sources(RunSamples(tmp_path / "run"))
        stream = planner(
            sources, state, Renderer(tokenizer, 300, "truncate"), seq_len=300, overlong="truncate"
        )
        made.extend(asyncio.run(plans(stream)))
        return [
            [(one.key.seq, str(tokenizer.decode(one.tokens))) for one in step.examples()] for step in made
        ]

    made: list[Any] = []
    whole = steps()
    seen = dict(one for step in whole for one in step)

    assert set(range(8)) == seen.keys()
    for number, text in seen.items():
        assert texts[number] in text
        assert f"What is {number}?" in text
        assert 4 == sum(other in text for other in texts)
    state, made = made[0].state, []
    assert whole[1:] == steps(state)
