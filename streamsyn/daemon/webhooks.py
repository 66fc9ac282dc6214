"""Webhooks: events of runs and batches, sent to the URLs of clients until they are received.

    ROOT/webhooks/ID.json    a message that was not received yet; private, since it has its secret

A message is on disk before the change that it tells of. It has the same id however often it is sent, so that
a receiver recognises it. It is given up after the last of `DELAYS_S`, or if the receiver answers 410.
"""

import asyncio
import heapq
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import aiohttp
import orjson
import structlog
from pydantic import BaseModel, ValidationError
from yarl import URL

from streamsyn.background import Background, background, finished_in_thread
from streamsyn.daemon.webhook_target import Webhook, connected_socket, key_of, signed_headers
from streamsyn.errors import StreamsynError
from streamsyn.io.durable import disk_errors, make_folder, write_whole
from streamsyn.records import digest

log = structlog.get_logger()

DELAYS_S: Final = (5, 30, 120, 600, 1800, 7200, 18_000, 36_000, 36_000)
"""Pauses in seconds before each repetition: all in all a little more than a day."""
MAX_PENDING: Final = 10_000
"""Messages that wait to be received; further ones are dropped and logged."""
_MAX_SENDING: Final = 16
_TIMEOUT_S: Final = 15.0
_GONE: Final = 410


class Message(BaseModel):
    """An event on its way: the content of its file.

    Attributes:
        id: Its id, by which the receiver recognises it.
        webhook: Where it goes.
        body: What is sent.
        attempts: How often it was sent.
        next_at: When it is sent next, in Unix seconds.
    """

    id: str
    webhook: Webhook
    body: str
    attempts: int = 0
    next_at: float = 0.0


