"""Weight updates: a server's weights and pauses, and the routes that control them."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from streamsyn.simulator import protocol
from streamsyn.simulator.completion_request import Malformed
from streamsyn.simulator.engine import Engine, Work
from streamsyn.simulator.protocol import RawRequest
from streamsyn.simulator.settings import SimulatorConfig

DEFAULT: Final = "default"
"""Version of the weights that a server starts with."""
MODES: Final = ("abort", "retract", "in_place")
HEALTH_TIMEOUT_S: Final = 20.0
NOT_FLUSHED: Final = (
    "Weights were updated, but the cache was not flushed because requests are still running or queued. "
    "Retract or finish them, then call /flush_cache."
)


class Weights:
    """The weights of a server, and whether it is paused.

    During a pause new requests wait, and requests in flight get no output. What they would have generated
    comes at once afterwards. (The real server loses that time.)
    """

    def __init__(self, config: SimulatorConfig) -> None:
        self._first = config.model
        self._open = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._changes: dict[Work, list[dict[str, Any]]] = {}
        self.restart()

    def restart(self) -> None:
        """Return to the state of a new process: first weights, not paused."""
        self.path = self._first
        """Where the weights were loaded from; also the model's name."""
        self.version = DEFAULT
        """Version in answers."""
        self.reported_version = DEFAULT
        """Version in /model_info: still the old one after an update that failed half-way."""
        self.mode: str | None = None
        """Mode of the pause; None when not paused."""
        self._open.set()

    async def enter(self) -> None:
        """Wait until new requests are accepted."""
        await self._open.wait()

    async def flow(self) -> None:
        """Wait until requests in flight may send output; aborted ones may during a pause."""
        if self.mode != "abort":
            await self._open.wait()

    @contextmanager
    def watched(self, work: Work) -> Iterator[list[dict[str, Any]]]:
        """Within the block, record in the list what earlier weights generated."""
        spans = self._changes[work] = []
        self._idle.clear()
        try:
            yield spans
        finally:
            del self._changes[work]
            if not self._changes:
                self._idle.set()

    def pause(self, mode: str) -> None:
        """Pause."""
        self.mode = mode
        self._open.clear()

    def resume(self) -> None:
        """End the pause."""
        self.mode = None
        self._open.set()

    async def idle(self) -> None:
        """Wait until no request is in flight."""
        await self._idle.wait()

    @property
    def busy(self) -> bool:
        """Whether a request is in flight."""
        return bool(self._changes)

    def change(self, path: str, version: str | None) -> None:
        """Change the weights from now on."""
        for work, spans in self._changes.items():
            if work.written:
                start = spans[-1]["end"] if spans else 0
                spans.append({"version": self.version, "start": start, "end": work.written})
        self.path, self.version = path, version or self.version

    def spans(self, before: list[dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
        """Return which weights generated which of `tokens` tokens, given the recorded spans."""
        found = [{**span, "end": min(span["end"], tokens)} for span in before if span["start"] < tokens]
        end = found[-1]["end"] if found else 0
        if end < tokens or not found:
            found.append({"version": self.version, "start": end, "end": tokens})
        return found


class WeightRoutes:
    """The routes for pauses, weight updates and health (srt/managers/tokenizer_manager.py)."""

    def __init__(self, weights: Weights, engine: Engine, load_s: float) -> None:
        self._weights = weights
        self._engine = engine
        self._load_s = load_s

    async def pause(self, raw: RawRequest) -> protocol.Reply:
        """POST /pause_generation; with `abort` it answers when no request is in flight."""
        weights = self._weights
        try:
            mode = protocol.read_object(raw.body).get("mode", "abort")
            if mode not in MODES:
                raise Malformed("body.mode: Input should be 'abort', 'retract' or 'in_place'")
        except Malformed as error:
            return protocol.malformed(str(error))
        weights.pause(mode)
        if mode == "abort":
            self._engine.abort_all()
            await weights.idle()
        return _status("paused")

    async def resume(self, raw: RawRequest) -> protocol.Reply:
        """POST /continue_generation."""
        try:
            protocol.read_object(raw.body)
        except Malformed as error:
            return protocol.malformed(str(error))
        self._weights.resume()
        return _status("continued")

    async def update(self, raw: RawRequest) -> protocol.Reply:
        """POST /update_weights_from_disk; unless paused, it first waits for requests in flight."""
        weights = self._weights
        try:
            body = protocol.read_object(raw.body)
            path, version = body.get("model_path"), body.get("weight_version")
            if not isinstance(path, str) or not isinstance(version, str | None):
                raise Malformed("body: Object missing required field `model_path`")
        except Malformed as error:
            return protocol.malformed(str(error))
        if body.get("abort_all_requests") is True:
            self._engine.abort_all()
        if weights.mode is not None:
            return await self._load(path, version, flush=body.get("flush_cache", True) is True)
        weights.pause("abort")  # as the real server's lock: requests in flight continue, new ones wait
        try:
            await weights.idle()
            return await self._load(path, version, flush=body.get("flush_cache", True) is True)
        finally:
            weights.resume()

    async def _load(self, path: str, version: str | None, *, flush: bool) -> protocol.Reply:
        weights = self._weights
        await asyncio.sleep(self._load_s)
        if not await asyncio.to_thread((Path(path) / "config.json").is_file):
            return _updated(f"Failed to get weights iterator: {path} is not a model directory.", good=False)
        weights.change(path, version)
        if flush and weights.mode == "in_place" and weights.busy:
            return _updated(NOT_FLUSHED, good=False)
        if flush:
            self._engine.cache.clear()
        weights.reported_version = weights.version
        message = "Succeeded to update model weights."
        return _updated(f"{message} Weight version updated to {version}." if version else message, good=True)

    async def health(self, _raw: RawRequest) -> protocol.Reply:
        """GET /health: it generates a token, so it waits for the end of a pause."""
        with suppress(TimeoutError):
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                await self._weights.enter()
                return protocol.Reply()
        return protocol.Reply(503)

    async def ready(self, _raw: RawRequest) -> protocol.Reply:
        """GET /ready."""
        return protocol.Reply(200 if self._weights.mode is None else 503)


def _status(what: str) -> protocol.Reply:
    return protocol.reply({"message": f"Generation {what} successfully.", "status": "ok"})


def _updated(message: str, *, good: bool) -> protocol.Reply:
    body = {"success": good, "message": message, "num_paused_requests": 0}
    return protocol.reply(body, 200 if good else 400)
