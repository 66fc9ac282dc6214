"""`POST /v1/runs/ID/seeds`: lines of seeds, streamed into the inbox of a run.

    body -> pieces -> unpacked -> lines -> [on disk] -> the run

Each piece is on disk before the next is read. While many accepted seeds wait to be taken up by the run, no
more of the body is read, so that the client waits. A client that goes away leaves what was on disk by then.
"""

import asyncio
from contextlib import AsyncExitStack
from typing import Any, Final

from aiohttp import web

from streamsyn.background import in_threads
from streamsyn.daemon.bodies import JsonBody, Unpacker, pieces, unpacker
from streamsyn.daemon.daemon import DAEMON, Daemon
from streamsyn.daemon.hosted_run import HostedRun
from streamsyn.daemon.problems import Problem, problem_of
from streamsyn.daemon.route import Route, json_response
from streamsyn.daemon.run_routes import requested_run
from streamsyn.errors import StreamsynError
from streamsyn.seeds.inbox import Inbox
from streamsyn.seeds.submission import Submission, Submitted

MAX_KEY_CHARS: Final = 255
_NDJSON: Final = "application/x-ndjson"


class RefusedLines(JsonBody):
    """A line that is not a seed: its number in the body, counted from 1, and what is wrong with it."""

    line: int
    detail: str


class Accepted(JsonBody):
    """What became of the lines: `accepted` seeds are on disk; `duplicate` ones were before."""

    accepted: int
    duplicate: int
    refused: int
    refused_lines: list[RefusedLines]


async def submit_seeds(request: web.Request) -> web.Response:
    """Take the seeds in the body, and answer when all are on disk."""
    run = await requested_run(request)
    daemon = request.app[DAEMON]
    daemon.check_room()
    key = _idempotency_key(request)
    if request.content_type.startswith("multipart/"):
        raise Problem(415, f"expected one seed a line ({_NDJSON}), not {request.content_type[:100]!r}")
    unpacks = unpacker(request.headers.get("Content-Encoding", ""))
    if key is None:
        _check_accepting(daemon, run)
    async with run.submitting() as inbox:
        return json_response(await _submit(request, run, inbox, unpacks, key), 202)


async def _submit(
    request: web.Request, run: HostedRun, inbox: Inbox, unpacks: Unpacker, key: str | None
) -> dict[str, Any]:
    daemon = request.app[DAEMON]
    serve = daemon.config.serve
    opening = inbox.submission(key, max_line_bytes=serve.max_line_bytes)
    async with AsyncExitStack() as stack:
        if key is None:
            submission = stack.enter_context(opening)
        else:  # the key is looked up on disk
            submission = await stack.enter_async_context(in_threads(opening))
        if not submission.is_answered:
            _check_accepting(daemon, run)
        taking = _Taking(unpacks, submission, serve.max_body_bytes)
        try:
            async for piece in pieces(request, serve.max_body_bytes):
                unpacks.feed(piece)
                while unpacks.has_more:
                    daemon.check_room()
                    if not submission.is_answered:
                        await _room(daemon, run, inbox)
                    await asyncio.to_thread(taking.chunk, ends=request.content.at_eof())
            if taking.answer is None:  # the end came after the last piece
                await asyncio.to_thread(taking.finish)
        except StreamsynError as error:
            problem = problem_of(error)
            if not submission.is_answered:
                problem.extra |= submission.so_far.as_json()  # what is on disk by now
            raise problem from error
        assert taking.answer is not None, "finished"
        return taking.answer.as_json()


class _Taking:
    """Takes the content of a body, within limits. Its methods block.

    Attributes:
        answer: The answer, once the body has ended.
    """

    def __init__(self, unpacks: Unpacker, submission: Submission, max_bytes: int) -> None:
        self.answer: Submitted | None = None
        self._unpacks = unpacks
        self._submission = submission
        self._max_bytes = max_bytes
        self._bytes = 0

    def chunk(self, *, ends: bool) -> None:
        """Put the next chunk on disk, with the answer if the body ends with it.

        Raises:
            Problem: A limit is passed, or the body is damaged.
        """
        chunk = self._unpacks.chunk()
        self._bytes += len(chunk)
        if self._bytes > self._max_bytes:
            raise Problem(413, f"the body is longer than {self._max_bytes:,} bytes when decompressed")
        self._submission.feed(chunk)
        if (line := self._submission.endless_line) is not None:
            raise Problem(413, f"line {line} is longer than {self._submission.max_line_bytes:,} bytes")
        if ends and not self._unpacks.has_more:
            self.finish()
        else:
            self._submission.flush()

    def finish(self) -> None:
        """The body has ended: everything is on disk, and answered."""
        self._unpacks.end()
        self.answer = self._submission.finish()


def _check_accepting(daemon: Daemon, run: HostedRun) -> None:
    if daemon.is_ending:
        raise Problem(503, "the daemon is ending")
    if not run.accepting:
        raise Problem(409, run.why_not_accepting)


async def _room(daemon: Daemon, run: HostedRun, inbox: Inbox) -> None:
    """Wait while the run has many accepted seeds to take up, and takes them up."""
    limit = daemon.config.serve.max_unread_seeds
    _check_accepting(daemon, run)
    while run.state == "running" and inbox.unread > limit:
        await inbox.room(limit)
        _check_accepting(daemon, run)


def _idempotency_key(request: web.Request) -> str | None:
    key = request.headers.get("Idempotency-Key")
    if key is None:
        return None
    if not 0 < len(key) <= MAX_KEY_CHARS or not (key.isascii() and key.isprintable()):
        raise Problem(422, f"Idempotency-Key: expected 1 to {MAX_KEY_CHARS} printable ASCII characters")
    return key


ROUTES: Final = (
    Route(
        method="POST",
        path="/v1/runs/{id}/seeds",
        handler=submit_seeds,
        scope="write",
        summary="Submit seeds, one a line, gzip or zstd allowed; answered when they are on disk.",
        body=_NDJSON,
        answers={202: Accepted},
        problems=(400, 404, 408, 409, 413, 415, 422, 503, 507),
    ),
)
