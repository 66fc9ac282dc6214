"""Rows of files as a source of training: any format, any first row, `train` of a dataset with splits."""

import gzip
from pathlib import Path
from typing import Any

import orjson
import pytest
import zstandard
from structlog.testing import capture_logs

from streamsyn.config.command_sections import TrainSection
from streamsyn.errors import ConfigError
from streamsyn.export.export_request import ExportRequest
from streamsyn.export.export_run import export
from streamsyn.sink.rundir import RunDirectory
from streamsyn.trainer.examples import BadRow, Row
from streamsyn.trainer.sources.locate import open_sources
from streamsyn.trainer.sources.row_files import FileRows
from streamsyn.trainer.sources.run_samples import RunSamples
from tests.builders import new_run
from tests.export.support import make_run, scored
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
    return [None if isinstance(one, BadRow) else one for one in rows]


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
    assert ROWS[:5] == values(source.fetch(0, 5))
    assert ROWS[400:402] == values(source.fetch(400, 2))
    assert ROWS[402:404] == values(source.fetch(402, 2))
    assert [ROWS[7], ROWS[599]] == values(list(source.pick([7, 599])))


def test_the_end_may_be_found_by_reading(tmp_path: Path) -> None:
    """A source of `train.mix` is not counted first: its total is known once it was read."""
    source = FileRows(str(write(tmp_path, "jsonl")), "files", "train.mix", count=False)
    before = source.total()
    source.fetch(590, 20)

    assert None is before
    assert 600 == source.total()


def test_bad_lines_keep_their_place(tmp_path: Path) -> None:
    """A line that is not a JSON object becomes a row whose problem names its place; blanks are skipped."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(ROWS[:1]) + b"\n#\n[]\n" + lines(ROWS[1:2]))
    found = FileRows(str(path), "files", "--from", count=True).fetch(0, 9)

    assert [ROWS[0], None, None, ROWS[1]] == values(found)
    _, invalid, array = found[:3]
    assert isinstance(invalid, BadRow)
    assert invalid.problem.startswith(f"{path}:3 is not valid JSON: ")
    assert BadRow(f"{path}:4 is not a JSON object but list") == array


def test_fewer_rows_than_before_are_noticed(tmp_path: Path) -> None:
    """Rows that a checkpoint names and the file no longer has are left out, and the total is known."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(ROWS[:3]))
    source = FileRows(str(path), "files", "train.mix", count=False)

    assert 1 == len(list(source.pick([2, 5])))
    assert None is not source.total()


def test_a_parquet_file_is_counted_by_its_metadata(tmp_path: Path) -> None:
    """The rows are not decoded for that: here they cannot be."""
    path = write(tmp_path, "parquet")
    data = bytearray(path.read_bytes())
    data[4:2000] = bytes(1996)
    path.write_bytes(data)
    source = FileRows(str(path), "files", "--from", count=True)

    assert 600 == source.total()
    with pytest.raises(ConfigError, match="cannot be read to its end"):
        source.fetch(0, 600)


SHARES, TASKS = "train=0.7,test=0.3", "task"


def exported(folder: Path, form: str, *splits: str) -> Path:
    """An export of a run with three tasks."""
    run = make_run(folder / "run", [scored(number) for number in range(40)])[0]
    to = folder / "exports" / "one"
    export(ExportRequest(root=run, to=str(to), format=form, splits=splits, shard_rows=7))
    return to


def ids(path: object) -> set[str]:
    """Of all rows that are read, and counted."""
    source = FileRows(str(path), "files", "--from", count=True)
    found = source.fetch(0, 1000)
    assert source.total() == len(found)
    return {one["id"] for one in found if not isinstance(one, BadRow)}


def files_of(folder: Path, split: str) -> set[str]:
    """What an export in JSON lines has in a split."""
    paths = folder.rglob(f"{split}-*.jsonl")
    return {orjson.loads(line)["id"] for path in paths for line in path.read_bytes().splitlines()}


@pytest.mark.parametrize("splits", [(SHARES,), (TASKS, SHARES)])
@pytest.mark.parametrize("form", ["jsonl", "parquet", "datasets"])
def test_of_an_export_only_train_is_read(form: str, splits: tuple[str, ...], tmp_path: Path) -> None:
    """In every format, and by whatever path it is found; what is left out is logged."""
    to = exported(tmp_path, form, *splits)
    lines = exported(tmp_path / "lines", "jsonl", *splits)
    train, test = files_of(lines, "train"), files_of(lines, "test")
    with capture_logs() as said:
        found = ids(to)

    assert train == found
    assert 40 == len(train) + len(test)
    assert test
    [line] = said
    assert ("rows.splits", "--from") == (line["event"], line["of"])
    assert all("train" in split for split in line["read"])
    assert all("test" in split for split in line["left_out"])
    assert line["left_out"]
    assert train == ids(tmp_path / "exports")
    assert train == ids(f"{to}/*")
    if form != "datasets":
        assert train == ids(to / "data")
        assert train == ids(f"{to}/**/*-0*")
        assert test == ids(f"{to}/**/test-*")


