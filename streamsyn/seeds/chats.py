"""The pair in a chat: the last question and its answer, with all that stands before in the instruction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeGuard

from streamsyn.seeds.values import NotASeed, is_absent, text_in

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


@dataclass(frozen=True, slots=True)
class ChatPair:
    """A question and its answer.

    Attributes:
        instruction: The question; with earlier turns, all of them, each with its speaker.
        answer: The answer.
        identity: What identifies the pair. System turns do not count where nothing else stands before.
        asks: What the instruction is made of, for messages.
    """

    instruction: str
    answer: str
    identity: tuple[str, str]
    asks: str


def is_chat(value: Any, speaker: str | None = None) -> TypeGuard[list[dict[str, Any]]]:
    """Whether a value is a list of messages whose speaker is in the field `speaker`; None for any."""
    names = ("role", "from") if speaker is None else (speaker,)
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and any(name in turn for name in names) for turn in value)
    )


def chat_pair(turns: Sequence[Mapping[str, Any]], name: str) -> ChatPair:
    """The last user message that is answered, and its answer.

    Args:
        turns: Messages of `role` and `content`, or of `from` and `value`.
        name: The field that they are in, for messages.

    Raises:
        NotASeed: No user message is followed by an answer, or a turn is not text.
    """
    spoken = [(_role(turn), turn) for turn in turns]
    places = [at for at, (role, _) in enumerate(spoken) if role == "user"]
    for asked in reversed(places):
        end = next((at for at in places if at > asked), len(spoken))
        answers = [turn for role, turn in spoken[asked + 1 : end] if role == "assistant" and _has_text(turn)]
        if answers:
            question, answer = _text(spoken[asked][1]), _text(answers[-1])
            return _with_earlier(spoken[:asked], question, answer)
    roles = ", ".join(role for role, _ in spoken) or "none"
    raise NotASeed(f"field {name!r} has no user message with an answer (roles: {roles})")


def with_system(system: str, instruction: str) -> str:
    """An instruction behind a system prompt."""
    return f"{system.strip()}\n\n{instruction}"


def _with_earlier(spoken: Sequence[tuple[str, Mapping[str, Any]]], question: str, answer: str) -> ChatPair:
    systems = [_text(turn) for role, turn in spoken if role == "system" and _has_text(turn)]
    earlier = [
        f"{_LABELS.get(role, role.capitalize())}: {_text(turn)}"
        for role, turn in spoken
        if role != "system" and _has_text(turn)
    ]
    instruction, asks = question, "last question"
    if earlier:
        instruction, asks = "\n\n".join([*earlier, f"User: {question}"]), "earlier turns + last question"
    identity = (instruction, answer)
    if systems:
        instruction, asks = with_system("\n\n".join(systems), instruction), f"system + {asks}"
    return ChatPair(instruction, answer, identity, asks)


def _role(turn: Mapping[str, Any]) -> str:
    spoken = str(turn.get("role", turn.get("from"))).lower()
    return _ROLES.get(spoken, spoken)


def _content(turn: Mapping[str, Any]) -> str:
    return "content" if "content" in turn else "value"


def _has_text(turn: Mapping[str, Any]) -> bool:
    return not is_absent(turn, _content(turn))


def _text(turn: Mapping[str, Any]) -> str:
    name = _content(turn)
    if name not in turn:
        raise NotASeed("field 'content' of a message is missing")
    return text_in(turn, name)
