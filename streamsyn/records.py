"""What flows through the stages, in the order in which it arises.

    Seed -> Draft -> Request -> Completion -> Context | Reject -> Sample

All of them are frozen: a stage hands on a new record, it never edits another's.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b
from typing import Any, TypeAlias


def digest(*parts: str | bytes) -> bytes:
    """16 bytes that stand for `parts`; the same on every machine and in every process."""
    encoded = [part.encode() if isinstance(part, str) else part for part in parts]
    # The lengths make ("ab", "c") differ from ("a", "bc").
    return blake2b(b"".join([b"%d:%b" % (len(part), part) for part in encoded]), digest_size=16).digest()


class RejectReason(StrEnum):
    """Why a seed got no context. The set is closed: readers of the log may switch over it."""

    # the line is no seed
    INVALID_UTF8 = "invalid_utf8"
    INVALID_JSON = "invalid_json"
    NOT_A_SEED = "not_a_seed"
    LINE_TOO_LONG = "line_too_long"
    # the answers failed a check, each time
    EMPTY = "empty"
    TOO_SHORT = "too_short"
    TOO_LONG = "too_long"
    REFUSAL = "refusal"
    TRUNCATED = "truncated"
    REPETITION = "repetition"
    PROMPT_ECHO = "prompt_echo"
    QA_PASTED = "qa_pasted"
    NO_PAIR = "no_pair"
    # the context was no good to train on
    NEAR_DUPLICATE = "near_duplicate"
    CONTAMINATED = "contaminated"
    LOW_CONTEXT_GAIN = "low_context_gain"
    NOT_ANSWERABLE = "not_answerable"
    # the servers gave no answer
    REQUEST_REFUSED = "request_refused"
    TIMEOUT = "timeout"
    BROKEN_RESPONSE = "broken_response"
    SERVER_UNAVAILABLE = "server_unavailable"
    # we failed
    INTERNAL_ERROR = "internal_error"


@dataclass(frozen=True, slots=True)
class Seed:
    """A trusted instruction-answer pair, or a document for which a recipe has the pair written.

    Attributes:
        id: Its own, or a hash of what it holds.
        task: Its kind of task.
        instruction: What is asked; "" with a document.
        answer: The gold answer; "" with a document.
        origin: Where it stood, as `file:line`.
        metadata: Its other fields.
        context: The document; "" with a pair.
    """

    id: str
    task: str
    instruction: str
    answer: str
    origin: str
    metadata: dict[str, Any] = field(default_factory=dict)
    context: str = ""


@dataclass(frozen=True, slots=True)
class BadSeed:
    """A line (or row) that is no seed; it goes through the stages like one and ends as a Reject."""

    origin: str
    reason: RejectReason
    detail: str
    key: bytes
    """Stands for the place and the bytes, so that reading the same line again is noticed."""


Entry: TypeAlias = Seed | BadSeed
"""What a seed source yields."""


@dataclass(frozen=True, slots=True)
class Draft:
    """The unit of work: one context to be written for a seed (`recipe.contexts_per_seed` of them)."""

    seed: Seed
    number: int = 0

    @property
    def id(self) -> str:
        """The seed's own id for its first draft, `id#1`, `id#2`, ... for the others.

        A `#` in a seed's own id is doubled, so that no two drafts share an id.
        """
        own = self.seed.id.replace("#", "##")
        return f"{own}#{self.number}" if self.number else own

    @property
    def key(self) -> bytes:
        """16 bytes by which a finished draft is known again."""
        return draft_key(self.seed.id, self.number)


def draft_key(seed_id: str, number: int) -> bytes:
    """The key of a draft, from what its outcome in the log holds."""
    return blake2b(f"draft {number} {seed_id}".encode(), digest_size=16).digest()


Work: TypeAlias = Draft | BadSeed
"""What a worker takes: each ends as exactly one Outcome."""


@dataclass(frozen=True, slots=True)
class Request:
    """One question to an LLM: chat `messages` and the sampling parameters that go with them."""

    messages: list[dict[str, str]]
    sampling: dict[str, Any]
    group: str = ""
    """Requests of one group share a long beginning, so they go to one server; "" where none is shared."""
    prefixes: tuple[str, ...] = ()
    """Keys of what it begins with like others do, outermost first: the template's, then the group's. The
    first request with a key brings it into a server's cache, the others wait for that."""
    scored: str | None = None
    """If given, nothing is to be written: how likely is this as the answer to `messages`?"""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at one server. `at` is in Unix seconds; `error` is None when an answer came."""

    server: str
    at: float
    seconds: float
    error: str | None = None
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer of an LLM, with what the server counted."""

    text: str
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    model: str
    server: str
    weight_version: str | None = None
    logprobs: tuple[float, ...] = ()
    """Of the tokens of `Request.scored`, in nats."""


@dataclass(frozen=True, slots=True)
class Document:
    """What a recipe makes of its completions: the context's text and what the checks measured.

    `instruction` and `answer` are those of the seed, unless the recipe wrote them.
    """

    text: str
    checks: dict[str, Any]
    steps: list[Completion]
    instruction: str | None = None
    answer: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """The document an LLM wrote for a seed: one line of `contexts/`, in this order after `seq`."""

    id: str
    seed_id: str
    draft: int
    task: str
    instruction: str
    answer: str
    context: str
    model: str
    server: str
    weight_version: str | None
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    wasted_tokens: int
    """Completion tokens of answers that were thrown away on the way."""
    attempts: list[Attempt]
    steps: list[dict[str, Any]]
    checks: dict[str, Any]
    origin: str
    metadata: dict[str, Any]
    written_at: float

    @property
    def key(self) -> bytes:
        """The key of the draft that this finishes."""
        return draft_key(self.seed_id, self.draft)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject:
    """A draft that got no context, or a line that is no seed: one line of `rejects/`."""

    key: bytes
    reason: RejectReason
    detail: str
    origin: str
    id: str | None = None
    seed_id: str | None = None
    draft: int | None = None
    task: str | None = None
    instruction: str | None = None
    answer: str | None = None
    wasted_tokens: int = 0
    attempts: list[Attempt] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    written_at: float = 0.0


Outcome: TypeAlias = Context | Reject


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A chat example to train on: one line of `samples/`, in this order after `seq`."""

    id: str
    seed_id: str
    task: str
    instruction: str
    """What is asked, as it stands among the contexts' text in `messages`."""
    messages: list[dict[str, str]]
    context_seqs: list[int | None]
    """The `seq` of each passage in the prompt, in order; null for one that is no context but of a corpus."""
    relevant_index: int
    """Which of the passages is the relevant one, from 0."""
    n_tokens: int
    """Of the whole chat, by the tokenizer of the model to be tuned (`assembly.tokenizer`); without one, of
    the passages alone, as counted by the servers that wrote them."""
    target_tokens: int | None = None
    """How many were wanted; null where a number of contexts was."""
