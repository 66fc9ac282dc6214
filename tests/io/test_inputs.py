"""Which files a path, a directory or a glob names, and the format of each by its name."""

import os
import socket
from pathlib import Path

import pytest

from streamsyn.errors import ConfigError
from streamsyn.io.inputs import TEXT_KINDS, find_files, find_rows, is_row_file
from tests.examples import in_turn

pytestmark = pytest.mark.timeout(20)


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"{}\n")
    return path


def find(pattern: object) -> list[Path]:
    found = find_rows(str(pattern), "seeds").places
    return [place for place in found if isinstance(place, Path)]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Seed files at several depths, among others that are none."""
    for name in ("b.jsonl", "a.jsonl.gz", "deep/c.parquet", "deep/er/d.ndjson.zst"):
        write(tmp_path / "tree" / name)
    for name in ("README.md", "deep/notes.txt", "pictures/cat.png"):
        write(tmp_path / "tree" / name)
    return tmp_path / "tree"


def test_a_file_stands_for_itself(tree: Path) -> None:
    """Also where its name looks like a glob."""
    odd = write(tree / "a[1].jsonl")

    assert [tree / "b.jsonl"] == find(str(tree / "b.jsonl"))
    assert [odd] == find(str(odd))


def test_a_folder_stands_for_all_seed_files_in_it(tree: Path) -> None:
    """At any depth, sorted; what is no seed file is left aside, and so are folders without any."""
    expected = ["a.jsonl.gz", "b.jsonl", "deep/c.parquet", "deep/er/d.ndjson.zst"]

    assert expected == [str(path.relative_to(tree)) for path in find(str(tree))]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jsonl", ["b.jsonl"]),
        ("*.jsonl*", ["a.jsonl.gz", "b.jsonl"]),
        ("d*", ["deep/c.parquet", "deep/er/d.ndjson.zst"]),
        ("*", ["a.jsonl.gz", "b.jsonl", "deep/c.parquet", "deep/er/d.ndjson.zst"]),
        ("**/*.parquet", ["deep/c.parquet"]),
        ("**", ["a.jsonl.gz", "b.jsonl", "deep/c.parquet", "deep/er/d.ndjson.zst"]),
    ],
)
def test_a_glob_stands_for_what_it_matches(tree: Path, pattern: str, expected: list[str]) -> None:
    """Each file once, though `**` matches it and the folder in which it lies."""
    found = [str(path.relative_to(tree)) for path in find(str(tree / pattern))]

    assert expected == sorted(found)


def test_a_saved_dataset_is_one_source(tree: Path) -> None:
    """Its files are not taken for seed files one by one."""
    write(tree / "saved" / "state.json")
    write(tree / "saved" / "data.parquet")

    assert [tree / "saved"] == find(str(tree / "saved"))
    assert (tree / "saved") in find(str(tree))
    assert (tree / "saved" / "data.parquet") not in find(str(tree))


@pytest.fixture
def out(tree: Path) -> Path:
    """A run directory among the seeds, with shards that are named as seed files are."""
    for name in ("run.json", "manifest.jsonl", "contexts/part-000000.jsonl", "spool/stdin.jsonl"):
        write(tree / "deep" / "out" / name)
    return tree / "deep" / "out"


@pytest.mark.parametrize("pattern", [".", "*", "**", "**/*", "**/*.*", "d*/**", "deep/../*"])
def test_a_run_directory_is_left_aside(tree: Path, out: Path, pattern: str) -> None:
    """OUT may lie among the seeds: what a run writes never becomes its seeds."""
    found = find(str(tree / pattern))

    assert found
    assert [] == [path for path in found if "out" in path.parts and ".." not in path.parts]


@pytest.mark.parametrize(("pattern", "files"), [("spool", 1), ("spool/*.jsonl", 1), ("contexts/*", 1)])
def test_what_lies_in_a_run_directory_can_be_given(out: Path, pattern: str, files: int) -> None:
    """Somebody who spells it out means it."""
    assert files == len(find(str(out / pattern)))


@pytest.mark.parametrize("log", ["manifest.jsonl", "contexts/part-000000.jsonl.open"])
def test_a_run_directory_itself_is_refused(tmp_path: Path, log: str) -> None:
    """Given as a path, with one line that says what it is; by a glob there is nothing in it."""
    out = tmp_path / "out"
    write(out / "run.json")
    write(out / log)

    with pytest.raises(ConfigError, match="out is a run directory"):
        find(str(out))
    with pytest.raises(ConfigError, match="there is no file to read in"):
        find(str(out / "*"))


def test_a_run_json_alone_makes_no_run_directory(tmp_path: Path) -> None:
    """Any tool may write a file of that name."""
    assert [write(tmp_path / "run.json")] == find(str(tmp_path))


def test_a_socket_is_refused(tmp_path: Path) -> None:
    """It has a seed file's name, and cannot be opened."""
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "s.jsonl"))
        with pytest.raises(ConfigError, match=r"s\.jsonl is neither a file nor a directory"):
            find(str(tmp_path))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("missing.jsonl", "seeds: {} does not exist"),
        ("*.tsv", "seeds: {} does not exist"),
        ("pictures", "seeds: there is no file to read in {}; the formats are .jsonl, "),
        ("pictures/*", "seeds: there is no file to read in {}; the formats are .jsonl, "),
        ("README.md", "seeds: {} is of no known format; there are .jsonl, "),
    ],
)
def test_what_stands_for_nothing_is_refused(tree: Path, pattern: str, message: str) -> None:
    """A path without rows is a typing error, not an empty success."""
    path = tree / pattern

    with pytest.raises(ConfigError) as raised:
        find(path)

    assert str(raised.value).startswith(message.format(path))


