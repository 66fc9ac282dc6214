"""The forms in which people have instruction-answer pairs, recognised by the fields of each row.

| form | fields |
|---|---|
| `pair` | `seeds.fields.instruction` and `seeds.fields.answer` |
| `alpaca` | `instruction`, `output`, and `input`, which is a part of the question |
| `messages` | a chat of `role` and `content` |
| `sharegpt` | a chat of `from` and `value` |
| `prompt_completion` | `prompt` and `completion`, and the like |
| `question_answer` | `question` and `answer` or `answers`, and the like |
| `request` | `custom_id`, `method`, `url`, `body`: a line of OpenAI's Batch API, for the recipe `chat` |

The first form in this order whose fields hold something is a row's form, unless `seeds.format` names one:
`request` is used only where it does. Null and empty count as absent.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, Final, TypeGuard

import structlog

from streamsyn.config.sections import FieldsSection, SeedFormat
from streamsyn.seeds.request_lines import BadRequestLine, read_request, texts_of

log = structlog.get_logger()

_DEFAULTS: Final = FieldsSection()
_CHATS: Final = ("messages", "conversations", "conversation")
_SYSTEMS: Final = ("system", "system_prompt")
_PROMPTS: Final = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "response"),
    ("input", "output"),
)
_QUESTIONS: Final = tuple(
    (question, answer)
    for question in ("question", "query", "input")
    for answer in ("answer", "answers", "response")
)
_ROLES: Final = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
"""What the speakers of chats are called; others, such as `tool`, keep their names."""
_LABELS: Final = {"user": "User", "assistant": "Assistant"}


class NotASeed(Exception):
    """Raised when a row is not a valid seed; its text says why."""


@dataclass(slots=True)
class Pair:
    """What a row holds.

    Attributes:
        form: The name of its form.
        instruction: The instruction, with all that belongs to the question.
        answers: The answers that count as right; the first is the gold answer.
        identity: The texts that the seed's id is a hash of, if the row has no id.
        taken: The fields that the instruction and the answers were made of.
        asks: How the instruction was made, for messages: `instruction + input`.
        answered: How the answer was made.
        id: The seed's id, if the form has one of its own.
    """

    form: SeedFormat
    instruction: str
    answers: Sequence[str]
    identity: tuple[str, str]
    taken: frozenset[str]
    asks: str
    answered: str
    id: str | None = None


Reading = Callable[[Mapping[str, Any], FieldsSection], Pair | None]
"""Returns the pair of a row of one form; None for a row of a different form. Raises NotASeed."""


class PairReader:
    """Reads the instruction-answer pairs of rows.

    Args:
        fields: `seeds.fields`. Where it names other fields for a pair, only these and chats are looked at.
        form: `seeds.format`.
    """

    def __init__(self, fields: FieldsSection, form: SeedFormat) -> None:
        self._fields = fields
        self._form = form
        self._readings = tuple(_readings(fields, form))

    def pair(self, row: Mapping[str, Any]) -> Pair:
        """The pair of a row.

        Raises:
            NotASeed: There is none; the text names what is missing and the keys to set.
        """
        for reading in self._readings:
            if (pair := reading(row, self._fields)) is not None:
                return pair
        raise _missing(row, self._fields, self._form)


def _missing(row: Mapping[str, Any], fields: FieldsSection, form: SeedFormat) -> NotASeed:
    """Why a row is of no form."""
    if form not in {"auto", "pair"}:
        return NotASeed(f"seeds.format = {form!r}, and the row is not of this form; fields: {_names(row)}")
    chats = sorted(name for name in (fields.messages, *_CHATS) if not is_absent(row, name))
    if chats and form == "auto":
        return NotASeed(f"field {chats[0]!r} is not a list of messages")
    for name, key in ((fields.instruction, "instruction"), (fields.answer, "answer")):
        if is_absent(row, name):
            if row.get(name) is not None:
                return NotASeed(f"field {name!r} is empty")
            advice = f"set seeds.fields.{key} to the field with the {key}"
            return NotASeed(f"field {name!r} is missing; fields: {_names(row)}; {advice}")
    return NotASeed(f"no pair was found; fields: {_names(row)}")


def _readings(fields: FieldsSection, form: SeedFormat) -> Iterator[Reading]:
    if form != "auto":
        yield _READINGS[form]
        return
    is_mapped = (fields.instruction, fields.answer) != (_DEFAULTS.instruction, _DEFAULTS.answer)
    if is_mapped and (fields.instruction, fields.answer) == ("instruction", "output"):
        yield _alpaca
    yield _named
    if not is_mapped:
        yield _alpaca
    yield _messages
    yield _sharegpt
    if not is_mapped:
        yield _prompt_completion
        yield _question_answer


def _named(row: Mapping[str, Any], fields: FieldsSection) -> Pair | None:
    return _pair_of(row, "pair", ((fields.instruction, fields.answer),))


def _alpaca(row: Mapping[str, Any], _: FieldsSection) -> Pair | None:
    return _pair_of(row, "alpaca", (("instruction", "output"),), more="input", systems=_SYSTEMS)


def _prompt_completion(row: Mapping[str, Any], _: FieldsSection) -> Pair | None:
    for prompt, completion in _PROMPTS:
        asked, answered = row.get(prompt), row.get(completion)
        if is_chat(asked) and is_chat(answered):
            chat = chat_pair([*asked, *answered], prompt, "prompt_completion")
            identity, taken = (chat.instruction, chat.answers[0]), frozenset({prompt, completion})
            return replace(chat, identity=identity, taken=taken, asks=prompt, answered=completion)
    return _pair_of(row, "prompt_completion", _PROMPTS, systems=_SYSTEMS)


def _question_answer(row: Mapping[str, Any], _: FieldsSection) -> Pair | None:
    return _pair_of(row, "question_answer", _QUESTIONS, systems=_SYSTEMS)


def _messages(row: Mapping[str, Any], fields: FieldsSection) -> Pair | None:
    return _chat_of(row, "messages", "role", fields.messages)


def _sharegpt(row: Mapping[str, Any], fields: FieldsSection) -> Pair | None:
    return _chat_of(row, "sharegpt", "from", fields.messages)


def _pair_of(
    row: Mapping[str, Any],
    form: SeedFormat,
    names: Sequence[tuple[str, str]],
    *,
    more: str | None = None,
    systems: Sequence[str] = (),
) -> Pair | None:
    """The pair in two fields; `more` of the question and a system prompt may be in others."""
    for asks, answered in names:
        if not is_absent(row, asks) and not is_absent(row, answered):
            break
    else:
        return None
    instruction, answers = text_in(row, asks), answers_in(row[answered], answered)
    parts = [asks]
    if more is not None and not is_absent(row, more):
        instruction = f"{instruction}\n\n{text_in(row, more)}"
        parts.append(more)
    for system in systems:
        if isinstance(row.get(system), str) and row[system].strip():
            instruction = with_system(row[system], instruction)
            parts.insert(0, system)
            break
    identity, taken = (instruction, answers[0]), frozenset((answered, *parts))
    return Pair(form, instruction, answers, identity, taken, " + ".join(parts), answered)


def _chat_of(row: Mapping[str, Any], form: SeedFormat, speaker: str, mapped: str) -> Pair | None:
    """The last question of a chat and its answer; what stands before is a part of the instruction."""
    name = next((one for one in (mapped, *_CHATS) if is_chat(row.get(one), speaker)), None)
    if name is None:
        return None
    chat = chat_pair(row[name], name, form)
    if form != "sharegpt" or not isinstance(system := row.get("system"), str) or not system.strip():
        return chat
    instruction = with_system(system, chat.instruction)
    return replace(
        chat,
        instruction=instruction,
        identity=(instruction, chat.answers[0]),
        taken=chat.taken | {"system"},
        asks=f"system + {chat.asks}",
    )


def _request(row: Mapping[str, Any], _: FieldsSection) -> Pair:
    """A request line: its last message is the instruction, and the answer is what the LLM will write."""
    try:
        line = read_request(row)
    except BadRequestLine as error:
        raise NotASeed(str(error)) from None
    question = texts_of(line.body["messages"][-1:])[0]["content"]
    taken, asks = frozenset({"custom_id"}), "last message of body"
    return Pair("request", question, ("",), (line.custom_id, ""), taken, asks, "the LLM's", line.custom_id)


_READINGS: Final[dict[SeedFormat, Reading]] = {
    "pair": _named,
    "alpaca": _alpaca,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt_completion": _prompt_completion,
    "question_answer": _question_answer,
    "request": _request,
}


class FormsSeen:
    """The forms of a source's rows.

    Args:
        source: The source, for messages.
        logs: Log each form when it is first seen.
    """

    def __init__(self, source: str, *, logs: bool = True) -> None:
        self.source = source
        self._logs = logs
        self._counts: Counter[tuple[str, str, str]] = Counter()

    def note(self, pair: Pair) -> None:
        """Count the form of a row."""
        key = (pair.form, pair.asks, pair.answered)
        if self._logs and key not in self._counts:
            how = {"form": pair.form, "instruction": pair.asks, "answer": pair.answered}
            log.info("seeds.form", source=self.source, **how)
        self._counts[key] += 1

    def lines(self) -> Iterator[str]:
        """One line for each form and mapping so far, for `streamsyn preview`."""
        for (form, asks, answered), count in self._counts.most_common():
            yield f"{self.source}: form {form} ({count}): instruction = {asks}; answer = {answered}"


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(sorted(map(str, row))[:8]) or "none"


def is_chat(value: Any, speaker: str | None = None) -> TypeGuard[list[dict[str, Any]]]:
    """Whether a value is a list of messages whose speaker is in the field `speaker`; None for any."""
    names = ("role", "from") if speaker is None else (speaker,)
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and any(name in turn for name in names) for turn in value)
    )


def chat_pair(turns: Sequence[Mapping[str, Any]], name: str, form: SeedFormat) -> Pair:
    """The pair of a chat: the last user message that is answered, and its answer.

    Earlier turns are a part of the instruction, each with its speaker. System turns do not count for the
    identity where nothing else stands before.

    Args:
        turns: Messages of `role` and `content`, or of `from` and `value`.
        name: The field that they are in.
        form: The form of the pair.

    Raises:
        NotASeed: No user message is followed by an answer, or a turn is not text.
    """
    spoken = [(_role(turn), turn) for turn in turns]
    places = [at for at, (role, _) in enumerate(spoken) if role == "user"]
    for asked in reversed(places):
        end = next((at for at in places if at > asked), len(spoken))
        answers = [turn for role, turn in spoken[asked + 1 : end] if role == "assistant" and _has_text(turn)]
        if answers:
            question, answer = _turn_text(spoken[asked][1]), _turn_text(answers[-1])
            instruction, identity, made_of = _with_earlier(spoken[:asked], question)
            asks, answered = f"{made_of} of {name}", f"last answer of {name}"
            return Pair(form, instruction, [answer], (identity, answer), frozenset({name}), asks, answered)
    roles = ", ".join(role for role, _ in spoken) or "none"
    raise NotASeed(f"field {name!r} has no user message with an answer (roles: {roles})")


def with_system(system: str, instruction: str) -> str:
    """An instruction behind a system prompt."""
    return f"{system.strip()}\n\n{instruction}"


def _with_earlier(spoken: Sequence[tuple[str, Mapping[str, Any]]], question: str) -> tuple[str, str, str]:
    """The instruction, the part of it that identifies the pair, and what it is made of, for messages."""
    systems = [_turn_text(turn) for role, turn in spoken if role == "system" and _has_text(turn)]
    earlier = [
        f"{_LABELS.get(role, role.capitalize())}: {_turn_text(turn)}"
        for role, turn in spoken
        if role != "system" and _has_text(turn)
    ]
    instruction, asks = question, "last question"
    if earlier:
        instruction, asks = "\n\n".join([*earlier, f"User: {question}"]), "earlier turns + last question"
    identity = instruction
    if systems:
        instruction, asks = with_system("\n\n".join(systems), instruction), f"system + {asks}"
    return instruction, identity, asks


def _role(turn: Mapping[str, Any]) -> str:
    spoken = str(turn.get("role", turn.get("from"))).lower()
    return _ROLES.get(spoken, spoken)


def _content(turn: Mapping[str, Any]) -> str:
    return "content" if "content" in turn else "value"


def _has_text(turn: Mapping[str, Any]) -> bool:
    return not is_absent(turn, _content(turn))


def _turn_text(turn: Mapping[str, Any]) -> str:
    name = _content(turn)
    if name not in turn:
        raise NotASeed("field 'content' of a message is missing")
    return text_in(turn, name)


def is_absent(row: Mapping[str, Any], name: str) -> bool:
    """Whether a field is missing or holds nothing: null, an empty text or list."""
    value = row.get(name)
    return value is None or (isinstance(value, str | list | dict) and not value)


def text_in(row: Mapping[str, Any], name: str) -> str:
    """The text of a field, or of its text parts.

    Raises:
        NotASeed: It holds something else, or white space alone.
    """
    value = row[name]
    if isinstance(value, list) and all(isinstance(part, dict) and "type" in part for part in value):
        value = "\n\n".join(_part(part, name) for part in value)
    if not isinstance(value, str):
        raise NotASeed(f"field {name!r} is not a string but {type(value).__name__}")
    if not value.strip():
        raise NotASeed(f"field {name!r} is empty")
    return value


def answers_in(value: Any, name: str) -> list[str]:
    """The answers in a field: a text, a number, a list of these, or an object as in SQuAD and TriviaQA.

    Raises:
        NotASeed: There is none.
    """
    if isinstance(value, str) and value.strip():
        return [value]
    found = list(dict.fromkeys(text for text in _answers(value, name) if text.strip()))
    if not found:
        raise NotASeed(f"field {name!r} is empty")
    return found


def _answers(value: Any, name: str) -> Iterator[str]:
    match value:
        case str():
            yield value
        case bool():
            yield "true" if value else "false"
        case int() | float() | Decimal():
            yield str(value)
        case list() if value and all(isinstance(part, dict) and "type" in part for part in value):
            yield "\n\n".join(_part(part, name) for part in value)
        case list():
            for one in value:
                if one is not None:
                    yield from _answers(one, name)
        case {"text": found}:  # SQuAD
            yield from _answers(found, name)
        case {"value": found, **rest}:  # TriviaQA
            yield from _answers([found, rest.get("aliases") or []], name)
        case _:
            raise NotASeed(
                f"field {name!r} holds no text, number or list of these but {type(value).__name__}"
            )


def _part(part: Mapping[str, Any], name: str) -> str:
    text = part.get("text")
    if part["type"] not in {"text", "input_text", "output_text"} or not isinstance(text, str):
        raise NotASeed(f"field {name!r} has a part that is not text but {part['type']!r}")
    return text
