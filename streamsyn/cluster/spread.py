"""Work on the shards of a log, spread over the nodes of a Ray cluster by Ray Data: for `export --ray` and
`score --ray`.

The nodes read the shards themselves, so the run directory must be on storage that all of them see at the
same path. What is computed is the same as in one process, in the same order.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final, TypeAlias

import pyarrow
import ray
import ray.data
from ray.exceptions import RayError

from streamsyn.errors import SinkError, root_cause
from streamsyn.scoring.contamination import EvalSets, Overlap
from streamsyn.scoring.score_log import written
from streamsyn.shingles import Signature, signatures
from streamsyn.sink import shards

Row: TypeAlias = dict[str, Any]

_BATCH: Final = 64
"""Contexts that are worked on together."""
_OVERLAP: Final = pyarrow.struct(
    [("ngrams", pyarrow.int64()), ("file", pyarrow.string()), ("words", pyarrow.string())]
)


def sign_shards(paths: Sequence[Path]) -> Iterator[Signature]:
    """Yield the signatures of the contexts in sealed shards, in order. Each shard is a task on some node.

    Raises:
        SinkError: A task failed, for example because its node does not have the shard.
    """
    return map(_signature_of, _map_shards(paths, _signed))


def examine_shards(
    paths: Sequence[Path], eval_sets: EvalSets | None, fields: Sequence[str]
) -> Iterator[tuple[Signature, Overlap | None]]:
    """Yield the signature of each context in sealed shards, and what it shares with evaluation data.

    Args:
        paths: The shards. Each is a task on some node.
        eval_sets: The data; each node gets it once. None: nothing is looked for.
        fields: Where in a context's row it is looked for.

    Raises:
        SinkError: A task failed, for example because its node does not have the shard.
    """
    shared = None if eval_sets is None else ray.put(eval_sets)
    for row in _map_shards(paths, partial(_examined, shared=shared, fields=fields)):
        overlap = row["overlap"]
        yield _signature_of(row), None if overlap is None else Overlap(**overlap)


def _map_shards(paths: Sequence[Path], work: Callable[[list[Row]], dict[str, Any]]) -> Iterator[Row]:
    """Yield what `work` returns in columns for batches of contexts, in the order of the log, as rows."""
    if not paths:
        return
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it logs each execution, and that bars are off
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    names = [{"path": str(path.absolute())} for path in paths]
    worked = ray.data.from_items(names, override_num_blocks=len(names)).map_batches(
        partial(_work_on, work=work), batch_size=1, batch_format="pyarrow"
    )
    try:
        batches: Iterator[Any] = iter(worked.iter_batches(batch_size=None, batch_format="pyarrow"))
        for batch in batches:
            yield from batch.to_pylist()
    except (RayError, OSError) as error:
        why = str(root_cause(error)).strip().rpartition("\n")[2]
        raise SinkError(f"a task of Ray could not read the shards of {paths[0].parent}: {why}") from error


def _work_on(names: pyarrow.Table, work: Callable[[list[Row]], dict[str, Any]]) -> Iterator[pyarrow.Table]:
    """Work on the contexts of the named shards, on a node."""
    for name in names["path"].to_pylist():
        rows = shards.rows(Path(name))
        while batch := list(islice(rows, _BATCH)):
            yield pyarrow.table(work(batch))


def _signed(rows: list[Row]) -> dict[str, Any]:
    signed = signatures([row["context"] for row in rows])
    return {
        "values": pyarrow.array([one.values for one in signed], pyarrow.binary()),
        "keys": pyarrow.array([one.keys for one in signed], pyarrow.binary()),
    }


def _signature_of(row: Row) -> Signature:
    return Signature(row["values"], row["keys"])


def _examined(rows: list[Row], shared: Any, fields: Sequence[str]) -> dict[str, Any]:
    found: list[Overlap | None] = [None] * len(rows)
    if shared is not None:
        eval_sets: EvalSets = ray.get(shared)  # not copied: the node's tasks share its memory
        found = [eval_sets.overlap(written(row, fields)) for row in rows]
    overlaps = [None if one is None else asdict(one) for one in found]
    return {**_signed(rows), "overlap": pyarrow.array(overlaps, _OVERLAP)}
