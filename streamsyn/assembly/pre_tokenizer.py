"""How a tokenizer splits a text before its model sees it, and where that can be resumed.

Pre-tokenization scans a text from left to right. From a boundary on, the scan does not depend on the text
before it if no search looks back. So the scans of two texts that are equal from a boundary on agree from
there, except near the end, where a search may look ahead. How far it can look is computed from its regular
expression, which is read as alternatives of single characters and classes, some repeated without bound. A
search reads no more than runs of its unbounded classes and a few characters besides. Where no unbounded
class holds both of two neighbouring characters there is a class break, which no run crosses, so it is
enough to count the class breaks that a search can cross. Tokenizers with other kinds of patterns have no
`PreTokenizer`.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from tokenizers import Encoding, Regex, pre_tokenizers

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_PER_CHARACTER = ("BertPreTokenizer", "WhitespaceSplit", "Punctuation", "Digits", "CharDelimiterSplit")
"""Pre-tokenizers that look at a character and its neighbour only."""
_ESCAPED_CLASS = re.compile(r"\\(?:[pP]\{\^?[\w ]+\}|[sSdDwWhH])")
_ESCAPED_CHARACTER = re.compile(r"\\(?:[nrtfv]|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|[^\w\s])")
_QUANTIFIER = re.compile(r"(?P<sign>[*+?]|\{(?P<least>\d*)(?P<comma>,?)(?P<most>\d*)\})(?P<suffix>[?+]*)")
_GROUP = re.compile(r"\((?:\?(?P<kind>[i]?:|=|!|>))?(?!\?)")


class UnsupportedPattern(Exception):
    """Raised for a pre-tokenizer or pattern whose lookahead cannot be determined."""


def pre_tokenizer_of(spec: dict[str, Any]) -> "PreTokenizer | None":
    """Return the pre-tokenizer described by the output of `Tokenizer.to_str`; None if it is not supported."""
    normalizer = spec["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":
        return None
    added = spec["added_tokens"]
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added):
        return None
    if spec["pre_tokenizer"] is None:
        return None
    try:
        lookahead, coarse = _levels(spec["pre_tokenizer"])
    except UnsupportedPattern:
        return None
    contents = [token["content"] for token in added]
    return PreTokenizer(lookahead, contents, coarse, nfc=normalizer is not None, drops=_drops(spec["model"]))


@dataclass(frozen=True, slots=True)
class Lookahead:
    """How far a search can look.

    Attributes:
        classes: Its unbounded classes, as patterns that match one character.
        breaks: Class breaks it can cross at most.
    """

    classes: frozenset[str]
    breaks: int


_ONE_CHARACTER = Lookahead(frozenset(), 1)


class PreTokenizer:
    """Finds safe split points: boundaries where a scan can be resumed, whatever text was before.

    Args:
        lookahead: How far the searches of all levels look together.
        added: Texts of added tokens, which are found before the text is split.
        coarse: For each level but the last, a split that leaves the gaps between its matches.
        nfc: Whether the split points are right only for texts in Unicode's normal form C.
        drops: Whether a character may be left without a token.
    """

    def __init__(
        self, lookahead: Lookahead, added: Iterable[str], coarse: Sequence[Any], *, nfc: bool, drops: bool
    ) -> None:
        self._margin_breaks = lookahead.breaks + 2
        self._classes = [pre_tokenizers.Split(Regex(one), "removed") for one in sorted(lookahead.classes)]
        self._coarse = coarse
        self._added = frozenset(added)
        self._longest_added = max(map(len, self._added), default=0)
        self._class_bits: dict[str, int] = {}
        self._drops = drops
        self.nfc = nfc

    def margin_end(self, text: str, begin: int) -> int | None:
        """Return where a margin that starts at `begin` ends; no search from before `begin` looks past it.

        None if the text is too short.
        """
        breaks = 0
        for at in range(begin + 1, len(text)):
            breaks += self._is_class_break(text, at)
            if breaks == self._margin_breaks:
                end = max(at + 1, begin + self._longest_added)
                return end if end <= len(text) else None
        return None

    def margin_begin(self, text: str) -> int:
        """Return the last position before which no search looks past the text's end; -1 if there is none."""
        breaks = 0
        for at in range(len(text) - 1, 0, -1):
            breaks += self._is_class_break(text, at)
            if breaks == self._margin_breaks:
                return min(at - 1, len(text) - self._longest_added)
        return -1

    def tokens_before(self, text: str, encoding: Encoding, at: int) -> int | None:
        """Return the number of a text's tokens before `at`; None if that is not a safe split point."""
        word = encoding.char_to_word(at)
        span = None if word is None else encoding.word_to_chars(word)
        if word is None or span is None or span[0] != at or not self._is_coarse_boundary(text, encoding, at):
            return None
        if self._drops and at > 0 and encoding.char_to_token(at - 1) is None:
            return None  # the word may start with a character that has no token
        tokens = encoding.word_to_tokens(word)
        return None if tokens is None else tokens[0]

    def last_before(self, text: str, encoding: Encoding, latest: int) -> tuple[int, int] | None:
        """Return the last safe split point at or before `latest`, and the number of tokens before it."""
        at = latest
        for _ in range(64):
            if at <= 0:
                return None
            word = encoding.char_to_word(at)
            span = None if word is None else encoding.word_to_chars(word)
            if span is None:
                at -= 1
                continue
            if span[0] > 0 and (before := self.tokens_before(text, encoding, span[0])) is not None:
                return span[0], before
            at = span[0] - 1
        return None

    def _is_class_break(self, text: str, at: int) -> bool:
        return not self._classes_of(text[at - 1]) & self._classes_of(text[at])

    def _classes_of(self, character: str) -> int:
        """Return the unbounded classes that hold a character, one bit each."""
        if (bits := self._class_bits.get(character)) is None:
            holds = (not one.pre_tokenize_str(character) for one in self._classes)
            bits = self._class_bits[character] = sum(held << index for index, held in enumerate(holds))
        return bits

    def _is_coarse_boundary(self, text: str, encoding: Encoding, at: int) -> bool:
        """Return whether no match of a coarser level spans `at`."""
        if not self._coarse:
            return True
        begin, end = 0, len(text)
        for token, (first, last) in zip(encoding.tokens, encoding.offsets, strict=True):
            if token in self._added and text[first:last] == token:
                begin = last if last <= at else begin
                end = min(end, first) if first >= at else end
        section = text[begin:end]
        for level in self._coarse:
            gaps = (span for _, span in level.pre_tokenize_str(section))
            if not any(first <= at - begin <= last for first, last in gaps):
                return False
        return True