def test_from_within_an_export_it_is_still_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path does not go through the folder with the listing."""
    to = exported(tmp_path, "jsonl", SHARES)
    monkeypatch.chdir(to / "data")

    assert files_of(to, "train") == ids(".")


@pytest.mark.parametrize(
    ("form", "splits"), [("datasets", TASKS), ("jsonl", "a=0.5,b=0.5"), ("jsonl", TASKS)]
)
def test_without_a_split_of_that_name_all_are_read(form: str, splits: str, tmp_path: Path) -> None:
    """Splits by task, or with names of the user's own; the listing itself is not read as a row."""
    to = exported(tmp_path, form, splits)
    source = FileRows(str(to), "files", "--from", count=True)

    assert 40 == len(ids(to))
    assert None not in values(source.fetch(0, 1000))


def test_a_saved_data_set_with_splits_needs_no_export(tmp_path: Path) -> None:
    """Of a saved DatasetDict `train` is read; a different split can be given by its folder."""
    import datasets

    splits = {"test": ROWS[:10], "train": ROWS[10:30]}
    saved = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})
    saved.save_to_disk(str(tmp_path / "saved"))

    assert {one["id"] for one in ROWS[10:30]} == ids(tmp_path / "saved")
    assert {one["id"] for one in ROWS[10:30]} == ids(f"{tmp_path}/saved/t*")
    assert {one["id"] for one in ROWS[:10]} == ids(tmp_path / "saved" / "test")
    (tmp_path / "saved" / "dataset_dict.json").write_text("[]")
    with pytest.raises(ConfigError, match="has no valid list of `splits`"):
        ids(tmp_path / "saved")


def test_a_file_of_that_name_that_lists_nothing_is_a_file_of_rows(tmp_path: Path) -> None:
    """An export is known by the content of its listing; a folder with a listing alone has no rows."""
    (tmp_path / "export.json").write_bytes(lines(ROWS[:3]))
    (tmp_path / "test-1.jsonl").write_bytes(lines(ROWS[3:5]))
    assert 5 == len(ids(tmp_path))
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "export.json").write_text('{\n  "made_by": "streamsyn export"\n}')
    with pytest.raises(ConfigError, match="--from: there are no rows in"):
        ids(tmp_path / "none")


def test_what_cannot_be_read_names_its_key(tmp_path: Path) -> None:
    """A missing path, and a file that is cut short, are configuration errors."""
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(gzip.compress(lines(ROWS))[:-20])
    (tmp_path / "no.parquet").write_bytes(b"PAR1")

    with pytest.raises(ConfigError, match=r"^train.mix: .*nowhere.jsonl does not exist"):
        FileRows(str(tmp_path / "nowhere.jsonl"), "mix", "train.mix", count=False)
    for path in (broken, tmp_path / "no.parquet"):
        with pytest.raises(ConfigError, match=rf"^--from: .*{path.name} cannot be read to its end"):
            FileRows(str(path), "files", "--from", count=True).total()


def test_a_stream_is_opened_by_what_it_is(tmp_path: Path) -> None:
    """A run directory, one that does not exist yet or waits for its servers, and files; URLs are refused."""
    run = new_run(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_bytes(b'{"format":1,"config":{},"fingerprint":{}}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "waiting" / "out").mkdir(parents=True)
    RunDirectory(tmp_path / "begun").close()
    files = write(tmp_path, "jsonl")

    def opened(stream: str) -> Any:
        return open_sources(stream, TrainSection(), tmp_path / "out").stream

    assert isinstance(opened(str(run)), RunSamples)
    assert isinstance(opened(str(tmp_path / "empty")), RunSamples)
    assert isinstance(opened(str(tmp_path / "begun")), RunSamples)
    beside = open_sources(str(tmp_path / "waiting"), TrainSection(), tmp_path / "waiting" / "out")
    assert isinstance(beside.stream, RunSamples), "a training may be there before its run"
    assert isinstance(opened(str(tmp_path / "later")), RunSamples)
    assert isinstance(opened(str(files)), FileRows)
    assert isinstance(opened(f"{tmp_path}/*.jsonl"), FileRows)
    with pytest.raises(ConfigError, match=r"nowhere.jsonl does not exist"):
        opened(str(tmp_path / "nowhere.jsonl"))
    (tmp_path / "nothing.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match=r"^--from .*nothing.jsonl is empty$"):
        opened(str(tmp_path / "nothing.jsonl"))
    with pytest.raises(ConfigError, match="http://host/stream is of no known format"):
        opened("http://host/stream")


def test_what_is_mixed_in_is_opened_with_its_weight(tmp_path: Path) -> None:
    """Each path of `train.mix` is a source of its own."""
    path = write(tmp_path, "jsonl")
    section = TrainSection.model_validate({"mix": [{"path": str(path), "weight": 3.0}]})
    [mixed] = open_sources(str(tmp_path / "later"), section, tmp_path / "out").mix

    assert 3.0 == mixed.weight
    assert f"mix:{path}" == mixed.source.name
    assert ROWS[:2] == values(mixed.source.fetch(0, 2))
