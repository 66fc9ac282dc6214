"""Scored requests: what is sent, how the answer is read, and servers that cannot score."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from streamsyn.config.sections import FleetSection
from streamsyn.errors import BrokenResponse, ConfigError, RequestRefused, ServerError
from streamsyn.fleet.fleet import Fleet, open_fleet
from streamsyn.fleet.limiter import AdaptiveLimiter
from streamsyn.fleet.logprobs import NoScores, Scorer
from streamsyn.fleet.thinking import PromptEnds
from streamsyn.fleet.transport import Reply
from streamsyn.records import Attempt, Request
from streamsyn.simulator.app import RunningSimulator, running
from streamsyn.simulator.in_process import InProcessTransport
from streamsyn.simulator.settings import Fault, Script, SimulatorConfig
from streamsyn.simulator.simulation import Simulation

pytestmark = pytest.mark.usefixtures("no_task_left")

MESSAGES = [{"role": "user", "content": "The geese fly south in autumn. " * 40 + "\n\nWhen do they fly?"}]
ANSWER = "In autumn they fly."
REQUEST = Request(MESSAGES, {}, "group", scored=ANSWER)
Routes = dict[str, Any]


class Canned:
    """A server that answers each path with what stands there, and notes what came."""

    def __init__(self, answers: Routes) -> None:
        self._answers = answers
        self.asked: list[tuple[str, Any, dict[str, str]]] = []

    async def exchange(
        self, _method: str, path: str, *, body: bytes | None = None, headers: Any = (), **_: Any
    ) -> Reply:
        """The answer, or 404."""
        self.asked.append((path, orjson.loads(body or b"{}"), dict(headers)))
        answer = self._answers.get(path)
        if callable(answer):
            answer = answer(orjson.loads(body or b"{}"))
        return Reply(404, b'{"detail":"Not Found"}') if answer is None else Reply(200, orjson.dumps(answer))


def tokens(body: dict[str, Any]) -> Any:
    """Seven ids for messages, three for an answer."""
    return {"tokens": [1, 2, 3, 4, 5, 6, 7] if "messages" in body else [11, 12, 13]}


def scored_as(**changes: Any) -> Routes:
    """As SGLang 0.5.23 answers (recorded, shortened)."""
    rows = [[None, 7, None], [-6.5, 11, None], [-1.9, 12, None], [-1.1, 13, None]]
    meta = {
        "id": "rid",
        "finish_reason": {"type": "length", "length": 0},
        "prompt_tokens": 10,
        "weight_version": "default",
        "input_token_logprobs": rows,
        "output_token_logprobs": [],
        "completion_tokens": 0,
        "cached_tokens": 6,
    }
    return {"/tokenize": tokens, "/generate": {"text": "", "output_ids": [], "meta_info": meta | changes}}


async def scored(answers: Routes, request: Request = REQUEST) -> tuple[Any, Canned]:
    """What is made of it, and what was asked for that."""
    server: Any = Canned(answers)
    scorer = Scorer(server, "http://server", PromptEnds(server, "http://server"))
    return await scorer.score(request, "m", "rid", 1.0), server


async def test_ids_go_back_to_the_server_that_made_them() -> None:
    """Messages are tokenized as for chat, the answer without special tokens; it alone has logprobs."""
    completion, server = await scored(scored_as())

    group = {"X-SMG-Routing-Key": "group"}
    assert [
        ("/tokenize", {"model": "m", "messages": MESSAGES}, group),
        ("/tokenize", {"model": "m", "prompt": ANSWER, "add_special_tokens": False}, group),
        ("/tokenize", {"model": "m", "messages": [{"role": "user", "content": "Is it?"}]}, {}),
        ("/detokenize", {"model": "m", "tokens": [1, 2, 3, 4, 5, 6, 7], "skip_special_tokens": False}, {}),
        (
            "/generate",
            {
                "input_ids": [1, 2, 3, 4, 5, 6, 7, 11, 12, 13],
                "sampling_params": {"max_new_tokens": 0, "temperature": 0},
                "return_logprob": True,
                "logprob_start_len": 6,
                "rid": "rid",
            },
            group,
        ),
    ] == server.asked
    assert (-6.5, -1.9, -1.1) == completion.logprobs
    assert (10, 6, 0, "m", "default") == (
        completion.prompt_tokens,
        completion.cached_tokens,
        completion.completion_tokens,
        completion.model,
        completion.weight_version,
    )


async def test_max_tokens_bounds_what_is_scored() -> None:
    """Only the first tokens of the answer are sent."""
    rows = [[None, 7, None], [-6.5, 11, None], [-1.9, 12, None]]
    completion, server = await scored(
        scored_as(input_token_logprobs=rows), Request(MESSAGES, {"max_tokens": 2}, scored=ANSWER)
    )

    assert [1, 2, 3, 4, 5, 6, 7, 11, 12] == server.asked[-1][1]["input_ids"]
    assert 2 == len(completion.logprobs)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"input_token_logprobs": [[-1.0, 11, None]]}, BrokenResponse, "different tokens"),
        (
            {"input_token_logprobs": [[None, 11, None], [-1, 12, None], [-1, 13, None]]},
            BrokenResponse,
            "logprob",
        ),
        ({"input_token_logprobs": None}, BrokenResponse, "invalid score"),
        ({"prompt_tokens": "ten"}, BrokenResponse, "invalid score"),
        ({"finish_reason": {"type": "abort", "message": "Aborted"}}, BrokenResponse, "aborted"),
    ],
)
async def test_an_answer_that_makes_no_sense_is_broken(
    changes: dict[str, Any], error: type[ServerError], said: str
) -> None:
    """Missing, foreign or half rows, and aborts: all of them can be tried again."""
    with pytest.raises(error, match=said):
        await scored(scored_as(**changes))


@pytest.mark.parametrize(
    ("answers", "error", "said"),
    [
        ({}, NoScores, "scoring needs SGLang: http://server answered 404 to /tokenize"),
        ({"/tokenize": tokens}, NoScores, "scoring needs SGLang: http://server answered 404 to /generate"),
        ({"/tokenize": {"count": 3}}, NoScores, "does not return token ids"),
        ({"/tokenize": {"tokens": [[1], [2]]}}, NoScores, "does not return token ids"),
        ({"/tokenize": {"tokens": []}}, RequestRefused, "no token"),
    ],
)
async def test_a_server_that_cannot_score_is_not_asked_again(
    answers: Routes, error: type[ServerError], said: str
) -> None:
    """What lacks the routes refuses; it is not unavailable, for it may write well."""
    with pytest.raises(error, match=said):
        await scored(answers)


@asynccontextmanager
async def fleet_of(*urls: str, **section: Any) -> AsyncIterator[Fleet]:
    """A fleet that is ready."""
    quick = {
        "backoff_base_s": 0.001,
        "backoff_max_s": 0.002,
        "request_timeout_s": 5.0,
        "probe_interval_s": 0.02,
    }
    settings = FleetSection.model_validate({"servers": urls, **quick, **section})
    async with asyncio.timeout(20), open_fleet(settings, lambda _: None) as fleet:
        await fleet.ask_models()
        yield fleet


@asynccontextmanager
async def simulator(script: Script = (), **config: Any) -> AsyncIterator[RunningSimulator]:
    """A simulated server."""
    async with running(SimulatorConfig(**config), script=script) as server:
        yield server


async def test_a_fleet_scores_and_answers_at_one_server() -> None:
    """A group stays at one server: its second request finds the prefix there, and so does a chat request."""
    async with simulator() as one, simulator() as two, fleet_of(one.url, two.url) as fleet:
        attempts: list[Attempt] = []
        first = await fleet.complete(REQUEST, attempts)
        second = await fleet.complete(REQUEST, attempts)
        asked = await fleet.complete(Request(MESSAGES, {}, "group"), attempts)
        figures = {server["server"]: server for server in fleet.metrics()}

    assert len(first.logprobs) == -(-len(ANSWER) // 4)
    assert first.logprobs == second.logprobs
    assert all(logprob < 0 for logprob in first.logprobs)
    assert 0 == first.cached_tokens < 256 <= second.cached_tokens <= asked.cached_tokens
    assert 1 == len({attempt.server for attempt in attempts})
    assert 3 == figures[first.server]["completions"]
    planned, cached = figures[first.server]["planned_cached_tokens"], figures[first.server]["cached_tokens"]
    assert planned == pytest.approx(cached, rel=0.2), "the plan knows of scored requests"


async def test_a_failed_scoring_is_tried_again_elsewhere() -> None:
    """Retries, ejection and the record of tries are those of any request."""
    broken: Script = lambda number, body: Fault.HTTP_500 if "input_ids" in body else None  # noqa: E731
    async with simulator(broken) as one, simulator() as two, fleet_of(one.url, two.url) as fleet:
        for number in range(8):
            attempts: list[Attempt] = []
            request = Request(MESSAGES, {}, str(number), scored=ANSWER)
            assert (await fleet.complete(request, attempts)).logprobs
            assert two.url == attempts[-1].server
            assert all(attempt.error for attempt in attempts[:-1])


async def test_a_scoring_that_is_late_is_aborted_by_its_rid() -> None:
    """A prefill that hangs is aborted at its server, and retried."""
    rids: list[str] = []

    def stall_once(_: int, body: dict[str, Any]) -> Fault | None:
        rids.append(body["rid"])
        return Fault.STALL if len(rids) == 1 else None

    async with simulator(stall_once) as server, fleet_of(server.url, request_timeout_s=0.5) as fleet:
        attempts: list[Attempt] = []
        await fleet.complete(REQUEST, attempts)
        assert 1 == server.simulation.stats.by_route["/abort_request"]
        assert 1 == server.simulation.stats.aborted + server.simulation.stats.disconnected
    assert ["ServerTimeout", None] == [attempt.error and attempt.error.split(":")[0] for attempt in attempts]
    assert 2 == len(set(rids))


async def test_the_start_names_servers_that_cannot_score() -> None:
    """A server that cannot score is named at the start; the simulator can."""

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "simulated"}]})

    async def health(_: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    app.router.add_get("/v1/models", models)
    app.router.add_get("/health", health)
    async with TestServer(app) as other, simulator() as server:
        url = str(other.make_url("")).rstrip("/")
        async with fleet_of(server.url) as fleet:
            await fleet.check_scores("simulated")
        async with fleet_of(server.url, url) as fleet:
            with pytest.raises(ConfigError, match=rf"scoring needs SGLang: {url} answered 404 to /tokenize"):
                await fleet.check_scores("simulated")


async def test_a_server_that_is_merely_unwell_is_not_refused() -> None:
    """A server that fails now may be able to score."""
    async with simulator([Fault.HTTP_500]) as server, fleet_of(server.url) as fleet:
        await fleet.check_scores("simulated")


async def test_the_simulator_scores_in_the_process_too() -> None:
    """Logprobs and ids are the same as over HTTP."""
    simulation: Any = InProcessTransport(Simulation(SimulatorConfig()))
    scorer = Scorer(simulation, "http://inside", PromptEnds(simulation, "http://inside"))
    inside = await scorer.score(REQUEST, "m", "rid", 1.0)
    async with simulator() as server, fleet_of(server.url) as fleet:
        outside = await fleet.complete(REQUEST, [])

    assert inside.logprobs == outside.logprobs


def moved_by(limiter: AdaptiveLimiter, *, scores: int, writes: bool) -> int:
    """The cap after a server that tells no load has answered for a while, and scored in between."""
    now = 0.0
    for number in range(400):
        now += 0.01
        limiter.in_flight = limiter.cap
        for _ in range(scores):
            limiter.scored(now, 0.1, 300)
        if writes:
            limiter.answered(now, 4.0 if number else 0.1, 400)
    return limiter.cap


def test_scoring_does_not_mislead_the_cap() -> None:
    """Scored requests generate no tokens: with other answers present, the cap follows those alone."""
    alone = moved_by(AdaptiveLimiter(), scores=0, writes=True)

    assert alone == moved_by(AdaptiveLimiter(), scores=5, writes=True)


def test_a_server_that_only_scores_finds_its_cap() -> None:
    """For a server that only scores, the cap follows its computed prompt tokens."""
    assert moved_by(AdaptiveLimiter(), scores=1, writes=False) > AdaptiveLimiter().cap


def test_a_scored_answer_ends_a_hold() -> None:
    """After a scored request the next hold is as short as the first."""
    holds = []
    for scores in (False, True):
        limiter = AdaptiveLimiter()
        limiter.busy(0.0, 1.0)
        if scores:
            limiter.scored(1.0, 0.1, 10)
        limiter.busy(1.0, 1.0)
        holds.append(limiter.held_until - 1.0)

    assert holds[0] == pytest.approx(2 * holds[1])
