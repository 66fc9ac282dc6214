"""The wire protocol: request bodies, lenient JSON, lists of models, and each form of failure."""

from typing import Any

import orjson
import pytest

from streamsyn.errors import (
    BrokenResponse,
    RateLimited,
    RequestRefused,
    ServerBusy,
    ServerError,
    ServerUnavailable,
)
from streamsyn.fleet import wire
from streamsyn.records import Request
from tests.examples import in_turn

URL = "http://one:1"
MESSAGES = [{"role": "user", "content": "About geese."}]


def parsed(body: Any, status: int = 200) -> Any:
    """What is made of an answer."""
    return wire.parse_object(status, orjson.dumps(body), URL)


def test_the_body_of_a_request() -> None:
    """Model, messages and rid, with the sampling parameters beside them."""
    request = Request(MESSAGES, {"temperature": 0.8, "max_tokens": 9, "top_p": 0.9})
    expected = {
        "model": "small",
        "messages": MESSAGES,
        "rid": "r-1",
        "temperature": 0.8,
        "max_tokens": 9,
        "top_p": 0.9,
    }
    assert expected == orjson.loads(wire.chat_body(request, "small", "r-1"))


def test_fields_that_are_left_out() -> None:
    """A streamed request without the fields that a server refuses is a plain OpenAI one."""
    body = wire.chat_body(
        Request(MESSAGES, {}), "small", "r-1", stream=True, without={"rid", "stream_options"}
    )
    assert {"model": "small", "messages": MESSAGES, "stream": True} == orjson.loads(body)


REFUSED = [
    # TensorRT-LLM, NIM; Mistral; FastAPI; OpenAI; Groq; Gemini; Cohere; Anthropic
    (
        400,
        """[{'type': 'extra_forbidden', 'loc': ('body', 'rid'), 'msg': 'Extra inputs are not permitted'}]""",
        "rid",
    ),
    (422, '{"detail":[{"type":"extra_forbidden","loc":["body","rid"],"input":"r-1"}]}', "rid"),
    (422, '{"detail":[{"type":"extra_forbidden","loc":["body","stream_options"]}]}', "stream_options"),
    (400, '{"error":{"message":"Unrecognized request argument supplied: rid"}}', "rid"),
    (400, '{"error":{"message":"property \'rid\' is unsupported"}}', "rid"),
    (
        400,
        '[{"error":{"message":"Invalid JSON payload received. Unknown name \\"rid\\": Cannot find field."}}]',
        "rid",
    ),
    (422, '{"message":"parameter \'stream_options\' is not a valid field"}', "stream_options"),
    (400, '{"error":{"message":"stream_options: Extra inputs are not permitted"}}', "stream_options"),
    (400, '{"object":"error","message":"routed_dp_rank=2 out of range [0, 2)"}', "routed_dp_rank"),
    # refusals of something else, some with the whole request in them
    (400, '{"error":{"message":"Additional properties are not allowed (\'top_k\' was unexpected)"}}', None),
    (400, '{"error":{"message":"Override of rid failed: the prompt is too long"}}', None),
    (400, '{"object":"error","message":"Too long."}', None),
    (500, '{"error":{"message":"unexpected rid"}}', None),
    (400, "", None),
]


@in_turn(("status", "body", "field"), REFUSED)
def test_the_field_that_a_server_refuses(status: int, body: str, field: str | None) -> None:
    """Each server words it in its own way; only a field that is optional is named."""
    assert field == wire.refused_field(status, body.encode())


@in_turn(
    ("body", "expected"),
    [
        (b'{"a": "caf\xe9"}', {"a": "caf\ufffd"}),
        (b'{"a": "one\x07two\nthree"}', {"a": "one\x07two\nthree"}),
        (b'{"a": ["\\ud83d"]}', {"a": ["\ufffd"]}),
        (b'{"a": "\\ud83d\\ude00", "b": "\xff"}', {"a": "\U0001f600", "b": "\ufffd"}),
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
    ],
)
def test_json_with_an_odd_byte_is_read(body: bytes, expected: Any) -> None:
    """Invalid UTF-8, control characters, a lone surrogate and a byte order mark cost no answer."""
    assert expected == wire.read_json(body)


