"""Shards can be read with common tools."""

import io
import os
import shutil
import subprocess
from pathlib import Path

import orjson
import pytest
import zstandard

from streamsyn.sink import shards
from tests.builders import COMPRESSIONS, as_rows, context, opened, sink

NUMBERS = range(400)


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sealed shard of each compression; the compressed one has as many frames as there were appends."""
    made = {}
    for compression in COMPRESSIONS:
        root = tmp_path_factory.mktemp(compression)
        with opened(root, sink(compression=compression, shard_bytes=10**9)) as log:
            for number in NUMBERS:  # incompressible, so that many reads are needed
                log.append([context(number, context=os.urandom(1000).hex())])
            log.seal_outcomes()
        made[compression] = root / "contexts" / f"part-000000{shards.SUFFIXES[compression]}"
    return made


def lines_of(path: Path) -> bytes:
    return b"".join(shards.line(row) for row in shards.rows(path))


def test_a_shard_is_many_frames(sealed: dict[str, Path]) -> None:
    """Each append is one frame with a checksum, by which a torn tail is found."""
    ends = [end for end, _ in shards.scan(sealed["zstd"])]
    head = sealed["zstd"].read_bytes()[:18]

    assert len(NUMBERS) == len(ends)
    assert zstandard.get_frame_parameters(head).has_checksum


def test_plain_lines_are_json(sealed: dict[str, Path]) -> None:
    """An uncompressed shard is JSON, line by line."""
    read = [orjson.loads(line) for line in sealed["none"].read_bytes().splitlines()]

    assert list(NUMBERS) == [row["seq"] for row in read]


def test_zstandard_reads_all_frames(sealed: dict[str, Path]) -> None:
    """A plain streaming reader of Python's zstandard does not end at the first frame."""
    expected = lines_of(sealed["zstd"])
    with sealed["zstd"].open("rb") as file:
        whole = zstandard.ZstdDecompressor().stream_reader(file).read()
    with sealed["zstd"].open("rb") as file:
        text = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), "utf-8")
        lines = sum(1 for _ in text)
    copied = io.BytesIO()
    with sealed["zstd"].open("rb") as file:
        zstandard.ZstdDecompressor().copy_stream(file, copied)

    assert expected == whole
    assert len(NUMBERS) == lines
    assert expected == copied.getvalue()


@pytest.mark.skipif(shutil.which("zstd") is None, reason="there is no zstd command here")
def test_the_zstd_command_reads_all_frames(sealed: dict[str, Path]) -> None:
    """`zstd -d` gives every row, and `zstd -t` finds the checksums right."""
    subprocess.run(["zstd", "-q", "-t", sealed["zstd"]], check=True)
    out = subprocess.run(["zstd", "-q", "-d", "-c", sealed["zstd"]], check=True, capture_output=True).stdout

    assert lines_of(sealed["zstd"]) == out


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.filterwarnings("ignore:::datasets")  # what a third party warns of is not ours to mend
def test_datasets_loads_every_row(
    sealed: dict[str, Path], compression: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets.load_dataset("json")` gives each row once, from either kind of shard, streaming or not."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    datasets.disable_progress_bars()
    files = str(sealed[compression])
    loaded = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(tmp_path))
    streamed = datasets.load_dataset(
        "json", data_files=files, split="train", cache_dir=str(tmp_path), streaming=True
    )
    texts = [row["context"] for row in shards.rows(sealed[compression])]

    assert list(NUMBERS) == loaded["seq"][:]
    assert texts == loaded["context"][:]
    assert texts == [row["context"] for row in streamed]


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_row_longer_than_a_read_is_whole(tmp_path: Path, compression: str) -> None:
    """Rows of several MB, compressible or not, come back."""
    given = [context(n, context=text) for n, text in enumerate(["x" * 3_000_000, os.urandom(2**20).hex()])]
    with opened(tmp_path, sink(compression=compression, shard_bytes=10**9)) as log:
        log.append(given)
        log.seal_outcomes()
    path = tmp_path / "contexts" / f"part-000000{shards.SUFFIXES[compression]}"

    assert as_rows(given) == list(shards.rows(path))
