"""How long a sample is, in tokens.

Tokens of long texts, exactly, from those of their passages and of what lies between them.

A passage is encoded once. Of it are kept a safe place near its head, one near its tail, and the tokens
between them: they are the same wherever the passage stands. What is left of a sample are its seams, from one
tail to the next head. That a scan is at a boundary at the head is looked up in the seam itself: where it is
not, the seam goes on to the head of the next passage. What cannot be cut, or found in the text, is counted
whole.

Counts samples as the model to be tuned sees them.
"""

import json
import unicodedata
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


class TokenCounter(Protocol):
    """Counts the tokens of samples."""

    def about(self, relevant: Passage, piece: Piece) -> int:
        """How many tokens a piece adds to the sample of `relevant`, about."""
        ...

    def slack(self, pieces: int) -> int | None:
        """By how much a sum over so many pieces may be off; None: it never is."""
        ...

    def total(self, relevant: Passage, pieces: Sequence[Piece], user: str | None = None) -> int:
        """Tokens of the sample of `relevant` that holds `pieces`, in this order.

        Args:
            relevant: Also one of `pieces`.
            pieces: All passages of the sample.
            user: The user message, where it has been rendered already.
        """
        ...


class ServerTokenCounter:
    """Counts the passages alone, as the servers counted that wrote them."""

    def about(self, relevant: Passage, piece: Piece) -> int:  # noqa: ARG002 - the protocol's
        return piece.tokens

    def slack(self, pieces: int) -> None:  # noqa: ARG002 - the protocol's
        return None

    def total(self, relevant: Passage, pieces: Sequence[Piece], user: str | None = None) -> int:  # noqa: ARG002
        return sum(piece.tokens for piece in pieces)


_HEADS = (256, 4096)
"""The characters in which a first boundary is looked for, and if there is none, in so many."""
_LOOKED_FOR = 64
_MOST_SEAMS = 2**14
_MOST_CORPUS = 2**17


class Cuts(NamedTuple):
    """What is kept of a passage's tokens. Places are in characters of the stripped text."""

    total: int
    """Tokens of it alone."""
    head: int
    """The first safe place; -1 where it cannot be cut."""
    head_end: int = 0
    """What a seam has to hold so that its boundaries up to `head` are right."""
    tail: int = 0
    """The last safe place."""
    between: int = 0
    """Tokens from `head` to `tail`."""


class Seam(NamedTuple):
    """A text between two safe places, with some of what follows."""

    text: str
    end: int
    """Where the second place is; -1: the text goes to its end."""


