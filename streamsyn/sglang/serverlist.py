"""A file of servers, which people edit while a run goes on: `fleet.servers_file`.

It is best replaced in one step, by renaming a new one: half a file is read as what it says.
"""

import math
import stat
import time
from pathlib import Path

from streamsyn.errors import ConfigError
from streamsyn.sglang.spec import NothingFound, ServerSpec, base_url

MAX_FILE_BYTES = 2**20
"""A larger file is no list of servers."""
LINE = "URL [weight=W] [key_env=NAME] [drain]"
_SETTLED_S = 2.0
"""A file that changed more recently may change again without its times showing it."""


class ServersFile:
    """Reads a file of servers, when it has changed. Blocks.

    Args:
        path: The file.
        settled_s: So long after its last change its times are enough to see that it has not changed.
    """

    def __init__(self, path: Path, settled_s: float = _SETTLED_S) -> None:
        self._path = path
        self._settled_s = settled_s
        self._stamp: tuple[int, ...] | None = None
        self._servers: list[ServerSpec] = []

    def read(self) -> list[ServerSpec]:
        """What it says now; read only when it is not the same file, unchanged, as the last time.

        Raises:
            ConfigError: It cannot be read, or a line is wrong, or it names no server.
        """
        try:
            now = self._path.stat()
            stamp = (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)
            if stamp == self._stamp:
                return self._servers
            if not stat.S_ISREG(now.st_mode):  # opening a pipe might never end
                raise ConfigError(f"fleet.servers_file: {self._path} is no file")
            with self._path.open("rb") as file:
                content = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            why = error.strerror or error
            raise ConfigError(f"fleet.servers_file: cannot read {self._path}: {why}") from error
        if len(content) > MAX_FILE_BYTES:
            raise ConfigError(f"fleet.servers_file: {self._path} has more than {MAX_FILE_BYTES} bytes")
        self._servers = self._parsed(content)
        self._stamp = stamp if time.time() - now.st_ctime > self._settled_s else None
        return self._servers

    def _parsed(self, content: bytes) -> list[ServerSpec]:
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ConfigError(f"fleet.servers_file: {self._path} is no UTF-8: {error.reason}") from error
        servers = parse_servers(text, str(self._path))
        if not servers:
            raise NothingFound(f"fleet.servers_file: {self._path} names no server")
        return servers


def parse_servers(text: str, name: str) -> list[ServerSpec]:
    """The servers that `text` names, one a line; what follows a `#` at the begin of a word is a comment.

    Args:
        text: The lines.
        name: Of the file, for messages.

    Raises:
        ConfigError: A line is wrong; the message begins with `name:line`.
    """
    found: dict[str, ServerSpec] = {}
    for number, line in enumerate(text.split("\n"), 1):
        words = _words(line)
        if not words:
            continue
        where = f"{name}:{number}"
        spec = _server(words, where)
        if found.setdefault(spec.url, spec) != spec:
            raise ConfigError(f"{where}: {spec.url} stands in a line before, which says something else of it")
    return list(found.values())


def _words(line: str) -> list[str]:
    words = line.split()
    comment = next((place for place, word in enumerate(words) if word.startswith("#")), None)
    return words[:comment]


def _server(words: list[str], where: str) -> ServerSpec:
    url = base_url(words[0], where)
    given: dict[str, str] = {}
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if key not in ("weight", "key_env", "drain") or bool(equals) != (key != "drain") or key in given:
            raise ConfigError(f"{where}: cannot use {word!r}; a line is {LINE}")
        given[key] = value
    if given.get("key_env") == "":
        raise ConfigError(f"{where}: key_env= takes the name of an environment variable")
    weight = _weight(given.get("weight", "1"), where)
    return ServerSpec(url, weight, given.get("key_env"), draining="drain" in given)


def _weight(text: str, where: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise ConfigError(f"{where}: weight= takes a number above 0, not {text!r}")
    return weight
