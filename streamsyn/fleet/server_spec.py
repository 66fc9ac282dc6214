"""The servers that a user names: entries of `fleet.servers` and lines of `fleet.servers_file`."""

import math
import re
import stat
import time
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from streamsyn.config.sections import FleetSection, ServerSection
from streamsyn.errors import ConfigError
from streamsyn.fleet.transport import KEY_VARIABLE, VERSIONED
from streamsyn.plain_text import cut, split_userinfo

MAX_FILE_BYTES = 2**20
"""A larger file is not a list of servers."""
LINE = "URL [weight=W] [key_env=NAME] [drain]"
_ROUTE = re.compile(r"(?:/v1)?(?:/chat/completions|/completions|/models)?/*$")
"""What may follow the base URL: `/v1`, or a route."""
_SETTLED_S = 2.0
"""A file that changed more recently may change again without new time stamps."""


class NoServersFound(ConfigError):
    """Raised when a file or a host name yields no servers; other sources may still have some."""


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """The URL, weight and credentials of one server. The URL identifies it, and has no credentials in it.

    Attributes:
        url: Base URL, without a trailing `/` or `/v1`, and without a query. With a different version at its
            end, such as `/v4`, the routes follow without `/v1`.
        weight: Its share of the requests relative to the other servers; above 0 and finite.
        key_env: Environment variable that holds its key; None is STREAMSYN_API_KEY.
        draining: It gets no new requests and finishes those it has.
        server_name: The host name, where `url` has an address that was looked up. Certificates are checked
            against it, and the Host header carries it.
        userinfo: `USER:PASSWORD` of the URL that the user gave, for the Authorization header alone.
        query: Query of each request, such as `api-version=2024-02-01`.
        incarnation: Tells processes at one URL apart, of servers that streamsyn starts on a cluster. A new
            process has an empty cache. When its incarnation is not listed any more, the server is dead.
    """

    url: str
    weight: float = 1.0
    key_env: str | None = None
    draining: bool = False
    server_name: str | None = None
    userinfo: str | None = field(default=None, repr=False)
    query: str = ""
    incarnation: str = ""


def server_specs(section: FleetSection, *, may_be_empty: bool = False) -> list[ServerSpec]:
    """Return the servers of `fleet.servers` in its order; of entries with the same URL, the first counts.

    The list may be empty where `fleet.servers_file` or `fleet.servers_dns` is set, and with `may_be_empty`.

    Raises:
        ConfigError: A URL is invalid, or there is neither a server nor a file or name to find some.
    """
    if section.servers_dns is not None:
        base_url(section.servers_dns, "fleet.servers_dns")
    elif not section.servers and section.servers_file is None and not may_be_empty:
        raise ConfigError(
            "no server: pass --server URL, set fleet.servers, or use --launch MODEL to start one"
        )
    found: dict[str, ServerSpec] = {}
    for entry in section.servers:
        server = entry if isinstance(entry, ServerSection) else ServerSection(url=entry)
        url, query = base_and_query(server.url, "fleet.servers")
        userinfo = split_userinfo(server.url).userinfo
        found.setdefault(url, ServerSpec(url, server.weight, server.key_env, userinfo=userinfo, query=query))
    return list(found.values())


def base_and_query(text: str, where: str) -> tuple[str, str]:
    """Return the base URL and the query in `text`, without userinfo.

    People copy more than the base: a trailing slash, `/v1`, the path of a route and a fragment are left out.

    Raises:
        ConfigError: It is not a valid URL; the message begins with `where`.
    """
    if not _is_url(text):
        bare = text.rpartition("@")[2]  # an invalid URL may have a password anywhere before
        shown = cut(bare if bare.isprintable() else repr(bare))
        raise ConfigError(f"{where}: {shown} is not a valid URL; it must start with http:// or https://")
    scheme, rest = split_userinfo(text).url.partition("#")[0].split("://", 1)
    rest, _, query = rest.partition("?")
    host, slash, path = rest.rstrip("/").partition("/")
    whole = slash + path
    path = _ROUTE.sub("", whole)
    if VERSIONED.search(path) and whole.startswith(f"{path}/v1"):
        path += "/v1"  # it is needed: to a version nothing is added
    return f"{scheme}://{host}{path}", query


def base_url(text: str, where: str) -> str:
    """Return the base URL in `text`, as `base_and_query` does."""
    return base_and_query(text, where)[0]


def _is_url(text: str) -> bool:
    """Whether aiohttp can send a request there; by itself it finds out only when it sends one."""
    if not text.startswith(("http://", "https://")) or not text.isprintable() or " " in text:
        return False
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port  # reading the port raises if it is invalid
    except ValueError:
        return False
    return bool(host) and all(0 < len(label) < 64 for label in (host or "").removesuffix(".").split("."))