def test_each_real_directory_is_visited_once(tree: Path) -> None:
    """Links to directories are followed; a link back to a directory above ends there, and is counted."""
    (tree / "deep" / "loop").symlink_to(tree)
    (tree / "linked").symlink_to(tree / "deep")
    found = find_files(str(tree), "seeds")

    names = [str(place).removeprefix(f"{tree}/") for place in found.places]
    assert ["a.jsonl.gz", "b.jsonl", "deep/c.parquet", "deep/er/d.ndjson.zst"] == names
    assert 2 == found.left_out.counts["linked directories that were visited before"]


def test_what_is_left_out_is_said_in_one_line(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files of other formats by name, hidden ones by number; notes beside the data are not meant."""
    names = (".a.jsonl", ".ipynb_checkpoints/b-checkpoint.jsonl", "e.csv", "f.zip", "dataset_infos.json")
    for name in names:
        write(tree / name)

    found = [path.name for path in find(tree)]

    assert ["a.jsonl.gz", "b.jsonl", "c.parquet", "d.ndjson.zst", "e.csv"] == found
    [line] = [line for line in capsys.readouterr().out.splitlines() if "files.left_out" in line]
    assert "2 hidden, 3 of no known format (notes.txt, f.zip, cat.png)" in line


def test_text_is_a_format_where_documents_are_wanted(tree: Path) -> None:
    """A corpus may be of plain text."""
    names = [place.name for place in find_files(str(tree), "assembly.corpus", TEXT_KINDS).places]

    assert "notes.txt" in names


def test_a_directory_that_cannot_be_listed_is_named(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies in it would be left out silently."""
    locked = tree / "locked"
    locked.mkdir()

    def refuse(path: Path) -> list[Path]:
        if path == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return [Path(entry.path) for entry in os.scandir(path)]

    monkeypatch.setattr(Path, "iterdir", refuse)  # root may list every directory

    with pytest.raises(ConfigError, match=r"seeds: .*locked cannot be used: Permission denied"):
        find(tree)


@in_turn(
    ("name", "expected"),
    [
        ("a.jsonl", True),
        ("a.ndjson", True),
        ("a.json", True),
        ("a.jsonl.gz", True),
        ("a.json.zst", True),
        ("a.parquet", True),
        ("a.parquet.gz", False),
        ("a.gz", False),
        ("a.csv", True),
        ("a.TSV.Gz", True),
        ("A.JSONL", True),
        ("a.jsonl.bz2", True),
        ("a.json.xz", True),
        ("a.txt", False),
        ("jsonl", False),
    ],
)
def test_kinds_are_told_by_names(name: str, expected: bool) -> None:
    """Only what can be read is taken from a folder."""
    assert expected == is_row_file(Path(name))
