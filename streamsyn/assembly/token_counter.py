"""The length of a sample in tokens.

`ServerTokenCounter` adds up what the servers counted. `ChatTokenCounter` counts the whole chat exactly,
with the tokenizer and chat template of the model to be tuned. It uses `IncrementalTokenCounter`, which
encodes each passage once: it keeps a safe split point near the head, one near the tail, and the number of
tokens between them, which is the same wherever the passage stands. In a sample only the seams are encoded,
from the tail point of one passage to the head point of the next. Whether the head point is a boundary there
is checked in the seam itself; if not, the seam extends to the next passage. A text that cannot be split is
encoded whole.
"""

import json
import unicodedata
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

from tokenizers import Encoding

from streamsyn.assembly.chat_tokenizer import ChatTokenizer
from streamsyn.assembly.corpus import CorpusPassage
from streamsyn.assembly.pre_tokenizer import pre_tokenizer_of
from streamsyn.assembly.sample_prompts import SamplePrompts
from streamsyn.assembly.window import Passage, Piece
from streamsyn.templates import PromptTemplate

_ERROR_TOKENS, _ERROR_TOKENS_PER_PIECE = 32, 2
"""Assumed error of a sum of estimates. A guess: it only decides how early samples are counted exactly."""
_HEAD_CHARS = (256, 4096)
"""Characters in which the head point is searched: the first number, then the second if there is none."""
_PROBE_CHARS = 64
"""Characters of a passage that are searched for first."""
_TOGETHER_CHARS = 2**20
"""Characters of passages that are encoded together; an encoding takes much more memory than its text."""
_MAX_SEAMS = 2**14
_MAX_CORPUS_PASSAGES = 2**17


class TokenCounter(Protocol):
    """Counts the tokens of samples."""

    def prepare(self, pieces: Sequence[Piece]) -> None:
        """Compute what counting needs of passages together, which takes less time."""
        ...

    def estimate(self, relevant: Passage, piece: Piece) -> int:
        """Return roughly how many tokens a piece adds to the sample of `relevant`."""
        ...

    def max_error(self, pieces: int) -> int | None:
        """Return by how many tokens a sum of this many estimates may be off; None if it is exact."""
        ...

    def count(self, relevant: Passage, pieces: Sequence[Piece], user: str | None = None) -> int:
        """Return the tokens of the sample of `relevant` that holds `pieces` in this order.

        Args:
            relevant: The relevant context; also one of `pieces`.
            pieces: All passages of the sample.
            user: The user message, if it has been rendered already.
        """
        ...


class ServerTokenCounter:
    """Adds up the passages' tokens as counted by the servers that wrote them; nothing else is counted."""

    def prepare(self, pieces: Sequence[Piece]) -> None:
        """Do nothing."""

    def estimate(self, relevant: Passage, piece: Piece) -> int:  # noqa: ARG002 - the protocol's
        return piece.tokens

    def max_error(self, pieces: int) -> None:  # noqa: ARG002 - the protocol's
        return None

    def count(self, relevant: Passage, pieces: Sequence[Piece], user: str | None = None) -> int:  # noqa: ARG002
        return sum(piece.tokens for piece in pieces)


class ChatTokenCounter:
    """Counts the whole chat exactly. Most of it is encoded once for each passage."""

    def __init__(self, tokenizer: ChatTokenizer, prompts: SamplePrompts) -> None:
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._incremental = IncrementalTokenCounter(tokenizer)
        self._separators: dict[PromptTemplate, int] = {}

    def prepare(self, pieces: Sequence[Piece]) -> None:
        self._incremental.prepare(pieces)

    def estimate(self, relevant: Passage, piece: Piece) -> int:
        template = self._prompts.template(relevant.task)
        if template not in self._separators:
            self._separators[template] = self._separator_tokens(template)
        return self._incremental.count_piece(piece) + self._separators[template]

    def max_error(self, pieces: int) -> int:
        return _ERROR_TOKENS + _ERROR_TOKENS_PER_PIECE * pieces

    def count(self, relevant: Passage, pieces: Sequence[Piece], user: str | None = None) -> int:
        if user is None:
            user = self._prompts.user_message(relevant, [piece.text for piece in pieces])
        return self._incremental.count(self._tokenizer.render(user, relevant.answer), pieces)

    def _separator_tokens(self, template: PromptTemplate) -> int:
        """Return the tokens that a template adds for each passage."""
        one, three = (
            self._tokenizer.count(template.render(contexts=["word"] * n, instruction="word", task="word"))
            for n in (1, 3)
        )
        return (three - one) // 2 - self._tokenizer.count("word")


