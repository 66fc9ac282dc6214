"""Request lines of OpenAI's Batch API: `{"custom_id", "method", "url", "body"}`, checked and taken apart.

Source: https://platform.openai.com/docs/api-reference/batch/request-input
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from streamsyn.io.json_rows import storable, text_of
from streamsyn.plain_text import cut, short_repr

ENDPOINT: Final = "/v1/chat/completions"
METHOD: Final = "POST"
_FIELDS: Final = ("custom_id", "method", "url", "body")
_ID_CHARS: Final = 512


class BadRequestLine(Exception):
    """Raised when a row is not a request line.

    Attributes:
        code: What is wrong, as OpenAI names it.
        param: The field.
    """

    def __init__(self, code: str, param: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


@dataclass(frozen=True, slots=True)
class RequestLine:
    """One request: its id, and the body for the chat route."""

    custom_id: str
    body: dict[str, Any]

    @property
    def model(self) -> str:
        """The model that it names; "" if it names none."""
        return self.body.get("model") or ""


def read_request(row: Mapping[str, Any]) -> RequestLine:
    """Return the request in a row.

    Raises:
        BadRequestLine: It is not one that can be sent.
    """
    for name in _FIELDS:
        if row.get(name) is None:
            raise BadRequestLine("missing_required_parameter", name, f"Missing required parameter: {name!r}.")
    custom_id, method, url, body = (row[name] for name in _FIELDS)
    if (
        not isinstance(custom_id, str)
        or not 0 < len(custom_id) <= _ID_CHARS
        or text_of(custom_id) != custom_id
    ):
        raise _invalid("custom_id", f"a text of 1 to {_ID_CHARS} characters", custom_id)
    if method != METHOD:
        raise BadRequestLine(
            "invalid_method", "method", f"method must be {METHOD}, not {short_repr(method)}."
        )
    if url != ENDPOINT:
        raise BadRequestLine("url_mismatch", "url", f"url must be {ENDPOINT}, not {short_repr(url)}.")
    if not isinstance(body, dict):
        raise _invalid("body", "an object", body)
    check_body(body)
    return RequestLine(custom_id, body)


def check_body(body: Mapping[str, Any]) -> None:
    """Check what is needed to send a chat request; the server judges the rest.

    Raises:
        BadRequestLine: It cannot be sent.
    """
    messages = body.get("messages")
    if messages is None:
        raise BadRequestLine(
            "missing_required_parameter", "body.messages", "Missing required parameter: 'body.messages'."
        )
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise _invalid("body.messages", "a list of at least one message", messages)
    if not isinstance(body.get("model"), str | None):
        raise _invalid("body.model", "the name of a model", body["model"])
    if body.get("stream"):
        raise BadRequestLine("unsupported_parameter", "body.stream", "Answers of a batch are not streamed.")
    if storable(body) != body:
        raise BadRequestLine(
            "invalid_value",
            "body",
            "The body cannot be sent unchanged: it has a number beyond 64 bits, a lone surrogate, or values "
            "nested more than 200 levels deep.",
        )


def texts_of(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return the texts of messages by role; calls of tools, images and the like are left out."""
    return [{"role": str(one.get("role", "")), "content": _text(one.get("content"))} for one in messages]


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    return "\n".join(text for text in texts if isinstance(text, str))


def _invalid(param: str, expected: str, value: Any) -> BadRequestLine:
    return BadRequestLine(
        "invalid_type", param, f"{param} must be {expected}, not {cut(short_repr(value), 200)}."
    )
