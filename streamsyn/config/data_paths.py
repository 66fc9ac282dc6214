"""What a path of data names: something on this machine, a URL, or a dataset on the Hugging Face hub."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from streamsyn.plain_text import without_userinfo

_HUB: Final = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.+-]+))?(?::([\w.+-]+))?")
_FILE_SUFFIX: Final = re.compile(
    r"\.(?:jsonl?|ndjson|csv|tsv|txt|parquet|arrow|gz|zst|bz2|xz|zip|tar|toml)", re.IGNORECASE
)

_QUERY: Final = re.compile(r"[?#].*\Z")
"""What follows the path, such as a signature."""


@dataclass(frozen=True, slots=True)
class HubName:
    """The name of a dataset on the hub: `org/name`, `org/name:split` or `org/name:config:split`.

    Attributes:
        repository: `org/name`.
        config: The configuration; None for the only or the default one.
        split: The split; None for `train`, or for all splits where there is no `train`.
    """

    repository: str
    config: str | None = None
    split: str | None = None


def is_url(path: str) -> bool:
    """Whether a path is a URL, which fsspec opens; `zip://*.jsonl::file.zip` is one too."""
    return "://" in path


def hub_name(path: str) -> HubName | None:
    """The dataset that a path names, unless it is a local path or looks like the name of a file.

    A path in a local directory is never a name on the hub: whoever mistypes it should be told.
    """
    found = _HUB.fullmatch(path)
    if found is None or path[0] in ".~" or _FILE_SUFFIX.fullmatch(Path(found[1]).suffix):
        return None
    if Path(path).exists() or Path(path).parent.is_dir():
        return None
    config, split = (found[2], found[3]) if found[3] else (None, found[2])
    return HubName(found[1], config, split)


def absolute_path(path: str) -> str:
    """A local path made absolute; a URL, a name on the hub, `-` and an empty path as they are."""
    if path in {"", "-"} or is_url(path) or hub_name(path) is not None:
        return path
    return str(Path(path).absolute())


def shown_url(url: str) -> str:
    """A URL without credentials: what may be logged and written."""
    return _QUERY.sub("", without_userinfo(url))


def saved_path(path: str) -> str:
    """A path as a configuration is saved with: absolute, and without credentials."""
    return shown_url(path) if is_url(path) else absolute_path(path)