class Webhooks:
    """Sends events. Made by `open_webhooks`; for the daemon's event loop.

    Args:
        folder: ROOT/webhooks.
        environ: The environment, which may hold secrets.
        session: Sends requests.
        tasks: Runs the sending.
        delays_s: Pauses before each repetition.
    """

    def __init__(
        self,
        folder: Path,
        environ: Mapping[str, str],
        session: aiohttp.ClientSession,
        tasks: Background,
        delays_s: Sequence[float] = DELAYS_S,
    ) -> None:
        self._folder = folder
        self._environ = environ
        self._session = session
        self._tasks = tasks
        self._delays_s = delays_s
        self._messages: dict[str, Message] = {}
        self._due: list[tuple[float, str]] = []
        self._sending = 0
        self._changed = asyncio.Event()
        """Replaced when it is set: by each message that comes, and each that was sent."""

    @property
    def pending(self) -> int:
        """Messages that were not received yet."""
        return len(self._messages)

    async def changed(self) -> None:
        """Wait until a message comes, or one was sent."""
        await self._changed.wait()

    async def open(self) -> None:
        """Take up the messages of earlier processes, and begin to send.

        Raises:
            SinkError: The directory cannot be used.
        """
        for message in await asyncio.to_thread(list, _found(self._folder)):
            self._put(message)
        self._tasks.start(self._send_all(), name="webhooks")

    async def announce(self, webhook: Webhook | None, event: str, number: int, data: dict[str, Any]) -> None:
        """Send an event if it is wanted; on return the message survives a kill.

        Args:
            webhook: Where to; None for nowhere.
            event: The type of the event, such as `run.finished`.
            number: Distinguishes it from other events of its type about the same thing.
            data: What it is about; its `id` names it.

        Raises:
            SinkError: The disk failed.
        """
        if webhook is None or not webhook.wants(event):
            return
        message_id = f"msg_{digest(event, data['id'], str(number)).hex()}"
        if message_id not in self._messages and self.pending >= MAX_PENDING:
            log.error("webhook.dropped", type=event, about=data["id"], why=f"{MAX_PENDING:,} messages wait")
            return
        body = {
            "id": message_id,
            "object": "event",
            "type": event,
            "created_at": int(time.time()),
            "data": data,
        }
        message = Message(id=message_id, webhook=webhook, body=orjson.dumps(body).decode())
        await finished_in_thread(self._save, message)
        self._put(message)

    def _put(self, message: Message) -> None:
        self._messages[message.id] = message
        heapq.heappush(self._due, (message.next_at, message.id))
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _send_all(self) -> None:
        """Send each message when it is due."""
        while True:
            wait_s = None
            while self._due and self._sending < _MAX_SENDING:
                next_at, message_id = self._due[0]
                wait_s = next_at - time.time()
                if wait_s > 0:
                    break
                wait_s = None
                heapq.heappop(self._due)
                message = self._messages.get(message_id)
                if message is not None and message.next_at == next_at:
                    self._sending += 1
                    self._tasks.start(self._send(message), name=f"webhook {message_id}")
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()

    async def _send(self, message: Message) -> None:
        """Send a message once; then it is received, given up, or due again later."""
        try:
            why = await self._post(message)
            message.attempts += 1
            if why is None:
                await self._forget(message)
            elif why == _GONE or message.attempts > len(self._delays_s):
                self._log("webhook.given_up", message, why)
                await self._forget(message)
            else:
                delay_s = self._delays_s[message.attempts - 1] * random.uniform(0.9, 1.1)
                self._log("webhook.failed", message, why, next_in_s=round(delay_s, 1))
                message.next_at = time.time() + delay_s
                try:
                    await finished_in_thread(self._save, message)
                finally:
                    self._put(message)
        except StreamsynError as error:
            log.error("webhook.not_saved", error=str(error))  # noqa: TRY400 - expected
        except Exception as bug:
            log.exception("webhook.bug", id=message.id, bug=repr(bug))  # the next process tries it again
        finally:
            self._sending -= 1
            self._notify()

    async def _post(self, message: Message) -> str | int | None:
        """Send a message; returns why it was not received, None if it was."""
        webhook = message.webhook
        key = key_of(webhook.secret or self._environ.get(webhook.secret_env or "", ""))
        if key is None:
            return f"the environment variable {webhook.secret_env} is not a secret any more"
        body = message.body.encode()
        headers = signed_headers(message.id, int(time.time()), body, key)
        headers["Content-Type"] = "application/json"
        try:
            async with self._session.post(
                webhook.url, data=body, headers=headers, allow_redirects=False
            ) as answer:
                return None if 200 <= answer.status < 300 else answer.status
        except TimeoutError:
            return f"no answer within {_TIMEOUT_S:g} s"
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return str(error) or repr(error)

    async def _forget(self, message: Message) -> None:
        self._messages.pop(message.id, None)
        await asyncio.to_thread(self._path(message).unlink, missing_ok=True)

    def _log(self, event: str, message: Message, why: str | int, **more: Any) -> None:
        receiver = str(URL(message.webhook.url).origin())  # a path or a query may hold a secret
        log.warning(event, id=message.id, to=receiver, attempt=message.attempts, why=why, **more)

    def _save(self, message: Message) -> None:
        write_whole(self._path(message), message.model_dump_json().encode(), is_private=True)

    def _path(self, message: Message) -> Path:
        return self._folder / f"{message.id}.json"


@asynccontextmanager
async def open_webhooks(
    folder: Path,
    environ: Mapping[str, str] = os.environ,
    *,
    allow_private: Callable[[], bool] = lambda: False,
    delays_s: Sequence[float] = DELAYS_S,
) -> AsyncIterator[Webhooks]:
    """Send events during the block; what was not received then is sent by the next process.

    Args:
        folder: ROOT/webhooks.
        environ: The environment, which may hold secrets.
        allow_private: Returns `serve.allow_private_webhooks`, whenever something is connected to.
        delays_s: Pauses before each repetition.

    Raises:
        SinkError: The directory cannot be used.
    """
    connector = aiohttp.TCPConnector(
        socket_factory=lambda info: connected_socket(info, allow_private=allow_private()),
        limit=_MAX_SENDING,
        force_close=True,  # so that each message is sent to an address that was judged
        use_dns_cache=False,
    )
    async with (
        aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            headers={"User-Agent": "streamsyn"},
        ) as session,
        background() as tasks,
    ):
        webhooks = Webhooks(folder, environ, session, tasks, delays_s)
        await webhooks.open()
        yield webhooks


def _found(folder: Path) -> Iterator[Message]:
    """The messages on disk; what cannot be read is logged and left alone."""
    with disk_errors(f"use {folder}"):
        make_folder(folder)
        folder.chmod(0o700)
        paths = sorted(folder.glob("msg_*.json"))
    for path in paths:
        try:
            yield Message.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            log.error("webhook.unreadable", path=str(path), why=str(error).splitlines()[0])  # noqa: TRY400