class IncrementalTokenCounter:
    """Counts texts that hold passages. Not for two threads at a time.

    Args:
        tokenizer: Whose tokens.
        settle_chars: After so many characters of a passage, any scan is likely to stand where its own does.
    """

    def __init__(self, tokenizer: ChatTokenizer, settle_chars: int = 24) -> None:
        self._tokenizer = tokenizer
        self._settle_chars = settle_chars
        self._scan = pre_tokenizer_of(json.loads(tokenizer.tokenizer.to_str()))
        self._cuts: WeakKeyDictionary[Piece, Cuts] = WeakKeyDictionary()
        self._of_corpus: dict[int, Cuts] = {}
        self._seams: dict[Seam, int | None] = {}

    @property
    def is_splicing(self) -> bool:
        """Whether the tokenizer is of a kind that allows it."""
        return self._scan is not None

    def alone(self, piece: Piece) -> int:
        """Tokens of a passage alone."""
        return self.cuts(piece).total

    def cuts(self, piece: Piece) -> Cuts:
        """What is known of a passage."""
        if isinstance(piece, CorpusPassage):
            if (cuts := self._of_corpus.get(piece.index)) is None:
                if len(self._of_corpus) >= _MOST_CORPUS:
                    self._of_corpus.clear()
                cuts = self._of_corpus[piece.index] = self._cut(piece.text.strip())
        elif (cuts := self._cuts.get(piece)) is None:
            cuts = self._cuts[piece] = self._cut(piece.text.strip())
        return cuts

    def count(self, text: str, pieces: Sequence[Piece]) -> int:
        """Tokens of a text; `pieces` stand in it in this order, stripped or not."""
        if self._scan is None or (self._scan.nfc and not unicodedata.is_normalized("NFC", text)):
            return self._tokenizer.count(text)
        placed: list[tuple[int, Cuts]] = []
        at = gap = 0
        for piece in pieces:
            inside = piece.text.strip()
            begin = _found(text, inside, at, at + gap)
            if begin < 0:
                return self._tokenizer.count(text)
            gap = begin - at
            at = begin + len(inside)
            if (cuts := self.cuts(piece)).head >= 0:
                placed.append((begin, cuts))
        return self._spliced(text, placed)

    def _spliced(self, text: str, placed: list[tuple[int, Cuts]]) -> int:
        begins = [0, *(begin + cuts.tail for begin, cuts in placed)]
        self._encode([_seam(text, begin, to) for begin, to in zip(begins, placed, strict=False)])
        tokens = begin = 0
        for place, cuts in placed:
            before = self._counted(_seam(text, begin, (place, cuts)))
            if before is not None:
                tokens += before + cuts.between
                begin = place + cuts.tail
        rest = self._counted(Seam(text[begin:], -1))
        assert rest is not None, "the rest has no second place to miss"
        return tokens + rest

    def _counted(self, seam: Seam) -> int | None:
        """The tokens before a seam's second place, if that is safe."""
        if seam not in self._seams:
            self._encode([seam])
        return self._seams[seam]

    def _encode(self, seams: Sequence[Seam]) -> None:
        assert self._scan is not None, "else texts are counted whole"
        if len(self._seams) > _MOST_SEAMS:
            self._seams.clear()
        new = [seam for seam in dict.fromkeys(seams) if seam not in self._seams]
        for seam, encoding in zip(new, self._encodings([seam.text for seam in new]), strict=True):
            if seam.end < 0:
                self._seams[seam] = len(encoding)
            else:
                self._seams[seam] = self._scan.tokens_before(seam.text, encoding, seam.end)

    def _cut(self, text: str) -> Cuts:
        if self._scan is None or (head := self._head(text)) is None:
            return Cuts(self._tokenizer.count(text), -1)
        begin, before, end = head
        rest = text[begin:]
        (encoding,) = self._encodings([rest])
        total = before + len(encoding)
        found = self._scan.last_before(rest, encoding, self._scan.margin_begin(rest))
        if found is None:
            return Cuts(total, -1)
        tail, between = found
        return Cuts(total, begin, end, begin + tail, between)

    def _head(self, text: str) -> tuple[int, int, int] | None:
        """A place near the head, the tokens before it, and the end of its margin."""
        assert self._scan is not None, "else texts are counted whole"
        for length in _HEADS:
            part = text[:length]
            (encoding,) = self._encodings([part])
            for at in range(self._settle_chars, len(part)):
                if (before := self._scan.tokens_before(part, encoding, at)) is not None:
                    if (end := self._scan.margin_end(part, at)) is not None:
                        return at, before, end
                    break
            if length >= len(text):
                break
        return None

    def _encodings(self, texts: list[str]) -> list[Encoding]:
        return self._tokenizer.tokenizer.encode_batch(texts, add_special_tokens=False)


def _found(text: str, inside: str, at: int, guess: int) -> int:
    """Where a passage begins, not before `at`; -1 if it is nowhere. To look for a long text takes long."""
    if text.startswith(inside, guess):
        return guess
    first = text.find(inside[:_LOOKED_FOR], at)
    return first if first < 0 or text.startswith(inside, first) else text.find(inside, at)


def _seam(text: str, begin: int, to: tuple[int, Cuts]) -> Seam:
    place, cuts = to
    return Seam(text[begin : place + cuts.head_end], place + cuts.head - begin)


_SLACK = (32, 2)
"""By how many tokens a sum of passages may be off, and by how many more for each: a guess, which decides
only how early samples are counted exactly."""


class ChatTokenCounter:
    """Counts the whole chat, exactly, and most of it only once for each passage."""

    def __init__(self, tokenizer: ChatTokenizer, prompts: SamplePrompts) -> None:
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._splicer = IncrementalTokenCounter(tokenizer)
        self._between: dict[PromptTemplate, int] = {}

    def about(self, relevant: Passage, piece: Piece) -> int:
        template = self._prompts.template(relevant.task)
        if template not in self._between:
            self._between[template] = self._glue(template)
        return self._splicer.alone(piece) + self._between[template]

    def slack(self, pieces: int) -> int:
        always, each = _SLACK
        return always + each * pieces

    def total(self, relevant: Passage, pieces: Sequence[Piece], user: str | None = None) -> int:
        if user is None:
            user = self._prompts.user_message(relevant, [piece.text for piece in pieces])
        return self._splicer.count(self._tokenizer.render(user, relevant.answer), pieces)

    def _glue(self, template: PromptTemplate) -> int:
        """Tokens of what the template puts round a passage."""
        one, three = (
            self._tokenizer.count(template.render(contexts=["word"] * n, instruction="word", task="word"))
            for n in (1, 3)
        )
        return (three - one) // 2 - self._tokenizer.count("word")
