"""How many examples a property test tries: all of them in `make torture`, a quarter of them in
`make test-crash`, and an eighth in `make test`. And which cases of a slow test are left to `make torture`.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, TypeVar

import pytest
from hypothesis import settings

F = TypeVar("F")
Test: TypeAlias = Callable[..., None]

_SHARES = {"short": 1 / 8, "long": 1 / 4, "torture": 1.0}
"""The profiles, and which share of the examples each one tries."""
_FEWEST = 10

# How long an example takes says nothing on a shared machine. A change is judged by the same examples each
# time; `make torture` looks for new ones.
for _name, _share in _SHARES.items():
    settings.register_profile(
        _name, deadline=None, max_examples=round(200 * _share), derandomize=_name != "torture"
    )


def examples(number: int) -> Callable[[F], F]:
    """Settings for `number` examples under the profile "torture"."""
    share = _SHARES.get(settings.get_current_profile_name(), 1.0)
    return settings(max_examples=max(_FEWEST, round(number * share)), deadline=None)


def one_in(every: int, cases: Sequence[Any]) -> list[Any]:
    """Cases of a parametrized test: the first of each `every` for CI, and the others for `make torture`."""
    return [case if number % every == 0 else _for_torture(case) for number, case in enumerate(cases)]


def _for_torture(case: Any) -> Any:
    given = case if isinstance(case, tuple) else (case,)
    return pytest.param(*given, marks=pytest.mark.torture)


def in_turn(names: str | tuple[str, ...], cases: Iterable[Any]) -> Callable[[Test], Test]:
    """Like `pytest.mark.parametrize`, but all cases are one test: for hundreds of cases of microseconds each.

    As tests of their own, every worker would collect each of them, and set up and report it. Fixtures are
    shared by the cases. A failure names its case in a note.
    """
    arguments = (names,) if isinstance(names, str) else names

    def decorated(test: Test) -> Test:
        @functools.wraps(test)
        def all_cases(**fixtures: Any) -> None:
            for case in cases:
                values = (case,) if isinstance(names, str) else case
                try:
                    test(**fixtures, **dict(zip(arguments, values, strict=True)))
                except BaseException as error:
                    error.add_note(f"case: {values!r:.2000}")
                    raise

        signature = inspect.signature(test)
        left = [one for name, one in signature.parameters.items() if name not in arguments]
        all_cases.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
        return all_cases

    return decorated
