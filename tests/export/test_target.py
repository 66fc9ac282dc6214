"""The folder of an export: any file system, no file of others is touched, the card is written last."""

import errno
import uuid
from pathlib import Path
from typing import Any

import fsspec
import orjson
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from streamsyn.errors import ConfigError
from streamsyn.export.export_request import COMPRESSIONS, ExportRequest
from streamsyn.export.export_run import export
from streamsyn.export.target import Target
from tests.export.support import make_run, rows_of, scored, tree


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), [scored(n) for n in range(40)])[0]


def exported(root: Path, to: Path | str, **given: Any) -> None:
    export(ExportRequest(root=root, to=str(to), **given))


class FullFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """A file system that accepts `room` files of rows, and then is full."""

    protocol = "full"
    store: dict[str, Any] = {}  # noqa: RUF012 - as the parent has it
    pseudo_dirs: list[str] = [""]  # noqa: RUF012
    room = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("full://")))

    def _open(self, path: str, mode: str = "rb", **given: Any) -> Any:
        if mode == "wb" and "-0000" in path:
            type(self).room -= 1
            if self.room < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
        return super()._open(path, mode, **given)


@pytest.fixture
def full() -> type[FullFileSystem]:
    fsspec.register_implementation("full", FullFileSystem, clobber=True)
    FullFileSystem.store, FullFileSystem.pseudo_dirs = {}, [""]
    return FullFileSystem


@pytest.mark.parametrize("form", COMPRESSIONS)
def test_every_file_system_gets_the_same_files(run: Path, tmp_path: Path, form: str) -> None:
    """A plain path, a file:// URL and a memory:// URL."""
    url = f"memory://{uuid.uuid4().hex}/a/b"
    exported(run, tmp_path / "a", format=form, shard_rows=9)
    exported(run, f"file://{tmp_path}/b/", format=form, shard_rows=9)
    exported(run, url, format=form, shard_rows=9)
    memory = fsspec.filesystem("memory")
    memory.get(f"{memory._strip_protocol(url)}/", str(tmp_path / "c"), recursive=True)

    assert tree(tmp_path / "a") == tree(tmp_path / "b") == tree(tmp_path / "c")


def test_the_listing_describes_each_file(run: Path, tmp_path: Path) -> None:
    """It has path, rows, bytes and digest of everything that was written."""
    exported(run, tmp_path, format="parquet", shard_rows=9)
    listing = orjson.loads((tmp_path / "export.json").read_bytes())
    digests = tree(tmp_path)
    del digests["export.json"]

    assert listing["complete"]
    assert digests == {file["path"]: file["sha256"] for file in listing["files"]}
    assert 40 == sum(file.get("rows", 0) for file in listing["files"])
    assert all((tmp_path / file["path"]).stat().st_size == file["bytes"] for file in listing["files"])


def test_existing_files_are_not_overwritten(run: Path, tmp_path: Path) -> None:
    """With `overwrite`, only an earlier export is."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a/theirs.txt").write_text("!")
    with pytest.raises(ConfigError, match="not empty"):
        exported(run, tmp_path / "a")
    with pytest.raises(ConfigError, match="no earlier export"):
        exported(run, tmp_path / "a", overwrite=True)
    with pytest.raises(ConfigError, match="is a file"):
        exported(run, tmp_path / "a/theirs.txt")

    assert {"theirs.txt"} == set(tree(tmp_path / "a"))


def test_an_earlier_export_is_replaced_and_nothing_else(run: Path, tmp_path: Path) -> None:
    """Files of others stay, wherever they are; those of the earlier export are gone."""
    out = tmp_path / "out"
    exported(run, out, splits=["task"])
    (out / "data/theirs-00000.jsonl").write_text("!\n")
    (out / "notes.md").write_text("!")
    exported(run, out, format="parquet", overwrite=True)
    exported(run, tmp_path / "fresh", format="parquet")

    theirs = {"data/theirs-00000.jsonl", "notes.md"}
    assert theirs | set(tree(tmp_path / "fresh")) == set(tree(out))


@pytest.mark.parametrize(
    "listing",
    [
        b"{}",
        b"[1]",
        b"nonsense",
        b'{"made_by":"someone","files":[]}',
        b'{"made_by":"streamsyn export","files":[{"path":"../theirs.txt"}]}',
        b'{"made_by":"streamsyn export","files":[{"path":"/theirs.txt"}]}',
        b'{"made_by":"streamsyn export","files":[{"path":7}]}',
    ],
)
def test_a_listing_that_is_not_ours_removes_nothing(tmp_path: Path, listing: bytes) -> None:
    """In particular nothing outside the folder."""
    (tmp_path / "theirs.txt").write_text("!")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/export.json").write_bytes(listing)

    with pytest.raises(ConfigError, match=r"export\.json was not written by streamsyn"):
        Target(str(tmp_path / "out"), overwrite=True)
    assert {"theirs.txt", "out/export.json"} == set(tree(tmp_path))


@pytest.mark.parametrize("form", COMPRESSIONS)
def test_an_export_that_fails_leaves_no_card(run: Path, full: type[FullFileSystem], form: str) -> None:
    """The error is one line, and an export with --overwrite cleans up."""
    full.room = 2
    with pytest.raises(ConfigError, match="cannot export to full://data/out: No space left on device"):
        exported(run, "full://data/out", format=form, shard_rows=9)
    left = [path for path in full.store if not path.endswith("export.json")]
    full.room = 99
    exported(run, "full://data/out", format=form, shard_rows=11, overwrite=True)

    assert 2 == len(left)
    assert "/data/out/README.md" not in left
    assert "/data/out/README.md" in full.store
    assert 4 == sum("-0000" in path for path in full.store)


def test_an_earlier_card_is_removed_first(run: Path, full: type[FullFileSystem]) -> None:
    """A second export that fails leaves no card of the first."""
    full.room = 99
    exported(run, "full://data/out")
    full.room = 0
    with pytest.raises(ConfigError, match="No space left"):
        exported(run, "full://data/out", overwrite=True)

    assert not any(path.endswith("README.md") for path in full.store)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nowhere://a/b", "--to: nowhere://a/b cannot be used: Protocol not known: nowhere"),
        ("s3://bucket/a", "--to: s3://bucket/a needs a package that is not installed: Install s3fs"),
        ("", "--to is empty"),
        ("/proc/nothing/a", "cannot export to /proc/nothing/a: "),
    ],
)
def test_an_unusable_target_is_one_line(run: Path, url: str, says: str) -> None:
    """Unknown protocols, missing packages, and folders that cannot be created."""
    with pytest.raises(ConfigError) as caught:
        exported(run, url)
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)


def test_an_unknown_format_or_compression_is_refused(run: Path, tmp_path: Path) -> None:
    """Before anything is written."""
    with pytest.raises(ConfigError, match=r"--compression.*'snappy'.*none or zstd"):
        exported(run, tmp_path, compression="snappy")
    with pytest.raises(ConfigError, match=r"--format.*'csv'"):
        exported(run, tmp_path, format="csv")
    assert [] == rows_of(tmp_path)
