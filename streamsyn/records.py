"""The records that pass between stages, in the order of the flow.

    Seed -> Draft -> Request -> Completion -> Context | Reject -> Sample

All are frozen: a stage passes on a new record and never edits one it received.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b
from typing import Any, Final, TypeAlias


def digest(*parts: str | bytes) -> bytes:
    """Return a 16-byte BLAKE2b hash of `parts`, the same on every machine and in every process."""
    encoded = [part.encode() if isinstance(part, str) else part for part in parts]
    # The lengths make ("ab", "c") differ from ("a", "bc").
    return blake2b(b"".join([b"%d:%b" % (len(part), part) for part in encoded]), digest_size=16).digest()


def is_held_out(seed_id: str, share: float) -> bool:
    """Return whether a seed is held out for evaluation.

    The decision depends only on the seed's id, so that all contexts of a seed are treated alike, in every
    run. Seeds that a share holds out are also held out by each larger share.

    Args:
        seed_id: The seed's id.
        share: Share of all seeds to hold out, 0 to 1.
    """
    return bool(share) and int.from_bytes(digest("holdout", seed_id)[:8]) < share * 2**64


class RejectReason(StrEnum):
    """Why a seed got no context. The set is closed, so readers of the log can list all cases."""

    # the line is not a valid seed
    INVALID_UTF8 = "invalid_utf8"
    INVALID_JSON = "invalid_json"
    NOT_A_SEED = "not_a_seed"
    LINE_TOO_LONG = "line_too_long"
    # every answer failed a check
    EMPTY = "empty"
    TOO_SHORT = "too_short"
    TOO_LONG = "too_long"
    STILL_THINKING = "still_thinking"
    REFUSAL = "refusal"
    TRUNCATED = "truncated"
    REPETITION = "repetition"
    PROMPT_ECHO = "prompt_echo"
    QA_PASTED = "qa_pasted"
    NO_PAIR = "no_pair"
    # the context is not fit for training
    NEAR_DUPLICATE = "near_duplicate"
    CONTAMINATED = "contaminated"
    LOW_CONTEXT_GAIN = "low_context_gain"
    NOT_ANSWERABLE = "not_answerable"
    # the servers gave no answer
    REQUEST_REFUSED = "request_refused"
    TIMEOUT = "timeout"
    BROKEN_RESPONSE = "broken_response"
    SERVER_UNAVAILABLE = "server_unavailable"
    # a bug in streamsyn or in a plug-in recipe
    INTERNAL_ERROR = "internal_error"


ANSWERS: Final = "answers"
"""The metadata field with all answers to an instruction that count as right, where there are several."""


@dataclass(frozen=True, slots=True)
class Seed:
    """A trusted instruction-answer pair, or a document for which a recipe writes the pair.

    Attributes:
        id: The seed's own id, or a hash of its content.
        task: Name of its task, such as a data set.
        instruction: The instruction; "" if the seed is a document.
        answer: The gold answer; "" if the seed is a document.
        origin: Where it was read, as `file:line`.
        metadata: All other fields.
        context: The document; "" if the seed is a pair.
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
    """An invalid line (or row). It passes through the stages like a seed and ends as a Reject.

    Attributes:
        key: 16-byte hash of place and content, by which the same line is recognised when read again.
    """

    origin: str
    reason: RejectReason
    detail: str
    key: bytes


Entry: TypeAlias = Seed | BadSeed
"""An item that a seed source yields."""


@dataclass(frozen=True, slots=True)
class Draft:
    """The unit of work: one context to write for a seed, which has `recipe.contexts_per_seed` drafts.

    Attributes:
        supersedes: The `seq` of the reject that its outcome supersedes, where a retry asks for it again.
    """

    seed: Seed
    number: int = 0
    supersedes: int | None = None

    @property
    def id(self) -> str:
        """The seed's id for draft 0, then `id#1`, `id#2`, ...

        A `#` in the seed's id is doubled, so that ids of drafts are unique.
        """
        own = self.seed.id.replace("#", "##")
        return f"{own}#{self.number}" if self.number else own

    @property
    def key(self) -> bytes:
        """The 16 bytes by which the log recognises a finished draft."""
        return draft_key(self.seed.id, self.number)


def draft_key(seed_id: str, number: int) -> bytes:
    """Return the key of a draft from the fields of its outcome in the log."""
    return blake2b(f"draft {number} {seed_id}".encode(), digest_size=16).digest()


