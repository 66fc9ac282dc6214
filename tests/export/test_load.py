"""An export loads in `datasets`, offline, with the splits and configurations of the card."""

from pathlib import Path
from typing import Any

import datasets
import pytest

from streamsyn.export.export_request import ExportRequest
from streamsyn.export.export_run import export
from tests.export.support import make_run, rows_of, scored


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose first contexts were not scored: columns begin with nulls."""
    outcomes = [scored(n, checks={}) for n in range(20)] + [scored(n) for n in range(20, 40)]
    return make_run(tmp_path_factory.mktemp("run"), outcomes)[0]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def load(folder: Path, *config: str) -> Any:
    return datasets.load_dataset(str(folder), *config)


def plain(dataset: Any) -> list[dict[str, Any]]:
    return sorted(dataset.to_list(), key=lambda row: row["id"])


@pytest.mark.parametrize(("form", "codec"), [("jsonl", "none"), ("jsonl", "zstd"), ("parquet", "zstd")])
def test_a_single_split_loads(run: Path, tmp_path: Path, form: str, codec: str) -> None:
    """The folder's path is enough, also where a column starts with nulls."""
    out = tmp_path / "out"
    export(ExportRequest(root=run, to=str(out), format=form, compression=codec, shard_rows=7))
    found = load(out)

    assert ["train"] == list(found)
    assert sorted(rows_of(out), key=lambda row: row["id"]) == plain(found["train"])


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_tasks_and_splits_load(run: Path, tmp_path: Path, form: str) -> None:
    """The default configuration has all tasks; each task has one of its own."""
    out = tmp_path / "out"
    splits = ["task", "train=0.7,test=0.3"]
    export(ExportRequest(root=run, to=str(out), format=form, splits=splits))
    everything, one = load(out), load(out, "govreport")

    assert 40 == sum(part.num_rows for part in everything.values())
    assert {"train", "test"} == set(everything) == set(one)
    assert {"govreport"} == {row["task"] for part in one.values() for row in part}
    assert 13 == sum(part.num_rows for part in one.values())
    assert {"default", "govreport", "qasper", "R_te_Co"} == set(datasets.get_dataset_config_names(str(out)))


def test_names_that_yaml_takes_for_something_else(tmp_path: Path) -> None:
    """Tasks and splits named `000`, `no` or `2024` are names, not numbers and not false."""
    outcomes = [scored(number, task=("000", "no", "2024")[number % 3]) for number in range(12)]
    run, out = make_run(tmp_path / "run", outcomes)[0], tmp_path
    export(ExportRequest(root=run, to=str(out / "a"), format="parquet", splits=["task"]))
    export(ExportRequest(root=run, to=str(out / "b"), format="parquet", splits=["no=0.5,yes=0.5"]))

    assert {"default", "000", "no", "2024"} == set(datasets.get_dataset_config_names(str(out / "a")))
    assert {"no", "yes"} == set(load(out / "b"))


@pytest.mark.parametrize(
    ("splits", "names"),
    [
        ([], None),
        (["task"], {"qasper", "govreport", "R_te_Co"}),
        (["a=0.5,b=0.5"], {"a", "b"}),
        (["task", "a=0.5,b=0.5"], {f"{t}.{s}" for t in ("qasper", "govreport", "R_te_Co") for s in "ab"}),
    ],
)
def test_a_saved_data_set_loads(run: Path, tmp_path: Path, splits: list[str], names: set[str] | None) -> None:
    """As one written by `save_to_disk`: one data set, or one per split."""
    out = tmp_path / "out"
    export(ExportRequest(root=run, to=str(out), format="datasets", splits=splits, shard_rows=4))
    found = datasets.load_from_disk(str(out))

    parts = {"": found} if names is None else dict(found)
    assert (names or {""}) == set(parts)
    together = datasets.concatenate_datasets(list(parts.values()))
    assert sorted(rows_of(out), key=lambda row: row["id"]) == plain(together)
    assert 40 == together.num_rows
