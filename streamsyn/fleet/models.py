"""What part of all requests each server should have: a plain computation.

Which models a fleet is asked for, and which of them a draft is written by.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from streamsyn.config.sections import FleetSection
from streamsyn.errors import ConfigError
from streamsyn.records import digest


class Sharer(Protocol):
    """What takes part: a server."""

    @property
    def weight(self) -> float:
        """Its part, beside the others'."""
        ...

    @property
    def cap(self) -> int:
        """What it can have in flight."""
        ...


def fair(servers: Sequence[Sharer], total: int) -> list[float]:
    """How many of `total` requests each server should have: by weight, but none more than its cap.

    What no server can have in flight waits, and is spread by weight again. Caps alone would be no measure:
    while they grow, and where nothing presses them, they differ by accident.
    """
    weights = sum(server.weight for server in servers)
    beyond = total - sum(server.cap for server in servers)
    if beyond >= 0:
        return [server.cap + beyond * server.weight / weights for server in servers]
    # Water filling: those that are full at the lowest level first, the others share what is left.
    level, left = 0.0, float(total)
    for server in sorted(servers, key=lambda server: server.cap / server.weight):
        level = left / weights
        if server.cap >= level * server.weight:
            break
        left -= server.cap
        weights -= server.weight
    return [min(server.cap, level * server.weight) for server in servers]


def agreed_models(served: Mapping[str, list[str]], section: FleetSection) -> list[str]:
    """The models to ask for: those of the configuration, else the one that all servers serve.

    Args:
        served: What each server that is up says it serves, by URL.
        section: Names the models that are wanted.

    Raises:
        ConfigError: A server serves none of those wanted, or nothing is said and the servers do not agree.
    """
    if section.models and section.model is not None:
        raise ConfigError("fleet.model and fleet.models are both set; the second names all that there are")
    if section.models:
        for url, models in served.items():
            if served_here(models, section.models) is None:
                raise ConfigError(
                    f"fleet.models: {url} serves {', '.join(models)}, none of {', '.join(section.models)}"
                )
        return list(section.models)
    if section.model is not None:
        for url, models in served.items():
            if section.model not in models:
                raise ConfigError(f"fleet.model: {url} serves {', '.join(models)}, not {section.model}")
        return [section.model]
    first = {models[0]: url for url, models in served.items() if models}
    if len(first) != 1:
        found = ", ".join(f"{model} at {url}" for model, url in first.items()) or "none at all"
        raise ConfigError(
            f"the servers do not agree on a model ({found}); name one with fleet.model, or several, "
            "with their shares, in fleet.models"
        )
    return list(first)


def served_here(models: Iterable[str], wanted: Iterable[str]) -> str | None:
    """The first of `wanted` among the `models` that a server has."""
    there = set(models)
    return next((model for model in wanted if model in there), None)


class ModelWeights:
    """Gives each draft a model, in proportion to the shares, the same one in every run."""

    def __init__(self, shares: Mapping[str, float]) -> None:
        total, edge = sum(shares.values()), 0.0
        self._edges: list[tuple[float, str]] = []
        for model, share in sorted(shares.items()):
            edge += share / total
            self._edges.append((edge, model))

    def model_of(self, key: bytes) -> str:
        """The model that writes the draft of this key."""
        if len(self._edges) == 1:
            return self._edges[0][1]
        point = int.from_bytes(digest("model", key)[:8]) / 2**64
        return next((model for edge, model in self._edges if point < edge), self._edges[-1][1])
