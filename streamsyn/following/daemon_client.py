"""The client of a daemon: asks for one run and its rows over HTTP, and retries while the daemon fails.

aiohttp's errors are translated here. `LoopThread` is an event loop in a thread of its own, for callers that
have none or must not be held up.
"""

import asyncio
import os
import random
import re
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from typing import Any, Final, NamedTuple, Self, TypeAlias, TypeVar
from urllib.parse import urlsplit

import aiohttp
import orjson
import structlog

from streamsyn.errors import (
    BrokenResponse,
    ConfigError,
    RateLimited,
    ServerError,
    ServerUnavailable,
    StreamsynError,
)
from streamsyn.fleet.transport import retry_after_s
from streamsyn.plain_text import message
from streamsyn.sink import shards
from streamsyn.sink.shards import KINDS

log = structlog.get_logger()

T = TypeVar("T")
Row: TypeAlias = dict[str, Any]

TOKEN_VARIABLE: Final = "STREAMSYN_TOKEN"  # noqa: S105  the variable's name
"""Environment variable of the token, if none is given."""
MAX_LINE_BYTES: Final = 64 * 2**20
"""A longer row is refused without being held in memory."""
_RUN_URL: Final = re.compile(r"https?://[^?#]+/v1/runs/[^/?#]+(/samples)?/?")
_READ_BYTES: Final = 2**20
_CONNECT_TIMEOUT_S: Final = 10.0
_SILENCE_TIMEOUT_S: Final = 60.0
"""A stream that is silent for this long is opened again: the machine of the daemon may be gone."""
_MESSAGE_BYTES: Final = 2000
_OK: Final = 200
RETRY_S: Final = 300.0
"""Seconds for which a daemon that cannot be reached is tried again, by default."""
FIRST_PAUSE_S: Final = 0.2
"""Pause in seconds before the second try; each further one doubles it."""
_LONGEST_PAUSE_S: Final = 15.0


class NoSuchRun(ConfigError):
    """Raised when the daemon does not have the run."""


class RunUrl(NamedTuple):
    """The URL of a run at a daemon, and the kind of rows that it names; None if it names none."""

    url: str
    kind: str | None


def run_url(url: str) -> RunUrl:
    """Take apart `http(s)://HOST/v1/runs/ID[/KIND]`.

    Raises:
        ConfigError: It is a different URL, or has credentials or a query.
    """
    parts = urlsplit(url)
    if parts.username is not None or parts.password is not None:
        raise ConfigError(f"{url}: a URL must not hold credentials; put the token into {TOKEN_VARIABLE}")
    folders = parts.path.rstrip("/").split("/")
    kind = folders.pop() if folders[-1] in KINDS else None
    is_ours = len(folders) >= 4 and folders[-3:-1] == ["v1", "runs"] and folders[-1]
    if parts.scheme not in {"http", "https"} or not parts.netloc or parts.query or not is_ours:
        raise ConfigError(f"{url} is not the URL of a run: expected http://HOST:PORT/v1/runs/ID")
    return RunUrl(f"{parts.scheme}://{parts.netloc}{'/'.join(folders)}", kind)


def is_run_url(text: str) -> bool:
    """Whether a text is the URL of a run at a daemon, or of its samples."""
    return _RUN_URL.fullmatch(text) is not None


