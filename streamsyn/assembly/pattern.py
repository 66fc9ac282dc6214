"""How far a regular expression can look: what makes it safe to split a text in pieces and join the results.

A pattern is read as alternatives of atoms: single characters or classes, some repeated without bound. To find
a match it looks at no more than the runs of its unbounded classes and a few characters besides. Where no
unbounded class holds both of two neighbouring characters there is a *wall*, which no run goes past. So the
walls that a search may cross are counted once for a pattern, and looking back, which it must not do at all,
is refused.
"""

import re
from dataclasses import dataclass

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
