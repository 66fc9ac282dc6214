from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from streamsyn.sglang.simulator.cache import count_tokens
from streamsyn.sglang.simulator.config import SimulatorConfig

DEFAULT_MODEL: Final = "default"


class Refused(Exception):
    """Raised when a request is answered with 400; the text is the message."""


class Malformed(Exception):
    """Raised when a body is no JSON object or lacks what its schema asks for."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What a request asks for, whatever its dialect."""

    rid: str
    model: str
    prompt: str | list[int]
    question: str
    """What a fault may paste back: the last user message, or the prompt's text."""
    max_tokens: int | None
    stream: bool = False
    include_usage: bool = False
    is_exam: bool = False
    """One message alone, to be answered greedily: taken for a question about the text before it."""
    ids: list[int] | None = None
    """The prompt's token ids, where it came as such."""
    logprob_start: int | None = None
    """Where input logprobs begin; None when none are asked for."""

    @property
    def reuse_limit(self) -> int | None:
        """Tokens before the first logprob may come from the cache; the others are computed."""
        return self.logprob_start


def whole_number(body: Mapping[str, Any], name: str) -> int | None:
    """The integer under `name`, None if there is none.

    Raises:
        Malformed: it is something else.
    """
    value = body.get(name)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise Malformed(f"{name}: Input should be a valid integer")


def check_length(ask: Ask, config: SimulatorConfig) -> Ask:
    """The ask, if its prompt and answer fit the context (`TokenizerManager._validate_one_request`).

    Raises:
        Refused: they do not.
    """
    tokens = count_tokens(ask.prompt)
    if tokens >= config.context_tokens:
        raise Refused(
            f"The input ({tokens} tokens) is longer than the model's context length "
            f"({config.context_tokens} tokens)."
        )
    if ask.max_tokens is not None and tokens + ask.max_tokens > config.context_tokens:
        raise Refused(
            f"Requested token count exceeds the model's maximum context length of {config.context_tokens} "
            f"tokens. You requested a total of {tokens + ask.max_tokens} tokens: {tokens} tokens from the "
            f"input messages and {ask.max_tokens} tokens for the completion. Please reduce the number of "
            "tokens in the input messages or the completion to fit within the limit."
        )
    return ask
