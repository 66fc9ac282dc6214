"""The sections of the servers."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from streamsyn.sections.base import Count, Positive, Seconds, Section, operational


class ServerSection(Section):
    """One server of the fleet, where more is to be said of it than its URL."""

    url: str
    """Base URL."""
    weight: Positive = 1.0
    """Its share of the work, beside the others'."""
    key_env: str | None = None
    """Environment variable that holds its key; by default STREAMSYN_API_KEY."""


class FleetSection(Section):
    """The servers and how they are asked. All of it is operational but the models."""

    servers: Annotated[tuple[str | ServerSection, ...], operational] = ()
    """Base URLs, or tables with `url`, `weight`, `key_env`; `--server URL` on the command line replaces
    them."""
    servers_file: Annotated[Path | None, operational] = None
    """A file of servers, one a line: `URL [weight=W] [key_env=NAME] [drain]`. It is read again when it
    changes: servers come, go, and are drained."""
    servers_dns: Annotated[str | None, operational] = None
    """A URL whose host name stands for all addresses it has, as a headless Kubernetes service does; it is
    looked up again now and then."""
    discover_interval_s: Annotated[Seconds, operational] = 5.0
    """Pause between looks at the file and the name."""
    model: Annotated[str | None, operational] = None
    """Model to ask for; by default what the servers say they serve."""
    models: dict[str, Positive] = {}
    """Several models, each with its share of the drafts, such as 3 of one and 1 of another."""
    concurrency: Annotated[Literal["auto"] | Count, operational] = "auto"
    """Requests in flight at one server: `auto` finds what keeps its batch full, or a number."""
    max_in_flight: Annotated[Count, operational] = 2048
    """Requests at one server at a time, at most, whatever `fleet.concurrency` says."""
    load_interval_s: Annotated[Seconds, operational] = 1.0
    """Pause between looks at a server's load."""
    slow_start_s: Annotated[Seconds, operational] = 10.0
    """A server that was ejected gets its full share of requests only so long after it is back."""
    balance_factor: Annotated[float, Field(ge=1), operational] = 1.25
    """A prefix group leaves its server when that one has more than this many times its share of the load."""
    leader_wait_s: Annotated[Seconds, operational] = 5.0
    """Requests wait at most so long for the first token of the one that brings their prefix into a cache."""
    hedge_tail: Annotated[bool | Annotated[float, Field(ge=0, le=1)], operational] = False
    """At the end of a run, when at most this share of the workers is left at work (true: 0.05), ask again
    elsewhere; the first answer counts."""
    tls_ca: Annotated[Path | None, operational] = None
    """PEM file of the authorities that https servers are checked against; by default the system's."""
    tls_cert: Annotated[Path | None, operational] = None
    """PEM file with our certificate and its key, for servers that ask for one."""
    request_timeout_s: Annotated[Seconds, operational] = 600.0
    """Bound on one try."""
    total_timeout_s: Annotated[Seconds, operational] = 3600.0
    """Bound on all tries of one request; time spent waiting for a free server does not count."""
    connect_timeout_s: Annotated[Seconds, operational] = 10.0
    """Bound on opening a connection."""
    max_attempts: Annotated[Count, operational] = 6
    """Tries of one request. A full queue is no try, nor is a server that cannot be reached."""
    backoff_base_s: Annotated[Seconds, operational] = 0.5
    """First pause between tries is drawn from zero to this; it doubles each time."""
    backoff_max_s: Annotated[Seconds, operational] = 30.0
    """Longest pause between tries."""
    eject_after: Annotated[Count, operational] = 3
    """Failures in a row after which a server gets no more requests until it answers a probe. One that
    cannot be reached gets none at once."""
    probe_interval_s: Annotated[Seconds, operational] = 2.0
    """Pause between the probes of an ejected server; it grows to ten times this."""
    give_up_s: Annotated[Seconds, operational] = 300.0
    """When no server was usable for so long, the run stops with 75, resumable."""
