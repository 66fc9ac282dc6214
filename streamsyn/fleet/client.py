"""The client of one server: requests out; completions, load metrics and models back, over any transport."""

from collections.abc import Callable

from streamsyn.errors import ConfigError, ServerUnavailable
from streamsyn.fleet import wire
from streamsyn.fleet.logprobs import check_scores, score
from streamsyn.fleet.thinking import cleaned
from streamsyn.fleet.transport import KEY_VARIABLE, Transport
from streamsyn.fleet.wire import Load, parse_load
from streamsyn.records import Completion, Request

_CONTROL_TIMEOUT_S = 15.0
_LOAD_TIMEOUT_S = 5.0
_ABORT_TIMEOUT_S = 2.0


class ServerClient:
    """Sends requests to one server.

    Args:
        url: Its base URL, which also names it in messages.
        transport: Carries the requests.
        request_timeout_s: Timeout of one chat request.
        key_name: Environment variable of its key, for messages.
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
        """Return the answer to `request`, as `chat` does; if it is to be scored, the logprobs of its answer.

        Raises:
            ServerError: No usable answer came; the subclass says what to do next.
        """
        if request.scored is None:
            return await self.chat(request, model, rid, on_first_token)
        return await score(self.transport, self.url, request, model, rid, self._request_timeout_s)

    async def check_scores(self, model: str, rid: str) -> None:
        """Check that the server can score.

        Raises:
            RequestRefused: It cannot.
            ServerError: It did not answer.
        """
        await check_scores(self.transport, self.url, model, rid, _CONTROL_TIMEOUT_S)

    async def chat(
        self, request: Request, model: str, rid: str, on_first_token: Callable[[], None] | None = None
    ) -> Completion:
        """Send a chat request and return the whole answer, without a thought or a second turn.

        With `on_first_token` the answer is streamed, and the callback is called when it begins: from then on
        the prompt is in the server's prefix cache.

        Raises:
            ServerError: No usable answer came; the subclass says what to do next.
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
        wire.check_rate_limit(reply.status, reply.body, self.url, reply.retry_after_s)
        parse = wire.parse_chat if on_first_token is None else wire.parse_chat_stream
        return cleaned(parse(reply.status, reply.body, self.url))

    async def abort(self, rid: str) -> None:
        """Abort the request with this rid.

        Raises:
            ServerError: The server did not answer; it notices the lost connection when it writes its answer.
        """
        body = b'{"rid":"%s"}' % rid.encode()
        await self.transport.exchange("POST", wire.ABORT, body=body, timeout_s=_ABORT_TIMEOUT_S)

    async def load(self) -> Load | None:
        """Return its load metrics; None if it has no such route.

        Raises:
            ServerError: It did not answer.
        """
        reply = await self.transport.exchange("GET", wire.LOADS, timeout_s=_LOAD_TIMEOUT_S)
        if reply.status in (404, 405):
            return None
        if reply.status != 200:
            raise wire.error_for(reply.status, "no load metrics", self.url)
        return parse_load(reply.body)

    async def weight_version(self) -> str | None:
        """Return the version of its weights; None if it does not report one.

        Raises:
            ServerError: It did not answer.
        """
        reply = await self.transport.exchange("GET", wire.MODEL_INFO, timeout_s=_CONTROL_TIMEOUT_S)
        return wire.parse_weight_version(reply.body) if reply.status == 200 else None

    async def models(self) -> list[str]:
        """Return the models it serves, if it is healthy.

        Raises:
            ServerError: It is not healthy.
            ConfigError: It does not accept the key.
        """
        reply = await self.transport.exchange("GET", wire.HEALTH, timeout_s=_CONTROL_TIMEOUT_S)
        if reply.status in (200, 404):  # servers other than SGLang may lack the route
            reply = await self.transport.exchange("GET", wire.MODELS, timeout_s=_CONTROL_TIMEOUT_S)
        elif reply.status not in (401, 403):
            raise ServerUnavailable(f"{self.url}{wire.HEALTH} answered {reply.status}")
        if reply.status in (401, 403):
            raise ConfigError(
                f"{self.url} does not accept the key (HTTP {reply.status}); set {self._key_name}, or give "
                "the user and password in the URL"
            )
        if reply.status != 200:
            raise wire.error_for(reply.status, "no list of models", self.url)
        models = wire.parse_models(reply.body)
        return [await self._served_name(model) if model.startswith("/") else model for model in models]

    async def _served_name(self, model: str) -> str:
        """Return the name of a model before a weight update from the directory `model`."""
        reply = await self.transport.exchange("GET", wire.SERVER_INFO, timeout_s=_CONTROL_TIMEOUT_S)
        return (wire.parse_served_name(reply.body) if reply.status == 200 else None) or model
