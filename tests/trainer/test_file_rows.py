import gzip
from pathlib import Path
from typing import Any

import orjson
import pytest
import zstandard

from streamsyn.errors import ConfigError
from streamsyn.sections.train import TrainSection
from streamsyn.sink.rundir import RunDirectory
from streamsyn.trainer.sources.files import FileRows
from streamsyn.trainer.sources.opening import open_sources
from streamsyn.trainer.sources.rundir import RunSamples
from streamsyn.trainer.stream.examples import Row
from tests.builders import new_run
from tests.trainer.streams import row

ROWS = [{**row(number), "messages": [{"role": "user", "content": f"é {number}"}]} for number in range(600)]


def lines(rows: list[dict[str, Any]]) -> bytes:
    """JSON lines."""
    return b"".join(orjson.dumps(one, option=orjson.OPT_APPEND_NEWLINE) for one in rows)


def write(folder: Path, form: str) -> Path:
    """ROWS in a file, or files, of a form."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    path = folder / f"rows.{form}"
    if form == "jsonl":
        path.write_bytes(lines(ROWS))
    elif form == "jsonl.gz":
        path.write_bytes(gzip.compress(lines(ROWS)))
    elif form == "jsonl.zst":
        path.write_bytes(b"".join(zstandard.compress(lines(part)) for part in (ROWS[:100], ROWS[100:])))
    elif form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=70)
    elif form == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(str(path))
    else:
        path.mkdir()
        (path / "a.jsonl").write_bytes(lines(ROWS[:250]))
        (path / "b.jsonl").write_bytes(lines(ROWS[250:]))
    return path


def values(rows: list[Row]) -> list[Any]:
    """What rows hold."""
    return [one.value for one in rows]


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "saved", "folder"])
def test_rows_of_every_form_can_be_read_from_anywhere(form: str, tmp_path: Path) -> None:
    """All rows in order, from any one on, again, and by their numbers."""
    source = FileRows(str(write(tmp_path, form)), "files", "--from", count=True)
    counted = source.total()
    found: list[Row] = []
    while rows := source.fetch(len(found), 77):
        found += rows

    assert 600 == counted
    assert ROWS == values(found)
    assert list(range(600)) == [one.seq for one in found]
    assert ROWS[:5] == values(source.fetch(0, 5))
    assert ROWS[400:402] == values(source.fetch(400, 2))
    assert ROWS[402:404] == values(source.fetch(402, 2))
    assert [ROWS[7], ROWS[599]] == values(list(source.pick([7, 599])))


def test_the_end_may_be_found_by_reading(tmp_path: Path) -> None:
    """What is mixed in is not counted first: its end is known once it was read."""
    source = FileRows(str(write(tmp_path, "jsonl")), "files", "train.mix", count=False)
    before = source.total()
    source.fetch(590, 20)

    assert None is before
    assert 600 == source.total()


def test_bad_lines_keep_their_place(tmp_path: Path) -> None:
    """A line that is no JSON object is a row that says so, with its file and line; blank ones are none."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(ROWS[:1]) + b"\n#\n[]\n" + lines(ROWS[1:2]))
    found = FileRows(str(path), "files", "--from", count=True).fetch(0, 9)

    assert [ROWS[0], None, None, ROWS[1]] == values(found)
    assert found[1].problem.startswith(f"{path}:3 is no JSON: ")
    assert f"{path}:4 is no JSON object but list" == found[2].problem


def test_fewer_rows_than_before_are_noticed(tmp_path: Path) -> None:
    """Rows that a checkpoint holds and a file no longer has are left out, and the end is known."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(ROWS[:3]))
    source = FileRows(str(path), "files", "train.mix", count=False)

    assert [2] == [one.seq for one in source.pick([2, 5])]
    assert None is not source.total()


def test_what_cannot_be_read_names_its_key(tmp_path: Path) -> None:
    """A path to nothing, and a file that breaks off, are the user's to mend."""
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(gzip.compress(lines(ROWS))[:-20])
    (tmp_path / "no.parquet").write_bytes(b"PAR1")

    with pytest.raises(ConfigError, match=r"^train.mix: .*nowhere.jsonl does not exist"):
        FileRows(str(tmp_path / "nowhere.jsonl"), "mix", "train.mix", count=False)
    for path in (broken, tmp_path / "no.parquet"):
        with pytest.raises(ConfigError, match=rf"^--from: .*{path.name} cannot be read to its end"):
            FileRows(str(path), "files", "--from", count=True).total()


def test_a_stream_is_opened_by_what_it_is(tmp_path: Path) -> None:
    """A run directory, one that is not there yet, or has not heard from its servers, and files; no URL."""
    run = new_run(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_bytes(b"{}")
    (tmp_path / "empty").mkdir()
    RunDirectory(tmp_path / "begun").close()
    files = write(tmp_path, "jsonl")

    def opened(stream: str) -> Any:
        return open_sources(stream, TrainSection(), tmp_path / "out").stream

    assert isinstance(opened(str(run)), RunSamples)
    assert isinstance(opened(str(tmp_path / "empty")), RunSamples)
    assert isinstance(opened(str(tmp_path / "begun")), RunSamples)
    assert isinstance(opened(str(tmp_path / "later")), RunSamples)
    assert isinstance(opened(str(files)), FileRows)
    assert isinstance(opened(f"{tmp_path}/*.jsonl"), FileRows)
    with pytest.raises(ConfigError, match=r"nowhere.jsonl does not exist"):
        opened(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(ConfigError, match="a stream is followed in a directory or on stdin"):
        opened("http://host/stream")


def test_what_is_mixed_in_is_opened_with_its_weight(tmp_path: Path) -> None:
    """Each path of `train.mix` is a source of its own."""
    path = write(tmp_path, "jsonl")
    section = TrainSection.model_validate({"mix": [{"path": str(path), "weight": 3.0}]})
    [mixed] = open_sources(str(tmp_path / "later"), section, tmp_path / "out").mix

    assert 3.0 == mixed.weight
    assert f"mix:{path}" == mixed.source.name
    assert ROWS[:2] == values(mixed.source.fetch(0, 2))
