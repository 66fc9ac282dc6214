"""Work on the shards of a log, spread over the nodes of a Ray cluster by Ray Data: for `export --ray`.

The nodes read the shards themselves, so the run directory must be on storage that all of them see at the
same path. What is computed is the same as in one process, in the same order.
"""

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

import pyarrow
import ray
import ray.data
from ray.exceptions import RayError

from streamsyn.errors import SinkError, root_cause
from streamsyn.shingles import Signature, signatures
from streamsyn.sink import shards

_BATCH: Final = 64
"""Contexts that are signed together."""


def sign_shards(paths: Sequence[Path]) -> Iterator[Signature]:
    """Yield the signatures of the contexts in sealed shards, in order. Each shard is a task on some node.

    Raises:
        SinkError: A task failed, for example because its node does not have the shard.
    """
    if not paths:
        return
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it logs each execution, and that bars are off
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    names = [{"path": str(path.absolute())} for path in paths]
    signed = ray.data.from_items(names, override_num_blocks=len(names)).map_batches(
        _sign, batch_size=1, batch_format="pyarrow"
    )
    try:
        batches: Iterator[Any] = iter(signed.iter_batches(batch_size=None, batch_format="pyarrow"))
        for batch in batches:
            for row in batch.to_pylist():
                yield Signature(row["values"], tuple(row["bands"]))
    except (RayError, OSError) as error:
        why = str(root_cause(error)).strip().rpartition("\n")[2]
        raise SinkError(f"a task of Ray could not read the shards of {paths[0].parent}: {why}") from error


def _sign(names: pyarrow.Table) -> Iterator[pyarrow.Table]:
    """Sign the contexts of the named shards, on a node."""
    for name in names["path"].to_pylist():
        rows = shards.rows(Path(name))
        while batch := list(islice(rows, _BATCH)):
            yield _table(signatures([row["context"] for row in batch]))


def _table(signed: Sequence[Signature]) -> pyarrow.Table:
    columns: dict[str, Any] = {
        "values": pyarrow.array([one.values for one in signed], pyarrow.binary()),
        "bands": pyarrow.array([one.bands for one in signed], pyarrow.list_(pyarrow.int64())),
    }
    return pyarrow.table(columns)
