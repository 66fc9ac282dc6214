"""Lines out of byte streams: the same however the bytes come, and no line too long is held."""

from collections.abc import Iterable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamsyn.io.rows import BOM, Line, LineSplitter, split_lines
from tests.examples import in_turn

PIECES = st.sampled_from([b"", b"\n", b"\r", b"\r\n", b"a", b"{}", b" ", BOM, b"\xff", b"x" * 30])
STREAMS = st.lists(PIECES, max_size=30).map(b"".join) | st.binary(max_size=100)
CUTS = st.lists(st.integers(0, 200), max_size=20)


def chunks_of(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    """`data` in pieces, cut at some offsets."""
    ends = [*sorted(cut for cut in cuts if cut <= len(data)), len(data)]
    return [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def lines_of(chunks: Iterable[bytes], max_line_bytes: int = 1 << 20) -> list[Line]:
    return [line for batch in split_lines(chunks, max_line_bytes) for line in batch]


def stated(data: bytes, max_line_bytes: int) -> list[Line]:
    """The rule, in its plain form: for all bytes at once."""
    pieces = data.split(b"\n")
    if not pieces[-1]:
        pieces.pop()
    lines = []
    for number, piece in enumerate(pieces, 1):
        text = piece.removeprefix(BOM) if number == 1 else piece
        too_long = len(piece) > max_line_bytes
        lines.append(Line(number, None if too_long else text.removesuffix(b"\r"), len(piece)))
    return lines


@settings(deadline=None)
@given(data=STREAMS, cuts=CUTS, max_line_bytes=st.integers(1, 50))
@example(data=BOM + b"a\r\nb", cuts=[1, 2, 5], max_line_bytes=50)
def test_lines_are_the_same_however_the_bytes_come(data: bytes, cuts: list[int], max_line_bytes: int) -> None:
    """Where chunks end, in the middle of a line end or of a byte order mark, makes no difference."""
    assert stated(data, max_line_bytes) == lines_of(chunks_of(data, cuts), max_line_bytes)


@settings(deadline=None)
@given(
    texts=st.lists(st.binary(max_size=20).filter(lambda text: not {10, 13} & set(text) and text)),
    end=st.sampled_from([b"\n", b"\r\n"]),
    ended=st.booleans(),
    bom=st.sampled_from([b"", BOM]),
    cuts=CUTS,
)
def test_what_was_written_as_lines_is_read_as_lines(
    texts: list[bytes], end: bytes, ended: bool, bom: bytes, cuts: list[int]
) -> None:
    """LF or CRLF, with a byte order mark or without, the last line ended or not: the same texts."""
    data = bom + end.join(texts) + (end if ended and texts else b"")
    expected = [
        text.removeprefix(BOM) if index == 0 and not bom else text for index, text in enumerate(texts)
    ]

    lines = lines_of(chunks_of(data, cuts))

    assert expected == [line.text for line in lines if line.text or texts]
    assert list(range(1, len(lines) + 1)) == [line.number for line in lines]


@in_turn("data", [b"", BOM, b"\n", b"\r\n", BOM + b"\n"])
def test_a_stream_without_text_has_no_line_with_text(data: bytes) -> None:
    """An empty file, a lone byte order mark, lone line ends: nothing to read."""
    assert [] == [line for line in lines_of([data]) if line.text]


def test_a_byte_order_mark_stands_at_the_start_alone() -> None:
    """Further in, the same three bytes are text."""
    assert [b"a", BOM + b"b"] == [line.text for line in lines_of([BOM + b"a\n" + BOM + b"b"])]


def test_blank_lines_keep_their_numbers() -> None:
    """A line is found by its number in an editor: blank ones count."""
    numbers = {line.text: line.number for line in lines_of([b"\n\na\n\r\nb"])}

    assert {b"": 4, b"a": 3, b"b": 5} == numbers


@pytest.mark.parametrize(("size", "text"), [(9, b"x" * 9), (10, b"x" * 10), (11, None)])
def test_a_line_may_be_as_long_as_the_limit(size: int, text: bytes | None) -> None:
    """A longer one is counted, not kept, and the lines behind it are read."""
    expected = [Line(1, text, size), Line(2, b"next", 4)]

    assert expected == lines_of([b"x" * size + b"\nnext\n"], 10)


@settings(deadline=None)
@given(
    chunks=st.lists(st.sampled_from([b"x" * 7, b"x" * 40, b"\n", b"a\nb"]), max_size=60),
    max_line_bytes=st.integers(1, 50),
)
def test_no_more_than_one_line_is_held(chunks: list[bytes], max_line_bytes: int) -> None:
    """What is kept between chunks never exceeds the limit of one line."""
    splitter = LineSplitter(max_line_bytes)
    for chunk in chunks:
        list(splitter.feed(chunk))

        assert sum(map(len, splitter._parts)) <= max_line_bytes


def test_a_line_is_handed_on_with_the_chunk_that_ends_it() -> None:
    """Nothing waits for more than its own line end."""
    splitter = LineSplitter(100)

    fed = [[line.text for line in splitter.feed(chunk)] for chunk in (b"a", b"b\nc\nd", b"\n")]

    assert [[], [b"ab", b"c"], [b"d"]] == fed
    assert [] == list(splitter.finish())
