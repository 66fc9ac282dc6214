"""Chat answers, whole and streamed, in the forms that OpenAI-compatible servers use."""

from typing import Any

import orjson
import pytest

from streamsyn.errors import BrokenResponse, RequestRefused, ServerBusy, ServerUnavailable
from streamsyn.fleet.chat_answer import Asked, events_in, parse_chat, parse_chat_stream
from streamsyn.records import Completion
from tests.examples import in_turn

URL = "http://one:1"
ASKED = Asked(URL, "asked", [12])


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
    return parse_chat(status, orjson.dumps(body), ASKED)


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


@in_turn(
    "reason",
    ["abort", "content_filter", "tool_calls", "Error", "content_filter: RECITATION", {"type": "abort"}],
)
def test_an_answer_that_did_not_end_by_itself_is_broken(reason: Any) -> None:
    """Its text is incomplete, or is not the answer; SGLang answers an aborted request with 200."""
    with pytest.raises(BrokenResponse, match=f"{URL} ended its answer with finish_reason"):
        parsed(answer(**choice("Geese", reason)))


@in_turn(
    ("reason", "expected"),
    [
        ("stop", "stop"),
        ("length", "length"),
        ("MAX_TOKENS", "length"),
        ("model_length", "length"),
        ("eos_token", "stop"),
        ("end_turn", "stop"),
        ("", "stop"),
        (None, "stop"),
        (7, "stop"),
        ({"type": "length"}, "length"),
    ],
)
def test_other_finish_reasons_are_a_stop_or_a_cut(reason: Any, expected: str) -> None:
    """Servers have words of their own; a whole answer without one is complete."""
    assert expected == parsed(answer(**choice("Geese fly.", reason))).finish_reason


@in_turn("usage", [None, {}, [], "12", {"prompt_tokens": None, "completion_tokens": "x"}])
def test_tokens_are_estimated_without_usage(usage: Any) -> None:
    """A quarter of the bytes, rounded up: 12 of the prompt, 10 of the text."""
    completion = parsed(answer(usage=usage))
    assert ("Geese fly.", 3, 0, 3, True) == (
        completion.text,
        completion.prompt_tokens,
        completion.cached_tokens,
        completion.completion_tokens,
        completion.tokens_estimated,
    )


@in_turn(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 100.0, "completion_tokens": 200.0}, (100, 200, False)),
        ({"prompt_tokens": 9, "completion_tokens": None}, (9, 3, True)),
        ({"completion_tokens": 9}, (3, 9, True)),
        ({"prompt_tokens": 2**63, "completion_tokens": -1}, (3, 3, True)),
        ({"prompt_tokens": True, "completion_tokens": 1e308}, (3, 3, True)),
        ({"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": "none"}, (9, 4, False)),
        (
            {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 99}},
            (9, 4, False),
        ),
    ],
)
def test_usage_in_part(usage: Any, expected: tuple[int, int, bool]) -> None:
    """Each count that is usable is taken; more cached tokens than there are count as all."""
    completion = parsed(answer(usage=usage))
    assert expected == (completion.prompt_tokens, completion.completion_tokens, completion.tokens_estimated)
    assert completion.cached_tokens <= completion.prompt_tokens


@pytest.mark.parametrize("model", [None, "", 5, {"name": "m"}])
def test_without_a_model_name_it_is_the_one_asked_for(model: Any) -> None:
    """The text counts."""
    assert "asked" == parsed(answer(model=model)).model


@in_turn("metadata", ["v1", {"weight_version": 7}, {"weight_versions": 7}, {"weight_versions": [7]}, []])
def test_metadata_of_another_kind(metadata: Any) -> None:
    """Other servers use the field for their own purposes."""
    assert parsed(answer(metadata=metadata)).weight_version is None


@pytest.mark.parametrize(
    "content",
    [
        [
            {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]},
            {"type": "text", "text": "Geese fly."},
        ],
        [{"type": "reasoning", "text": "Hm."}, {"type": "output_text", "text": "Geese "}, "fly."],
        [{"text": "Geese fly."}, {"type": "text", "text": None}],
    ],
)
def test_content_as_parts(content: Any) -> None:
    """Text parts are joined; thoughts and others are left out."""
    assert "Geese fly." == parsed(answer(**choice(content, "stop"))).text


@pytest.mark.parametrize(
    "thought",
    [
        {"type": "thinking", "thinking": [{"type": "text", "text": "Hm, geese."}]},
        {"type": "reasoning", "text": "Hm, geese."},
    ],
)
def test_a_thought_among_parts_is_counted(thought: Any) -> None:
    """By its share of the characters: half of them."""
    body = answer(
        **choice([thought, "Geese fly."], "stop"), usage={"completion_tokens": 12, "prompt_tokens": 9}
    )
    assert 6 == parsed(body).thinking_tokens


@in_turn(
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
        answer(**choice(7, "stop")),
        answer(**choice([7], "stop")),
        answer(**choice([{"type": "text", "text": 7}], "stop")),
    ],
)
def test_json_without_a_text_is_broken(body: Any) -> None:
    """The message shows how it begins."""
    with pytest.raises(BrokenResponse, match=f"{URL} sent an invalid answer"):
        parsed(body)


def test_an_answer_with_an_odd_byte_is_read() -> None:
    """A character that was cut in two costs one character, not the answer."""
    body = orjson.dumps(answer()).replace(b"Geese fly.", b"Geese \xe2\x80 fly.\x07")
    assert "Geese \ufffd fly.\x07" == parse_chat(200, body, ASKED).text