def _drops(model: dict[str, Any]) -> bool:
    """Return whether characters outside the vocabulary are left without a token."""
    if model["type"] == "Unigram":
        return model.get("unk_id") is None
    return model.get("unk_token") not in model["vocab"]


def _levels(spec: dict[str, Any]) -> tuple[Lookahead, list[Any]]:
    """Return the lookahead of all levels together, and the splits that leave the gaps of all but the last."""
    levels = list(spec["pretokenizers"] if spec["type"] == "Sequence" else [spec])
    if levels and levels[-1]["type"] == "ByteLevel":
        last = levels.pop()
        if last["add_prefix_space"]:
            raise UnsupportedPattern(spec["type"])
        if last["use_regex"]:
            levels.append(
                {"type": "Split", "pattern": {"Regex": _GPT2}, "behavior": "Isolated", "invert": False}
            )
    if not levels:
        raise UnsupportedPattern(spec["type"])
    lookaheads = [_lookahead(level, is_alone=len(levels) == 1) for level in levels]
    together = reduce(lambda a, b: Lookahead(a.classes | b.classes, a.breaks + b.breaks), lookaheads)
    before: list[Any] = []
    coarse = []
    for level in levels[:-1]:
        split, gaps = _coarse(level)
        if gaps is not None:
            coarse.append(pre_tokenizers.Sequence([*before, gaps]))
        before.append(split)
    return together, coarse


def _lookahead(level: dict[str, Any], *, is_alone: bool) -> Lookahead:
    match level["type"]:
        case "Split" if "Regex" in level["pattern"]:
            return lookahead_of(level["pattern"]["Regex"])
        case "Split":
            return Lookahead(frozenset(), len(level["pattern"]["String"]))
        case "Whitespace":
            return lookahead_of(r"\s|\S+")  # coarser than its own pattern, whose classes are another engine's
        case "Metaspace" if is_alone and level.get("split", True) and level["prepend_scheme"] != "first":
            return _ONE_CHARACTER
        case kind if kind in _PER_CHARACTER:
            return _ONE_CHARACTER
        case kind:
            raise UnsupportedPattern(kind)


