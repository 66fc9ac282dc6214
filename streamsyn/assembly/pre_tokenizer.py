"""How far a regular expression can look: what makes it safe to split a text in pieces and join the results.

A pattern is read as alternatives of atoms: single characters or classes, some repeated without bound. To find
a match it looks at no more than the runs of its unbounded classes and a few characters besides. Where no
unbounded class holds both of two neighbouring characters there is a *wall*, which no run goes past. So the
walls that a search may cross are counted once for a pattern, and looking back, which it must not do at all,
is refused.

How a tokenizer splits a text before its model sees it, and where that can be taken up again.

Splitting is a scan from left to right. Where it has come to a boundary, what follows does not depend on what
was before, if nothing in it looks back. So two scans of texts that are equal from a boundary on agree from
there on, but for the end, where a search may look ahead: `pattern` says how far. Tokenizers of which this
cannot be said have no Scan.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from tokenizers import Encoding, Regex, pre_tokenizers

_ESCAPED_CLASS = re.compile(r"\\(?:[pP]\{\^?[\w ]+\}|[sSdDwWhH])")
_ESCAPED_CHARACTER = re.compile(r"\\(?:[nrtfv]|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|[^\w\s])")
_QUANTIFIER = re.compile(r"(?P<sign>[*+?]|\{(?P<least>\d*)(?P<comma>,?)(?P<most>\d*)\})(?P<suffix>[?+]*)")
_GROUP = re.compile(r"\((?:\?(?P<kind>[i]?:|=|!|>))?(?!\?)")


class Unreadable(Exception):
    """A pattern that is not of this simple kind."""


@dataclass(frozen=True, slots=True)
class Reach:
    """What a search can look at.

    Attributes:
        classes: Its unbounded classes, as patterns that match one character.
        walls: So many walls it may cross, at most.
    """

    classes: frozenset[str]
    walls: int


def reach_of(pattern: str) -> Reach:
    """The reach of a pattern in Oniguruma's syntax, as tokenizer.json has it.

    Raises:
        Unreadable: It looks back, or is of another kind than is understood here.
    """
    reader = _Reader(pattern)
    walls = reader.alternatives(is_caseless=False)
    if not reader.is_at_end:
        raise Unreadable(pattern)
    return Reach(frozenset(reader.classes), walls)


class _Reader:
    """Reads a pattern from left to right."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0
        self.classes: set[str] = set()

    @property
    def is_at_end(self) -> bool:
        return self._at == len(self._pattern)

    def alternatives(self, *, is_caseless: bool) -> int:
        """The walls that the farthest alternative may cross, up to the end or a closing bracket."""
        most = walls = 0
        while not self.is_at_end and self._pattern[self._at] != ")":
            if self._pattern[self._at] == "|":
                self._at += 1
                most, walls = max(most, walls), 0
            else:
                walls += self._atom(is_caseless=is_caseless)
        return max(most, walls)

    def _atom(self, *, is_caseless: bool) -> int:
        if self._pattern[self._at] == "(":
            group = self._take(_GROUP)
            walls = self.alternatives(is_caseless=is_caseless or group["kind"] == "i:")
            if self.is_at_end:
                raise Unreadable(self._pattern)
            self._at += 1
            times = self._times()
            if times is None:
                raise Unreadable(self._pattern)
            return walls * times
        one = self._character()
        times = self._times()
        if times is not None:
            return times
        if is_caseless:  # the class alone would not say what it holds
            raise Unreadable(self._pattern)
        self.classes.add(one)
        return 1

    def _times(self) -> int | None:
        """How often what stands before is repeated at most; None: without bound."""
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
        """The pattern of one character: a class or the character itself."""
        first = self._pattern[self._at]
        if first == "[":
            return self._class()
        if first == "\\":
            for kind in (_ESCAPED_CLASS, _ESCAPED_CHARACTER):
                if found := kind.match(self._pattern, self._at):
                    self._at = found.end()
                    return found.group()
            raise Unreadable(self._pattern)
        if first in "^$*+?{}":
            raise Unreadable(self._pattern)
        self._at += 1
        return first

    def _class(self) -> str:
        begin, depth = self._at, 0
        while not self.is_at_end:
            rest = self._pattern[self._at : self._at + 3]
            if rest[0] == "\\":
                self._at += 1
            elif rest.startswith(("[]", "[^]")):
                raise Unreadable(self._pattern)
            elif rest[0] == "[":
                depth += 1
            elif rest[0] == "]":
                depth -= 1
                if depth == 0:
                    self._at += 1
                    return self._pattern[begin : self._at]
            self._at += 1
        raise Unreadable(self._pattern)

    def _take(self, kind: re.Pattern[str]) -> re.Match[str]:
        found = kind.match(self._pattern, self._at)
        if found is None:
            raise Unreadable(self._pattern)
        self._at = found.end()
        return found


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_BY_CHARACTER = Reach(frozenset(), 1)
"""Of what looks at a character and its neighbour."""
_PLAIN = ("BertPreTokenizer", "WhitespaceSplit", "Punctuation", "Digits", "CharDelimiterSplit")


