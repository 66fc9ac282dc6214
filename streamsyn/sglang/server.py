"""One server of the fleet: its client and what is known of it."""

from dataclasses import dataclass

from streamsyn.sglang.client import ServerClient
from streamsyn.sglang.health import Health
from streamsyn.sglang.limiter import Limiter


@dataclass(slots=True, eq=False)
class Server:
    """What the fleet holds of a server; the decisions are its limiter's and its health's."""

    client: ServerClient
    limiter: Limiter
    health: Health
    completions: int = 0
    completion_tokens: int = 0

    @property
    def url(self) -> str:
        """Base URL."""
        return self.client.url

    def is_usable(self, now: float) -> bool:
        """Whether a request may go to it now."""
        return not self.health.ejected and self.limiter.has_room(now)
