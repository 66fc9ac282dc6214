"""Credentials in URLs: used to log in to a server, and cut from everything that is written or shown."""

import re
from typing import Any, Final, NamedTuple

_USERINFO: Final = re.compile(r"([a-z][a-z0-9+.-]{0,30}://)[^\s/?#]*@", re.IGNORECASE)


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
    """Return `text` with the userinfo cut from every URL in it."""
    return _USERINFO.sub(r"\1", text) if "@" in text and "://" in text else text


def without_userinfo_within(value: Any) -> Any:
    """Return a JSON value with the userinfo cut from every URL in its strings."""
    match value:
        case str():
            return without_userinfo(value)
        case dict():
            return {key: without_userinfo_within(below) for key, below in value.items()}
        case list() | tuple():
            return [without_userinfo_within(below) for below in value]
        case _:
            return value
