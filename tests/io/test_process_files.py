"""The limit of open files is raised to what the system allows; temporary files always have a folder."""

import os
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from streamsyn.errors import ConfigError
from streamsyn.io.process_files import free_files, raise_limit, temporary_files_near


@contextmanager
def soft_limit(files: int) -> Iterator[None]:
    """The soft limit is `files` at the start of the block, and as before after it."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_soft_limit_is_raised_to_the_hard_one() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with soft_limit(256):
        assert raise_limit() == hard
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)


def test_where_the_system_forbids_it_the_limit_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(_kind: int, _limits: tuple[int, int]) -> None:
        raise ValueError("current limit exceeds maximum limit")

    with soft_limit(256):
        monkeypatch.setattr(resource, "setrlimit", forbidden)
        assert raise_limit() == 256
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("limit", "inputs", "left"), [(1024, 1, 895), (1024, 100, 796), (128, 1, 64), (20_000, 1, 19_871)]
)
def test_connections_get_what_files_leave(limit: int, inputs: int, left: int) -> None:
    assert left == free_files(limit, inputs)


@pytest.fixture(autouse=True)
def no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container with a read-only root: none of the folders that `tempfile` tries can be written."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/none"])
    monkeypatch.setenv("TMPDIR", "/proc/none")


def test_they_are_made_beside_the_output(tmp_path: Path) -> None:
    """Also by libraries and child processes; the output itself need not exist yet."""
    with pytest.raises(FileNotFoundError):
        tempfile.gettempdir()
    temporary_files_near(tmp_path / "runs" / "first")
    with tempfile.TemporaryDirectory() as folder:
        assert Path(folder).parent == tmp_path
    assert os.environ["TMPDIR"] == str(tmp_path)


def test_without_any_place_the_message_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)  # root may write everywhere
    with pytest.raises(ConfigError, match=f"{tmp_path} cannot be written either; set TMPDIR"):
        temporary_files_near(tmp_path)


def test_the_systems_folder_is_used_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path)])
    temporary_files_near(tmp_path / "out")
    assert tempfile.gettempdir() == str(tmp_path)
    assert os.environ["TMPDIR"] == "/proc/none"