class PreTokenizer:
    """Finds safe places in texts: boundaries where a scan can be taken up, whatever was before.

    Args:
        reach: How far its searches look, together.
        added: Texts of tokens that are found before the text is split.
        coarse: For each level but the last, a split that leaves what lies between its matches.
        nfc: Whether it is exact only for texts in Unicode's normal form C.
        drops: Whether a character may be left without a token.
    """

    def __init__(
        self, reach: Reach, added: Iterable[str], coarse: Sequence[Any], *, nfc: bool, drops: bool
    ) -> None:
        self._walls = reach.walls + 2
        self._classes = [pre_tokenizers.Split(Regex(one), "removed") for one in sorted(reach.classes)]
        self._coarse = coarse
        self._added = frozenset(added)
        self._longest = max(map(len, self._added), default=0)
        self._held: dict[str, int] = {}
        self._drops = drops
        self.nfc = nfc

    def margin_end(self, text: str, begin: int) -> int | None:
        """The end of a stretch from `begin` on, behind which a search from before it cannot look."""
        walls = 0
        for at in range(begin + 1, len(text)):
            walls += self._is_wall(text, at)
            if walls == self._walls:
                end = max(at + 1, begin + self._longest)
                return end if end <= len(text) else None
        return None

    def margin_begin(self, text: str) -> int:
        """The last place such that no search from before it can look past the end; -1 if there is none."""
        walls = 0
        for at in range(len(text) - 1, 0, -1):
            walls += self._is_wall(text, at)
            if walls == self._walls:
                return min(at - 1, len(text) - self._longest)
        return -1

    def tokens_before(self, text: str, encoding: Encoding, at: int) -> int | None:
        """How many tokens of a text come before `at`, if that is a safe place in it."""
        word = encoding.char_to_word(at)
        span = None if word is None else encoding.word_to_chars(word)
        if word is None or span is None or span[0] != at or not self._is_between(text, encoding, at):
            return None
        if self._drops and at > 0 and encoding.char_to_token(at - 1) is None:
            return None  # the word may begin with what has no token
        tokens = encoding.word_to_tokens(word)
        return None if tokens is None else tokens[0]

    def last_before(self, text: str, encoding: Encoding, latest: int) -> tuple[int, int] | None:
        """The last safe place that is not behind `latest`, and the tokens before it."""
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

    def _is_wall(self, text: str, at: int) -> bool:
        return not self._classes_of(text[at - 1]) & self._classes_of(text[at])

    def _classes_of(self, character: str) -> int:
        """The unbounded classes that hold a character, a bit each."""
        if (held := self._held.get(character)) is None:
            bits = ((not one.pre_tokenize_str(character)) << place for place, one in enumerate(self._classes))
            held = self._held[character] = sum(bits)
        return held

    def _is_between(self, text: str, encoding: Encoding, at: int) -> bool:
        """Whether no match of a coarser level goes on over `at`."""
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


def pre_tokenizer_of(spec: dict[str, Any]) -> PreTokenizer | None:
    """How a tokenizer scans, from what `Tokenizer.to_str` says; None when that cannot be said."""
    normalizer = spec["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":
        return None
    added = spec["added_tokens"]
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added):
        return None
    if spec["pre_tokenizer"] is None:
        return None
    try:
        reach, coarse = _levels(spec["pre_tokenizer"])
    except Unreadable:
        return None
    contents = [token["content"] for token in added]
    return PreTokenizer(reach, contents, coarse, nfc=normalizer is not None, drops=_drops(spec["model"]))


def _drops(model: dict[str, Any]) -> bool:
    """Whether characters that are not in the vocabulary are left without a token."""
    if model["type"] == "Unigram":
        return model.get("unk_id") is None
    return model.get("unk_token") not in model["vocab"]


def _levels(spec: dict[str, Any]) -> tuple[Reach, list[Any]]:
    """The reach of all levels together, and for all but the last the split that leaves its gaps."""
    levels = list(spec["pretokenizers"] if spec["type"] == "Sequence" else [spec])
    if levels and levels[-1]["type"] == "ByteLevel":
        last = levels.pop()
        if last["add_prefix_space"]:
            raise Unreadable(spec["type"])
        if last["use_regex"]:
            levels.append(
                {"type": "Split", "pattern": {"Regex": _GPT2}, "behavior": "Isolated", "invert": False}
            )
    if not levels:
        raise Unreadable(spec["type"])
    reaches = [_reach(level, is_alone=len(levels) == 1) for level in levels]
    together = reduce(lambda a, b: Reach(a.classes | b.classes, a.walls + b.walls), reaches)
    before: list[Any] = []
    coarse = []
    for level in levels[:-1]:
        split, gaps = _coarse(level)
        if gaps is not None:
            coarse.append(pre_tokenizers.Sequence([*before, gaps]))
        before.append(split)
    return together, coarse


def _reach(level: dict[str, Any], *, is_alone: bool) -> Reach:
    match level["type"]:
        case "Split" if "Regex" in level["pattern"]:
            return reach_of(level["pattern"]["Regex"])
        case "Split":
            return Reach(frozenset(), len(level["pattern"]["String"]))
        case "Whitespace":
            return reach_of(r"\s|\S+")  # coarser than it is: its classes are those of another engine
        case "Metaspace" if is_alone and level.get("split", True) and level["prepend_scheme"] != "first":
            return _BY_CHARACTER
        case kind if kind in _PLAIN:
            return _BY_CHARACTER
        case kind:
            raise Unreadable(kind)


def _coarse(level: dict[str, Any]) -> tuple[Any, Any]:
    """A level that others follow, and the same leaving its gaps; None where its matches are one character."""
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
            raise Unreadable(level["type"])
