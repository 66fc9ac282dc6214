"""What the daemon keeps of a batch: ROOT/batches/ID/batch.json, replaced whole and synced at each change."""

import re
import secrets
import time
from pathlib import Path
from typing import Any, Final, Literal, Self, get_args

import orjson
from pydantic import BaseModel, ConfigDict, Field

from streamsyn.daemon.run_record import read_record
from streamsyn.errors import SinkError
from streamsyn.io.durable import make_folder, write_whole

BATCH_FILE: Final = "batch.json"
FORMAT_VERSION: Final = 1
NO_LIMIT: Final = "24h"
"""The only completion window that OpenAI's clients know, so it is not a wish: such a batch never expires."""
_WINDOW: Final = re.compile(r"([1-9][0-9]{0,5})([smhd])")
_UNIT_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}

Status = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
STATUSES: Final[tuple[Status, ...]] = get_args(Status)
_TIMED: Final = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
ENDED: Final[frozenset[Status]] = frozenset({"failed", "completed", "expired", "cancelled"})


class BatchRecord(BaseModel):
    """The content of batch.json; times are in Unix seconds.

    Attributes:
        format_version: The version of this format.
        id: Its id, which is also the id of its run.
        created_at: When it was created.
        input_file_id: The file with its requests.
        endpoint: Where each request goes.
        completion_window: As its client gave it.
        metadata: The client's own pairs.
        status: Its status, as OpenAI names them.
        at: When it reached each status.
        model: The model that its requests name.
        total: Number of requests.
        completed: Requests with an answer in the output file.
        failed: Requests with a failure in the output file.
        output_file_id: The file with all outcomes, from the moment when the requests are valid.
        error_file_id: The file with the failures, from the first one on.
        errors: Why it failed.
        priority: The priority of its run.
    """

    model_config = ConfigDict(extra="allow")  # what later versions add is kept

    format_version: int = FORMAT_VERSION
    id: str
    created_at: float
    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None
    status: Status = "validating"
    at: dict[str, float] = Field(default_factory=dict)
    model: str | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: list[dict[str, Any]] = Field(default_factory=list)
    priority: Literal["low", "normal", "high"] = "low"

    @property
    def has_ended(self) -> bool:
        """Whether nothing will change any more."""
        return self.status in ENDED

    @property
    def expires_at(self) -> float | None:
        """When it expires; None if it never does."""
        if self.completion_window == NO_LIMIT:
            return None
        window_s = window_seconds(self.completion_window)
        return None if window_s is None else self.created_at + window_s

    def reached(self, status: Status) -> None:
        """Change the status."""
        self.status = status
        self.at[status] = time.time()

    def as_json(self) -> dict[str, Any]:
        """The batch as OpenAI's API shows it."""
        expires_at = self.expires_at
        times = {f"{status}_at": self._time(status) for status in _TIMED}
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "model": self.model,
            "errors": {"object": "list", "data": self.errors} if self.errors else None,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": self.status,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": int(self.created_at),
            "expires_at": None if expires_at is None else int(expires_at),
            **times,
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
            "metadata": self.metadata,
        }

    def save(self, root: Path) -> None:
        """Replace the file. Blocks on the disk.

        Raises:
            SinkError: It cannot be written.
        """
        try:
            make_folder(root)
        except OSError as error:
            raise SinkError(f"cannot write {root}: {error.strerror}") from error
        write_whole(root / BATCH_FILE, orjson.dumps(self.model_dump(mode="json")))

    @classmethod
    def load(cls, root: Path) -> Self | None:
        """Read the file; None if there is none: the batch was never created completely. Blocks on the disk.

        Raises:
            SinkError: It cannot be read.
        """
        return read_record(cls, root / BATCH_FILE, FORMAT_VERSION)

    def _time(self, status: str) -> int | None:
        at = self.at.get(status)
        return None if at is None else int(at)


def window_seconds(text: str) -> int | None:
    """Return the seconds of a completion window, such as `90m` or `2d`; None if it is not valid."""
    found = _WINDOW.fullmatch(text)
    return None if found is None else int(found[1]) * _UNIT_S[found[2]]


def new_id() -> str:
    """Return an id for a batch."""
    return f"batch_{secrets.token_hex(12)}"
