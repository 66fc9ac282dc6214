"""Which split a sample falls in, and how splits are called.

How files and splits are called, and what else `datasets` looks for.
"""

import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from streamsyn.errors import ConfigError
from streamsyn.records import digest

MAX_TASKS = 256
"""A split for each task is a file open for each task."""
_NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)
_RESERVED = ("all", "default")
"""Names that `datasets` gives a meaning to."""


@dataclass(frozen=True, slots=True)
class Split:
    """Where a sample goes: its task's configuration, if tasks are split, and the split in it."""

    task: str | None
    name: str


class Splits:
    """Tells of each sample which split it falls in.

    All samples of a seed fall in the same: what counts is a digest of its id and the split seed.

    Args:
        given: `task`, and `NAME=SHARE,...`, in any order, each once at most.
        seed: Another one splits otherwise.

    Raises:
        ConfigError: `given` is neither.
    """

    def __init__(self, given: Sequence[str], seed: int) -> None:
        self._seed = str(seed)
        shares = [one for one in given if one != "task"]
        self.by_task = len(shares) < len(given)
        if len(shares) > 1 or len(given) - len(shares) > 1:
            raise ConfigError("--split: give `task` once, shares once, or both")
        self.shares = _shares(shares[0]) if shares else {"train": 1.0}
        self._names = list(self.shares)
        self._bounds = list(accumulate(self.shares.values()))[:-1]

    def of(self, task: str, seed_id: str) -> Split:
        """The split of a sample."""
        place = int.from_bytes(digest("split", self._seed, seed_id)[:8]) / 2**64
        return Split(task if self.by_task else None, self._names[bisect_right(self._bounds, place)])


def _shares(text: str) -> dict[str, float]:
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, _, share = part.strip().partition("=")
        if not _NAME.fullmatch(name) or name in _RESERVED:
            raise ConfigError(f"--split {text}: {name!r} cannot be the name of a split")
        try:
            value = float(share)
        except ValueError:
            value = math.nan
        if not value > 0 or name in shares:
            raise ConfigError(
                f"--split {text}: give `task`, or each name once with a share, as in train=0.95"
            )
        shares[name] = value
    if not math.isclose(sum(shares.values()), 1, abs_tol=1e-6):
        raise ConfigError(f"--split {text}: the shares come to {sum(shares.values()):g}, not to 1")
    return shares


class TaskNames:
    """Names of tasks as folders and configurations may be called: letters, digits and underscores.

    Raises (when called):
        ConfigError: There are more than MAX_TASKS.
    """

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._taken = set(_RESERVED)

    def __call__(self, task: str) -> str:
        """The name for a task, the same each time."""
        if task not in self._names:
            if len(self._names) == MAX_TASKS:
                raise ConfigError(f"--split task: there are more than {MAX_TASKS} tasks; split by shares")
            name = re.sub(r"[^A-Za-z0-9]+", "_", task).strip("_")[:64]
            if not name or name.casefold() in self._taken:  # file systems may not tell cases apart
                name = f"{name or 'task'}_{digest(task).hex()[:12]}"
            self._names[task] = name
            self._taken.add(name.casefold())
        return self._names[task]
