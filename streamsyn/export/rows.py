"""A row of an export: a sample, and what was measured of its relevant context."""

from typing import Any, TypeAlias

import pyarrow

from streamsyn.records import Sample

Row: TypeAlias = dict[str, Any]

SCHEMA = pyarrow.schema(
    [
        ("id", pyarrow.string()),
        ("seed_id", pyarrow.string()),
        ("task", pyarrow.string()),
        ("instruction", pyarrow.string()),
        (
            "messages",
            pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])),
        ),
        ("n_tokens", pyarrow.int64()),
        ("target_tokens", pyarrow.int64()),
        ("context_seqs", pyarrow.list_(pyarrow.int64())),
        ("relevant_index", pyarrow.int64()),
        ("epoch", pyarrow.int64()),
        ("model", pyarrow.string()),
        ("context_gain", pyarrow.float64()),
        ("answer_score", pyarrow.float64()),
        ("closed_book_score", pyarrow.float64()),
        ("flags", pyarrow.list_(pyarrow.string())),
    ]
)
"""Columns, in this order in every format."""

_MEASURED = ("context_gain", "answer_score", "closed_book_score")


def measured(context: Row) -> Row:
    """What a row tells of the context that it is about, from that context's row in the log."""
    checks = context.get("checks") or {}
    figures: Row = {"model": context.get("model")}
    figures.update({name: checks.get(name) for name in _MEASURED})
    figures["flags"] = list(checks.get("flags") or ())
    return figures


def row_of(sample: Sample, epoch: int, figures: Row) -> Row:
    """The row of a sample."""
    more = {"epoch": epoch, **figures}
    # Not `asdict`, which copies the texts' lists.
    return {name: more[name] if name in more else getattr(sample, name) for name in SCHEMA.names}


def text_bytes(row: Row) -> int:
    """How long a row is, near enough: the bytes of its texts, and something for the rest."""
    return 256 + sum(_bytes(message["content"]) for message in row["messages"]) + 8 * len(row["context_seqs"])


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
