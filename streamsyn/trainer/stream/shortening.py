"""Shortens samples that are longer than a row: distractors are left out before any text is cut.

A sample's message does not say where its passages begin and end. They are found by the texts of its contexts,
which the log of the run has.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from streamsyn.records import digest
from streamsyn.trainer.examples import Dropped, Example, Key

Render = Callable[[dict[str, Any], Key], Example | Dropped]


@dataclass(frozen=True, slots=True)
class _Passages:
    """The message of a sample in parts.

    Attributes:
        before: What stands before the first passage.
        texts: The passages.
        between: For each passage what stands between the one before it and it; "" for the first.
        after: What stands after the last passage.
    """

    before: str
    texts: Sequence[str]
    between: Sequence[str]
    after: str

    def message(self, kept: Sequence[int]) -> str:
        """The message with only some passages, at least one, in their order."""
        first, *others = kept
        parts = (self.between[at] + self.texts[at] for at in others)
        return "".join((self.before, self.texts[first], *parts, self.after))


def context_seqs(row: dict[str, Any]) -> list[int] | None:
    """The seqs of a sample's contexts, its relevant one among them; None if the row does not name them."""
    seqs, relevant = row.get("context_seqs"), row.get("relevant_index")
    if not isinstance(seqs, list) or not isinstance(relevant, int) or not 0 <= relevant < len(seqs):
        return None
    if not isinstance(seqs[relevant], int):
        return None
    return [seq for seq in seqs if isinstance(seq, int)]  # null for a passage of a corpus


def shortened(
    row: dict[str, Any], key: Key, texts: Sequence[str], render: Render
) -> Example | Dropped | None:
    """Make an example of a sample with as few distractors left out as the row's length demands.

    Which distractors are left out first is drawn from the sample's id, so that the relevant passage keeps its
    depth on average. If the sample is too long without any distractor, the example is cut.

    Args:
        row: A sample of one user message.
        key: Its key.
        texts: The texts of its contexts, as `context_seqs` names them.
        render: Makes an example of a row.

    Returns:
        The example, or why there is none; None if the passages are not found in the message.
    """
    seqs = context_seqs(row)
    message = row["messages"][0]["content"]
    passages = _found(message, texts)
    if seqs is None or passages is None or len(seqs) != len(texts):
        return None
    relevant = seqs.index(row["context_seqs"][row["relevant_index"]])
    leave_out = sorted(
        (at for at in range(len(texts)) if at != relevant),
        key=lambda at: digest("leave out", str(row.get("id")), str(seqs[at])),
    )

    def without(count: int) -> Example | Dropped:
        kept = sorted({*range(len(texts))}.difference(leave_out[:count]))
        user = {**row["messages"][0], "content": passages.message(kept)}
        return render({**row, "messages": [user, *row["messages"][1:]]}, key)

    few, enough, made = 0, len(leave_out), without(len(leave_out))
    while enough - few > 1 and not _is_too_long(made):  # without `few` it is too long, without `enough` not
        middle = (few + enough) // 2
        if _is_too_long(tried := without(middle)):
            few = middle
        else:
            enough, made = middle, tried
    return made


def _is_too_long(made: Example | Dropped) -> bool:
    return isinstance(made, Dropped) or made.cut


def _found(message: str, texts: Sequence[str]) -> _Passages | None:
    spans: list[tuple[int, int]] = []
    end = 0
    for text in texts:
        begin = message.find(text, end)
        if begin < 0:
            return None
        end = begin + len(text)
        spans.append((begin, end))
    between = ["", *(message[one[1] : other[0]] for one, other in pairwise(spans))]
    return _Passages(message[: spans[0][0]], texts, between, message[end:])
