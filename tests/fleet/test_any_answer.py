"""Whatever a server answers, on any route: a usable result, or an error of the ServerError family."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from random import Random
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.config.sections import FleetSection
from streamsyn.errors import ConfigError, ServerError
from streamsyn.fleet import discovery, weight_update, wire
from streamsyn.fleet.client import ServerClient
from streamsyn.fleet.fleet import open_fleet
from streamsyn.fleet.limiter import AdaptiveLimiter
from streamsyn.fleet.models import agreed_models
from streamsyn.fleet.transport import Reply, http_transport, retry_after_s
from streamsyn.plain_text import visible
from streamsyn.records import Completion, Request
from streamsyn.simulator.virtual_time import run_virtually
from tests.examples import examples
from tests.fleet.scripted import ScriptedServers, ScriptedTransport

URL = "http://one:1"
REQUEST = Request([{"role": "user", "content": "About geese."}], {})
SCORED = Request(REQUEST.messages, {}, scored="Yes.")
CHAT = {
    "model": "m",
    "choices": [
        {
            "index": 0,
            "message": {"content": "Geese fly.", "reasoning_content": "Hm."},
            "finish_reason": "stop",
        }
    ],
    "usage": {
        "prompt_tokens": 9,
        "completion_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 7},
        "completion_tokens_details": {"reasoning_tokens": 1},
    },
    "metadata": {"weight_version": "1", "weight_versions": [{"version": "1"}]},
    "sglext": {"cached_tokens_details": {"device": 4, "host": 2, "storage": 1}},
}
EVENT = {**CHAT, "choices": [{"index": 0, "delta": {"content": "Geese."}, "finish_reason": "stop"}]}
RANK = {
    "timestamp": 12.5,
    "num_running_reqs": 30,
    "num_waiting_reqs": 4,
    "num_waiting_uncached_tokens": 900,
    "max_total_num_tokens": 32768,
    "max_running_requests": 32,
    "token_usage": 0.61,
    "gen_throughput": 99.5,
    "queues": {"retracted": 2},
}
SCORE = {
    "meta_info": {
        "finish_reason": {"type": "length"},
        "input_token_logprobs": [[None, 9, None], [-0.5, 1, None], [-0.5, 2, None]],
        "prompt_tokens": 3,
        "cached_tokens": 1,
        "cached_tokens_details": {"device": 0, "host": 1},
        "weight_version": "1",
    }
}
ANSWERS: dict[str, Any] = {
    wire.CHAT: CHAT,
    wire.HEALTH: {},
    wire.ABORT: {},
    weight_update.PAUSE: {},
    wire.MODELS: {"data": [{"id": "/weights"}]},
    wire.SERVER_INFO: {"served_model_name": "m", "enable_hierarchical_cache": True},
    wire.MODEL_INFO: {"weight_version": "1"},
    "/v1/loads": {"loads": [RANK, RANK]},
    wire.TOKENIZE: {"tokens": [1, 2]},
    wire.DETOKENIZE: {"text": "assistant\n<think>\n"},
    wire.GENERATE: SCORE,
    discovery.ROUTER_WORKERS: {"workers": [{"url": URL, "labels": {"policy": "cache_aware"}}]},
    discovery.ROUTER_INFO: {"router_manager": True, "workers_count": 3},
    weight_update.UPDATE: {"success": True, "message": "done"},
}
"""A good answer of each route."""


async def load(client: ServerClient) -> None:
    """Whatever is read as load metrics, the cap can follow it."""
    metrics = await client.load()
    limiter = AdaptiveLimiter(8, slow_start_s=1.0, ceiling=64, interval_s=1.0)
    for now in (1.0, 2.0):
        if metrics is not None:
            limiter.observe(metrics, now)


async def models(client: ServerClient) -> None:
    """Whatever is read as models, one can be chosen, or the user is asked."""
    agreed_models({URL: await client.models()}, FleetSection())


async def chat(client: ServerClient) -> None:
    """Whatever is read as an answer, the log can hold it."""
    _check(await client.complete(REQUEST, "m", "r-1"))


async def stream(client: ServerClient) -> None:
    """As `chat`."""
    _check(await client.complete(REQUEST, "m", "r-1", lambda: None))


async def score(client: ServerClient) -> None:
    """As `chat`."""
    _check(await client.complete(SCORED, "m", "r-1"))


def _check(completion: Completion) -> None:
    orjson.dumps(completion)
    assert completion.finish_reason in ("stop", "length")
    assert 0 <= completion.cached_tokens <= completion.prompt_tokens < 2**62
    elsewhere = completion.cached_host_tokens, completion.cached_storage_tokens
    assert min(elsewhere) >= 0
    assert sum(elsewhere) <= completion.cached_tokens
    assert 0 <= completion.thinking_tokens <= completion.completion_tokens < 2**31


CALLS: dict[str, tuple[Callable[[ServerClient], Awaitable[object]], tuple[str, ...]]] = {
    "chat": (chat, (wire.CHAT, wire.TOKENIZE, wire.DETOKENIZE)),
    "stream": (stream, (wire.CHAT,)),
    "score": (score, (wire.TOKENIZE, wire.DETOKENIZE, wire.SERVER_INFO, wire.GENERATE)),
    "models": (models, (wire.HEALTH, wire.MODELS, wire.SERVER_INFO)),
    "load": (load, ("/v1/loads",)),
    "weight_version": (lambda client: client.weight_version(), (wire.MODEL_INFO,)),
    "features": (lambda client: client.ask_features(), (wire.SERVER_INFO,)),
    "abort": (lambda client: client.abort("r-1"), (wire.ABORT,)),
    "router": (
        lambda client: discovery.warn_about_router(URL, client.transport),
        (discovery.ROUTER_WORKERS, discovery.ROUTER_INFO),
    ),
    "pause": (
        lambda client: weight_update.pause(client.transport, URL, "abort", 5.0),
        (weight_update.PAUSE,),
    ),
}
"""What is asked of a server, and the routes it uses."""


def ask(call: str, replies: dict[str, Reply]) -> ServerError | ConfigError | None:
    """Make a call; return the error, if it is one of ours."""
    whole = {path: Reply(200, orjson.dumps(answer)) for path, answer in ANSWERS.items()}
    client = ServerClient(URL, ScriptedTransport(whole | replies), 5.0)
    try:
        asyncio.run(CALLS[call][0](client))  # type: ignore[arg-type]
    except (ServerError, ConfigError) as error:
        return error
    return None


NUMBERS = (
    st.integers()
    | st.floats()
    | st.sampled_from([2**31, 2**63, 2**70, 10**400, -1, 1e308, float("inf"), float("nan"), 4.5])
)
TEXTS = st.text(max_size=5) | st.sampled_from(["\x1b[2J", "stop", "abort", "/weights", "\ud800", "x" * 5_000])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["error", "message", "code", "object", "type", "text", "id", "content", "detail"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
BODIES = st.binary(max_size=60) | st.sampled_from(
    [b"", b"[" * 100_000, b'{"a":' * 100_000, b"\xff" * 300, b"1" * 5_000, b'"\x1b[2J']
)
STATUSES = st.sampled_from([200, 200, 200, 201, 204, 400, 401, 404, 408, 422, 429, 500, 503, 599])


@st.composite
def changed(draw: st.DrawFn, answer: Any) -> Any:
    """`answer` with one of its values replaced, or left out."""
    if not isinstance(answer, dict | list) or not answer or draw(st.integers(0, 3)) == 0:
        return draw(JSON)
    places: list[Any] = list(answer) if isinstance(answer, dict) else list(range(len(answer)))
    place = draw(st.sampled_from(places))
    if draw(st.integers(0, 5)) == 0:
        return (
            {name: value for name, value in answer.items() if name != place}
            if isinstance(answer, dict)
            else []
        )
    other = draw(changed(answer[place]))
    if isinstance(answer, dict):
        return {**answer, place: other}
    return [*answer[:place], other, *answer[place + 1 :]]


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """Server-sent events, most of them nearly valid, and lines that are none."""
    data = changed(EVENT).map(lambda event: b"data: " + json.dumps(event).encode())
    lines = st.sampled_from(
        [b"", b": ping", b"data", b"data:", b"data: [DONE]", b"event: x", b"\xff", b"data: {"]
    )
    parts = draw(st.lists(data | lines | st.binary(max_size=9), max_size=5))
    return draw(st.sampled_from([b"\n\n", b"\r\n\r\n", b"\n", b"\r\r"])).join(parts)


@st.composite
def replies(draw: st.DrawFn, call: str) -> dict[str, Reply]:
    """Answers of the routes of a call."""
    found = {}
    for path in CALLS[call][1]:
        bodies = BODIES | changed(ANSWERS.get(path, {})).map(lambda answer: json.dumps(answer).encode())
        if call == "stream":
            bodies = streams() | bodies
        found[path] = Reply(draw(STATUSES), draw(bodies))
    return found


def test_good_answers_are_used() -> None:
    """Otherwise the tests below would test nothing."""
    refused = {call: str(error) for call in CALLS if (error := ask(call, {})) is not None}
    assert {} == refused


@pytest.mark.parametrize("call", CALLS)
@given(data=st.data())
@examples(200)
def test_any_answer(call: str, data: st.DataObject) -> None:
    """Only our own errors come out, and what is taken can be used and logged."""
    error = ask(call, data.draw(replies(call)))
    if isinstance(error, ServerError):
        assert not {"\n", "\t"} & set(str(error))
        assert visible(str(error)) == str(error)
        assert len(str(error).encode()) <= 2048
    elif error is not None:
        assert call == "models"  # a key that is not accepted; no model, or several


@given(body=BODIES | JSON.map(lambda value: json.dumps(value).encode()), status=STATUSES)
@examples(200)
def test_any_refusal(status: int, body: bytes) -> None:
    """The messages of refusals, and the search for fields in them."""
    wire.refused_field(status, body)
    with suppress(ServerError):
        wire.parse_object(status, body, URL)


@given(data=st.data(), stream=st.booleans())
@examples(60)
def test_a_fleet_survives_any_answers(data: st.DataObject, stream: bool) -> None:
    """A server that answers anything for a while, on all routes, is used again when it answers well."""
    good = {path: Reply(200, orjson.dumps(answer)) for path, answer in ANSWERS.items()}
    odd: dict[str, Reply] = {}
    for call in CALLS:
        odd |= data.draw(replies(call))
    run_virtually(_odd_for_a_while(good, odd, ("shared",) if stream else ()), limit_s=86_400)


async def _odd_for_a_while(
    good: Mapping[str, Reply], odd: Mapping[str, Reply], prefixes: tuple[str, ...]
) -> None:
    servers = ScriptedServers({URL: dict(good)})
    section = FleetSection(servers=(URL,), max_attempts=2, request_timeout_s=60)
    request = Request(REQUEST.messages, {}, prefixes=prefixes)
    async with open_fleet(section, lambda _: None, {}, connect=servers.connect, rng=Random(0)) as fleet:
        await fleet.ask_models()
        servers.replies[URL].update(odd)
        for _ in range(4):
            with suppress(ServerError, TimeoutError):
                async with asyncio.timeout(100):
                    await fleet.complete(request, [])
        servers.replies[URL].clear()
        servers.replies[URL].update(good)
        assert "Geese fly." == (await fleet.complete(request, [])).text


@given(value=st.text(), date=st.text())
@examples(200)
def test_any_pause(value: str, date: str) -> None:
    """`Retry-After` and `Date` of any content."""
    pause_s = retry_after_s({"Retry-After": value, "Date": date}, 0.0)
    assert pause_s is None or 0 <= pause_s <= 600


@given(
    sent=st.binary(max_size=200)
    | st.builds(
        lambda *parts: b"".join(parts),
        *[
            st.sampled_from(
                [
                    b"HTTP/1.1 200 OK\r\n",
                    b"HTTP/1.1 307 X\r\n",
                    b"HTTP/1.0 500\r\n",
                    b"HTTP/1.1 100 C\r\n\r\n",
                ]
            ),
            st.sampled_from(
                [
                    b"",
                    b"Location: \xff://[\r\n",
                    b"Content-Encoding: gzip\r\n",
                    b"Content-Encoding: deflate\r\n",
                    b"Content-Encoding: br\r\n",
                    b"Transfer-Encoding: chunked\r\n",
                    b"Content-Length: 9\r\n",
                    b"Content-Length: -1\r\n",
                    b"Set-Cookie: \x1b=1\r\n",
                    b"Retry-After: 1e400\r\n",
                ]
            ),
            st.binary(max_size=30).map(lambda value: b"X: " + value + b"\r\n") | st.just(b""),
            st.just(b"\r\n"),
            st.binary(max_size=60),
        ],
    )
)
@examples(200)
def test_any_bytes_of_a_socket(sent: bytes) -> None:
    """What is no HTTP, nearly HTTP, and HTTP with wrong contents."""
    asyncio.run(_receive(sent))


async def _receive(sent: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(sent)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, http_transport(url, {}) as transport:
        with suppress(ServerError):
            await transport.exchange("GET", "/", timeout_s=5)
