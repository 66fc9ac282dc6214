"""Asks servers the questions of a training while it goes on: `train.eval_servers`.

Each published folder of weights is loaded by all these servers. Then those that have it are asked all the
questions, by a thread that the training does not wait for. While one evaluation is running the newest weights
wait, and those that they replace are skipped. A server that fails is left out of that evaluation.
"""

import asyncio
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Self

import orjson
import structlog

from streamsyn.config.command_sections import PublishSection, TrainSection
from streamsyn.config.sections import FleetSection
from streamsyn.errors import SinkError, StreamsynError
from streamsyn.fleet.server_spec import base_url
from streamsyn.fleet.transport import http_transport, tls_context
from streamsyn.io.durable import write_whole
from streamsyn.scoring.suites.suite_question import SuiteQuestion
from streamsyn.scoring.suites.suite_run import Answered, SuiteRun
from streamsyn.trainer.evaluation.exam import FOLDER, mean_scores
from streamsyn.trainer.saving.publish import ServerWeights, server_headers, step_of

log = structlog.get_logger()

KEY = "train.eval_servers"
_CUT = "the training ended before all questions were answered"


@dataclass(frozen=True, slots=True)
class ServerEvaluation:
    """The result of asking about the weights of one step.

    Attributes:
        step: The step at which the weights were published.
        found: Fields of its line in metrics.jsonl.
    """

    step: int
    found: dict[str, Any]


