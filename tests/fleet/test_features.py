"""What the fleet uses of SGLang beyond OpenAI's routes, and how it does without."""

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from streamsyn.fleet import wire
from streamsyn.fleet.chat_answer import Asked, parse_chat, parse_chat_stream
from streamsyn.fleet.client import ServerClient
from streamsyn.fleet.transport import Reply
from streamsyn.records import Completion, Request
from streamsyn.telemetry import Counters
from tests.examples import examples, in_turn
from tests.fleet.scripted import ScriptedTransport
from tests.fleet.test_fleet import fleet_of, simulators

REQUEST = Request([{"role": "user", "content": "About geese. " * 100}], {"max_tokens": 4})
ASKED = Asked("http://one:1", "m", [12])


@in_turn(
    ("info", "has_details"),
    [
        ({"enable_hierarchical_cache": True, "enable_cache_report": True}, True),
        ({"enable_lmcache": True, "enable_cache_report": True}, True),
        ({"enable_hierarchical_cache": False, "enable_cache_report": False}, True),
        ({"enable_hierarchical_cache": False, "enable_cache_report": True}, False),
        ({"version": "0.11", "vllm": "yes"}, False),
        ({}, False),
    ],
)
def test_when_tiers_are_asked_for(info: dict[str, Any], has_details: bool) -> None:
    """Where there is more than one, or where a server reports its cached tokens in no other way."""
    assert has_details == wire.parse_features(orjson.dumps(info)).has_details


@given(st.binary(max_size=30) | st.recursive(st.none() | st.booleans(), st.lists).map(orjson.dumps))
@examples(50)
def test_any_other_answer_is_that_of_a_server_without_features(body: bytes) -> None:
    """`/server_info` may be anything at all."""
    assert wire.Features() == wire.parse_features(body)


def chat(sglext: Any, reported: int | None) -> Completion:
    """An answer to a prompt of 100 tokens, whole; the streamed one must say the same."""
    details = None if reported is None else {"cached_tokens": reported}
    usage = {"prompt_tokens": 100, "completion_tokens": 1, "prompt_tokens_details": details}
    whole = {
        "model": "m",
        "choices": [{"index": 0, "message": {"content": "Geese."}, "finish_reason": "stop"}],
        "usage": usage,
        "sglext": sglext,
    }
    events = [
        {"choices": [{"index": 0, "delta": {"content": "Geese."}, "finish_reason": "stop"}], "model": "m"},
        {"choices": [], "usage": None, "sglext": sglext},
        {"choices": [], "usage": usage},
    ]
    stream = b"".join(b"data: %s\n\n" % orjson.dumps(event) for event in events) + b"data: [DONE]\n\n"
    completion = parse_chat(200, orjson.dumps(whole), ASKED)
    assert completion == parse_chat_stream(200, stream, ASKED)
    return completion


@in_turn(
    ("details", "reported", "expected"),
    [
        ({"device": 40, "host": 20, "storage": 5, "storage_backend": "file"}, 65, (65, 20, 5)),
        ({"device": 40, "host": 20}, 60, (60, 20, 0)),
        ({"device": 40, "host": 20}, None, (60, 20, 0)),  # without --enable-cache-report
        ({"device": 0, "host": 80, "storage": 80}, 90, (90, 80, 10)),  # more than there is
        ({"device": 40, "host": "x"}, 60, (60, 0, 0)),
        ({"device": 40}, 60, (60, 0, 0)),
        (None, 60, (60, 0, 0)),
        (["device"], None, (0, 0, 0)),
    ],
)
def test_cached_tokens_by_tier(details: Any, reported: int | None, expected: tuple[int, int, int]) -> None:
    """Host memory and storage where the server says so; else the plain count is all there is."""
    found = chat({"cached_tokens_details": details}, reported)

    assert expected == (found.cached_tokens, found.cached_host_tokens, found.cached_storage_tokens)


async def test_a_server_that_refuses_the_field_is_asked_without_it() -> None:
    """Once; from then on only the plain count is used."""
    client = ServerClient("http://one:1", Refusing("return_cached_tokens_details"), 5.0)
    client.features = wire.Features(has_details=True)

    with capture_logs() as logs:
        found = [(await client.chat(REQUEST, "m", f"r-{number}")).cached_tokens for number in range(2)]

    assert [7, 7] == found
    assert [["return_cached_tokens_details"]] == [each["fields"] for each in logs]


class Refusing(ScriptedTransport):
    """Refuses one field as unknown, and answers everything else."""

    def __init__(self, field: str) -> None:
        usage = {
            "prompt_tokens": 9,
            "completion_tokens": 1,
            "prompt_tokens_details": {"cached_tokens": 7},
        }
        message = {"message": {"content": "Geese."}, "finish_reason": "stop"}
        answer = {"model": "m", "choices": [message], "usage": usage}
        super().__init__({wire.CHAT: Reply(200, orjson.dumps(answer))})
        self._field = field
        self.asked: list[dict[str, Any]] = []

    async def exchange(self, method: str, path: str, **given: Any) -> Reply:
        """See Transport."""
        self.asked.append(orjson.loads(given.get("body") or b"{}"))
        if self._field in self.asked[-1]:
            return Reply(
                400, b'{"error": {"message": "Extra inputs are not permitted: %s"}}' % self._field.encode()
            )
        return await super().exchange(method, path, **given)


@pytest.mark.usefixtures("no_task_left")
async def test_a_fleet_learns_of_cached_tokens_without_the_cache_report() -> None:
    """What a server does is asked at the start: one with the report is not asked for more."""
    asked: list[bool] = []

    def note(_number: int, body: dict[str, Any]) -> None:
        asked.append(body.get("return_cached_tokens_details", False))

    for cache_report in (True, False):
        async with simulators() as simulated:
            server = await simulated.start(note, cache_report=cache_report)
            async with fleet_of(server.url) as fleet:
                found = [(await fleet.complete(REQUEST, [])).cached_tokens for _ in range(2)]
                [figures] = fleet.metrics()
        assert [0, 320] == found
        assert (320, 0, 0) == tuple(
            figures[f"cached_{name}"] for name in ("tokens", "host_tokens", "storage_tokens")
        )
    assert [False, False, True, True] == asked


def test_tiers_of_a_run() -> None:
    """What is neither host nor storage was on the device."""
    counters = Counters(cached_tokens=10, cached_host_tokens=3, cached_storage_tokens=2)

    assert {"device": 5, "host": 3, "storage": 2} == counters.cached_by_tier
