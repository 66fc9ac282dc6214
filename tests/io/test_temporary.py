"""Where temporary files are made when the system has no folder for them."""

import os
import tempfile
from pathlib import Path

import pytest

from streamsyn.errors import ConfigError
from streamsyn.io.temporary import temporary_files_near


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
