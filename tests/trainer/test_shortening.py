"""Samples longer than a row lose distractors first, then what the answer does not need of their passage."""

import asyncio
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
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
FRAME = len("Read:  That was it. Why?So.") + 4
"""Tokens of a row without its passages; 4 are special."""


@cache
def renderer(seq_len: int = ROOM) -> Renderer:
    """A token for each letter."""
    return Renderer(tiny.tokenizer(), seq_len, "truncate")


def short(row: dict[str, Any], texts: list[str], seq_len: int = ROOM) -> Example | Dropped | None:
    """What a row of these passages makes if it is longer than `seq_len`."""
    made = renderer(seq_len)
    return shortened(row, KEY, texts, lambda *one: made.render_batch([one])[0], made.render_around)


def text_of(made: Example | Dropped | None) -> str:
    """The text of an example."""
    assert isinstance(made, Example)
    return str(tiny.tokenizer().decode(made.tokens))


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
    """With its question and answer, wherever it is, where it fits; a part of it fills the row otherwise."""
    relevant %= len(lengths)
    texts = [chr(ord("a") + at) * length for at, length in enumerate(lengths)]
    row = row_of(texts, relevant, between)
    assume(len(row["messages"][0]["content"]) + FRAME > ROOM)
    named = [text for text, seq in zip(texts, row["context_seqs"], strict=True) if seq is not None]
    found = text_of(made := short(row, named))
    assert isinstance(made, Example)

    assert made.length <= ROOM
    assert found.endswith(" That was it. Why?<|end|><|assistant|>So.<|end|>")
    assert found.startswith("<|user|>Read: ")
    kept = [text for text in named if text in found]
    if not made.cut:
        assert texts[relevant] in kept
        assert 0 < len(named) - len(kept)
    else:  # passages of a corpus have no seq, so that their texts are not known
        others = [text for text in texts if text not in named]
        assert len(between.join([texts[relevant], *others])) + FRAME > ROOM - len(between)
        assert made.length == ROOM


@examples(100)
@given(
    length=st.integers(80, 600),
    place=st.floats(0, 1),
    seq_len=st.integers(80, 300),
    answer=st.sampled_from(["QUARTZ", "XYLEM, 1917"]),
)
def test_a_passage_that_is_too_long_keeps_what_answers(
    length: int, place: float, seq_len: int, answer: str
) -> None:
    """The row is filled to the last token. Instruction and answer are whole, and so is the place in the
    passage that has the words of the answer.
    """
    prose = ("lorem ipsum dolor sit amet " * 30)[:length]
    at = int(place * length)
    passage = f"{prose[:at]}{answer}{prose[at:]}"
    row = row_of(["m" * 50, passage], 1)
    row["messages"][1]["content"] = answer
    row["instruction"] = "That was it. Why?"
    assume(len(passage) + FRAME - len("So.") + len(answer) > seq_len)  # FRAME has an answer, too
    whole = f"<|end|><|assistant|>{answer}<|end|>"
    assume(seq_len >= FRAME + len(answer) + 40)
    found = text_of(made := short(row, ["m" * 50, passage], seq_len))
    prompt = found.removesuffix(whole)

    assert isinstance(made, Example)
    assert seq_len == made.length
    assert found.endswith(f" That was it. Why?{whole}")
    assert found.startswith("<|user|>Read: ")
    assert answer in prompt


@pytest.mark.parametrize("known", [True, False])
def test_an_instruction_is_never_cut(*, known: bool) -> None:
    """A row whose instruction and answer do not fit is dropped, if the row names its instruction or its
    passages; one whose instruction is long keeps all of it.
    """
    asked = "Why? " * 20
    row = row_of(["prose " * 50], 0)
    row["messages"][0]["content"] += asked
    row["instruction"] = asked
    makes = partial(short, row, ["prose " * 50]) if known else partial(plain, row)

    assert asked in text_of(makes(seq_len=170))
    dropped = makes(seq_len=110)
    assert isinstance(dropped, Dropped)
    assert "overlong" == dropped.reason


def test_a_sample_of_other_origin_keeps_its_ends_and_what_answers() -> None:
    """A quarter of the room at either end, and between them the window that has most of the answer; without
    any, the middle is cut out.
    """
    prose = "lorem ipsum dolor sit amet " * 20
    asked = f"Read this: {prose[:300]}QUARTZ{prose[300:]} Now tell me the mineral"
    found = text_of(plain(chat(asked, "QUARTZ"), seq_len=100))
    begin, rest = found.split("QUARTZ", 1)
    middle = text_of(plain(chat(asked, "777"), seq_len=100)).removeprefix("<|user|>")

    assert begin.startswith("<|user|>Read this: ")
    assert rest.endswith(" tell me the mineral<|end|><|assistant|>QUARTZ<|end|>")
    assert asked.startswith(middle[:40])
    assert middle.removesuffix("<|end|><|assistant|>777<|end|>")[-40:] == asked[-40:]


def plain(row: dict[str, Any], seq_len: int) -> Example | Dropped:
    """What a row makes whose passages are not known."""
    return renderer(seq_len).render_batch([(row, KEY)])[0]


def chat(asked: str, answer: str) -> dict[str, Any]:
    """A row of one question and its answer."""
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


def test_a_sample_whose_passages_are_not_found_is_left_to_be_cut() -> None:
    """A template may change them, and rows of other origin do not name them."""
    row = row_of(["abc", "def"], 0)

    assert short(row, ["abc", "xyz"]) is None
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
