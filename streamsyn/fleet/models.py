"""Which models a fleet serves, and which of them writes a draft."""

import difflib
from collections.abc import Iterable, Mapping, Sequence

from streamsyn.config.sections import FleetSection
from streamsyn.errors import ConfigError
from streamsyn.records import digest

_MAX_LISTED = 20
"""Models named in a message."""


def agreed_models(served: Mapping[str, list[str]], section: FleetSection) -> list[str]:
    """Return the models to use: those of the configuration, else the one that all servers serve.

    Args:
        served: Models of each healthy server, by URL.
        section: May name the wanted models.

    Raises:
        ConfigError: A server serves none of the wanted models, or none is named and the servers differ.
    """
    if section.models and section.model is not None:
        raise ConfigError("fleet.model and fleet.models are both set; set one of them")
    if section.models:
        for url, models in served.items():
            if first_wanted(models, section.models) is None:
                raise ConfigError(
                    f"fleet.models: {url} serves {listed(models)}, none of {listed(section.models)}"
                )
        return list(section.models)
    if section.model is not None:
        for url, models in served.items():
            if section.model not in models:
                raise ConfigError(
                    f"fleet.model: {url} serves {listed(models, section.model)}, not {section.model}"
                )
        return [section.model]
    common = [
        model for model in next(iter(served.values())) if all(model in there for there in served.values())
    ]
    common = list(dict.fromkeys(common))
    if len(common) == 1:
        return common
    if common:
        raise ConfigError(
            f"the servers serve several models ({listed(common)}); set fleet.model to use one, or "
            "fleet.models to give several a weight each"
        )
    found = "; ".join(f"{url} serves {listed(models)}" for url, models in served.items())
    raise ConfigError(
        f"the servers serve different models: {found}. Set fleet.model to use one, or fleet.models to give "
        "several a weight each"
    )


def shared_models(served: Mapping[str, Sequence[str]], section: FleetSection) -> list[str] | None:
    """Return the models for one run of several that share servers; None while servers must answer first.

    A server may serve other models than this run wants.

    Args:
        served: Models of each server, by URL; empty for one that has not answered yet.
        section: May name the wanted models.

    Raises:
        ConfigError: All servers have answered, and none serves a wanted model; or none is named and they
            differ.
    """
    known = {url: list(models) for url, models in served.items() if models}
    wanted = list(section.models) or ([] if section.model is None else [section.model])
    if not known:
        return None
    if not wanted or (section.models and section.model is not None):
        return agreed_models(known, section)
    there = {model for models in known.values() for model in models}
    missing = [model for model in wanted if model not in there]
    if missing and len(known) == len(served):
        key = "fleet.models" if section.models else "fleet.model"
        raise ConfigError(f"{key}: no server serves {listed(missing)}; they serve {listed(sorted(there))}")
    return None if missing else wanted


def listed(models: Iterable[str], wanted: str = "") -> str:
    """Return model names for a message; of many those that are most like `wanted`, or the first ones."""
    names = list(dict.fromkeys(models))
    if len(names) > _MAX_LISTED:
        near = difflib.get_close_matches(wanted, names, _MAX_LISTED, 0) if wanted else names[:_MAX_LISTED]
        return f"{', '.join(near)} and {len(names) - len(near)} more"
    return ", ".join(names) or "no model"


def first_wanted(models: Iterable[str], wanted: Iterable[str]) -> str | None:
    """Return the first of `wanted` among the `models` of a server."""
    there = set(models)
    return next((model for model in wanted if model in there), None)


class ModelWeights:
    """Gives each draft a model, in proportion to the weights and the same one in every run."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        in_order = sorted(weights.items())  # the rounding of sums, too, must not depend on the order given
        total, edge = sum(weight for _, weight in in_order), 0.0
        self._edges: list[tuple[float, str]] = []
        for model, weight in in_order:
            edge += weight / total
            self._edges.append((edge, model))

    def model_of(self, key: bytes) -> str:
        """Return the model that writes the draft with this key."""
        if len(self._edges) == 1:
            return self._edges[0][1]
        point = int.from_bytes(digest("model", key)[:8]) / 2**64
        return next((model for edge, model in self._edges if point < edge), self._edges[-1][1])
