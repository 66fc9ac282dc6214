"""The simulator over HTTP: every answer has the form of SGLang 0.5.23."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import orjson
import pytest

from streamsyn.simulator.app import RunningSimulator, running
from streamsyn.simulator.settings import Fault, Script, SimulatorConfig

MESSAGES = [
    {"role": "system", "content": "You write documents."},
    {"role": "user", "content": "About geese."},
]
CHAT: dict[str, Any] = {"model": "any-name", "messages": MESSAGES}
QUEUE_FULL = {
    "object": "error",
    "message": "The request queue is full.",
    "type": "503",
    "param": None,
    "code": 503,
}


class Client:
    """A session bound to one simulator."""

    def __init__(self, server: RunningSimulator, session: aiohttp.ClientSession) -> None:
        self.server = server
        self.session = session

    async def ask(self, method: str, path: str, body: Any = None, **options: Any) -> tuple[int, bytes]:
        """Status and body."""
        async with (
            asyncio.timeout(10),
            self.session.request(method, f"{self.server.url}{path}", json=body, **options) as reply,
        ):
            return reply.status, await reply.read()

    async def json(self, method: str, path: str, body: Any = None, **options: Any) -> Any:
        """The decoded body of a 200."""
        status, data = await self.ask(method, path, body, **options)
        assert status == 200, data
        return orjson.loads(data)

    async def chat(self, **fields: Any) -> Any:
        """The decoded answer of the chat route."""
        return await self.json("POST", "/v1/chat/completions", CHAT | fields)

    async def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The events of a streamed answer; the last one is the string [DONE]."""
        status, data = await self.ask("POST", path, body | {"stream": True})
        assert status == 200, data
        *events, end = [event.removeprefix("data: ") for event in data.decode().split("\n\n")]
        assert end == ""
        return [event if event == "[DONE]" else orjson.loads(event) for event in events]

    async def until_running(self, count: int) -> None:
        """Returns once `count` requests have come and live in the engine."""
        engine = self.server.simulation.engine
        async with asyncio.timeout(5):
            while engine.running + engine.waiting != count:
                await self.json("GET", "/v1/loads?include=core")


@asynccontextmanager
async def simulator(
    script: Script | None = None, *, on_death: Callable[[], None] = lambda: None, **fields: Any
) -> AsyncIterator[Client]:
    async with (
        running(SimulatorConfig(**fields), script=script, on_death=on_death) as server,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
    ):
        yield Client(server, session)


