"""The states of a hosted run, and what may follow on what."""

from dataclasses import dataclass
from typing import Final, Literal, get_args

from streamsyn.errors import StreamsynError

State = Literal["running", "paused", "stopped", "finished", "failed"]
STATES: Final[tuple[State, ...]] = get_args(State)
ENDED: Final[frozenset[State]] = frozenset({"finished", "failed"})


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