class EvalServers:
    """The servers of `train.eval_servers`, on rank 0. A context manager: the thread ends with it, without
    finishing evaluations unless `finish` has been called.

    Args:
        section: The section `train`, with `publish`.
        fleet: The section `fleet`, for the servers' API keys and how they are asked.
        questions: The questions, grouped by exam, and within an exam by part.
        out: OUT.
        environ: Where the API keys are.

    Raises:
        ConfigError: A server's URL is invalid, or its API key is not in the environment.
    """

    def __init__(
        self,
        section: TrainSection,
        fleet: FleetSection,
        questions: Sequence[SuiteQuestion],
        out: Path,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._publish = section.publish or PublishSection()
        self._wait_s = section.eval_wait_s
        self._fleet = fleet
        self._questions = questions
        self._out = out
        self._environ = environ
        self._headers = server_headers(section.eval_servers, KEY, fleet, environ)
        self._tls = tls_context(fleet)
        self._given = {base_url(url, KEY): url for url in section.eval_servers}
        self._servers: dict[str, ServerWeights] = {}
        self._wanted: Path | None = None
        self._loading: Path | None = None
        self._asking: asyncio.Timeout | None = None
        self._ending = self._in_a_hurry = False
        self._changed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready = threading.Event()
        self._results: SimpleQueue[ServerEvaluation] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="eval-servers", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.hurry()
        self._thread.join()

    @property
    def in_use(self) -> set[Path]:
        """Folders that a server may be reading, or is to read."""
        # In this order: a folder that moves from wanted to loading in between is seen twice, not missed.
        return {folder for folder in (self._wanted, self._loading) if folder is not None}

    def offer(self, folder: Path) -> None:
        """Have the servers load these weights and answer the questions, after the current evaluation."""
        self._call(lambda: self._want(folder))

    def results(self) -> list[ServerEvaluation]:
        """The evaluations that have ended since the last call."""
        found = []
        while True:
            try:
                found.append(self._results.get_nowait())
            except Empty:
                return found

    def hurry(self) -> None:
        """End soon, in the middle of an evaluation. Safe in a signal handler."""
        self._call(self._stop)

    def finish(self) -> None:
        """Wait until the weights offered last are evaluated, but not longer than `train.eval_wait_s`."""
        self._call(self._end)
        self._thread.join(self._wait_s)
        if self._thread.is_alive():
            log.warning("train.eval_servers_late", waited_s=self._wait_s)
            self.hurry()
            self._thread.join()

    def _call(self, method: Callable[[], None]) -> None:
        if self._loop is None or self._loop.is_closed():
            return
        try:
            self._loop.call_soon_threadsafe(method)
        except RuntimeError:
            return  # the loop has ended by itself

    def _want(self, folder: Path) -> None:
        if self._wanted is not None:
            self._add(self._wanted, {"skipped": "newer weights were published before it could begin"})
        self._wanted = folder
        self._changed.set()

    def _end(self) -> None:
        self._ending = True
        self._changed.set()

    def _stop(self) -> None:
        if self._wanted is not None:
            self._add(self._wanted, {"skipped": "the training ended before it could begin"})
            self._wanted = None
        self._in_a_hurry = True
        for server in self._servers.values():
            server.hurry()
        if self._asking is not None and not self._asking.expired():
            self._asking.reschedule(asyncio.get_running_loop().time())
        self._end()

    def _add(self, folder: Path, found: dict[str, Any]) -> None:
        self._results.put(ServerEvaluation(step_of(folder), {"version": folder.name, **found}))

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        async with AsyncExitStack() as stack:
            for url, headers in self._headers.items():
                opened = http_transport(
                    url, headers, tls=self._tls, connect_timeout_s=self._fleet.connect_timeout_s
                )
                transport = await stack.enter_async_context(opened)
                self._servers[url] = ServerWeights(url, transport, self._publish)
            self._loop = asyncio.get_running_loop()
            self._ready.set()
            while True:
                await self._changed.wait()
                self._changed.clear()
                while self._wanted is not None:
                    folder, self._loading, self._wanted = self._wanted, self._wanted, None
                    self._add(folder, await self._evaluate(folder))
                if self._ending:
                    return

    async def _evaluate(self, folder: Path) -> dict[str, Any]:
        """Load weights and ask. Returns the fields of the result."""
        began = asyncio.get_running_loop().time()
        loaded = await self._load(folder)
        self._loading = None
        found: dict[str, Any] = {"servers": len(loaded), "questions": len(self._questions), "answered": 0}
        failed = sorted(self._servers.keys() - set(loaded))
        if failed:
            found["failed_servers"] = failed
        if loaded and not self._in_a_hurry:
            answered, problem = await self._ask(loaded, folder.name)
            graded = ((one.question.suite, one.question.part, _score(one)) for one in answered)
            found |= {"answered": sum(one.error is None for one in answered), **mean_scores(graded)}
            problem = await asyncio.to_thread(self._write, folder, answered) or problem
        else:
            problem = "no server has loaded the weights" if not loaded else _CUT
        if found["answered"] < found["questions"]:
            found["partial"] = True
            log.warning(
                "train.eval_servers_failed", version=folder.name, answered=found["answered"], error=problem
            )
        if problem:
            found["problem"] = problem
        return {**found, "seconds": round(asyncio.get_running_loop().time() - began, 3)}

    async def _load(self, folder: Path) -> list[str]:
        """The servers that have loaded these weights."""
        async with asyncio.TaskGroup() as group:
            tasks = {
                url: group.create_task(server.load(folder), name=f"eval-load-{url}")
                for url, server in self._servers.items()
            }
        return [url for url, task in tasks.items() if task.result()]

    async def _ask(self, urls: Sequence[str], version: str) -> tuple[list[Answered], str | None]:
        """The answers in the order of the questions, and why some are missing."""
        run = SuiteRun(
            questions=self._questions,
            total=len(self._questions),
            fleet=self._fleet_of(urls),
            environ=self._environ,
        )
        problem = None
        try:
            async with asyncio.timeout(None) as self._asking:
                await run.run()
        except TimeoutError:
            problem = _CUT
        except StreamsynError as error:
            problem = str(error)
        self._asking = None
        by_question = {id(one.question): _checked(one, version) for one in run.answered}
        missing = problem or "it was not asked"
        answered = [by_question.get(id(one)) or Answered(one, error=missing) for one in self._questions]
        return answered, problem or next((one.error for one in answered if one.error), None)

    def _fleet_of(self, urls: Sequence[str]) -> FleetSection:
        """The section `fleet` with these servers, as `fleet.servers` has them if it does."""
        known = {
            base_url(entry if isinstance(entry, str) else entry.url, "fleet.servers"): entry
            for entry in self._fleet.servers
        }
        servers = tuple(known.get(url, self._given[url]) for url in urls)
        others: dict[str, Any] = {"servers_file": None, "servers_dns": None, "model": None, "models": {}}
        return self._fleet.model_copy(update={"servers": servers, **others})

    def _write(self, folder: Path, answered: Sequence[Answered]) -> str | None:
        """Write all answers to a file such as OUT/answers/servers-0000100.jsonl. Returns what failed."""
        target = self._out / FOLDER / f"servers-{step_of(folder):07}.jsonl"
        lines = (orjson.dumps(one.row(), option=orjson.OPT_APPEND_NEWLINE) for one in answered)
        try:
            target.parent.mkdir(exist_ok=True)
            write_whole(target, b"".join(lines))
        except (OSError, SinkError) as error:
            return f"cannot write {target}: {error}"
        return None


def _score(one: Answered) -> float | None:
    return one.score if one.error is None else None


def _checked(one: Answered, version: str) -> Answered:
    """An answer counts only if the weights in question wrote it."""
    if one.error is None and one.version != version:
        return replace(one, score=0.0, error=f"written by weights {one.version}, not {version}")
    return one
