import secrets
from collections.abc import Awaitable, Callable
from typing import Final, TypeAlias

from streamsyn.sglang.simulator import wire
from streamsyn.sglang.simulator.chat import Chat
from streamsyn.sglang.simulator.control import Control
from streamsyn.sglang.simulator.generation import Generation
from streamsyn.sglang.simulator.line import Asked, Line
from streamsyn.sglang.simulator.native import Native
from streamsyn.sglang.simulator.reading import Spelling
from streamsyn.sglang.simulator.simulation import Simulation
from streamsyn.sglang.simulator.weights import Steering

OPEN_TO_ALL: Final = ("/health", "/ready", "/metrics")
"""Paths that begin so need no key (srt/utils/auth.py)."""

Telling: TypeAlias = Callable[[Asked], wire.Reply | Awaitable[wire.Reply]]
Route: TypeAlias = Generation | Telling


class Routes:
    """All that the server answers to, whatever carries requests to it: the key, counting, the routes."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        key = simulation.config.api_key
        self._key = key.encode() if key is not None else None
        chat = Generation(simulation, Chat(), json_only=True)
        spelling = Spelling()
        generate = Generation(simulation, Native(spelling, simulation.weights), json_only=False)
        self._routes: dict[str, dict[str, Route]] = {
            "/v1/chat/completions": {"POST": chat},
            "/generate": {"POST": generate, "PUT": generate},
            **_telling(Control(simulation, spelling)),
            **_steering(Steering(simulation.weights, simulation.engine, simulation.config.load_s)),
        }

    async def serve(self, asked: Asked, line: Line) -> None:
        """Answers one request on its line."""
        methods = self._routes.get(asked.path)
        route = methods.get(asked.method) if methods else None
        self._simulation.stats.by_route[asked.path if route else "unknown"] += 1
        if not self._may(asked):
            await line.send(wire.reply({"error": "Unauthorized"}, 401))
        elif isinstance(route, Generation):
            await route.serve(asked, line)
        elif route:
            told = route(asked)
            await line.send(told if isinstance(told, wire.Reply) else await told)
        elif methods:
            await line.send(wire.reply({"detail": "Method Not Allowed"}, 405))
        else:
            await line.send(wire.reply({"detail": "Not Found"}, 404))

    def _may(self, asked: Asked) -> bool:
        if self._key is None or asked.path.startswith(OPEN_TO_ALL):
            return True
        scheme, _, token = asked.authorization.partition(" ")
        return scheme.lower() == "bearer" and secrets.compare_digest(token.encode(), self._key)


def _telling(control: Control) -> dict[str, dict[str, Route]]:
    """The routes that are answered at once."""
    return {
        "/v1/loads": _get(control.loads),
        "/v1/models": _get(control.models),
        "/server_info": _get(control.server_info),
        "/get_server_info": _get(control.server_info),
        "/model_info": _get(control.model_info),
        "/get_model_info": _get(control.model_info),
        "/tokenize": {"POST": control.tokenize},
        "/v1/tokenize": {"POST": control.tokenize},
        "/abort_request": {"POST": control.abort},
        "/flush_cache": _get(control.flush) | {"POST": control.flush},
        "/metrics": _get(control.metrics),
        "/simulator/stats": _get(control.stats),
        "/simulator/reset": {"POST": control.reset},
    }


def _steering(steering: Steering) -> dict[str, dict[str, Route]]:
    """The routes that a pause and other weights are about."""
    return {
        "/health": _get(steering.health),
        "/health_generate": _get(steering.health),
        "/ready": _get(steering.ready),
        "/pause_generation": {"POST": steering.pause},
        "/continue_generation": {"POST": steering.go_on},
        "/update_weights_from_disk": {"POST": steering.update},
    }


def _get(route: Telling) -> dict[str, Route]:
    return {"GET": route, "HEAD": route}