class DaemonClient:
    """One run at a daemon. Use it as an async context manager.

    Args:
        url: The URL of the run, as `run_url` returns it.
        kind: `samples`, `contexts` or `rejects`.
        token: Sent as a bearer token; None takes it from the environment, if it is there.

    Raises (all methods):
        ConfigError: The daemon has no such run, or refuses the token or the request.
        ServerUnavailable: It could not be reached, or the connection was lost: try again.
        RateLimited: It asks for a pause.
        BrokenResponse: What it sent is not what was asked for.
    """

    def __init__(self, url: str, kind: str, token: str | None = None) -> None:
        self.url = url
        self._kind = kind
        self._token = token

    async def __aenter__(self) -> Self:
        self._session = _session(self._token)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def describe(self) -> dict[str, Any]:
        """The run as the daemon describes it: `state`, `created_at`, `last` and more."""
        with _translated(self.url):
            async with self._get("", {}) as response:
                return decoded(await response.read(), self.url)

    @asynccontextmanager
    async def open(
        self, first: int, *, follow: bool, limit: int | None = None, kind: str | None = None
    ) -> AsyncIterator["RowStream"]:
        """Ask for the rows from `first` on; with `follow` also for those that are written later.

        `kind` asks for rows of another kind than the client's.
        """
        path = f"/{kind or self._kind}"
        query = {"after": str(first - 1)} if first else {}
        if follow:
            query["follow"] = "1"
        if limit is not None:
            query["limit"] = str(limit)
        with _translated(self.url):
            async with self._get(path, query) as response:
                yield RowStream(response.content, f"{self.url}{path}", first)

    async def acknowledge(self, consumer: str, seq: int, metrics: Mapping[str, float]) -> None:
        """Tell the daemon that a named consumer, which is created if need be, has done with rows.

        Args:
            consumer: Its name.
            seq: The last row that it does not need any more; -1 for none.
            metrics: Numbers of its work, for the daemon's page.
        """
        path, body = f"/consumers/{consumer}", {"seq": seq, "metrics": dict(metrics)}
        with _translated(self.url):
            try:
                await self._send("POST", f"{path}/ack", body)
            except NoSuchRun:  # or no such consumer
                await self._send("PUT", path, {"kind": self._kind})
                await self._send("POST", f"{path}/ack", body)

    async def _send(self, method: str, path: str, body: Any) -> None:
        url = self.url + path
        async with self._session.request(method, url, json=body, allow_redirects=False) as response:
            if not response.ok:
                raise await _refusal(url, response)

    @asynccontextmanager
    async def _get(self, path: str, query: Mapping[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        url = self.url + path
        # Not followed: a redirect could lead the token elsewhere.
        async with self._session.get(url, params=query, allow_redirects=False) as response:
            if response.status != _OK:
                raise await _refusal(url, response)
            yield response


async def answers(urls: Sequence[str]) -> list[dict[str, Any]]:
    """The JSON objects that a daemon answers to GET requests, with the token of the environment.

    Raises:
        As the methods of `DaemonClient`.
    """
    found = []
    async with _session(None) as session:
        for url in urls:
            with _translated(url):
                async with session.get(url, allow_redirects=False) as response:
                    if response.status != _OK:
                        raise await _refusal(url, response)
                    found.append(decoded(await response.read(), url))
    return found


def _session(token: str | None) -> aiohttp.ClientSession:
    """A client of a daemon. A token of None is taken from the environment, if it is there."""
    headers = {"Accept-Encoding": "identity"}
    if token := token or os.environ.get(TOKEN_VARIABLE):
        headers["Authorization"] = f"Bearer {token}"
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S, sock_read=_SILENCE_TIMEOUT_S)
    return aiohttp.ClientSession(headers=headers, read_bufsize=_READ_BYTES, timeout=timeout)


@contextmanager
def _translated(url: str) -> Iterator[None]:
    """Raise aiohttp's errors of the block as ours."""
    try:
        yield
    except aiohttp.InvalidURL as error:
        raise ConfigError(f"{url} is not a valid URL") from error
    except aiohttp.ClientConnectorError as error:
        raise ServerUnavailable(f"cannot connect to {url}: {error.os_error}") from error
    except TimeoutError as error:
        raise ServerUnavailable(f"{url} did not answer in time") from error
    except (aiohttp.ClientPayloadError, aiohttp.ClientConnectionError, ConnectionError) as error:
        raise ServerUnavailable(f"the connection to {url} was lost") from error
    except (aiohttp.ClientError, UnicodeError) as error:
        raise BrokenResponse(f"invalid HTTP response from {url}") from error


class RowStream:
    """The rows of an answer, as they arrive.

    Args:
        content: The body of the answer.
        url: Where it comes from, for messages.
        first: Number of the first row.
    """

    def __init__(self, content: aiohttp.StreamReader, url: str, first: int) -> None:
        self._content = content
        self._url = url
        self._parts: list[bytes] = []
        """The beginning of the line whose end has not come yet."""
        self._size = 0
        self.next = first
        """Number of the next row."""

    async def read(self) -> list[Row]:
        """The rows that have arrived since the last call, at least one; none at the end of the answer.

        Raises:
            ServerUnavailable: The connection was lost.
            BrokenResponse: A line is not the row that comes next, or too long.
            TimeoutError: Nothing has come for a minute.
        """
        while chunk := await self._chunk():
            end = chunk.rfind(b"\n") + 1
            self._parts.append(chunk[:end] if end else chunk)
            self._size += len(chunk)
            if self._size > MAX_LINE_BYTES:
                raise BrokenResponse(f"{self._url} sent a row of more than {MAX_LINE_BYTES} bytes")
            if not end:
                continue
            lines = shards.split(b"".join(self._parts))
            self._parts, self._size = [chunk[end:]], len(chunk) - end
            if rows := [self._row(line) for line in lines if not line.isspace()]:
                return rows
        return []

    async def _chunk(self) -> bytes:
        try:
            return await self._content.readany()
        except TimeoutError:
            raise
        except aiohttp.ClientError as error:
            raise ServerUnavailable(f"the connection to {self._url} was lost") from error

    def _row(self, line: bytes) -> Row:
        row = decoded(line, self._url)
        if row.get("seq") != self.next:
            raise BrokenResponse(f"{self._url} sent row {row.get('seq')} in the place of row {self.next}")
        self.next += 1
        return row


def decoded(body: bytes, url: str) -> Row:
    """A JSON object that a daemon has sent.

    Raises:
        BrokenResponse: It is something else.
    """
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BrokenResponse(f"{url} did not answer with JSON; is it a streamsyn daemon?") from error
    if not isinstance(value, dict):
        raise BrokenResponse(f"{url} did not answer with a JSON object; is it a streamsyn daemon?")
    return value


async def _refusal(url: str, response: aiohttp.ClientResponse) -> StreamsynError:
    """The error for an answer that has another status than 200."""
    status = response.status
    why = _detail(await response.content.read(_MESSAGE_BYTES)) or response.reason or ""
    match status:
        case 401 | 403:
            return ConfigError(
                f"{url} refuses access ({status}): {why}; give a token as `token` or in {TOKEN_VARIABLE}"
            )
        case 404:
            return NoSuchRun(f"{url} does not exist: {why}")
        case 408 | 429 | 503:
            wait_s = retry_after_s(response.headers, time.time())
            return RateLimited(f"{url} answered {status}: {why}", retry_after_s=wait_s)
        case _ if status >= 500:
            return ServerUnavailable(f"{url} answered {status}: {why}")
        case _:
            return ConfigError(f"{url} answered {status}: {why}")


def _detail(body: bytes) -> str:
    """The `detail` of a problem (RFC 9457); the body itself if it is something else."""
    with suppress(orjson.JSONDecodeError):
        problem = orjson.loads(body)
        if isinstance(problem, dict) and isinstance(detail := problem.get("detail"), str):
            return message(detail)
    return message(body.decode(errors="replace"))


class Reconnecting:
    """Pauses between the tries, and gives up in the end.

    Args:
        url: What is asked, for logs.
        retry_s: Seconds from the first failure after which the next one is raised.
    """

    def __init__(self, url: str, retry_s: float) -> None:
        self._url = url
        self._retry_s = retry_s
        self._failing_since: float | None = None
        self._tries = 0

    def succeeded(self) -> None:
        """The daemon has answered: failures before do not count any more."""
        self._failing_since, self._tries = None, 0

    async def pause(self, error: ServerError) -> None:
        """Wait before the next try; full jitter, so that readers do not come back all at once.

        Raises:
            ServerError: The tries have lasted too long; it is `error`.
        """
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        if self._tries == 0:
            log.warning("follow.interrupted", url=self._url, why=str(error), retry_s=self._retry_s)
        if now - self._failing_since > self._retry_s:
            raise error
        pause_s = min(FIRST_PAUSE_S * 2**self._tries, _LONGEST_PAUSE_S) * random.random()
        if isinstance(error, RateLimited) and error.retry_after_s is not None:
            pause_s += error.retry_after_s
        self._tries = min(self._tries + 1, 30)
        await asyncio.sleep(pause_s)


class LoopThread:
    """Runs coroutines in a thread's event loop, within an async context that it opens and closes.

    Args:
        context: Opened in the loop before the first coroutine runs, closed after the last.
        name: Name of the thread.
    """

    def __init__(self, context: AbstractAsyncContextManager[object], name: str) -> None:
        self._context = context
        self._loop = asyncio.new_event_loop()
        self._opened = self._loop.create_future()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine in the loop. To cancel the future cancels the coroutine."""
        return asyncio.run_coroutine_threadsafe(self._within(work), self._loop)

    def close(self) -> None:
        """Cancel what runs, close the context, and wait for the end of the thread. May be called again.

        It does not wait when it is called in an event loop, which that would hold up.
        """
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._stop.set)
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self._thread.join()

    async def _within(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            await asyncio.shield(self._opened)
        except BaseException:
            work.close()
            raise
        return await work

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._main())

    async def _main(self) -> None:
        async with self._context:
            self._opened.set_result(None)
            await self._stop.wait()
