"""The manifest: read line by line, a torn end cut, anything else that is wrong refused by its line."""

import re
from pathlib import Path

import pytest

from streamsyn.errors import SinkError
from streamsyn.sink.manifest import Manifest, SealedShard

SHARD = SealedShard(
    kind="contexts",
    path="contexts/part-000000.jsonl",
    rows=2,
    bytes=10,
    sha256="00",
    first_seq=0,
    last_seq=1,
    tokens={"prompt": 1, "cached": 0, "completion": 2},
    model="m",
    sealed_at=1.5,
)


def written(path: Path) -> Manifest:
    manifest = Manifest(path)
    manifest.add_shard(SHARD)
    manifest.add_flush(2)
    manifest.add_final({"contexts": 2})
    return manifest


def test_what_was_added_is_read_again(tmp_path: Path) -> None:
    """Shards, ends of streams and the final line come back as they went in."""
    path = tmp_path / "manifest.jsonl"
    manifest, again = written(path), Manifest(path)

    assert ([SHARD], [2], {"final": True, "contexts": 2}, 0) == (
        again.shards,
        again.flushes,
        again.final,
        again.torn_bytes,
    )
    assert ([SHARD], [2], {"contexts": 2}) == (manifest.shards, manifest.flushes, manifest.final)


def test_a_line_after_the_final_one_undoes_it(tmp_path: Path) -> None:
    """A run that resumes with more seeds is not final any more, here and when read again."""
    path = tmp_path / "manifest.jsonl"
    manifest = written(path)
    manifest.add_shard(SHARD)

    assert (None, None) == (manifest.final, Manifest(path).final)


def test_a_last_line_cut_at_any_byte_is_cut_off(tmp_path: Path) -> None:
    """What a kill left of the last line goes, the lines before it stay, the next one follows them."""
    path = tmp_path / "manifest.jsonl"
    written(path)
    whole = path.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for size in range(start, len(whole)):
        path.write_bytes(whole[:size])
        manifest = Manifest(path)
        assert size - start == manifest.torn_bytes
        manifest.cut_torn_line()
        manifest.add_final({"contexts": 2})
        assert whole == path.read_bytes()


@pytest.mark.parametrize("tail", [b"\0" * 4096, b"\0" * 40 + b"1.5}\n", b'{"kin', b"\xff\xfe\n"])
def test_a_last_line_that_was_never_synced_is_cut_off(tmp_path: Path, tail: bytes) -> None:
    """A loss of power may leave NULs or half a line, even with its end."""
    path = tmp_path / "manifest.jsonl"
    written(path)
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    manifest = Manifest(path)
    torn = manifest.torn_bytes
    manifest.add_flush(3)

    assert ([SHARD], len(tail)) == (manifest.shards, torn)
    assert whole + b'{"flush":true,"contexts":3}\n' == path.read_bytes()


@pytest.mark.parametrize("line", [b'{"parted":true,"contexts":5}', b'{"retry":true,"parted":1}'])
def test_a_line_of_a_newer_version_is_refused(tmp_path: Path, line: bytes) -> None:
    """Not as one of damage: the error names what is unknown."""
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(line + b"\n")

    with pytest.raises(
        SinkError, match=r"unknown .*parted; a newer version of streamsyn may have written it"
    ):
        Manifest(path)


@pytest.mark.parametrize(
    "line", [b"{broken", b"[]", b"1", b'{"kind":"contexts"}', b'{"flush":true}', b"", b"\0\0"]
)
def test_a_broken_line_in_the_middle_is_refused(tmp_path: Path, line: bytes) -> None:
    """It cannot be torn, so something else is wrong: the error names file and line, and nothing is cut."""
    path = tmp_path / "manifest.jsonl"
    written(path)
    lines = path.read_bytes().splitlines(keepends=True)
    broken = b"".join([lines[0], line + b"\n", *lines[1:]])
    path.write_bytes(broken)

    with pytest.raises(SinkError, match=re.escape(f"{path}:2: invalid manifest line: ")):
        Manifest(path)
    assert broken == path.read_bytes()
