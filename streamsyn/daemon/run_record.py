"""What the daemon keeps of a hosted run: DIR/service.json, replaced whole and synced at each change.

`RunState` decides which of its states may follow on which.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self, TypeVar, get_args

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from streamsyn.errors import SinkError, StreamsynError
from streamsyn.io.durable import write_whole

R = TypeVar("R", bound=BaseModel)

Priority = Literal["low", "normal", "high"]
State = Literal["running", "paused", "stopped", "finished", "failed"]
STATES: Final[tuple[State, ...]] = get_args(State)
ENDED: Final[frozenset[State]] = frozenset({"finished", "failed"})
SERVICE_FILE: Final = "service.json"
FORMAT_VERSION: Final = 1


class Refused(StreamsynError):
    """Raised when the state of a run does not allow what a client asks; the text says what to do."""


@dataclass(slots=True)
class RunState:
    """Decides what a run may do.

        running    seeds are asked for; ends as finished once it is closed and every seed has its outcome
        paused     nothing new is begun; seeds are still accepted
        stopped    as paused, and seeds are refused
        finished   closed, and every seed has its outcome
        failed     stopped by an error

    Attributes:
        state: The present state, by what was asked: a run that is paused may still have requests in flight.
        is_closed: Whether no more seeds will come.
        error: Why it failed; None in all other states.
    """

    state: State = "running"
    is_closed: bool = False
    error: str | None = None

    @property
    def accepting(self) -> bool:
        """Whether seeds are accepted."""
        return not self.is_closed and self.state in {"running", "paused"}

    @property
    def why_not_accepting(self) -> str:
        """Why seeds are refused, and what to do."""
        if self.state == "failed":
            return f"the run failed ({self.error}); resume it first"
        if self.state == "stopped" and not self.is_closed:
            return "the run is stopped; resume it first"
        if self.state == "finished":
            return "the run is finished; resume it to have it accept seeds again"
        return "the run is closed: it accepts no more seeds"

    def close(self) -> None:
        """No more seeds will come."""
        self.is_closed = True

    def pause(self) -> None:
        """Begin nothing new; seeds are still accepted.

        Raises:
            Refused: The run is not going on.
        """
        if self.state not in {"running", "paused"}:
            raise Refused(f"a run that is {self.state} cannot be paused")
        self.state = "paused"

    def drain(self) -> None:
        """Begin nothing new, and refuse seeds.

        Raises:
            Refused: The run has ended.
        """
        if self.state in {"finished", "failed"}:
            raise Refused(f"a run that is {self.state} cannot be drained")
        self.state = "stopped"

    def resume(self) -> None:
        """Go on. A finished run is open for seeds again."""
        if self.state == "finished":
            self.is_closed = False
        self.state, self.error = "running", None

    def retry(self) -> None:
        """Go on, to ask rejects again. A finished run stays closed."""
        self.state, self.error = "running", None

    def finished(self) -> None:
        """Every seed has its outcome."""
        if self.is_closed:
            self.state = "finished"

    def failed(self, error: str) -> None:
        """An error has stopped the run."""
        self.state, self.error = "failed", error


class Figures(BaseModel):
    """Totals of a run up to the end of its last execution.

    Attributes:
        contexts: Contexts in the log.
        rejects: Rejects that hold.
        samples: Samples in the log.
        rows: Rows of each kind in the log.
        reasons: The rejects, by reason.
        tokens: Tokens by kind.
        prefix: Shares of the prompt tokens of the last execution that were planned to be cached, and were.
    """

    contexts: int = 0
    rejects: int = 0
    samples: int = 0
    rows: dict[str, int] = Field(default_factory=dict)
    reasons: dict[str, int] = Field(default_factory=dict)
    tokens: dict[str, int] = Field(default_factory=dict)
    prefix: dict[str, float] = Field(default_factory=dict)


class RunRecord(BaseModel):
    """The content of service.json.

    Attributes:
        format_version: The version of this format.
        id: The run's id.
        created_at: When it was created, in Unix seconds.
        given: The request that created it, to recognise its repetition.
        shaping: The configuration that shapes outputs, as it was at creation.
        state: The state that the run has, or goes on with when the daemon starts.
        is_closed: Whether no more seeds will come.
        error: Why it failed.
        retry: Reasons of rejects that are to be asked again and have not been yet.
        accepted: Seeds accepted until it finished.
        events: Number of times that the state has changed.
        figures: Totals.
    """

    model_config = ConfigDict(extra="allow")  # what later versions add is kept

    format_version: int = FORMAT_VERSION
    id: str
    created_at: float
    weight: float = 1.0
    priority: Priority = "normal"
    labels: dict[str, str] = Field(default_factory=dict)
    given: dict[str, Any] = Field(default_factory=dict)
    shaping: dict[str, Any] = Field(default_factory=dict)
    state: State = "running"
    is_closed: bool = False
    error: str | None = None
    retry: list[str] = Field(default_factory=list)
    accepted: int = 0
    events: int = 0
    figures: Figures = Field(default_factory=Figures)

    def save(self, root: Path) -> None:
        """Replace the file. Blocks on the disk.

        Raises:
            SinkError: It cannot be written.
        """
        write_whole(root / SERVICE_FILE, orjson.dumps(self.model_dump(mode="json")))

    @classmethod
    def has_ended(cls, root: Path) -> tuple[float, State] | None:
        """When a run that has ended was created, and its state; None for any other. Blocks on the disk.

        Much faster than `load`, for a start with thousands of runs.
        """
        try:
            record = orjson.loads((root / SERVICE_FILE).read_bytes())
            state, created_at = record["state"], record["created_at"]
        except (OSError, ValueError, TypeError, KeyError):
            return None  # `load` says what is wrong
        is_ours = record.get("id") == root.name and record.get("format_version") == FORMAT_VERSION
        return (created_at, state) if is_ours and state in ENDED and isinstance(created_at, float) else None

    @classmethod
    def load(cls, root: Path) -> Self | None:
        """Read the file; None if there is none: the run was never created completely. Blocks on the disk.

        Raises:
            SinkError: It cannot be read.
        """
        return read_record(cls, root / SERVICE_FILE, FORMAT_VERSION)


def read_record(kind: type[R], path: Path, version: int) -> R | None:
    """Read a record with a `format_version`; None if there is no file. Blocks on the disk.

    Args:
        kind: The class of the record.
        path: The file.
        version: The newest version that this code reads.

    Raises:
        SinkError: It cannot be read, is damaged, or has a newer format.
    """
    try:
        content = orjson.loads(path.read_bytes())
        record = kind.model_validate(content)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SinkError(f"cannot read {path}: {error.strerror}") from error
    except (orjson.JSONDecodeError, ValidationError) as error:
        raise SinkError(f"{path} is damaged: {str(error).splitlines()[0]}") from error
    found = int(content.get("format_version", version))  # the model has checked it
    if found > version:
        raise SinkError(f"{path} has format version {found}; this streamsyn reads versions up to {version}")
    return record
