"""One server, in its own words: requests out, completions and loads back, whatever carries them."""

from collections.abc import Callable

from streamsyn.errors import ConfigError, ServerUnavailable
from streamsyn.fleet import wire
from streamsyn.fleet.scored import check_scores, score
from streamsyn.fleet.transport import KEY_VARIABLE, Transport
from streamsyn.fleet.wire import Load, parse_load
from streamsyn.records import Completion, Request

_CONTROL_TIMEOUT_S = 15.0
_LOAD_TIMEOUT_S = 5.0
_ABORT_TIMEOUT_S = 2.0


class ServerClient:
    """Speaks to one server.

    Args:
        url: Its base URL, by which it is called.
        transport: What carries requests to it.
        request_timeout_s: Bound on one chat request.
        key_name: Environment variable that its key came from, for messages.
    """

    def __init__(
        self, url: str, transport: Transport, request_timeout_s: float, key_name: str = KEY_VARIABLE
    ) -> None:
        self.url = url
        self.transport = transport
        self._request_timeout_s = request_timeout_s
        self._key_name = key_name

    async def complete(
        self, request: Request, model: str, rid: str, on_first_token: Callable[[], None] | None = None
    ) -> Completion:
        """What `request` is after: an answer, as `chat` gives it, or how likely one is.

        Raises:
            ServerError: No usable answer came; the kind says what to do next.
        """
        if request.scored is None:
            return await self.chat(request, model, rid, on_first_token)
        return await score(self.transport, self.url, request, model, rid, self._request_timeout_s)

    async def check_scores(self, model: str, rid: str) -> None:
        """Find out whether it can score.

        Raises:
            RequestRefused: It cannot.
            ServerError: It gave no answer.
        """
        await check_scores(self.transport, self.url, model, rid, _CONTROL_TIMEOUT_S)

    async def chat(
        self, request: Request, model: str, rid: str, on_first_token: Callable[[], None] | None = None
    ) -> Completion:
        """Ask and wait for the whole answer.

        With `on_first_token` the answer is streamed, and the call made when it begins: from then on the
        prompt is in the server's prefix cache.

        Raises:
            ServerError: No usable answer came; the kind says what to do next.
        """
        headers = {wire.ROUTING_KEY: request.group} if request.group else {}
        reply = await self.transport.exchange(
            "POST",
            wire.CHAT,
            body=wire.chat_body(request, model, rid, stream=on_first_token is not None),
            headers=headers,
            timeout_s=self._request_timeout_s,
            on_data=on_first_token,
        )
        if on_first_token is not None:
            return wire.parse_chat_stream(reply.status, reply.body, self.url)
        return wire.parse_chat(reply.status, reply.body, self.url)

    async def abort(self, rid: str) -> None:
        """Have the server drop the request of that rid.

        Raises:
            ServerError: It could not be told; it will find out when it writes its answer.
        """
        body = b'{"rid":"%s"}' % rid.encode()
        await self.transport.exchange("POST", wire.ABORT, body=body, timeout_s=_ABORT_TIMEOUT_S)

    async def load(self) -> Load | None:
        """What it has to do just now; None when it does not say.

        Raises:
            ServerError: It gave no answer.
        """
        reply = await self.transport.exchange("GET", wire.LOADS, timeout_s=_LOAD_TIMEOUT_S)
        if reply.status in (404, 405):
            return None
        if reply.status != 200:
            raise wire.error_of(reply.status, "no load", self.url)
        return parse_load(reply.body)

    async def weight_version(self) -> str | None:
        """Which weights it has, as it calls them; None when it does not say.

        Raises:
            ServerError: It gave no answer.
        """
        reply = await self.transport.exchange("GET", wire.MODEL_INFO, timeout_s=_CONTROL_TIMEOUT_S)
        return wire.weight_version(reply.body) if reply.status == 200 else None

    async def models(self) -> list[str]:
        """What it serves, once it is healthy.

        Raises:
            ServerError: It is not up.
            ConfigError: It does not accept our key.
        """
        reply = await self.transport.exchange("GET", wire.HEALTH, timeout_s=_CONTROL_TIMEOUT_S)
        if reply.status in (200, 404):  # other servers than SGLang may lack the route
            reply = await self.transport.exchange("GET", wire.MODELS, timeout_s=_CONTROL_TIMEOUT_S)
        elif reply.status not in (401, 403):
            raise ServerUnavailable(f"{self.url}{wire.HEALTH} answered {reply.status}")
        if reply.status in (401, 403):
            raise ConfigError(
                f"{self.url} does not accept the key (HTTP {reply.status}); set {self._key_name}"
            )
        if reply.status != 200:
            raise wire.error_of(reply.status, "no list of models", self.url)
        models = wire.served_models(reply.body)
        return [await self._started_as(model) if model.startswith("/") else model for model in models]

    async def _started_as(self, model: str) -> str:
        """What a model was called before its server read other weights, from the directory `model`."""
        reply = await self.transport.exchange("GET", wire.SERVER_INFO, timeout_s=_CONTROL_TIMEOUT_S)
        return (wire.started_as(reply.body) if reply.status == 200 else None) or model
