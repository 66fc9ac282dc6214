"""What is said of a server before it is asked: where it is, its weight, the key it wants.

One server of the fleet: its client, and what is known of it.
"""

import asyncio
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from streamsyn.config.sections import FleetSection, ServerSection
from streamsyn.errors import ConfigError
from streamsyn.fleet.client import ServerClient
from streamsyn.fleet.health import Health
from streamsyn.fleet.limiter import Limiter
from streamsyn.fleet.prefixes import PrefixModel, PrefixWarmUp
from streamsyn.fleet.transport import KEY_VARIABLE
from streamsyn.fleet.wire import Load
from streamsyn.records import Request

if TYPE_CHECKING:
    from streamsyn.fleet.prefixes import PrefixWarmUp


class NoServersFound(ConfigError):
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


def server_specs(section: FleetSection) -> list[ServerSpec]:
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


@dataclass(slots=True, eq=False)
class Server:
    """What the fleet holds of a server; the decisions are those of its limiter, its health, its leaders.

    Attributes:
        spec: What the configuration says of it.
        client: Speaks to it.
        limiter: How many requests it may have.
        health: Whether it is used.
        model: What it is asked for.
        leaders: Which beginnings are in its cache, and who waits for those that are on their way there.
        prefixes: What its prefix cache should hold.
        queue: Requests that wait for a place here, since their group is at home here.
        homes: Groups that are at home here.
        draining: It gets nothing new.
    """

    spec: ServerSpec
    client: ServerClient
    limiter: Limiter
    health: Health
    model: str = ""
    leaders: "PrefixWarmUp[Waiter]" = field(default_factory=PrefixWarmUp)
    prefixes: PrefixModel = field(default_factory=PrefixModel)
    queue: "deque[Waiter]" = field(default_factory=deque)
    homes: int = 0
    draining: bool = False
    is_gone: bool = False
    """It is no longer one of the fleet's."""
    load: Load | None = None
    weight_version: str | None = None
    """Of its weights, when it was asked last; an answer that is not streamed says it itself."""
    told_cap: int = 0
    """The cap that the log told of last."""
    completions: int = 0
    completion_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    planned_cached_tokens: float = 0.0

    @property
    def url(self) -> str:
        """Base URL."""
        return self.client.url

    @property
    def weight(self) -> float:
        """Its share of the work, beside the others'."""
        return self.spec.weight

    @property
    def is_in(self) -> bool:
        """Whether it gets requests at all."""
        return not self.health.ejected and not self.draining

    @property
    def assigned(self) -> int:
        """Requests that are there, or wait to go there."""
        return self.limiter.in_flight + len(self.queue) + self.leaders.followers

    @property
    def cap(self) -> int:
        """Requests that it may have in flight."""
        return self.limiter.cap

    def counts(self) -> dict[str, int]:
        """What it has done."""
        return {
            "completions": self.completions,
            "completion_tokens": self.completion_tokens,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "planned_cached_tokens": round(self.planned_cached_tokens),
        }

    def figures(self) -> dict[str, Any]:
        """What there is to say of it now."""
        load = self.load
        return {
            "server": self.url,
            "model": self.model,
            "weight": self.weight,
            "in_flight": self.limiter.in_flight,
            "cap": self.limiter.cap,
            "queued": len(self.queue) + self.leaders.followers,
            "running": load and load.running,
            "waiting": load and load.waiting,
            "waiting_uncached_tokens": load and load.waiting_uncached_tokens,
            "token_usage": load and load.token_usage,
            "generated_per_s": load and load.generated_per_s,
            "ejected": self.health.ejected,
            "draining": self.draining,
            "decisions": dict(self.limiter.decisions),
            **self.counts(),
        }


@dataclass(slots=True, eq=False)
class Place:
    """One request's place at a server, to be given back.

    Attributes:
        server: Where.
        leads: The beginnings that it is the first with.
    """

    server: Server
    leads: tuple[str, ...] = ()


@dataclass(slots=True, eq=False)
class Waiter:
    """A request that has no place yet."""

    number: int
    request: Request
    turn: asyncio.Future[Place]
    avoid: Server | None
    since: float