class SplitPoints(NamedTuple):
    """What is kept of an encoded passage. Positions are characters of the stripped text."""

    total: int
    """Tokens of the passage alone."""
    head: int
    """The first safe split point; -1 if the passage cannot be split."""
    head_end: int = 0
    """End of the text a seam must include for its boundaries up to `head` to be right."""
    tail: int = 0
    """The last safe split point."""
    between: int = 0
    """Tokens from `head` to `tail`."""


class Seam(NamedTuple):
    """A text between two safe split points, with some of the text after it."""

    text: str
    end: int
    """Position of the second split point; -1 if the seam reaches to the end of the text."""


class IncrementalTokenCounter:
    """Counts the tokens of texts that contain passages. Not thread-safe.

    Args:
        tokenizer: The tokenizer to count with.
        settle_chars: Characters at a passage's start that are skipped when its head point is searched, as
            the boundaries there may depend on the text before it.
    """

    def __init__(self, tokenizer: ChatTokenizer, settle_chars: int = 24) -> None:
        self._tokenizer = tokenizer
        self._settle_chars = settle_chars
        self._pre_tokenizer = pre_tokenizer_of(json.loads(tokenizer.tokenizer.to_str()))
        self._points: WeakKeyDictionary[Piece, SplitPoints] = WeakKeyDictionary()
        self._corpus_points: dict[int, SplitPoints] = {}
        self._seams: dict[Seam, int | None] = {}

    @property
    def is_incremental(self) -> bool:
        """Whether the tokenizer allows it; otherwise every text is encoded whole."""
        return self._pre_tokenizer is not None

    def count(self, text: str, pieces: Sequence[Piece]) -> int:
        """Return the tokens of a text that contains `pieces` in this order, stripped or not."""
        scan = self._pre_tokenizer
        if scan is None or (scan.nfc and not unicodedata.is_normalized("NFC", text)):
            return self._tokenizer.count(text)
        placed: list[tuple[int, SplitPoints]] = []
        end = gap = 0
        for piece in pieces:
            stripped = piece.text.strip()
            begin = _find(text, stripped, end, end + gap)
            if begin < 0:
                return self._tokenizer.count(text)
            gap = begin - end
            end = begin + len(stripped)
            if (points := self.split_points(piece)).head >= 0:
                placed.append((begin, points))
        return self._count_seams(text, placed)

    def prepare(self, pieces: Sequence[Piece]) -> None:
        """Split passages together: the tokenizer encodes their texts on all cores."""
        new = deque(piece for piece in pieces if piece not in self._points)
        while new:
            some, chars = [], 0
            while new and chars < _TOGETHER_CHARS:
                some.append(new.popleft())
                chars += len(some[-1].text)
            self._points.update(zip(some, self._split([piece.text.strip() for piece in some]), strict=True))

    def count_piece(self, piece: Piece) -> int:
        """Return the tokens of a passage alone."""
        return self.split_points(piece).total

    def split_points(self, piece: Piece) -> SplitPoints:
        """Return the split points of a passage, which are cached."""
        if isinstance(piece, CorpusPassage):
            if (points := self._corpus_points.get(piece.index)) is None:
                if len(self._corpus_points) >= _MAX_CORPUS_PASSAGES:
                    self._corpus_points.clear()
                (points,) = self._split([piece.text.strip()])
                self._corpus_points[piece.index] = points
        elif (points := self._points.get(piece)) is None:
            (points,) = self._split([piece.text.strip()])
            self._points[piece] = points
        return points

    def _count_seams(self, text: str, placed: list[tuple[int, SplitPoints]]) -> int:
        starts = [0, *(begin + points.tail for begin, points in placed)]
        self._encode_seams([_seam(text, start, to) for start, to in zip(starts, placed, strict=False)])
        tokens = start = 0
        for begin, points in placed:
            before = self._seam_tokens(_seam(text, start, (begin, points)))
            if before is not None:
                tokens += before + points.between
                start = begin + points.tail
        rest = self._seam_tokens(Seam(text[start:], -1))
        assert rest is not None, "the last seam has no second split point"
        return tokens + rest

    def _seam_tokens(self, seam: Seam) -> int | None:
        """Return the tokens before a seam's second split point; None if that is not safe here."""
        if seam not in self._seams:
            self._encode_seams([seam])
        return self._seams[seam]

    def _encode_seams(self, seams: Sequence[Seam]) -> None:
        assert self._pre_tokenizer is not None, "else texts are encoded whole"
        if len(self._seams) > _MAX_SEAMS:
            self._seams.clear()
        new = [seam for seam in dict.fromkeys(seams) if seam not in self._seams]
        for seam, encoding in zip(new, self._encode([seam.text for seam in new]), strict=True):
            if seam.end < 0:
                self._seams[seam] = len(encoding)
            else:
                self._seams[seam] = self._pre_tokenizer.tokens_before(seam.text, encoding, seam.end)

    def _split(self, texts: Sequence[str]) -> list[SplitPoints]:
        if self._pre_tokenizer is None:
            return [SplitPoints(self._tokenizer.count(text), -1) for text in texts]
        heads = [self._find_head(text) for text in texts]
        rests = [text[head[0] :] if head else text for text, head in zip(texts, heads, strict=True)]
        points = []
        for head, rest, encoding in zip(heads, rests, self._encode(rests), strict=True):
            if head is None:
                points.append(SplitPoints(len(encoding), -1))
                continue
            begin, before, end = head
            total = before + len(encoding)
            found = self._pre_tokenizer.last_before(rest, encoding, self._pre_tokenizer.margin_begin(rest))
            if found is None:
                points.append(SplitPoints(total, -1))
            else:
                tail, between = found
                points.append(SplitPoints(total, begin, end, begin + tail, between))
        return points

    def _find_head(self, text: str) -> tuple[int, int, int] | None:
        """Return a split point near the head, the tokens before it, and the end of its margin."""
        assert self._pre_tokenizer is not None, "else texts are encoded whole"
        for length in _HEAD_CHARS:
            part = text[:length]
            (encoding,) = self._encode([part])
            for at in range(self._settle_chars, len(part)):
                if (before := self._pre_tokenizer.tokens_before(part, encoding, at)) is not None:
                    if (end := self._pre_tokenizer.margin_end(part, at)) is not None:
                        return at, before, end
                    break
            if length >= len(text):
                break
        return None

    def _encode(self, texts: list[str]) -> list[Encoding]:
        return self._tokenizer.tokenizer.encode_batch(texts, add_special_tokens=False)


def _find(text: str, passage: str, first: int, guess: int) -> int:
    """Return where a passage begins, at `first` or later; -1 if nowhere. A search for a long text is slow."""
    if text.startswith(passage, guess):
        return guess
    found = text.find(passage[:_PROBE_CHARS], first)
    return found if found < 0 or text.startswith(passage, found) else text.find(passage, first)


def _seam(text: str, start: int, to: tuple[int, SplitPoints]) -> Seam:
    begin, points = to
    return Seam(text[start : begin + points.head_end], begin + points.head - start)