@in_turn("body", [b"", b"<html>busy</html>", b'{"choices": [', b"\xff\xfe", b"data: {}\n\n"])
def test_a_body_that_is_no_json_is_broken(body: bytes) -> None:
    """The message shows how it begins."""
    with pytest.raises(BrokenResponse, match="did not answer JSON"):
        parse_chat(200, body, ASKED)


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


def stream(body: bytes) -> Completion:
    """What is made of a streamed answer."""
    return parse_chat_stream(200, body, ASKED)


def test_a_streamed_answer_is_put_together() -> None:
    """The text of all events, the finish reason, the usage of the last one."""
    assert Completion("Geese fly.", "stop", 9, 7, 4, "m", URL) == stream(EVENTS + DONE)


USAGE_EVENT = EVENTS.rindex(b"data: ")
LAST_TEXT = EVENTS.rindex(b"data: ", 0, USAGE_EVENT)
FORMS = {
    "comments": b": ping\n\n" + EVENTS.replace(b"\n\n", b"\n: ping\n\n: ping\n\n") + DONE,
    "no space": (EVENTS + DONE).replace(b"data: ", b"data:"),
    "event names, ids and retries": b"retry: 5\n\n"
    + (EVENTS + DONE).replace(b"data: ", b"event: x\nid: 1\ndata: "),
    "CRLF": (EVENTS + DONE).replace(b"\n", b"\r\n"),
    "CR": (EVENTS + DONE).replace(b"\n", b"\r"),
    "byte order mark": b"\xef\xbb\xbf" + EVENTS + DONE,
    "several data lines": (EVENTS + DONE).replace(b'"choices":', b'\ndata: "choices":'),
    "no final line end": EVENTS + DONE.strip(),
    "no [DONE]": EVENTS,
    "no choices": EVENTS.replace(b'"choices":[],', b"") + DONE,
    "null choices": EVENTS.replace(b'"choices":[],', b'"choices":null,') + DONE,
    "delta null": EVENTS.replace(b'{"content":null}', b"null") + DONE,
    "a second choice": event({"content": "Geese "}) + EVENTS.replace(b"Geese ", b"") + DONE,
    "ping events": b'data: {"type": "ping"}\n\n' + EVENTS + DONE,
    "more after [DONE]": EVENTS + DONE + b"data: {\n\n",
    "content as parts": EVENTS.replace(b'"fly."', b'[{"type":"text","text":"fly."},{"type":"thinking"}]')
    + DONE,
    "not streamed": orjson.dumps({**answer(model="m", usage=USAGE), "metadata": None}),
}


@in_turn("form", FORMS)
def test_forms_of_streams(form: str) -> None:
    """Server-sent events as the standard has them, and what servers make of a stream."""
    assert Completion("Geese fly.", "stop", 9, 7, 4, "m", URL) == stream(FORMS[form])


def test_no_final_usage() -> None:
    """The tokens of a stream are estimated without it."""
    completion = stream(EVENTS[:USAGE_EVENT] + DONE)
    assert (3, 3, True) == (
        completion.prompt_tokens,
        completion.completion_tokens,
        completion.tokens_estimated,
    )


def test_done_without_a_finish_reason() -> None:
    """The server says that it is done."""
    assert "stop" == stream(EVENTS[:LAST_TEXT] + DONE).finish_reason


def test_other_choices_are_left_out() -> None:
    """Only the first choice is the answer."""
    other = event({"content": "Swans"}).replace(b'"index":0', b'"index":1')
    assert "Geese fly." == stream(other + EVENTS + DONE).text


@in_turn("end", [*range(0, LAST_TEXT, 61), LAST_TEXT, USAGE_EVENT - 3])
def test_a_stream_that_is_cut(end: int) -> None:
    """A stream that ends before its text does means that the server died, at any length."""
    with pytest.raises(ServerUnavailable):
        stream(EVENTS[:end])


@in_turn("end", range(USAGE_EVENT, len(EVENTS), 17))
def test_a_stream_that_is_cut_behind_its_text_is_used(end: int) -> None:
    """Only the usage is lost."""
    assert "Geese fly." == stream(EVENTS[:end]).text


def test_errors_inside_a_stream() -> None:
    """Errors in a stream have status 200 and are classified by their code."""
    error = b'data: {"error": {"object":"error","message":"The request queue is full.","code":503}}\n\n'
    with pytest.raises(ServerBusy):
        stream(error + DONE)
    with pytest.raises(RequestRefused):
        parse_chat_stream(400, b'{"object": "error", "message": "no"}', ASKED)


@in_turn(
    "data",
    ["{no json", '{"choices": [7]}', '{"choices": 7}', '{"choices": [{"delta": {"content": 7}}]}', "7", "[]"],
)
def test_an_invalid_event_is_broken(data: str) -> None:
    """A delta that is a number, for one."""
    with pytest.raises(BrokenResponse, match="streamed an invalid event"):
        stream(b"data: %b\n\n" % data.encode() + DONE)


def test_events() -> None:
    """The examples of the standard."""
    assert [b"YHOO\n+2\n10"] == list(events_in(b"data: YHOO\ndata: +2\ndata: 10\n\n"))
    assert [b"first event", b"second event", b" third event"] == list(
        events_in(
            b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n"
        )
    )
    assert [b"", b"\n", b""] == list(events_in(b"data\n\ndata\ndata\n\ndata:"))


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
    streamed = stream(events + usage + DONE)

    assert [("", True), ("", True)] == [(one.text, one.is_only_thought) for one in (whole, streamed)]
    assert (3, 4) == (whole.thinking_tokens, streamed.thinking_tokens)
