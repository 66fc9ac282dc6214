"""The wire protocol: request bodies, answers, and each form of failure."""

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.errors import (
    BrokenResponse,
    RateLimited,
    RequestRefused,
    ServerBusy,
    ServerError,
    ServerUnavailable,
)
from streamsyn.fleet import wire
from streamsyn.records import Completion, Request

URL = "http://one:1"
MESSAGES = [{"role": "user", "content": "About geese."}]


def answer(**fields: Any) -> dict[str, Any]:
    """What SGLang answers, with `fields` in place of its own."""
    return {
        "id": "rid-1",
        "object": "chat.completion",
        "model": "small",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Geese fly.", "reasoning_content": None},
                "logprobs": None,
                "finish_reason": "stop",
                "matched_stop": 2,
            }
        ],
        "usage": {
            "prompt_tokens": 12,
            "total_tokens": 15,
            "completion_tokens": 3,
            "prompt_tokens_details": {"cached_tokens": 8},
        },
        "metadata": {"weight_version": "default"},
        **fields,
    }


def choice(content: Any, finish_reason: Any) -> dict[str, Any]:
    """The field `choices` with one choice."""
    return {"choices": [{"message": {"content": content}, "finish_reason": finish_reason}]}


def parsed(body: Any, status: int = 200) -> Completion:
    """What is made of an answer."""
    return wire.parse_chat(status, orjson.dumps(body), URL)


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


def test_a_whole_answer() -> None:
    """Text, finish reason and all that the server counted."""
    expected = Completion("Geese fly.", "stop", 12, 8, 3, "small", URL, "default")
    assert expected == parsed(answer())


@pytest.mark.parametrize("details", [{}, {"prompt_tokens_details": None}, {"prompt_tokens_details": {}}])
def test_no_cache_report(details: dict[str, Any]) -> None:
    """Without --enable-cache-report the details are null, or missing: nothing was cached, as far as known."""
    usage = {"prompt_tokens": 12, "completion_tokens": 3, **details}
    assert 0 == parsed(answer(usage=usage)).cached_tokens


def test_null_content_is_an_empty_text() -> None:
    """A model that ends at once has null for a text; a check rejects it later."""
    assert "" == parsed(answer(**choice(None, "stop"))).text


def test_no_metadata() -> None:
    """Other servers report no weight version."""
    body = answer()
    del body["metadata"]
    assert parsed(body).weight_version is None


@pytest.mark.parametrize("reason", ["abort", "content_filter", "tool_calls", None])
def test_an_answer_that_did_not_end_by_itself_is_broken(reason: str | None) -> None:
    """Only `stop` and `length` are complete; SGLang answers an aborted request with 200."""
    with pytest.raises(BrokenResponse, match=f"{URL} ended its answer with finish_reason {reason!r}"):
        parsed(answer(**choice("Geese", reason)))


@pytest.mark.parametrize("name", ["choices", "usage", "model"])
def test_an_answer_that_lacks_a_part_is_broken(name: str) -> None:
    """The message names what is missing."""
    body = answer()
    del body[name]
    with pytest.raises(BrokenResponse, match=f"invalid answer .*{name}"):
        parsed(body)


@pytest.mark.parametrize(
    "body",
    [
        {},
        [],
        None,
        "text",
        7,
        answer(choices=[]),
        answer(choices=None),
        answer(choices=[{"finish_reason": "stop"}]),
        answer(choices=[{"finish_reason": "stop", "message": None}]),
        answer(usage=None),
        answer(usage={"prompt_tokens": 1}),
        answer(metadata="v1"),
        answer(metadata={"weight_version": 7}),
        answer(model=5),
        answer(model={"name": "m"}),
        answer(usage={"prompt_tokens": 1, "completion_tokens": 2**63}),
        answer(usage={"prompt_tokens": True, "completion_tokens": 1}),
        answer(usage={"prompt_tokens": 1, "completion_tokens": -1}),
    ],
)
def test_json_that_is_no_answer_is_broken(body: Any) -> None:
    """Any invalid JSON answer with status 200 raises BrokenResponse."""
    with pytest.raises(BrokenResponse):
        parsed(body)


@pytest.mark.parametrize("usage", [{"prompt_tokens": None, "completion_tokens": 3}, {"prompt_tokens": "x"}])
def test_counts_that_are_no_numbers_are_broken(usage: dict[str, Any]) -> None:
    """Token counts must be numbers."""
    with pytest.raises(BrokenResponse):
        parsed(answer(usage={"completion_tokens": 3, **usage}))


def test_a_text_that_is_no_string_is_broken() -> None:
    """Content parts are refused."""
    with pytest.raises(BrokenResponse):
        parsed(answer(**choice([{"type": "text", "text": "Geese"}], "stop")))


@pytest.mark.parametrize("body", [b"", b"<html>busy</html>", b'{"choices": [', b"\xff\xfe", b"data: {}\n\n"])
def test_a_body_that_is_no_json_is_broken(body: bytes) -> None:
    """The message shows how it begins."""
    with pytest.raises(BrokenResponse, match="did not answer JSON"):
        wire.parse_chat(200, body, URL)


