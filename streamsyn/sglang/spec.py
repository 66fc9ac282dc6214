"""What is said of a server before it is asked: where it is, its weight, the key it wants."""

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from streamsyn.errors import ConfigError
from streamsyn.sections import FleetSection, ServerSection

KEY_VARIABLE = "STREAMSYN_API_KEY"
"""Environment variable of the key for servers that name no other."""


class NothingFound(ConfigError):
    """Raised when a place that may name servers names none now: at the start, others will do."""


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """One server as it is wanted. Two with the same URL are the same server.

    Attributes:
        url: Base URL: no `/` and no `/v1` at its end.
        weight: Its share of the work beside the others'; above 0 and finite.
        key_env: Environment variable that holds its key; None is STREAMSYN_API_KEY.
        draining: It gets no new requests, and may finish those it has.
        server_name: Where the URL holds an address that was looked up: the name. Certificates are checked
            against it, and the Host header carries it.
    """

    url: str
    weight: float = 1.0
    key_env: str | None = None
    draining: bool = False
    server_name: str | None = None


def specs(section: FleetSection) -> list[ServerSpec]:
    """The servers that `fleet.servers` names, in its order, each once: the first entry of a URL counts.

    None at all is fine where a file or a name is to tell of them.

    Raises:
        ConfigError: There is no server and nothing to tell of one, or what stands for one is no URL.
    """
    if section.servers_dns is not None:
        base_url(section.servers_dns, "fleet.servers_dns")
    elif not section.servers and section.servers_file is None:
        raise ConfigError(
            "no server: pass --server URL, set fleet.servers, or --launch MODEL to have one started"
        )
    found: dict[str, ServerSpec] = {}
    for entry in section.servers:
        server = entry if isinstance(entry, ServerSection) else ServerSection(url=entry)
        url = base_url(server.url, "fleet.servers")
        found.setdefault(url, ServerSpec(url, server.weight, server.key_env))
    return list(found.values())


def base_url(text: str, where: str) -> str:
    """`text` as a base URL: a slash at its end and `/v1` are what people copy along.

    Raises:
        ConfigError: It is no URL; names `where` it stands.
    """
    if not _is_url(text):
        shown = text if text.isprintable() else repr(text)
        raise ConfigError(f"{where}: {shown} is no URL; it starts with http:// or https://")
    scheme, rest = text.split("://", 1)
    rest = rest.rstrip("/")
    if "/" in rest:  # else it may be a host called v1
        rest = rest.removesuffix("/v1").rstrip("/")
    return f"{scheme}://{rest}"


def _is_url(text: str) -> bool:
    """Whether a request can be addressed to it: aiohttp finds out only when it sends one."""
    if not text.startswith(("http://", "https://")) or not text.isprintable() or " " in text:
        return False
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port  # the port is parsed, and refused, when it is asked for
    except ValueError:
        return False
    return bool(host) and all(0 < len(label) < 64 for label in (host or "").removesuffix(".").split("."))


def headers_of(spec: ServerSpec, environ: Mapping[str, str]) -> dict[str, str]:
    """The headers that carry the key of `spec`; none where it names no variable and the usual one is not set.

    Raises:
        ConfigError: The variable that it names is not set, or the key is one that no header can carry.
    """
    name = spec.key_env or KEY_VARIABLE
    key = environ.get(name)
    if not key and spec.key_env is not None:
        raise ConfigError(f"key_env of {spec.url}: the environment variable {name} is not set")
    if not key:
        return {}
    if not key.isprintable():
        raise ConfigError(f"{name} holds characters that no HTTP header can, such as a line end")
    return {"Authorization": f"Bearer {key}"}
