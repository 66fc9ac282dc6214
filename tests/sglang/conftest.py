"""Fixtures for the tests of the servers' side."""

import asyncio
from collections.abc import AsyncIterator

import pytest_asyncio


@pytest_asyncio.fixture
async def no_task_left() -> AsyncIterator[None]:
    """What a test opened has closed all of its asyncio tasks when the test ends."""
    before = asyncio.all_tasks()
    yield
    left = {task.get_name() for task in asyncio.all_tasks() - before if not task.done()}
    assert set() == left - {asyncio.current_task().get_name()}  # type: ignore[union-attr]