Work: TypeAlias = Draft | BadSeed
"""An item of the work queue. Each ends as exactly one Outcome."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request to an LLM.

    Attributes:
        messages: The chat messages: [{role, content}, ...].
        sampling: Sampling parameters, such as temperature and max_tokens.
        group: Key of its prefix group, whose requests go to one server; "" for none.
        prefixes: Keys of the prefixes shared with other requests, shortest first: the template's, then the
            group's. The first request with a key warms a server's cache; the others wait for that.
        scored: If given, nothing is generated: the server scores this text as the answer.
        task: Task of the seed: answers of one task have similar lengths.
        conversation_tokens: If more requests will extend this conversation, the expected tokens of all its
            answers and later questions; else 0.
        model: The model to ask; "" for the one that the fleet chose for the draft.
        body: If given, this chat request is sent as it is, and the whole answer is kept. `messages` and
            `sampling` then only describe it: its texts, for placement, and its parameters.
    """

    messages: list[dict[str, str]]
    sampling: dict[str, Any]
    group: str = ""
    prefixes: tuple[str, ...] = ()
    scored: str | None = None
    task: str = ""
    conversation_tokens: int = 0
    model: str = ""
    body: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt of a request at one server.

    Attributes:
        server: Base URL of the server.
        at: Start, in Unix seconds.
        seconds: Duration.
        error: What went wrong; None if an answer came.
        completion_tokens: Tokens that were generated.
    """

    server: str
    at: float
    seconds: float
    error: str | None = None
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer of an LLM, with the token counts of the server.

    Attributes:
        text: The answer, without a thought before it and without control tokens after it.
        logprobs: Log-likelihood of each token of `Request.scored`, in nats.
        thought: What the model wrote before the text, with its marks; "" if the server keeps thoughts apart.
        thinking_tokens: Tokens of the thought: as the server counts them, else estimated from its characters.
        tokens_estimated: Whether token counts are estimated from the text, since the server sent none.
        cached_host_tokens: Cached tokens that came from host memory, where a server says so.
        cached_storage_tokens: Cached tokens that came from storage, where a server says so.
        body: The whole answer of the server to a `Request.body`, of which `text` is the first choice.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    model: str
    server: str
    weight_version: str | None = None
    logprobs: tuple[float, ...] = ()
    thought: str = ""
    thinking_tokens: int = 0
    tokens_estimated: bool = False
    body: dict[str, Any] | None = None
    cached_host_tokens: int = 0
    cached_storage_tokens: int = 0

    @property
    def text_tokens(self) -> int:
        """Tokens of the text, without those of a thought."""
        return self.completion_tokens - self.thinking_tokens

    @property
    def is_only_thought(self) -> bool:
        """Whether the model thought and then wrote nothing."""
        return self.thinking_tokens > 0 and not self.text.strip()


@dataclass(frozen=True, slots=True)
class Document:
    """What a recipe returns for a draft.

    Attributes:
        text: The context.
        checks: What the checks measured, and `flags`: a list of names.
        steps: The completions that it was made of.
        instruction: The instruction, if the recipe wrote it; None keeps the seed's.
        answer: The answer, if the recipe wrote it; None keeps the seed's.
    """

    text: str
    checks: dict[str, Any]
    steps: list[Completion]
    instruction: str | None = None
    answer: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """The document an LLM wrote for a seed: one line of `contexts/`, fields in this order.

    Attributes:
        supersedes: The `seq` of the reject that it supersedes. None, which the line leaves out, is the rule.
    """

    supersedes: int | None = None
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
    thinking_tokens: int = 0
    """Tokens of thoughts among them; these are not in `context`."""
    wasted_tokens: int
    """Completion tokens of the discarded answers of this draft."""
    attempts: list[Attempt]
    steps: list[dict[str, Any]]
    checks: dict[str, Any]
    origin: str
    metadata: dict[str, Any]
    written_at: float

    @property
    def key(self) -> bytes:
        """The key of its draft."""
        return draft_key(self.seed_id, self.draft)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject:
    """A draft that got no context, or an invalid line: one line of `rejects/`.

    Attributes:
        supersedes: As in `Context`.
    """

    supersedes: int | None = None
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
DurableContext: TypeAlias = tuple[int, Context]
"""A context that is on disk, and its `seq` in the log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A chat example for training: one line of `samples/`, fields in this order."""

    id: str
    seed_id: str
    task: str
    instruction: str
    """The instruction as it appears in `messages`."""
    messages: list[dict[str, str]]
    context_seqs: list[int | None]
    """The `seq` of each passage in the prompt, in order; null for a passage of a corpus."""
    relevant_index: int
    """Index of the relevant passage, from 0."""
    n_tokens: int
    """Tokens of the whole chat by `assembly.tokenizer`; without one, the sum of the passages' tokens by the
    counts of the servers that wrote them."""
    target_tokens: int | None = None
    """Target length in tokens; null if a number of contexts was configured."""
