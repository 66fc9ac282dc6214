"""One row of an export: a sample, and the scores of its relevant context."""

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
"""The columns, in this order in every format."""

SCORES = ("context_gain", "answer_score", "closed_book_score")
"""Columns with scores of the relevant context; null where they were not measured."""


def context_fields(context: Row) -> Row:
    """Return the fields that a sample's row takes from the log row of its relevant context."""
    checks = context.get("checks") or {}
    fields: Row = {"model": context.get("model")}
    fields.update({name: checks.get(name) for name in SCORES})
    fields["flags"] = list(checks.get("flags") or ())
    return fields


def row_of(sample: Sample, epoch: int, fields: Row) -> Row:
    """Return the row of a sample; `fields` are the `context_fields` of its relevant context."""
    more = {"epoch": epoch, **fields}
    # Not `asdict`, which copies the lists.
    return {name: more[name] if name in more else getattr(sample, name) for name in SCHEMA.names}


def row_bytes(row: Row) -> int:
    """Return the approximate size of a row: the bytes of its texts, and a constant for the rest."""
    return 256 + sum(_bytes(message["content"]) for message in row["messages"]) + 8 * len(row["context_seqs"])


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
