"""Rows behind URLs and on the hub: found, read, and named without credentials."""

import gzip
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import orjson
import pytest

from streamsyn.config.data_paths import HubName, absolute_path, hub_name, saved_path, shown_url
from streamsyn.errors import ConfigError
from streamsyn.io.inputs import decode_all, find_files, open_rows
from streamsyn.io.places import HubDataset, RemoteFile
from streamsyn.io.rows import ReadOptions

ROWS = [{"n": n, "text": "x" * 50} for n in range(300)]
LINES = b"".join(orjson.dumps(row) + b"\n" for row in ROWS)


@pytest.fixture
def bucket() -> Iterator[str]:
    """The URL of a folder in memory."""
    memory = fsspec.filesystem("memory")
    yield "memory://bucket"
    memory.rm("/bucket", recursive=True)


def put(url: str, data: bytes) -> None:
    with fsspec.open(url, "wb") as file:
        file.write(data)


def names_in(url: str) -> list[str]:
    return [str(place).rpartition("bucket/")[2] for place in find_files(url, "seeds").places]


def rows_in(url: str) -> list[Any]:
    found = find_files(url, "seeds").places
    return [row for place in found for _, row in decode_all(place, ReadOptions())]


def test_a_url_stands_for_a_file_a_directory_or_a_glob(bucket: str) -> None:
    """As a path does: hidden files, run directories and other formats are left out and counted."""
    for name in (
        "b.jsonl",
        "a.JSONL.gz",
        "deep/c.csv",
        ".d.jsonl",
        "e.zip",
        "run/contexts/part-000000.jsonl",
    ):
        put(f"{bucket}/{name}", gzip.compress(LINES) if name.endswith("gz") else LINES)
    for name in ("run.json", "manifest.jsonl"):
        put(f"{bucket}/run/{name}", b"{}")

    assert ["a.JSONL.gz", "b.jsonl", "deep/c.csv"] == names_in(bucket)
    assert ["b.jsonl"] == names_in(f"{bucket}/b.jsonl")
    assert ["b.jsonl"] == names_in(f"{bucket}/*.jsonl")
    assert "1 hidden, 1 of no known format (e.zip), 3 run directories" == str(
        find_files(bucket, "s").left_out
    )
    assert ROWS == rows_in(f"{bucket}/a.JSONL.gz")


def test_every_format_is_read_from_a_url(bucket: str, tmp_path: Path) -> None:
    """Parquet, an array, a saved dataset."""
    import datasets

    datasets.disable_progress_bars()
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.to_parquet(tmp_path / "a.parquet")
    put(f"{bucket}/a.parquet", (tmp_path / "a.parquet").read_bytes())
    put(f"{bucket}/a.json", orjson.dumps(ROWS))
    dataset.save_to_disk(f"{bucket}/saved")

    assert 3 * ROWS == rows_in(bucket)
    [place] = find_files(f"{bucket}/a.json", "seeds").places
    reader = open_rows(place, ReadOptions())
    assert 300 == reader.count()
    assert 1.0 == reader.fraction()


@pytest.mark.parametrize("name", ["none.jsonl", "b.zip"])
def test_what_is_not_there_is_named(bucket: str, name: str) -> None:
    """Without credentials."""
    put(f"{bucket}/b.zip", b"")
    with pytest.raises(ConfigError, match=rf"^seeds: memory://bucket/{name} (does not exist|is of no known)"):
        find_files(f"{bucket}/{name}", "seeds")
    with pytest.raises(ConfigError, match="nowhere"):
        find_files("nowhere://bucket/a.jsonl", "seeds")


def test_a_file_that_goes_away_is_named(bucket: str) -> None:
    """The error of the file system becomes one line."""
    put(f"{bucket}/a.jsonl", LINES)
    [place] = find_files(f"{bucket}/a.jsonl", "seeds").places
    reader = open_rows(place, ReadOptions(key="seeds"))
    fsspec.filesystem("memory").rm("/bucket/a.jsonl")
    put(f"{bucket}/b.jsonl", b"")

    with pytest.raises(ConfigError, match=r"^seeds: .*a\.jsonl cannot be read to its end"):
        list(reader.batches())


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Write nothing."""


@pytest.fixture
def http(tmp_path: Path) -> Iterator[str]:
    """The URL of an HTTP server on this machine, which serves a directory."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_files_are_read_over_http(http: str, tmp_path: Path) -> None:
    """With a signature in the URL, which is shown nowhere."""
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES))
    [place] = find_files(f"{http}/a.jsonl.gz?signature=secret", "seeds").places

    rows = list(decode_all(place, ReadOptions()))

    assert isinstance(place, RemoteFile)
    assert ROWS == [row for _, row in rows]
    assert f"{http}/a.jsonl.gz:1" == rows[0][0]
    assert "https://host/a" == shown_url("https://user:pw@host/a?x=y#z") == saved_path("https://u:p@host/a?x")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("org/name", HubName("org/name")),
        ("org/name:train", HubName("org/name", None, "train")),
        ("org/name:main:train", HubName("org/name", "main", "train")),
        ("org/name.v1", HubName("org/name.v1")),
        ("org/pairs.jsonl", None),
        ("org/PAIRS.CSV:x", None),
        ("name", None),
        ("./org/name", None),
        ("a/b/c", None),
        ("here/name", None),
        ("here/there", None),
        ("-", None),
    ],
)
def test_a_name_on_the_hub_is_not_a_local_path(
    path: str, expected: HubName | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What exists here, or would lie in a directory here, is a local path, and made absolute."""
    (tmp_path / "here" / "there").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    assert expected == hub_name(path)
    unchanged = expected is not None or path == "-"
    assert (path if unchanged else str(Path(path).absolute())) == absolute_path(path)


def test_a_dataset_on_the_hub_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its training split alone, unless all are wanted; places name the split."""
    import datasets

    asked = []

    def load(repository: str, config: str | None, *, split: str | None, streaming: bool) -> Any:
        asked.append((repository, config, split, streaming))
        one = datasets.Dataset.from_list(ROWS[:3]).to_iterable_dataset()
        return one if split else datasets.IterableDatasetDict({"test": one, "train": one})

    monkeypatch.setattr(datasets, "load_dataset", load)  # the hub cannot be reached from everywhere
    [place] = find_files("org/name", "seeds").places
    [part] = find_files("org/name:main:test", "seeds").places

    rows = list(decode_all(place, ReadOptions(batch_rows=2)))
    all_rows = list(decode_all(place, ReadOptions(all_splits=True)))
    of_part = list(decode_all(part, ReadOptions()))

    assert isinstance(place, HubDataset)
    assert [(f"hf://datasets/org/name[train]:{n + 1}", ROWS[n]) for n in range(3)] == rows
    assert 6 == len(all_rows)
    assert "hf://datasets/org/name[test]:1" == of_part[0][0]
    assert [("org/name", None, None, True)] * 2 + [("org/name", "main", "test", True)] == asked


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the name; it may have been meant as a local path."""
    import datasets

    def load(*_: object, **__: object) -> Any:
        raise ConnectionError("Couldn't reach 'org/name' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    [place] = find_files("org/name", "seeds").places

    with pytest.raises(ConfigError, match=r"^seeds: org/name does not exist here, and cannot be read"):
        list(open_rows(place, ReadOptions(key="seeds")).batches())
