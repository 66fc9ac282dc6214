"""Short chat data whose loss shows what a model forgets while it learns to read long contexts."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice

import structlog

from streamsyn.errors import ConfigError
from streamsyn.trainer.sources.files import FileRows
from streamsyn.trainer.stream.examples import Dropped, Example, Key, Row
from streamsyn.trainer.stream.feed import Rendering
from streamsyn.trainer.stream.reading import mark_of

log = structlog.get_logger()

_AT_ONCE = 64
_SHOWN = 5
"""Dropped rows that are logged one by one."""


def control_examples(path: str, samples: int, renderer: Rendering) -> list[Example]:
    """The first examples of the rows in `path`, so many at most. A row that makes none is counted and said.

    Raises:
        ConfigError: No row makes an example, or there is nothing to read.
    """
    found: list[Example] = []
    dropped: Counter[str] = Counter()
    for where, made in _made(path, renderer):
        if len(found) == samples:
            break
        if isinstance(made, Example):
            found.append(made)
            continue
        dropped[made.reason] += 1
        if dropped.total() <= _SHOWN:
            log.warning("control.dropped", at=where, reason=made.reason, why=made.detail)
    if dropped:
        log.warning("control.dropped_rows", count=dropped.total(), samples=len(found))
    if not found:
        why = ", ".join(f"{reason}: {count}" for reason, count in dropped.items()) or "it is empty"
        raise ConfigError(f"train.control: {path}: no row of it can be evaluated ({why})")
    return found


def _made(path: str, renderer: Rendering) -> Iterator[tuple[str, Example | Dropped]]:
    rows = FileRows(path, "control", "train.control", count=False).placed()
    while some := list(islice(rows, _AT_ONCE)):
        good = [(row.value, _key(row)) for _, row in some if row.value is not None]
        made = iter(renderer.render_batch(good))
        for where, row in some:
            yield where, Dropped("bad_row", row.problem) if row.value is None else next(made)


def _key(row: Row) -> Key:
    """By what it holds: another file is not compared with this one when a training goes on."""
    return Key(f"control:{mark_of(row)}", 0, row.seq)