def headers_of(spec: ServerSpec, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the headers with the server's key, or the user and password of its URL; none without either.

    Raises:
        ConfigError: The variable in `spec.key_env` is not set, the key cannot be sent in a header, or the URL
            has a password, too.
    """
    if spec.userinfo is not None:
        if spec.key_env is not None:
            raise ConfigError(
                f"{spec.url} has a user in its URL and key_env = {spec.key_env}; give one of them"
            )
        user, _, password = spec.userinfo.partition(":")
        credentials = b64encode(f"{unquote(user)}:{unquote(password)}".encode())
        return {"Authorization": f"Basic {credentials.decode()}"}
    name = spec.key_env or KEY_VARIABLE
    key = environ.get(name)
    if not key and spec.key_env is not None:
        raise ConfigError(f"key_env of {spec.url}: the environment variable {name} is not set")
    if not key:
        return {}
    if not key.isprintable():
        raise ConfigError(f"{name} holds characters that an HTTP header cannot carry, such as a line end")
    return {"Authorization": f"Bearer {key}"}


class ServersFile:
    """Reads `fleet.servers_file` whenever it has changed. Its calls block.

    Replace the file in one step, by renaming a new one: a half-written file is taken as complete.

    Args:
        path: The file.
        settled_s: Seconds after its last change from which unchanged time stamps prove an unchanged file.
    """

    def __init__(self, path: Path, settled_s: float = _SETTLED_S) -> None:
        self._path = path
        self._settled_s = settled_s
        self._stamp: tuple[int, ...] | None = None
        self._servers: list[ServerSpec] = []

    def read(self) -> list[ServerSpec]:
        """Return the servers in the file; an unchanged file is not read again.

        Raises:
            ConfigError: The file cannot be read, or a line is invalid.
            NoServersFound: The file lists no server.
        """
        try:
            now = self._path.stat()
            stamp = (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)
            if stamp == self._stamp:
                return self._servers
            if not stat.S_ISREG(now.st_mode):  # opening a pipe might block for ever
                raise ConfigError(f"fleet.servers_file: {self._path} is not a regular file")
            with self._path.open("rb") as file:
                content = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            why = error.strerror or error
            raise ConfigError(f"fleet.servers_file: cannot read {self._path}: {why}") from error
        if len(content) > MAX_FILE_BYTES:
            raise ConfigError(f"fleet.servers_file: {self._path} is larger than {MAX_FILE_BYTES} bytes")
        self._servers = self._parse(content)
        self._stamp = stamp if time.time() - now.st_ctime > self._settled_s else None
        return self._servers

    def _parse(self, content: bytes) -> list[ServerSpec]:
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ConfigError(f"fleet.servers_file: {self._path} is not UTF-8: {error.reason}") from error
        servers = parse_servers(text, str(self._path))
        if not servers:
            raise NoServersFound(f"fleet.servers_file: {self._path} lists no servers; a line is {LINE}")
        return servers


def parse_servers(text: str, name: str) -> list[ServerSpec]:
    """Return the servers in `text`, one per line; a `#` at the start of a word begins a comment.

    Args:
        text: The lines.
        name: File name for messages.

    Raises:
        ConfigError: A line is invalid; the message begins with `name:line`.
    """
    found: dict[str, ServerSpec] = {}
    for number, line in enumerate(text.split("\n"), 1):
        words = _words(line)
        if not words:
            continue
        where = f"{name}:{number}"
        spec = _parse_line(words, where)
        if found.setdefault(spec.url, spec) != spec:
            raise ConfigError(f"{where}: {spec.url} is already listed above with different settings")
    return list(found.values())


def _words(line: str) -> list[str]:
    words = line.split()
    comment = next((place for place, word in enumerate(words) if word.startswith("#")), None)
    return words[:comment]


def _parse_line(words: list[str], where: str) -> ServerSpec:
    url, query = base_and_query(words[0], where)
    given: dict[str, str] = {}
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if key not in ("weight", "key_env", "drain") or bool(equals) != (key != "drain") or key in given:
            raise ConfigError(f"{where}: invalid option {word!r}; a line is {LINE}")
        given[key] = value
    if given.get("key_env") == "":
        raise ConfigError(f"{where}: key_env= needs the name of an environment variable")
    weight = _parse_weight(given.get("weight", "1"), where)
    userinfo = split_userinfo(words[0]).userinfo
    return ServerSpec(
        url, weight, given.get("key_env"), draining="drain" in given, userinfo=userinfo, query=query
    )


def _parse_weight(text: str, where: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise ConfigError(f"{where}: weight= must be a number above 0, not {text!r}")
    return weight
