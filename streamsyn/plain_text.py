"""Text as it may be shown and kept: safe for a terminal, short, and without credentials of URLs."""

import re
import reprlib
from typing import Any, Final, NamedTuple

MAX_MESSAGE_BYTES: Final = 2048
"""Longest message that is kept in the log or shown."""

# Control characters except line ends and tabs; line separators; characters that turn the direction of
# writing; surrogates, which cannot be encoded.
_UNSAFE: Final = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]|\r(?!\n)"
)
_BREAKS: Final = re.compile(r"[\r\n\t]\s*")

_REPR: Final = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 100
_QUERY: Final = re.compile(r"([a-z][a-z0-9+.-]{0,30}://[^\s?\"'<>]{0,2048}\?)([^\s\"'<>]+)", re.IGNORECASE)
_SECRET: Final = re.compile(
    r"((?:^|[&;])[\w.-]{0,40}(?:key|token|sig|signature|secret|password|passwd|pwd|auth|credential)=)[^&;#]+",
    re.IGNORECASE,
)
"""A parameter of a query that holds a secret, by its name."""
_USERINFO: Final = re.compile(r"([a-z][a-z0-9+.-]{0,30}://)[^\s/?#]*@", re.IGNORECASE)


def visible(text: str) -> str:
    r"""Return `text` with characters that could control a terminal as escapes, such as `\x1b`."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def cut(text: str, max_bytes: int = MAX_MESSAGE_BYTES) -> str:
    """Return the beginning of `text`: at most `max_bytes` bytes of UTF-8, a note of what was cut included."""
    if len(text) * 4 <= max_bytes:
        return text
    size = len(text.encode(errors="replace"))
    if size <= max_bytes:
        return text
    note = f"... (cut: {size:,} bytes)"
    return text[:max_bytes].encode(errors="replace")[: max_bytes - len(note)].decode(errors="ignore") + note


def message(text: str) -> str:
    """Return `text` as a message: one visible line of at most 2 KB."""
    return cut(_BREAKS.sub(" ", visible(cut(text).strip())))


def short_repr(value: Any) -> str:
    """Return a short `repr` of any JSON value, however large or deep it is."""
    return _REPR.repr(value)


class Location(NamedTuple):
    """A URL without its userinfo, and the userinfo, `USER:PASSWORD`; None if it has none."""

    url: str
    userinfo: str | None


def split_userinfo(url: str) -> Location:
    """Return `url` without its userinfo, and the userinfo as it is written, percent encoding included."""
    found = _USERINFO.match(url)
    if found is None:
        return Location(url, None)
    scheme = found[1]
    return Location(scheme + url[found.end() :], found[0].removeprefix(scheme).removesuffix("@"))


def without_userinfo(text: str) -> str:
    """Return `text` with the userinfo cut from every URL in it, and secrets in queries replaced by `***`."""
    if "://" not in text:
        return text
    if "@" in text:
        text = _USERINFO.sub(r"\1", text)
    return _QUERY.sub(_without_secrets, text) if "?" in text else text


def _without_secrets(found: re.Match[str]) -> str:
    return found[1] + _SECRET.sub(r"\1***", found[2])


def without_userinfo_within(value: Any) -> Any:
    """Return a JSON value with the credentials cut from every URL in its strings."""
    match value:
        case str():
            return without_userinfo(value)
        case dict():
            return {key: without_userinfo_within(below) for key, below in value.items()}
        case list() | tuple():
            return [without_userinfo_within(below) for below in value]
        case _:
            return value
