"""Compressed bodies: in any pieces, in several members, damaged, cut short, or far larger than they look."""

import gzip
from contextlib import suppress

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.daemon.bodies import unpacker
from streamsyn.daemon.problems import Problem
from tests.examples import examples


def packed(coding: str, data: bytes) -> bytes:
    match coding:
        case "gzip":
            return gzip.compress(data)
        case "zstd":
            return zstandard.ZstdCompressor().compress(data)
        case _:
            return data


def unpacked(coding: str, body: bytes, piece: int) -> list[bytes]:
    """The chunks of a body that comes in pieces."""
    unpacks, chunks = unpacker(coding), []
    for start in range(0, len(body), piece):
        unpacks.feed(body[start : start + piece])
        while unpacks.has_more:
            chunks.append(unpacks.chunk())
    unpacks.end()
    return chunks


@examples(60)
@given(
    coding=st.sampled_from(["", "gzip", "zstd"]),
    parts=st.lists(st.binary(max_size=3000), max_size=3),
    piece=st.integers(1, 500),
)
def test_a_body_comes_through(coding: str, parts: list[bytes], piece: int) -> None:
    """Of several members or frames, and in any pieces."""
    body = b"".join(packed(coding, part) for part in parts)

    assert b"".join(parts) == b"".join(unpacked(coding, body, piece))


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
def test_chunks_are_bounded(coding: str) -> None:
    """However well a body was compressed."""
    body = packed(coding, bytes(20 << 20))

    chunks = unpacked(coding, body, 1 << 16)
    assert 20 << 20 == sum(map(len, chunks))
    assert max(map(len, chunks)) <= 4 << 20


@examples(60)
@given(
    coding=st.sampled_from(["gzip", "zstd"]),
    at=st.integers(0, 400),
    garbage=st.binary(min_size=1, max_size=50),
)
def test_a_damaged_body_is_a_problem(coding: str, at: int, garbage: bytes) -> None:
    """Or is unpacked to something: not every damage shows. No other error comes."""
    body = packed(coding, b"some seeds " * 40)
    body = body[:at] + garbage + body[at + len(garbage) :]
    with suppress(Problem):
        unpacked(coding, body, 100)


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
def test_a_body_that_is_cut_short_is_a_problem(coding: str) -> None:
    """What came before has been used."""
    with pytest.raises(Problem, match="cut short"):
        unpacked(coding, packed(coding, b"some seeds " * 40)[:-1], 10)


def test_a_window_beyond_the_standard_is_refused() -> None:
    """It would be allocated."""
    wide = zstandard.ZstdCompressionParameters(window_log=27)
    compressor = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    body = compressor.compress(bytes(1000)) + compressor.flush()

    with pytest.raises(Problem, match="not valid zstd"):
        unpacked("zstd", body, 1000)


def test_an_unknown_coding_is_refused() -> None:
    """With those that are known."""
    with pytest.raises(Problem, match="'br' is not supported; use gzip or zstd") as raised:
        unpacker("br")

    assert (415, "gzip, zstd") == (raised.value.status, raised.value.headers["Accept-Encoding"])
