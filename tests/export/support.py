"""Run directories to export, and functions that read an export."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import orjson
import pyarrow.parquet
import zstandard

from streamsyn.assembly.resources import AssemblyResources
from streamsyn.config.fingerprint import fingerprint, with_absolute_paths
from streamsyn.config.loading import Config
from streamsyn.pipeline.delivery import AssemblyStage
from streamsyn.records import Context, Outcome, Sample
from streamsyn.sink.log import RunLog
from streamsyn.sink.rundir import RunDirectory
from tests.builders import context

TASKS = ("qasper", "govreport", "Räte & Co")


class Outlet:
    """Records samples."""

    def __init__(self, log: RunLog) -> None:
        self._log = log

    def deliver(self, samples: Sequence[Sample]) -> None:
        self._log.samples.append(samples)

    def stop(self) -> None:
        pass


def scored(number: int, **given: Any) -> Context:
    """A context of one of three tasks, with scores."""
    checks = {
        "context_gain": number / 10 - 1,
        "answer_score": 0.5,
        "flags": ["truncated"] * (number % 5 == 0),
    }
    fields = {"task": TASKS[number % 3], "context": f"Text {number}, é. " * 20, "checks": checks}
    return context(number, **{**fields, **given})


def make_run(
    root: Path, outcomes: Sequence[Outcome], *, to_the_end: bool = True, **assembly: Any
) -> tuple[Path, Config]:
    """A run directory with contexts, rejects and samples, as a run writes it."""
    config = Config.model_validate(
        {
            "sink": {"shard_bytes": 8000},
            "assembly": {"contexts_per_sample": 3, "max_similarity": 1, **assembly},
        }
    )
    directory, resources = RunDirectory(root), AssemblyResources(config.assembly)
    directory.save(with_absolute_paths(config), {**fingerprint(config), **resources.fingerprint()})
    log = RunLog(root, config.sink)
    log.append(outcomes)
    stage = AssemblyStage(
        lambda: resources.assembler(config.run.seed),
        log,
        Outlet(log),
        logged=log.contexts.rows,
        delivered=log.samples.rows,
        flushes=log.manifest.flushes,
    )
    stage.catch_up()
    if to_the_end:
        log.seal_outcomes()
        stage.finish()
        log.finish()
    log.close()
    directory.close()
    return root, config


def tree(folder: Path) -> dict[str, str]:
    """The digest of each file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """All rows of an export, whatever its format, file by file."""
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".jsonl":
            rows += map(orjson.loads, path.read_bytes().splitlines())
        elif path.suffix == ".zst":
            data = zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes())
            rows += map(orjson.loads, data.splitlines())
        elif path.suffix == ".parquet":
            rows += pyarrow.parquet.read_table(path).to_pylist()
        elif path.suffix == ".arrow":
            rows += datasets.Dataset.from_file(str(path)).to_list()
    return rows
