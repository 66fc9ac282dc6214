"""Fixtures for all tests: nothing may block the event loop."""

from collections.abc import Iterator

import pytest
from blockbuster import BlockBuster, blockbuster_ctx
from hypothesis import settings

settings.register_profile("shared machine", deadline=None)  # how long an example takes says nothing here
settings.load_profile("shared machine")


@pytest.fixture(autouse=True)
def _no_blocking_calls() -> Iterator[BlockBuster]:
    """A blocking call made from a coroutine of ours fails the test; in a thread it is fine."""
    with blockbuster_ctx("streamsyn") as detector:
        yield detector
