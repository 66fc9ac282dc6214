"""Where webhooks go: the URL and the secret that a client gave, the signature, and the addresses allowed.

Source: https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

import base64
import binascii
import errno
import hmac
import ipaddress
import socket
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationError
from yarl import URL

from streamsyn.daemon.bodies import JsonBody
from streamsyn.daemon.problems import Problem
from streamsyn.errors import SinkError
from streamsyn.io.durable import write_whole

Event = Literal[
    "run.finished",
    "run.failed",
    "run.paused",
    "run.stopped",
    "run.running",
    "batch.completed",
    "batch.failed",
    "batch.expired",
    "batch.cancelled",
]
Owner = Literal["run", "batch"]
_FILE: Final = "webhook.json"
_PREFIX: Final = "whsec_"
_KEY_BYTES: Final = range(24, 65)
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
_FORM: Final = f"{_PREFIX} and 24 to 64 bytes in base64"


class Webhook(JsonBody):
    """Where events are sent, signed with a secret as Standard Webhooks describes.

    Give the secret itself, which only the owner of the daemon's files can read, or the name of an environment
    variable of the daemon that holds it.
    """

    url: Annotated[str, Field(max_length=2048)]
    secret: Annotated[str, Field(max_length=256)] | None = None
    secret_env: Annotated[str, Field(max_length=256)] | None = None
    events: list[Event] | None = None

    @property
    def shown(self) -> dict[str, Any]:
        """What is kept of it where others may read it: a digest in place of the secret."""
        kept = self.model_dump(exclude={"secret"}, exclude_none=True)
        return (
            kept
            if self.secret is None
            else kept | {"secret_sha256": sha256(self.secret.encode()).hexdigest()}
        )

    def save(self, root: Path, of: Owner) -> None:
        """Keep it in the directory of a run or of a batch, private. Blocks on the disk.

        Raises:
            SinkError: It cannot be written.
        """
        write_whole(root / f"{of}_{_FILE}", self.model_dump_json().encode(), is_private=True)

    @classmethod
    def load(cls, root: Path, of: Owner) -> "Webhook | None":
        """Return the one of a run or of a batch; None if it has none. Blocks on the disk.

        Raises:
            SinkError: It cannot be read.
        """
        path = root / f"{of}_{_FILE}"
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            raise SinkError(f"cannot read {path}: {str(error).splitlines()[0]}") from error

    def wants(self, event: str) -> bool:
        """Whether an event is to be sent; without a list, all are."""
        return self.events is None or event in self.events

    def check(self, environ: Mapping[str, str], *, allow_private: bool) -> None:
        """Refuse what cannot work.

        Args:
            environ: The environment of the daemon.
            allow_private: `serve.allow_private_webhooks`.

        Raises:
            Problem: 422: the URL or the secret is invalid.
        """
        try:
            url = URL(self.url)
        except ValueError:
            url = URL()
        if url.scheme not in {"http", "https"} or not url.host:
            raise Problem(422, "webhook.url: expected a URL that begins with https:// or http://")
        if url.user is not None or url.password is not None:
            raise Problem(422, "webhook.url: a user or a password in the URL is not supported")
        if not allow_private and is_private(url.host):
            raise Problem(422, f"webhook.url: {private_refused(url.host)}")
        if (self.secret is None) == (self.secret_env is None):
            raise Problem(422, "webhook: give one of secret and secret_env")
        if self.secret is not None and key_of(self.secret) is None:
            raise Problem(422, f"webhook.secret: expected {_FORM}")
        if self.secret_env is not None and key_of(environ.get(self.secret_env, "")) is None:
            raise Problem(
                422, f"webhook.secret_env: the daemon has no environment variable of this name with {_FORM}"
            )


def key_of(secret: str) -> bytes | None:
    """Return the key in a secret `whsec_...`; None if it is not one."""
    if not secret.startswith(_PREFIX):
        return None
    try:
        key = base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        return None
    return key if len(key) in _KEY_BYTES else None


def signed_headers(message_id: str, timestamp: int, body: bytes, key: bytes) -> dict[str, str]:
    """Return the headers of a message: its id, the time in Unix seconds, and its signature."""
    signed = b"%b.%d.%b" % (message_id.encode(), timestamp, body)
    signature = base64.b64encode(hmac.digest(key, signed, sha256)).decode()
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{signature}",
    }


def is_private(host: str) -> bool:
    """Whether a host is an address that is not public: of this machine or of a private network, for example.

    A name is judged when it is connected to: `connected_socket`.
    """
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host.lower().rstrip(".") == "localhost" or host.lower().rstrip(".").endswith(".localhost")
    return any(not one.is_global or one.is_multicast for one in _meant(address))


def _meant(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """The address, or the IPv4 addresses that an IPv6 address stands for."""
    if isinstance(address, ipaddress.IPv4Address):
        return [address]
    if address.ipv4_mapped is not None:
        return [address.ipv4_mapped]
    found: list[ipaddress.IPv4Address | ipaddress.IPv6Address] = [address]
    if address.sixtofour is not None:
        found.append(address.sixtofour)
    if address.teredo is not None:
        found.extend(address.teredo)
    if address in _NAT64:
        found.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return found


def private_refused(host: str) -> str:
    """Why an address is refused, and what to do."""
    return (
        f"{host[:100]} is not a public address; the operator allows such with "
        "serve.allow_private_webhooks = true"
    )


def connected_socket(address_info: tuple[Any, ...], *, allow_private: bool) -> socket.socket:
    """Return a socket for a connection, if its address is allowed: what a name resolves to right now counts.

    Args:
        address_info: The address, as `socket.getaddrinfo` returns it.
        allow_private: `serve.allow_private_webhooks`.

    Raises:
        OSError: The address is not public.
    """
    family, kind, protocol, _, address = address_info
    if not allow_private and is_private(str(address[0])):
        raise OSError(errno.EACCES, private_refused(str(address[0])))
    return socket.socket(family, kind, protocol)
