"""How many requests a server may have at a time: a plain state machine, with no clock of its own."""

from dataclasses import dataclass

_FIRST_HOLD_S = 0.1
_LONGEST_HOLD_S = 5.0


@dataclass(slots=True)
class Limiter:
    """A fixed cap, and a hold after the server said that its queue is full.

    A full queue is backpressure: no request fails by it, the server just gets nothing new for a
    while, twice as long each time until it answers again.
    """

    cap: int
    in_flight: int = 0
    held_until: float = 0.0
    _next_hold_s: float = _FIRST_HOLD_S

    def has_room(self, now: float) -> bool:
        """Whether one more request may go out."""
        return self.in_flight < self.cap and now >= self.held_until

    def busy(self, now: float, jitter: float) -> None:
        """The server refused a request because its queue is full. `jitter` is drawn from [0, 1)."""
        if now < self.held_until:
            return  # one of those that were under way when the first one came back
        self.held_until = now + self._next_hold_s * (0.5 + 0.5 * jitter)
        self._next_hold_s = min(2 * self._next_hold_s, _LONGEST_HOLD_S)

    def answered(self) -> None:
        """The server answered a request."""
        self._next_hold_s = _FIRST_HOLD_S
