"""Which seeds are kept for evaluation: drawn by their ids, so that it is the same ones in every run."""

from dataclasses import dataclass, field
from typing import Any

from streamsyn.records import digest
from streamsyn.trainer.stream.examples import Example


@dataclass(frozen=True, slots=True)
class HeldOut:
    """An example that is evaluated and never trained on, with the row it was made of."""

    example: Example
    row: dict[str, Any] = field(repr=False)


def is_held_out(row: dict[str, Any], share: float) -> bool:
    """Whether a row belongs to one of the seeds that are held out: `share` of all, whatever the order.

    All drafts of a seed go the same way. A row without `seed_id` and `id` is never held out.
    """
    seed_id = row.get("seed_id") or row.get("id")
    if not share or not isinstance(seed_id, str):
        return False
    return int.from_bytes(digest("holdout", seed_id)[:8]) < share * 2**64
