"""The lines of an inbox's file: seeds, what requests were answered, where it was closed or reopened.

The origin of an entry is not in its line: it is `submitted:` and the number of the line.
"""

from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final, TypeAlias

import orjson

from streamsyn.records import BadSeed, Entry, RejectReason, Seed

NAME: Final = "submitted"
"""The name of an inbox in the origin of an entry, as in `submitted:17`."""


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """What the request with an idempotency key was answered.

    Attributes:
        key: The key.
        body: The hash of its content.
        answer: The answer, as JSON.
    """

    key: str
    body: bytes
    answer: bytes


@dataclass(frozen=True, slots=True)
class Closing:
    """From here on the inbox is closed, or open again."""

    closed: bool


InboxLine: TypeAlias = Entry | StoredAnswer | Closing


def entry_key(entry: Entry) -> bytes:
    """The 16 bytes by which the same entry is recognised: the id and the pair, or the content of a bad line.

    A different pair with the same id is a different seed; `id_owners` gives it an id of its own.
    """
    if isinstance(entry, BadSeed):
        return entry.key
    lengths = f"{len(entry.id)} {len(entry.instruction)} {len(entry.answer)}"  # `digest` takes twice as long
    text = f"seed {lengths} {entry.id}{entry.instruction}{entry.answer}{entry.context}"
    return blake2b(text.encode(), digest_size=16).digest()


def encode(line: InboxLine) -> bytes:
    """The line, with its line end."""
    found: dict[str, Any]
    match line:
        case Seed():
            fields = {
                "id": line.id,
                "task": line.task,
                "instruction": line.instruction,
                "answer": line.answer,
                "metadata": line.metadata,
                "context": line.context,
            }
            found = {"seed": fields}
        case BadSeed():
            found = {"bad": {"reason": line.reason, "detail": line.detail, "key": line.key.hex()}}
        case StoredAnswer():
            answer = orjson.Fragment(line.answer)
            found = {"answer": {"key": line.key, "body": line.body.hex(), "answer": answer}}
        case Closing():
            found = {"closed": line.closed}
    return orjson.dumps(found, option=orjson.OPT_APPEND_NEWLINE)


def decode(line: bytes, number: int = 0) -> InboxLine | None:
    """What is in a line; None if it is damaged.

    Args:
        line: The line.
        number: Its number, counted from 1.
    """
    try:
        kind, fields = orjson.loads(line).popitem()
        match kind:
            case "seed":
                return Seed(origin=f"{NAME}:{number}", **fields)
            case "bad":
                reason = RejectReason(fields["reason"])
                return BadSeed(f"{NAME}:{number}", reason, fields["detail"], bytes.fromhex(fields["key"]))
            case "answer":
                answer = orjson.dumps(fields["answer"])
                return StoredAnswer(fields["key"], bytes.fromhex(fields["body"]), answer)
            case "closed":
                return Closing(bool(fields))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return None
