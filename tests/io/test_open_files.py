"""The limit of open files: raised to what the system allows, and divided between files and connections."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from streamsyn.io.open_files import free_files, raise_limit


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
