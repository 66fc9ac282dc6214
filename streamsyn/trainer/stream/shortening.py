"""Shortens samples that are longer than a row: distractors are left out before any text is cut.

A sample's message does not say where its passages begin and end. They are found by the texts of its contexts,
which the log of the run has. Where they are known and the relevant one is too long by itself, a window of it
is kept, and everything around it. Otherwise the prompt keeps its beginning, its end, its instruction if the
row names it, and a window between them.

The window is what has most in common with answer and instruction; if nothing has anything in common with
them, the middle is cut out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy
from numpy.typing import NDArray

from streamsyn.records import digest
from streamsyn.trainer.examples import Dropped, Example, Key

Render = Callable[[dict[str, Any], Key], Example | Dropped]
RenderAround = Callable[[dict[str, Any], Key, str], Example | Dropped]
_ONE = 10**12
"""The weight of a token that a context has once."""


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
    row: dict[str, Any], key: Key, texts: Sequence[str], render: Render, around: RenderAround
) -> Example | Dropped | None:
    """Make an example of a sample with as few distractors left out as the row's length demands.

    Which distractors are left out first is drawn from the sample's id, so that the relevant passage keeps its
    depth on average. If the sample is too long without any distractor, its relevant passage is cut.

    Args:
        row: A sample of one user message.
        key: Its key.
        texts: The texts of its contexts, as `context_seqs` names them.
        render: Makes an example of a row.
        around: Makes an example of a row with as much of a text in it as fits.

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

    def without(count: int) -> dict[str, Any]:
        kept = sorted({*range(len(texts))}.difference(leave_out[:count]))
        user = {**row["messages"][0], "content": passages.message(kept)}
        return {**row, "messages": [user, *row["messages"][1:]]}

    few, enough, made = 0, len(leave_out), render(without(len(leave_out)), key)
    if _is_too_long(made):
        return around(without(len(leave_out)), key, texts[relevant])
    while enough - few > 1:  # without `few` it is too long, without `enough` not
        middle = (few + enough) // 2
        if _is_too_long(tried := render(without(middle), key)):
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


def common_ends(prompt: Sequence[int], bare: Sequence[int]) -> tuple[int, int]:
    """The number of tokens that two prompts have in common at the beginning, and at the end."""
    shorter = min(len(prompt), len(bare))
    head = next((at for at in range(shorter) if prompt[at] != bare[at]), shorter)
    rest = shorter - head
    tail = next((at for at in range(rest) if prompt[-1 - at] != bare[-1 - at]), rest)
    return head, tail


def around_instruction(prompt: Sequence[int], instruction: Sequence[int], least: int) -> tuple[int, int]:
    """The number of tokens at the beginning, and at the end of a prompt, that are not to be cut.

    Args:
        prompt: The tokens of the prompt.
        instruction: Those of its instruction, which stands nearer to one end; empty if it is not known.
        least: The number at either end without it.
    """
    inner = instruction[1:-1]  # the first and the last one may be merged with what is next to them
    begin = _last_place(prompt, inner) - 1
    end = begin + len(instruction)
    if begin < 0:
        return least, least
    return (max(least, end), least) if begin + end < len(prompt) else (least, max(least, len(prompt) - begin))


def cut_between(prompt: list[int], head: int, tail: int, size: int, wanted: Sequence[int]) -> list[int]:
    """Return `size` tokens of a longer prompt: the beginning, the end and a window between them.

    The window is the one with the most tokens in common with `wanted`. A token counts less the more often it
    occurs, by the square, so that articles and punctuation hardly matter. Of equal windows it is the one in
    the middle of the first ones next to each other.

    Args:
        prompt: The tokens of the prompt.
        head: Number of tokens at the beginning that are kept.
        tail: Number of tokens at the end that are kept.
        size: Tokens to keep; more than `head + tail`.
        wanted: Tokens of the answer and of the instruction.
    """
    end = len(prompt) - tail
    between, room = numpy.array(prompt[head:end], dtype=numpy.int64), size - head - tail
    _, kinds, counts = numpy.unique(between, return_inverse=True, return_counts=True)
    weights = numpy.where(numpy.isin(between, numpy.array(wanted)), _ONE // counts[kinds] ** 2, 0)
    if not weights.any():
        return [*prompt[: head + room // 2], *prompt[end - (room - room // 2) :]]
    begin = head + _best(weights, room)
    return [*prompt[:head], *prompt[begin : begin + room], *prompt[end:]]


def _best(weights: NDArray[numpy.int64], size: int) -> int:
    """The place of the window with the largest sum of weights."""
    sums = numpy.concatenate(([0], numpy.cumsum(weights)))
    sums = sums[size:] - sums[:-size]
    best = numpy.flatnonzero(sums == sums.max())
    gaps = numpy.flatnonzero(numpy.diff(best) > 1)
    return int(best[0] + best[gaps[0] if len(gaps) else -1]) // 2


def _last_place(tokens: Sequence[int], wanted: Sequence[int]) -> int:
    """The last place where tokens stand in this order; -1 if there is none, or nothing is wanted."""
    size = len(wanted)
    places = range(len(tokens) - size, -1, -1) if size else ()
    return next((at for at in places if tokens[at] == wanted[0] and tokens[at : at + size] == wanted), -1)