OPENAI = {"object": "error", "message": "Too long.", "type": "BadRequestError", "param": None, "code": 400}
FULL = {
    "object": "error",
    "message": "The request queue is full.",
    "type": "503",
    "param": None,
    "code": 503,
}


@pytest.mark.parametrize(
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


@pytest.mark.parametrize(
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
        wire.parse_chat(500, b"x" * 10_000, URL)
    assert 250 > len(str(raised.value))


@given(status=st.integers(100, 599), body=st.binary(max_size=60))
def test_any_bytes_become_a_server_error(status: int, body: bytes) -> None:
    """Any bytes of a server raise ServerError or give an answer."""
    with pytest.raises(ServerError):
        wire.parse_chat(status, body, URL)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 700) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(
                ["error", "object", "message", "code", "choices", "usage", "model", "finish_reason"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(status=st.sampled_from([200, 400, 503]), body=JSON)
def test_any_json_becomes_a_server_error(status: int, body: Any) -> None:
    """Known keys in the wrong places raise ServerError."""
    with pytest.raises(ServerError):
        parsed(body, status)


def test_parse_models() -> None:
    """The ids, in the server's order."""
    body = orjson.dumps({"object": "list", "data": [{"id": "small", "root": "x"}, {"id": "lora"}]})
    assert ["small", "lora"] == wire.parse_models(body)


@pytest.mark.parametrize(
    "body", [b"", b"{}", b"[]", b"null", b'{"data": null}', b'{"data": [{}]}', b'{"data": ["small"]}', b"<"]
)
def test_an_invalid_list_of_models_is_broken(body: bytes) -> None:
    """It raises a ServerError, so the server is probed later."""
    with pytest.raises(BrokenResponse, match="/v1/models"):
        wire.parse_models(body)


def event(delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
    """As the real server sends it, less what is not read."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return b"data: %b\n\n" % orjson.dumps({"id": "r", "model": "m", "choices": [choice]})


USAGE = {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 7}}
EVENTS = (
    event({"role": "assistant", "content": ""})
    + event({"content": "Geese "})
    + event({"content": "fly."})
    + event({"content": None}, "stop")
    + b"data: %b\n\n" % orjson.dumps({"id": "r", "model": "m", "choices": [], "usage": USAGE})
)
DONE = b"data: [DONE]\n\n"


def test_a_streamed_answer_is_put_together() -> None:
    """The text of all events, the finish reason, the usage of the last one."""
    completion = wire.parse_chat_stream(200, EVENTS + DONE, "s")
    assert ("Geese fly.", "stop", 9, 7, 4, "m", "s") == (
        completion.text,
        completion.finish_reason,
        completion.prompt_tokens,
        completion.cached_tokens,
        completion.completion_tokens,
        completion.model,
        completion.server,
    )


@pytest.mark.parametrize("end", range(0, len(EVENTS), 97))
def test_a_stream_that_is_cut(end: int) -> None:
    """A stream without its end means that the server died, at any length."""
    with pytest.raises(ServerUnavailable):
        wire.parse_chat_stream(200, EVENTS[:end], "s")


def test_errors_inside_a_stream() -> None:
    """Errors in a stream have status 200 and are classified by their code."""
    error = b'data: {"error": {"object":"error","message":"The request queue is full.","code":503}}\n\n'
    with pytest.raises(ServerBusy):
        wire.parse_chat_stream(200, error + DONE, "s")
    with pytest.raises(BrokenResponse):
        wire.parse_chat_stream(200, b"data: {no json\n\n" + DONE, "s")
    with pytest.raises(BrokenResponse):
        wire.parse_chat_stream(200, b'data: {"choices": [{}]}\n\n' + DONE, "s")
    with pytest.raises(RequestRefused):
        wire.parse_chat_stream(400, b'{"object": "error", "message": "no"}', "s")


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_a_thought_in_a_field_of_its_own_is_counted(name: str) -> None:
    """By the server where it does, else by its share of the characters; it is not part of the text."""
    body = answer(choices=[{"message": {"content": "abc", name: "d" * 6}, "finish_reason": "stop"}])
    usage = {"prompt_tokens": 12, "completion_tokens": 30}

    def counted(**more: Any) -> tuple[str, int]:
        completion = parsed(body | {"usage": usage | more})
        return completion.text, completion.thinking_tokens

    assert ("abc", 20) == counted()
    assert ("abc", 17) == counted(completion_tokens_details={"reasoning_tokens": 17})
    assert ("abc", 18) == counted(reasoning_tokens=18, completion_tokens_details=None)
    assert ("abc", 30) == counted(reasoning_tokens=400)


def test_an_answer_that_is_only_a_thought() -> None:
    """Its content is null; streamed and whole."""
    message = {"content": None, "reasoning": "Hm."}
    whole = parsed(answer(choices=[{"message": message, "finish_reason": "length"}]))
    events = event({"reasoning_content": "H"}) + event({"reasoning_content": "m."}, "length")
    usage = b"data: %b\n\n" % orjson.dumps({"id": "r", "model": "m", "choices": [], "usage": USAGE})
    streamed = wire.parse_chat_stream(200, events + usage + DONE, "s")

    assert [("", True), ("", True)] == [(one.text, one.is_only_thought) for one in (whole, streamed)]
    assert (3, 4) == (whole.thinking_tokens, streamed.thinking_tokens)
