"""The servers behind one name: `fleet.servers_dns`."""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable
from urllib.parse import urlsplit

from streamsyn.sglang.spec import NothingFound, ServerSpec

LookUp = Callable[[str, int], Awaitable[Iterable[str]]]
"""All addresses of a host name, for a port. Raises OSError when it has none."""

_DEFAULT_PORTS = {"http": 80, "https": 443}


async def at_name(url: str, look_up: LookUp) -> list[ServerSpec]:
    """The servers at all addresses that the host of `url` has now.

    Raises:
        NothingFound: It has none, or nobody can be asked.
    """
    parts = urlsplit(url)
    try:
        addresses = await look_up(parts.hostname or "", parts.port or _DEFAULT_PORTS[parts.scheme])
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise NothingFound(f"fleet.servers_dns: {parts.hostname} cannot be looked up: {why}") from error
    return at_addresses(url, addresses)


def at_addresses(url: str, addresses: Iterable[str]) -> list[ServerSpec]:
    """One server an address: `url` with the address in place of its name; always in the same order."""
    parts = urlsplit(url)
    user, at, _ = parts.netloc.rpartition("@")
    port = "" if parts.port is None else f":{parts.port}"
    servers = []
    for address in sorted(set(addresses)):
        host = f"[{address}]" if ":" in address else address
        there = parts._replace(netloc=f"{user}{at}{host}{port}").geturl()
        name = None if parts.hostname == address else parts.hostname
        servers.append(ServerSpec(there, server_name=name))
    return servers


async def system_look_up(name: str, port: int) -> list[str]:
    """Addresses as the system's resolver finds them, IPv4 and IPv6."""
    found = await asyncio.get_running_loop().getaddrinfo(name, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]
