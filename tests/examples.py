"""How many examples a property test tries: all of them in `make test-crash`, a quarter in `make test`."""

from collections.abc import Callable
from typing import TypeVar

from hypothesis import settings

F = TypeVar("F")

# How long an example takes says nothing on a shared machine.
settings.register_profile("short", deadline=None, max_examples=25)
settings.register_profile("long", deadline=None, max_examples=100)


def examples(number: int) -> Callable[[F], F]:
    """Settings for `number` examples under the profile "long"."""
    is_long = settings.get_current_profile_name() == "long"
    return settings(max_examples=number if is_long else max(10, number // 4), deadline=None)