@in_turn("body", [b"", b"<html>", b"{", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000])
def test_what_is_not_json(body: bytes) -> None:
    """ValueError, and nothing else."""
    with pytest.raises(ValueError, match=r"."):
        wire.read_json(body)


OPENAI = {"object": "error", "message": "Too long.", "type": "BadRequestError", "param": None, "code": 400}
FULL = {
    "object": "error",
    "message": "The request queue is full.",
    "type": "503",
    "param": None,
    "code": 503,
}


@in_turn(
    ("status", "body", "kind", "said"),
    [
        # SGLang's own two shapes, and that of its authentication
        (400, OPENAI, RequestRefused, "Too long."),
        (400, {"error": {"message": "Too long."}}, RequestRefused, "Too long."),
        (400, {"error": "Unexpected keyword"}, RequestRefused, "Unexpected keyword"),
        (503, FULL, ServerBusy, "queue is full"),
        (500, {"object": "error", "message": "CUDA", "code": 500}, ServerUnavailable, "CUDA"),
        (401, {"error": "Unauthorized"}, ServerUnavailable, "Unauthorized"),
        # its router, and proxies before it
        (
            400,
            {"error": {"message": "JSON syntax error", "code": "json_parse_error"}},
            RequestRefused,
            "syntax",
        ),
        (503, {"error": {"message": "No available workers"}}, ServerUnavailable, "No available workers"),
        (503, {}, ServerUnavailable, "503"),
        (502, "bad gateway", ServerUnavailable, "bad gateway"),
        (429, {"error": {"message": "slow down"}}, RateLimited, "slow down"),
        (408, {}, ServerUnavailable, "408"),
        (403, {}, ServerUnavailable, "403"),
        (404, {"detail": "Not Found"}, ServerUnavailable, "Not Found"),
        (405, {"detail": "Method Not Allowed"}, ServerUnavailable, "Method Not Allowed"),
        # others
        (413, {"detail": "Payload Too Large"}, RequestRefused, "Too Large"),
        (422, {"detail": [{"msg": "Field required"}]}, RequestRefused, "Field required"),
        (302, {}, BrokenResponse, "302"),
        (204, {}, BrokenResponse, "204"),
    ],
)
def test_the_error_for_each_status(status: int, body: Any, kind: type[ServerError], said: str) -> None:
    """The error class says what to do next; the message has the server, the status and its message."""
    with pytest.raises(ServerError, match=said) as raised:
        parsed(body, status)
    assert kind is type(raised.value)
    assert str(raised.value).startswith(f"{URL} answered {status}: ")


@in_turn(
    ("body", "kind"),
    [
        (FULL, ServerBusy),
        ({"error": {**FULL, "type": "SERVICE_UNAVAILABLE"}}, ServerBusy),
        (OPENAI, RequestRefused),
        ({"error": OPENAI}, RequestRefused),
        ({"object": "error", "message": "CUDA error", "code": 500}, ServerUnavailable),
        ({"error": {"message": "worker is gone"}}, ServerUnavailable),
        ({"error": "no reason", "code": "odd"}, ServerUnavailable),
        ({"object": "error"}, ServerUnavailable),
    ],
)
def test_an_error_inside_a_200_is_read_by_its_code(body: Any, kind: type[ServerError]) -> None:
    """Either shape of error object may come with status 200; without a code it is the server's fault."""
    with pytest.raises(ServerError) as raised:
        parsed(body)
    assert kind is type(raised.value)


def test_a_long_body_is_shown_in_part() -> None:
    """Error messages are short."""
    with pytest.raises(ServerUnavailable) as raised:
        wire.parse_object(500, b"x" * 10_000, URL)
    assert 250 > len(str(raised.value))


def test_parse_models() -> None:
    """The ids, in the server's order."""
    body = orjson.dumps({"object": "list", "data": [{"id": "small", "root": "x"}, {"id": "lora"}]})
    assert ["small", "lora"] == wire.parse_models(body)


@in_turn(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'{"data": null}',
        b'{"data": [{}]}',
        b'{"data": ["small"]}',
        b'{"data": [{"id": 7}]}',
        b'{"data": [{"id": {"name": "small"}}]}',
        b"<",
    ],
)
def test_an_invalid_list_of_models_is_broken(body: bytes) -> None:
    """It raises a ServerError, so the server is probed later."""
    with pytest.raises(BrokenResponse, match="/v1/models"):
        wire.parse_models(body)