async def test_chat_answer_has_the_shape_of_the_real_one() -> None:
    """Every key of a chat completion is there, the model is echoed, the rid is the id."""
    async with simulator() as client:
        answer = await client.chat(rid="run-0001")
    text = answer["choices"][0]["message"]["content"]
    assert isinstance(answer.pop("created"), int)
    assert 120 <= len(text.split()) <= 180
    assert "Context:" not in text
    assert answer == {
        "id": "run-0001",
        "object": "chat.completion",
        "model": "any-name",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, "reasoning_content": None},
                "logprobs": None,
                "finish_reason": "stop",
                "matched_stop": 2,
            }
        ],
        "usage": {
            "prompt_tokens": answer["usage"]["prompt_tokens"],
            "total_tokens": answer["usage"]["prompt_tokens"] + -(-len(text) // 4),
            "completion_tokens": -(-len(text) // 4),
            "prompt_tokens_details": {"cached_tokens": 0},
            "reasoning_tokens": 0,
            "completion_tokens_details": None,
        },
        "metadata": {
            "weight_version": "default",
            "weight_versions": [{"version": "default", "start": 0, "end": -(-len(text) // 4)}],
        },
    }


async def test_chat_cuts_at_max_tokens() -> None:
    """An answer longer than max_tokens ends there, with finish_reason length."""
    async with simulator() as client:
        answer = await client.chat(max_tokens=10)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["matched_stop"] is None
    assert answer["usage"]["completion_tokens"] == 10
    assert len(answer["choices"][0]["message"]["content"]) == 40


async def test_ignore_eos_writes_until_max_tokens() -> None:
    """An answer that would be shorter goes on, on both routes."""
    forced = {"ignore_eos": True}
    async with simulator(words=20) as client:
        answer = await client.chat(max_tokens=500, **forced)
        native = {"text": "Geese", "sampling_params": {"max_new_tokens": 500, **forced}}
        written = await client.json("POST", "/generate", native)
    assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (500, "length")
    assert written["meta_info"]["completion_tokens"] == 500


async def test_chat_stream_is_role_pieces_finish_usage_done() -> None:
    """A stream names the role, gives the text in pieces, then the finish reason, the usage and [DONE]."""
    async with simulator() as client:
        body = CHAT | {"rid": "r1", "stream_options": {"include_usage": True}}
        first, *pieces, finish, usage, done = await client.events("/v1/chat/completions", body)
        plain = await client.events("/v1/chat/completions", CHAT)
    assert done == "[DONE]"
    assert first["object"] == "chat.completion.chunk"
    assert first["id"] == "r1"
    assert first["choices"][0]["delta"] == {"reasoning_content": None, "role": "assistant", "content": ""}
    text = "".join(piece["choices"][0]["delta"]["content"] for piece in pieces)
    assert finish["choices"][0] == {
        "index": 0,
        "delta": {"reasoning_content": None},
        "logprobs": None,
        "finish_reason": "stop",
        "matched_stop": 2,
    }
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == -(-len(text) // 4)
    assert "usage" not in finish
    assert plain[-2]["choices"][0]["finish_reason"] == "stop"


async def test_generate_answer_has_the_shape_of_the_real_one() -> None:
    """/generate gives text, output ids and meta_info; without max_new_tokens it stops at 128 tokens."""
    async with simulator() as client:
        answer = await client.json("POST", "/generate", {"text": "Geese " * 100, "rid": "g1"})
        ids = await client.json("POST", "/generate", {"input_ids": list(range(70))})
    meta = answer["meta_info"]
    assert meta.pop("e2e_latency") >= 0
    assert len(answer["output_ids"]) == 128
    assert meta == {
        "id": "g1",
        "finish_reason": {"type": "length", "length": 128},
        "prompt_tokens": 150,
        "weight_version": "default",
        "num_retractions": 0,
        "reasoning_tokens": 0,
        "completion_tokens": 128,
        "cached_tokens": 0,
        "cached_tokens_details": None,
        "weight_versions": [{"version": "default", "start": 0, "end": 128}],
    }
    assert ids["meta_info"]["prompt_tokens"] == 70
    assert len(ids["meta_info"]["id"]) == 32


async def test_generate_stream_repeats_the_text_so_far() -> None:
    """Each event holds all of the text so far; only the last one has a finish reason."""
    async with simulator(words=40) as client:
        *events, done = await client.events("/generate", {"text": "Geese"})
    assert done == "[DONE]"
    texts = [event["text"] for event in events]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert [event["meta_info"]["finish_reason"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["meta_info"]["finish_reason"] == {"type": "stop", "matched": 2}


async def test_scoring_gives_a_logprob_for_each_token_of_the_answer() -> None:
    """With logprob_start_len at the prefix's last token there is one null and then one logprob a token."""
    prefix, answer = "The geese fly south in autumn. ", "In autumn they do."
    async with simulator() as client:
        counts = [
            (await client.json("POST", "/tokenize", {"model": "m", "prompt": text}))["count"]
            for text in (prefix, prefix + answer)
        ]
        body = {
            "text": prefix + answer,
            "sampling_params": {"max_new_tokens": 0, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": counts[0] - 1,
        }
        scored = await client.json("POST", "/generate", body)
    rows = scored["meta_info"]["input_token_logprobs"]
    assert scored["text"] == ""
    assert scored["meta_info"]["completion_tokens"] == 0
    assert scored["meta_info"]["output_token_logprobs"] == []
    assert len(rows) == counts[1] - counts[0] + 1
    assert rows[0][0] is None
    assert all(row[0] < 0 and isinstance(row[1], int) and row[2] is None for row in rows[1:])


async def test_scoring_from_the_start_uses_no_cache() -> None:
    """Logprobs are computed, never cached: reuse ends at logprob_start_len."""
    body = {"text": "geese " * 500, "sampling_params": {"max_new_tokens": 0}, "return_logprob": True}
    async with simulator() as client:
        for start, cached in ((0, 0), (0, 0), (600, 576)):
            scored = await client.json("POST", "/generate", body | {"logprob_start_len": start})
            assert scored["meta_info"]["cached_tokens"] == cached


async def test_an_impossible_logprob_start_is_refused() -> None:
    """A start behind the prompt is 400 in the native error shape."""
    async with simulator() as client:
        body = {"text": "geese", "return_logprob": True, "logprob_start_len": 99}
        status, data = await client.ask("POST", "/generate", body)
    assert status == 400
    assert "logprob_start_len=99 is higher" in orjson.loads(data)["error"]["message"]


async def test_loads_reports_running_and_waiting() -> None:
    """/v1/loads has one rank; include=core leaves the sections out; a wrong section is 400."""
    async with simulator(script=[Fault.STALL, Fault.STALL], slots=1) as client, asyncio.TaskGroup() as group:
        for rid in ("a", "b"):
            group.create_task(client.chat(rid=rid))
        await client.until_running(2)
        told = await client.json("GET", "/v1/loads?include=core")
        full = await client.json("GET", "/v1/loads")
        wrong, _ = await client.ask("GET", "/v1/loads?include=nonsense")
        await client.ask("POST", "/abort_request", {"abort_all": True})
    assert set(told) == {"timestamp", "version", "accelerator", "num_accelerators", "loads"}
    [rank] = told["loads"]
    assert (rank["num_running_reqs"], rank["num_waiting_reqs"], rank["max_running_requests"]) == (1, 1, 1)
    assert rank["num_waiting_uncached_tokens"] > 0
    assert "queues" not in rank
    assert full["loads"][0]["queues"]["waiting"] == 1
    assert wrong == 400


async def test_health_info_and_models() -> None:
    """Health, info and models answer on every path that the real server has."""
    async with simulator(model="small", slots=7, queue_limit=9) as client:
        for path in ("/health", "/health_generate", "/ready"):
            assert await client.ask("GET", path) == (200, b"")
        for path in ("/server_info", "/get_server_info"):
            info = await client.json("GET", path)
            assert (info["version"], info["max_running_requests"], info["max_queued_requests"]) == (
                "0.5.23",
                7,
                9,
            )
        for path in ("/model_info", "/get_model_info"):
            assert (await client.json("GET", path))["served_model_name"] == "small"
        [card] = (await client.json("GET", "/v1/models"))["data"]
        assert (card["id"], card["owned_by"], card["max_model_len"]) == ("small", "sglang", 131072)


async def test_metrics_are_prometheus_text() -> None:
    """The main gauges and counters stand under SGLang's names."""
    async with simulator(model="small") as client:
        await client.chat()
        status, data = await client.ask("GET", "/metrics")
    text = data.decode()
    assert status == 200
    assert 'sglang:num_running_reqs{model_name="small"' in text
    assert "# TYPE sglang:prompt_tokens_total counter" in text
    assert (
        'sglang:num_requests_total{model_name="small",engine_type="unified",is_streaming="False"} 1.0' in text
    )
    assert 'sglang:e2e_request_latency_seconds_count{model_name="small",engine_type="unified"} 1.0' in text


async def test_tokenize_counts_four_characters_as_one() -> None:
    """One list for one prompt, a list of lists for several, the chat template for messages."""
    async with simulator() as client:
        one = await client.json("POST", "/tokenize", {"model": "m", "prompt": "123456789"})
        several = await client.json("POST", "/v1/tokenize", {"prompt": ["1234", "12345"]})
        chat = await client.json("POST", "/tokenize", {"messages": MESSAGES})
        used = (await client.chat())["usage"]["prompt_tokens"]
    assert one["count"] == len(one["tokens"]) == 3
    assert one["max_model_len"] == 131072
    assert several["count"] == [1, 2]
    assert chat["count"] == used


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/generate", "/tokenize", "/abort_request"])
async def test_malformed_json_is_400(path: str) -> None:
    """A body that is not a JSON object is refused in the second error form, and not counted."""
    async with simulator() as client:
        for data in (b'{"messages": [', b"[]"):
            headers = {"Content-Type": "application/json"}
            async with client.session.post(client.server.url + path, data=data, headers=headers) as reply:
                error = await reply.json()
                assert reply.status == 400
                assert (error["object"], error["type"], error["code"]) == ("error", "Bad Request", 400)
        assert client.server.simulation.stats.requests == 0


async def test_a_chat_body_of_another_type_is_400() -> None:
    """The OpenAI routes take application/json only."""
    async with (
        simulator() as client,
        client.session.post(
            f"{client.server.url}/v1/chat/completions", data=b"{}", headers={"Content-Type": "text/plain"}
        ) as reply,
    ):
        assert reply.status == 400
        assert "Unsupported Media Type" in (await reply.json())["message"]


@pytest.mark.parametrize(
    ("path", "body", "shape"),
    [
        ("/v1/chat/completions", {"messages": []}, {"message", "object", "type", "param", "code"}),
        ("/v1/chat/completions", {"model": "m"}, {"message", "object", "type", "param", "code"}),
        ("/v1/chat/completions", CHAT | {"n": 2}, {"message", "object", "type", "param", "code"}),
        ("/v1/chat/completions", CHAT | {"max_tokens": "9"}, {"message", "object", "type", "param", "code"}),
        (
            "/v1/chat/completions",
            CHAT | {"max_tokens": 10**6},
            {"message", "object", "type", "param", "code"},
        ),
        ("/generate", {"text": "a" * 600_000}, {"error"}),
        ("/generate", {}, {"error"}),
        ("/generate", {"text": ["a", "b"]}, {"error"}),
        ("/generate", {"text": "a", "sampling_params": {"max_tokens": 5}}, {"error"}),
    ],
)
async def test_unanswerable_requests_are_400(path: str, body: dict[str, Any], shape: set[str]) -> None:
    """Each route refuses in its own error form."""
    async with simulator() as client:
        status, data = await client.ask("POST", path, body)
    assert status == 400
    assert set(orjson.loads(data)) == shape


async def test_an_unknown_sampling_parameter_is_named() -> None:
    """/generate returns `error` as a string with the known parameters."""
    async with simulator() as client:
        body = {"text": "a", "sampling_params": {"max_tokens": 5}}
        _, data = await client.ask("POST", "/generate", body)
    assert orjson.loads(data)["error"].startswith(
        "unknown field `max_tokens`, expected one of `max_new_tokens`"
    )


async def test_a_rid_that_is_alive_is_refused() -> None:
    """A second request with the rid of a running one is 400: a retry needs a new rid."""
    async with simulator(script=[Fault.STALL]) as client, asyncio.TaskGroup() as group:
        group.create_task(client.chat(rid="same"))
        await client.until_running(1)
        status, data = await client.ask("POST", "/v1/chat/completions", CHAT | {"rid": "same"})
        await client.ask("POST", "/abort_request", {"rid": "same"})
    assert status == 400
    assert orjson.loads(data)["message"] == "Duplicate request ID detected: same"


async def test_unknown_routes_are_404() -> None:
    """Unknown routes answer as FastAPI does."""
    async with simulator() as client:
        assert await client.ask("GET", "/get_load") == (404, b'{"detail":"Not Found"}')
        assert (await client.ask("GET", "/generate"))[0] == 405


async def test_the_key_is_asked_for_except_on_probes() -> None:
    """Without the right Bearer a request is 401; health and metrics are open."""
    async with simulator(api_key="secret") as client:
        assert await client.ask("POST", "/v1/chat/completions", CHAT) == (401, b'{"error":"Unauthorized"}')
        wrong = {"Authorization": "Bearer wrong"}
        assert (await client.ask("GET", "/v1/loads", headers=wrong))[0] == 401
        right = {"Authorization": "Bearer secret"}
        assert (await client.ask("GET", "/v1/loads", headers=right))[0] == 200
        assert (await client.ask("GET", "/health"))[0] == 200
        assert (await client.ask("GET", "/metrics"))[0] == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/generate"])
async def test_queue_full_is_503(path: str) -> None:
    """Both routes answer a full queue in the OpenAI error shape, without Retry-After."""
    body = CHAT | {"text": "a"}
    async with (
        simulator([Fault.QUEUE_FULL]) as client,
        client.session.post(client.server.url + path, json=body) as reply,
    ):
        assert reply.status == 503
        assert "Retry-After" not in reply.headers
        assert await reply.json() == QUEUE_FULL


async def test_queue_full_in_a_stream_comes_with_200() -> None:
    """A stream has begun before the queue refuses: the error is an event, then [DONE]."""
    async with simulator([Fault.QUEUE_FULL]) as client:
        events = await client.events("/v1/chat/completions", CHAT)
    assert events == [{"error": QUEUE_FULL | {"type": "SERVICE_UNAVAILABLE"}}, "[DONE]"]


async def test_error_in_200() -> None:
    """Status 200 does not mean that the body is an answer."""
    async with simulator([Fault.ERROR_IN_200] * 2) as client:
        answer = await client.json("POST", "/v1/chat/completions", CHAT)
        *_, error, done = await client.events("/v1/chat/completions", CHAT)
    assert (answer["object"], answer["code"]) == ("error", 500)
    assert (error["error"]["type"], done) == ("INTERNAL_SERVER_ERROR", "[DONE]")


async def test_http_500_and_refusals() -> None:
    """500 and 400 in the shape of each route."""
    async with simulator([Fault.HTTP_500, Fault.REFUSE, Fault.REFUSE]) as client:
        status, data = await client.ask("POST", "/v1/chat/completions", CHAT)
        assert (status, orjson.loads(data)["type"]) == (500, "InternalServerError")
        status, data = await client.ask("POST", "/v1/chat/completions", CHAT)
        assert (status, orjson.loads(data)["type"]) == (400, "BadRequestError")
        status, data = await client.ask("POST", "/generate", {"text": "a"})
        assert (status, set(orjson.loads(data)["error"])) == (400, {"message"})


async def test_reset_comes_before_any_byte() -> None:
    """The client sees its connection reset; the next request on a new one is served."""
    async with simulator([Fault.RESET]) as client:
        with pytest.raises(aiohttp.ClientConnectionError):
            await client.chat()
        await client.chat()
        assert client.server.simulation.stats.connections == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_cut_body_is_shorter_than_promised(stream: bool) -> None:
    """A body that ends early is shorter than its Content-Length, or lacks [DONE]."""
    async with simulator([Fault.CUT_BODY]) as client:
        async with asyncio.timeout(5):
            with pytest.raises(aiohttp.ClientPayloadError):
                await client.ask("POST", "/v1/chat/completions", CHAT | {"stream": stream})
        assert client.server.simulation.stats.answered == 0


async def test_bad_json() -> None:
    """The body of a 200 breaks off inside the JSON."""
    async with simulator([Fault.BAD_JSON]) as client:
        status, data = await client.ask("POST", "/v1/chat/completions", CHAT)
    assert status == 200
    with pytest.raises(orjson.JSONDecodeError):
        orjson.loads(data)


async def test_stall_lasts_until_aborted() -> None:
    """A stalled request holds its slot; an abort by rid brings a real aborted answer."""
    async with simulator([Fault.STALL]) as client:
        async with asyncio.TaskGroup() as group:
            asking = group.create_task(client.json("POST", "/generate", {"text": "a", "rid": "s1"}))
            await client.until_running(1)
            assert await client.ask("POST", "/abort_request", {"rid": "s1"}) == (200, b"")
        assert asking.result()["meta_info"]["finish_reason"] == {
            "type": "abort",
            "message": "Aborted",
            "status_code": None,
            "err_type": None,
        }
        stats = await client.json("GET", "/simulator/stats")
    assert (stats["aborted"], stats["answered"], stats["in_flight"]) == (1, 0, 0)


async def test_a_disconnected_client_frees_its_slot() -> None:
    """A disconnect cancels the request in the engine."""
    async with simulator([Fault.STALL]) as client:
        with pytest.raises(TimeoutError):
            async with client.session.post(
                f"{client.server.url}/v1/chat/completions",
                json=CHAT,
                timeout=aiohttp.ClientTimeout(total=1.0),
            ):
                pass
        await client.until_running(0)
        assert client.server.simulation.stats.disconnected == 1


async def test_aborted_answers_hold_part_of_the_text() -> None:
    """finish_reason abort comes with 200 and some text."""
    async with simulator([Fault.ABORTED]) as client:
        [choice] = (await client.chat())["choices"]
    assert choice["finish_reason"] == "abort"
    assert choice["matched_stop"] is None
    assert choice["message"]["content"]


@pytest.mark.parametrize(
    ("fault", "finish"),
    [
        (Fault.EMPTY, "stop"),
        (Fault.SHORT, "stop"),
        (Fault.REFUSAL, "stop"),
        (Fault.TRUNCATED, "length"),
        (Fault.REPETITION, "stop"),
        (Fault.ECHO, "stop"),
        (Fault.QA, "stop"),
    ],
)
async def test_bad_content_arrives_whole(fault: Fault, finish: str) -> None:
    """Bad content is an answer like any other, counted as answered and under its fault."""
    async with simulator([fault]) as client:
        answer = await client.chat()
        stats = await client.json("GET", "/simulator/stats")
    [choice] = answer["choices"]
    text = choice["message"]["content"]
    assert choice["finish_reason"] == finish
    assert (stats["answered"], stats["faults"]) == (1, {str(fault): 1})
    match fault:
        case Fault.EMPTY:
            assert text == ""
        case Fault.SHORT:
            assert 0 < len(text.split()) <= 6
        case Fault.REFUSAL:
            assert "can't help" in text
        case Fault.TRUNCATED:
            assert len(text.split()) > 60
            assert not text.endswith(".")
        case Fault.REPETITION:
            assert len(set(text.split(". "))) < len(text.split(". ")) / 4
        case Fault.ECHO:
            assert text == MESSAGES[-1]["content"]
        case _:
            assert "\n\nQuestion: About geese.\nAnswer: " in text


async def test_a_full_queue_refuses_and_a_free_slot_serves() -> None:
    """With one slot and one place, the third request is 503; the others are served in turn."""
    async with simulator([Fault.STALL], slots=1, queue_limit=1) as client:
        async with asyncio.TaskGroup() as group:
            first = group.create_task(client.chat(rid="first"))
            await client.until_running(1)
            second = group.create_task(client.chat(rid="second"))
            await client.until_running(2)
            third = await client.ask("POST", "/v1/chat/completions", CHAT)
            await client.ask("POST", "/abort_request", {"rid": "first"})
        assert third == (503, orjson.dumps(QUEUE_FULL))
        assert first.result()["choices"][0]["finish_reason"] == "abort"
        assert second.result()["choices"][0]["finish_reason"] == "stop"


async def test_death_resets_everything() -> None:
    """After `die_after` requests all connections are reset for ever, and the callback is called."""
    died: list[bool] = []

    async def lost(client: Client, method: str, path: str) -> None:
        with pytest.raises(aiohttp.ClientConnectionError):
            await client.ask(method, path, CHAT)

    async with simulator([Fault.STALL], die_after=1, on_death=lambda: died.append(True)) as client:
        async with asyncio.TaskGroup() as group:
            group.create_task(lost(client, "POST", "/v1/chat/completions"))
            await client.until_running(1)
            await lost(client, "POST", "/v1/chat/completions")
        await lost(client, "GET", "/health")
        assert client.server.simulation.engine.running == 0
    assert died == [True]


async def test_an_abort_takes_every_rid_that_begins_with_a_live_one() -> None:
    """Aborting run-1 ends run-1 and run-12, and leaves run-2."""
    async with simulator([Fault.STALL] * 3) as client:
        async with asyncio.TaskGroup() as group:
            for rid in ("run-1", "run-12", "run-2"):
                group.create_task(client.chat(rid=rid))
            await client.until_running(3)
            await client.ask("POST", "/abort_request", {"rid": "run-1"})
            await client.until_running(1)
            await client.ask("POST", "/abort_request", {"rid": "run-2"})
        assert client.server.simulation.stats.aborted == 3


async def test_a_mere_prefix_aborts_only_with_several_tokenizer_workers() -> None:
    """With one tokenizer worker, the default, SGLang 0.5.23 drops an abort whose rid nobody has."""
    for workers, left in ((1, 2), (2, 0)):
        script = [Fault.STALL] * 2
        async with simulator(script, tokenizer_workers=workers) as client, asyncio.TaskGroup() as group:
            for rid in ("run-1", "run-2"):
                group.create_task(client.chat(rid=rid))
            await client.until_running(2)
            assert await client.ask("POST", "/abort_request", {"rid": "run-"}) == (200, b"")
            assert await client.ask("POST", "/abort_request", {"rid": "unknown"}) == (200, b"")
            await client.until_running(left)
            await client.ask("POST", "/abort_request", {"abort_all": True})


async def test_an_abort_in_the_queue_says_so() -> None:
    """A request aborted in the queue has an empty text and the shorter meta_info of the real server."""
    async with simulator([Fault.STALL], slots=1) as client, asyncio.TaskGroup() as group:
        group.create_task(client.chat(rid="runs"))
        await client.until_running(1)
        waits = group.create_task(client.json("POST", "/generate", {"text": "a", "rid": "waits"}))
        await client.until_running(2)
        await client.ask("POST", "/abort_request", {"rid": "waits"})
        await client.until_running(1)
        await client.ask("POST", "/abort_request", {"rid": "runs"})
    answer = waits.result()
    assert answer["text"] == ""
    assert answer["meta_info"]["finish_reason"] == {"type": "abort", "message": "Abort in waiting queue"}
    assert "prompt_tokens" not in answer["meta_info"]


async def test_cached_tokens_rise_on_a_shared_prefix() -> None:
    """A second request finds a shared prefix in whole blocks of 64 tokens."""
    shared = "All about geese and their journeys. " * 40
    async with simulator() as client:
        cached = []
        for tail in ("one", "two"):
            messages = [{"role": "user", "content": shared + tail}]
            usage = (await client.chat(messages=messages))["usage"]
            cached.append(usage["prompt_tokens_details"]["cached_tokens"])
        stats = await client.json("GET", "/simulator/stats")
    assert cached == [0, (len("<|user|>\n") + len(shared)) // 256 * 64]
    assert stats["cached_tokens"] == cached[1]
    assert stats["prompt_tokens"] == 2 * usage["prompt_tokens"]


async def test_ranks_have_their_own_caches_slots_and_queues() -> None:
    """Requests take turns, or name a rank on either route; SGLang's words refuse one that is not there."""
    messages = [{"role": "user", "content": "geese " * 200}]
    refused = "routed_dp_rank=2 out of range [0, 2)"
    async with simulator([None] * 8 + [Fault.STALL] * 3, dp_size=2, slots=1, queue_limit=1) as client:
        usages = [(await client.chat(messages=messages, max_tokens=1))["usage"] for _ in range(3)]
        usages += [(await client.chat(messages=messages, max_tokens=1, routed_dp_rank=1))["usage"]]
        text = {"text": "other " * 200, "sampling_params": {"max_new_tokens": 0}}
        for rank, cached in ((0, 0), (1, 0), (1, 256)):
            meta = (await client.json("POST", "/generate", text | {"routed_dp_rank": rank}))["meta_info"]
            assert cached == meta["cached_tokens"]
        status, data = await client.ask("POST", "/v1/chat/completions", CHAT | {"routed_dp_rank": 2})
        assert (400, refused) == (status, orjson.loads(data)["message"])
        async with asyncio.TaskGroup() as group:
            for number in range(3):  # two at rank 1, of which one waits, and one at rank 0
                group.create_task(client.chat(rid=f"r{number}", routed_dp_rank=int(number < 2)))
                await client.until_running(number + 1)
            loads = (await client.json("GET", "/v1/loads"))["loads"]
            full, _ = await client.ask("POST", "/v1/chat/completions", CHAT | {"routed_dp_rank": 1})
            twice, _ = await client.ask("POST", "/v1/chat/completions", CHAT | {"rid": "r2"})
            for number in range(3):
                await client.ask("POST", "/abort_request", {"rid": f"r{number}"})
        metrics = (await client.ask("GET", "/metrics"))[1].decode()
        info = await client.json("GET", "/server_info")

    assert [0, 0, 256, 256] == [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    figures = ("dp_rank", "num_running_reqs", "num_waiting_reqs", "max_running_requests")
    assert [(0, 1, 0, 1), (1, 1, 1, 1)] == [tuple(load[name] for name in figures) for load in loads]
    assert (503, 400) == (full, twice)
    assert 'dp_rank="1"' in metrics
    assert (2, 2) == (info["dp_size"], len(info["internal_states"]))


async def test_the_tiers_of_cached_tokens_are_told_when_asked_for() -> None:
    """`sglext` names the tier, in an event of its own in a stream, also without the cache report."""
    messages = [{"role": "user", "content": "geese " * 200}]
    ask = {"messages": messages, "max_tokens": 3, "return_cached_tokens_details": True}
    async with simulator(cache_report=False) as client:
        cold = await client.chat(**ask)
        warm = await client.chat(**ask)
        plain = await client.chat(messages=messages, max_tokens=3)
        _, data = await client.ask("POST", "/v1/chat/completions", {"model": "m", **ask, "stream": True})
        info = await client.json("GET", "/server_info")

    tiers = {"cached_tokens_details": {"device": 256, "host": 0}}
    assert [None, tiers, None] == [each.get("sglext") for each in (cold, warm, plain)]
    assert [None] * 3 == [each["usage"]["prompt_tokens_details"] for each in (cold, warm, plain)]
    *_, told, done = data.removesuffix(b"\n\n").split(b"\n\n")
    assert b"data: [DONE]" == done
    assert tiers == orjson.loads(told.removeprefix(b"data: "))["sglext"]
    assert not info["enable_cache_report"]


async def test_a_continued_answer_is_found_in_the_cache() -> None:
    """continue_final_message sends back prompt and answer: both are cached, but for the last block."""
    async with simulator() as client:
        first = await client.chat()
        text = first["choices"][0]["message"]["content"]
        messages = [*CHAT["messages"], {"role": "assistant", "content": text}]
        again = await client.chat(messages=messages, continue_final_message=True)
    usage = again["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= usage["prompt_tokens"] - 2 * 64
    assert again["choices"][0]["message"]["content"] != text


async def test_flush_empties_the_cache_only_when_idle() -> None:
    """400 while a request runs, then 200 and a cold cache."""
    messages = [{"role": "user", "content": "geese " * 200}]
    async with simulator([Fault.STALL]) as client:
        async with asyncio.TaskGroup() as group:
            group.create_task(client.chat(rid="r", messages=messages))
            await client.until_running(1)
            assert await client.ask("GET", "/flush_cache") == (400, b"Flush cache failed.\n")
            await client.ask("POST", "/abort_request", {"rid": "r"})
        await client.chat(messages=messages)
        status, data = await client.ask("POST", "/flush_cache")
        usage = (await client.chat(messages=messages))["usage"]
    assert status == 200
    assert data.startswith(b"Cache flushed.\n")
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0


async def test_stats_count_what_came_and_reset_forgets_it() -> None:
    """Requests, routes, answers, tokens and connections are counted; a reset clears them and the script."""
    async with simulator([Fault.EMPTY, None]) as client:
        usages = [(await client.chat())["usage"] for _ in range(2)]
        stats = await client.json("GET", "/simulator/stats")
        empty = await client.json("POST", "/simulator/reset")
        [choice] = (await client.chat())["choices"]
    assert stats == {
        "requests": 2,
        "by_route": {"/v1/chat/completions": 2, "/simulator/stats": 1},
        "answered": 2,
        "faults": {"empty": 1},
        "in_flight": 0,
        "max_in_flight": 1,
        "connections": 1,
        "aborted": 0,
        "disconnected": 0,
        "retracted": 0,
        "prompt_tokens": sum(usage["prompt_tokens"] for usage in usages),
        "cached_tokens": 0,
        "completion_tokens": usages[1]["completion_tokens"],
    }
    assert empty["requests"] == 0
    assert choice["message"]["content"] == ""


async def test_idle_connections_close_after_the_keep_alive_time() -> None:
    """The server closes an idle connection by itself, as a real one does after 5 s."""
    async with simulator(keep_alive_s=0.05) as client:
        host, port = client.server.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /health HTTP/1.1\r\nHost: simulator\r\n\r\n")
        async with asyncio.timeout(5):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
            assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()


async def test_latency_and_tokens_take_their_time() -> None:
    """An answer takes latency_ms plus ms_per_token for each token."""
    async with simulator(latency_ms=20, jitter_ms=5, ms_per_token=1) as client:
        answer = await client.json(
            "POST", "/generate", {"text": "a", "sampling_params": {"max_new_tokens": 30}}
        )
    assert answer["meta_info"]["e2e_latency"] >= 0.045


async def test_a_batching_server_speaks_the_same_protocol() -> None:
    """With a cost model, answers, streams, aborts, the load and the cache are on the same routes."""
    messages = [{"role": "user", "content": "geese " * 200}]
    script = [None, None, None, Fault.STALL]
    async with simulator(script, cost_model="h100", speed=50) as client:
        usages = [(await client.chat(messages=messages))["usage"] for _ in range(2)]
        *_, done = await client.events("/v1/chat/completions", CHAT)
        async with asyncio.TaskGroup() as group:
            stalled = group.create_task(client.chat(rid="r"))
            await client.until_running(1)
            [rank] = (await client.json("GET", "/v1/loads"))["loads"]
            assert await client.ask("GET", "/flush_cache") == (400, b"Flush cache failed.\n")
            await client.ask("POST", "/abort_request", {"rid": "r"})
        await client.json("POST", "/simulator/reset")
        usages.append((await client.chat(messages=messages))["usage"])
    assert done == "[DONE]"
    assert [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages] == [0, 256, 0]
    assert stalled.result()["choices"][0]["finish_reason"] == "abort"
    assert (rank["max_total_num_tokens"], rank["max_running_requests"]) == (444_500, 2048)
    assert rank["cache_hit_rate"] == 0