def _coarse(level: dict[str, Any]) -> tuple[Any, Any]:
    """Return a level as a split, and a split that leaves its gaps (None if it matches one character)."""
    match level:
        case {"type": "Split", "invert": False, "behavior": "Isolated" | "Removed" as behavior}:
            given = level["pattern"]
            pattern = Regex(given["Regex"]) if "Regex" in given else given["String"]
            return pre_tokenizers.Split(pattern, behavior.lower()), pre_tokenizers.Split(pattern, "removed")
        case {"type": "Digits", "individual_digits": True}:
            return pre_tokenizers.Digits(individual_digits=True), None
        case {"type": "Punctuation", "behavior": "Isolated"}:
            return pre_tokenizers.Punctuation("isolated"), None
        case {"type": "WhitespaceSplit"}:
            return pre_tokenizers.WhitespaceSplit(), None
        case _:
            raise UnsupportedPattern(level["type"])


def lookahead_of(pattern: str) -> Lookahead:
    """Return the lookahead of a pattern in Oniguruma's syntax, which tokenizer.json uses.

    Raises:
        UnsupportedPattern: The pattern looks back, or uses syntax that `_PatternParser` does not know.
    """
    parser = _PatternParser(pattern)
    breaks = parser.alternatives(is_caseless=False)
    if not parser.is_at_end:
        raise UnsupportedPattern(pattern)
    return Lookahead(frozenset(parser.classes), breaks)


class _PatternParser:
    """Parses a pattern from left to right, collecting its unbounded classes and counting class breaks."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0
        self.classes: set[str] = set()

    @property
    def is_at_end(self) -> bool:
        return self._at == len(self._pattern)

    def alternatives(self, *, is_caseless: bool) -> int:
        """Parse up to the end or a closing bracket; return the class breaks of the longest alternative."""
        most = breaks = 0
        while not self.is_at_end and self._pattern[self._at] != ")":
            if self._pattern[self._at] == "|":
                self._at += 1
                most, breaks = max(most, breaks), 0
            else:
                breaks += self._atom(is_caseless=is_caseless)
        return max(most, breaks)

    def _atom(self, *, is_caseless: bool) -> int:
        if self._pattern[self._at] == "(":
            group = self._take(_GROUP)
            breaks = self.alternatives(is_caseless=is_caseless or group["kind"] == "i:")
            if self.is_at_end:
                raise UnsupportedPattern(self._pattern)
            self._at += 1
            times = self._repetitions()
            if times is None:
                raise UnsupportedPattern(self._pattern)
            return breaks * times
        one = self._character()
        times = self._repetitions()
        if times is not None:
            return times
        if is_caseless:  # the class holds more than its pattern says
            raise UnsupportedPattern(self._pattern)
        self.classes.add(one)
        return 1

    def _repetitions(self) -> int | None:
        """Parse a quantifier; return how often the atom before it repeats at most, None if without bound."""
        found = _QUANTIFIER.match(self._pattern, self._at)
        if found is None:
            return 1
        self._at = found.end()
        if found["sign"] in "*+" or "+" in found["suffix"]:
            return None
        if found["sign"] == "?":
            return 1
        if found["comma"]:
            return int(found["most"]) if found["most"] else None
        return int(found["least"])

    def _character(self) -> str:
        """Parse and return the pattern of one character: a class or the character itself."""
        first = self._pattern[self._at]
        if first == "[":
            return self._class()
        if first == "\\":
            for kind in (_ESCAPED_CLASS, _ESCAPED_CHARACTER):
                if found := kind.match(self._pattern, self._at):
                    self._at = found.end()
                    return found.group()
            raise UnsupportedPattern(self._pattern)
        if first in "^$*+?{}":
            raise UnsupportedPattern(self._pattern)
        self._at += 1
        return first

    def _class(self) -> str:
        begin, depth = self._at, 0
        while not self.is_at_end:
            rest = self._pattern[self._at : self._at + 3]
            if rest[0] == "\\":
                self._at += 1
            elif rest.startswith(("[]", "[^]")):
                raise UnsupportedPattern(self._pattern)
            elif rest[0] == "[":
                depth += 1
            elif rest[0] == "]":
                depth -= 1
                if depth == 0:
                    self._at += 1
                    return self._pattern[begin : self._at]
            self._at += 1
        raise UnsupportedPattern(self._pattern)

    def _take(self, kind: re.Pattern[str]) -> re.Match[str]:
        found = kind.match(self._pattern, self._at)
        if found is None:
            raise UnsupportedPattern(self._pattern)
        self._at = found.end()
        return found
