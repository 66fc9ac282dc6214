"""What `streamsyn status` reads from a run directory."""

import json
import os
import platform
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from streamsyn.cli.main import cli
from streamsyn.config.fingerprint import fingerprint
from streamsyn.config.loading import Config
from streamsyn.errors import ConfigError
from streamsyn.pipeline.status import status, status_lines
from streamsyn.sink.log import RunLog
from streamsyn.sink.partitions import begin_partitions
from streamsyn.sink.rundir import RunDirectory
from tests.builders import context, reject


def test_a_run_from_its_beginning_to_a_retry(tmp_path: Path) -> None:
    """Running by its lock, unfinished without it, then finished; then with rejects that are reopened."""
    directory = RunDirectory(tmp_path)
    config = Config()
    directory.save(config.model_dump(mode="json"), fingerprint(config) | {"model": "m"})
    empty = status(tmp_path)
    assert ("running", 0, None) == (empty.state, empty.contexts, empty.last_outcome_at)
    assert f"pid {os.getpid()}" in (empty.process or "")

    log = RunLog(tmp_path, config.sink)
    log.append([*(context(n, written_at=100.0 + n) for n in range(5)), reject(7)])
    running = status(tmp_path)
    assert (5, 1, {"not_a_seed": 1}) == (running.contexts, running.rejects, running.reasons)
    assert 104.0 == running.last_outcome_at
    assert 1.0 == running.outcomes_per_s

    log.close()
    directory.close()
    stopped = status(tmp_path)
    assert "unfinished" == stopped.state
    assert any(f"streamsyn run --out {tmp_path}" in line for line in status_lines(stopped, 164.0))
    assert "  last       outcome 1 min 00 s ago; 1.0 outcomes/s before it" in status_lines(stopped, 164.0)

    log = RunLog(tmp_path, config.sink)
    log.seal_outcomes()
    log.finish()
    log.close()
    assert ("finished", 50) == (status(tmp_path).state, status(tmp_path).completion_tokens)

    log = RunLog(tmp_path, config.sink)
    log.add_retry(["not_a_seed"])
    assert ("unfinished", 1, 0) == (
        status(tmp_path).state,
        status(tmp_path).retrying,
        status(tmp_path).superseded,
    )
    log.append([context(7, supersedes=0)])
    log.close()
    retried = status(tmp_path)
    assert (6, 0, 1, 0) == (retried.contexts, retried.rejects, retried.superseded, retried.retrying)


def test_a_takeover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has taken over is at work, not who still holds the lock; it is neither once it has ended."""
    older = RunDirectory(tmp_path)
    older.save(Config().model_dump(mode="json"), fingerprint(Config()) | {"model": "m"})
    newer = RunDirectory(tmp_path, take_over=True)
    running = status(tmp_path)
    assert ("running", f"pid {os.getpid()} on {platform.node()}, which took over") == (
        running.state,
        running.process,
    )
    with monkeypatch.context() as patched:
        patched.setattr(os, "getpid", lambda: 2**31 - 1)  # no process has this number
        dead = RunDirectory(tmp_path, take_over=True)
    assert "unfinished" == status(tmp_path).state
    last = RunDirectory(tmp_path, take_over=True)
    last.close()
    assert "unfinished" == status(tmp_path).state
    for one in (older, newer, dead):
        one.close()


def test_a_partition_that_is_missing(tmp_path: Path) -> None:
    """A run that had finished has not, if one of its partitions is gone."""
    partitions = begin_partitions(tmp_path, 2)
    for at in range(2):
        directory = RunDirectory(partitions.directories[at])
        directory.save(Config().model_dump(mode="json"), fingerprint(Config()) | {"model": "m"})
        log = RunLog(directory.root, Config().sink)
        log.finish()
        log.close()
        directory.close()
        partitions = partitions.with_ended(at)
    assert "finished" == status(tmp_path).state
    shutil.rmtree(partitions.directories[0])

    assert "unfinished" == status(tmp_path).state


def test_the_command(tmp_path: Path) -> None:
    """Text, or one JSON object; a directory of something else is refused."""
    with pytest.raises(ConfigError, match="is not a run directory"):
        status(tmp_path)
    directory = RunDirectory(tmp_path)
    directory.save(Config().model_dump(mode="json"), fingerprint(Config()))
    directory.close()
    text = CliRunner().invoke(cli, ["status", str(tmp_path)])
    found = json.loads(CliRunner().invoke(cli, ["status", str(tmp_path), "--json"]).output)

    assert text.output.startswith(f"{tmp_path}: not finished")
    assert ("unfinished", 0, None) == (found["state"], found["contexts"], found["outcomes_per_s"])
