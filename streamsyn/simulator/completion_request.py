"""A request to generate or score, and its answer, independent of the route."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from streamsyn.simulator.settings import Fault, SimulatorConfig
from streamsyn.simulator.texts import (
    CHARACTERS_PER_TOKEN,
    Prose,
    answering_sentence,
    count_tokens,
    given_answer,
)

EOS_ID: Final = 2


PAIR_FORM: Final = "Question: ...\nAnswer: ..."
"""A question that contains this is answered in this form."""


REFUSAL: Final = "I'm sorry, but I can't help with writing this document."


Finish = dict[str, Any]
"""A finish reason as in `meta_info`; the chat route shows its `type` and `matched`."""


STOPPED: Final[Finish] = {"type": "stop", "matched": EOS_ID}


ABORTED: Final[Finish] = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}


ABORTED_WAITING: Final[Finish] = {"type": "abort", "message": "Abort in waiting queue"}


class Refused(Exception):
    """Raised when a request is refused with 400; the text is the message."""


class Malformed(Exception):
    """Raised when a body is not a JSON object or does not match its schema."""


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """The parameters of a request, independent of the route."""

    rid: str
    model: str
    prompt: str | list[int]
    question: str
    """The last user message, or the prompt's text; the echo fault repeats it."""
    max_tokens: int | None
    ignore_eos: bool = False
    """The answer is written until `max_tokens`."""
    stream: bool = False
    include_usage: bool = False
    rank: int | None = None
    """The data-parallel rank that it names."""
    with_details: bool = False
    """Whether the answer has the tiers of its cached tokens."""
    is_exam: bool = False
    """A single message at temperature 0: answered as a question about the text in it."""
    ids: list[int] | None = None
    """The prompt's token ids, if it was given as ids."""
    logprob_start: int | None = None
    """First token with an input logprob; None when no logprobs are requested."""

    @property
    def reuse_limit(self) -> int | None:
        """Tokens that may come from the cache: those before the first logprob. None means no limit."""
        return self.logprob_start


def whole_number(body: Mapping[str, Any], name: str) -> int | None:
    """Return the integer `name`, None if it is missing.

    Raises:
        Malformed: It is not an integer.
    """
    value = body.get(name)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise Malformed(f"{name}: Input should be a valid integer")


def check_request(request: CompletionRequest, config: SimulatorConfig) -> CompletionRequest:
    """Return the request if its prompt and answer fit the context, and its rank exists.

    Source: `TokenizerManager.generate_request` and `_validate_one_request`.

    Raises:
        Refused: They do not fit, or it does not exist.
    """
    if request.rank is not None and not 0 <= request.rank < config.dp_size:
        raise Refused(f"routed_dp_rank={request.rank} out of range [0, {config.dp_size})")
    tokens = count_tokens(request.prompt)
    if tokens >= config.context_tokens:
        raise Refused(
            f"The input ({tokens} tokens) is longer than the model's context length "
            f"({config.context_tokens} tokens)."
        )
    if request.max_tokens is not None and tokens + request.max_tokens > config.context_tokens:
        raise Refused(
            f"Requested token count exceeds the model's maximum context length of {config.context_tokens} "
            f"tokens. You requested a total of {tokens + request.max_tokens} tokens: {tokens} tokens from "
            f"the input messages and {request.max_tokens} tokens for the completion. Please reduce the "
            "number of tokens in the input messages or the completion to fit within the limit."
        )
    return request


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a request."""

    text: str
    finish: Finish
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    seconds: float
    retractions: int = 0
    """How often it was retracted from the running batch."""
    weights: list[dict[str, Any]] = field(default_factory=list)
    """The weights that wrote it: `version`, with `start` and `end` in its tokens."""

    @property
    def aborted(self) -> bool:
        """Whether it was aborted."""
        return bool(self.finish["type"] == "abort")

    @property
    def weight_version(self) -> str:
        """Version of the weights that wrote its end."""
        return str(self.weights[-1]["version"])


def cut_short(tokens: int) -> Finish:
    """Return the finish reason of an answer that reached its token limit."""
    return {"type": "length", "length": tokens}


def compose(request: CompletionRequest, fault: Fault | None, prose: Prose, words: int) -> tuple[str, Finish]:
    """Return the text to write, and its finish reason."""
    if request.max_tokens == 0:
        return "", cut_short(0)
    text = _content(request, fault, prose, words)
    if request.ignore_eos and request.max_tokens is not None:
        while count_tokens(text) < request.max_tokens:
            text += f"\n\n{prose.write(words)}"
        return text[: request.max_tokens * CHARACTERS_PER_TOKEN], cut_short(request.max_tokens)
    tokens = count_tokens(text)
    if request.max_tokens is not None and tokens > request.max_tokens:
        return text[: request.max_tokens * CHARACTERS_PER_TOKEN], cut_short(request.max_tokens)
    if fault is Fault.TRUNCATED:
        return text, cut_short(tokens)
    return text, ABORTED if fault is Fault.ABORTED else STOPPED


def _content(request: CompletionRequest, fault: Fault | None, prose: Prose, words: int) -> str:
    match fault:
        case Fault.EMPTY:
            return ""
        case Fault.SHORT:
            return prose.write(min(words, 6))
        case Fault.REFUSAL:
            return REFUSAL
        case Fault.REPETITION:
            sentence = prose.write(16)
            return " ".join([sentence] * max(8, words // 16))
        case Fault.ECHO:
            return request.question
        case Fault.QA:
            last = request.question.rstrip().rpartition("\n")[2]
            return f"{prose.write(words)}\n\nQuestion: {request.question}\nAnswer: {last}"
        case Fault.TRUNCATED | Fault.ABORTED:
            text = prose.write(words)
            return text[: len(text) * 3 // 5]
        case _ if PAIR_FORM in request.question:
            return prose.pair()
        case _:
            return (answering_sentence(request.question) if request.is_exam else "") or prose.about(
                given_answer(request.question), words
            )


DEFAULT_MODEL: Final = "default"
