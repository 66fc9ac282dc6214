"""The client of one server: requests out; completions, load metrics and models back, over any transport."""

from collections.abc import Callable, Collection

import structlog

from streamsyn.errors import BrokenResponse, ConfigError, RequestRefused, ServerUnavailable, WrongAddress
from streamsyn.fleet import wire
from streamsyn.fleet.chat_answer import Asked, parse_chat, parse_chat_stream, parse_whole
from streamsyn.fleet.logprobs import Scorer
from streamsyn.fleet.thinking import CONTINUES, PromptEnds, cleaned, template_fields
from streamsyn.fleet.transport import KEY_VARIABLE, Reply, Transport, route
from streamsyn.fleet.wire import Features, Load, parse_features, parse_load
from streamsyn.records import Completion, Request
from streamsyn.telemetry import trace_headers

log = structlog.get_logger()

_CONTROL_TIMEOUT_S = 15.0
_LOAD_TIMEOUT_S = 5.0
_GIVE_BASE = f"give the base URL of an OpenAI-compatible API, to which {wire.MODELS} can be added"
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
        self._without: frozenset[str] = frozenset()
        """Optional fields of a chat request that the server refused."""
        self._has_usage = True
        self.features = Features()
        """What it can do; set by `ask_features`."""
        self._prompt_ends = PromptEnds(transport, url)
        self._scorer = Scorer(transport, url, self._prompt_ends)

    @property
    def ranks(self) -> int:
        """Its data-parallel ranks; 1 if it takes no request for a rank."""
        return 1 if wire.RANK in self._without else self.features.ranks

    async def complete(
        self,
        request: Request,
        model: str,
        rid: str,
        on_first_token: Callable[[], None] | None = None,
        rank: int | None = None,
    ) -> Completion:
        """Return the answer to `request`, without a thought or a second turn, or the logprobs to score.

        Args and Raises: as `chat`.
        """
        if request.body is not None:
            return await self.chat(request, model, rid, rank=rank)  # not streamed, and nothing is removed
        if request.scored is None:
            # Before the request: an answer that has come must not wait for anything.
            end = await self._prompt_ends.of(model, template_fields(request))
            completion = await self.chat(request, model, rid, on_first_token, rank)
            return cleaned(completion, is_open=end.is_open and CONTINUES not in request.sampling)
        try:
            return await self._scorer.score(request, model, rid, self._request_timeout_s, rank)
        except RequestRefused as error:
            if rank is None or wire.RANK not in str(error):
                raise
        scored = await self._scorer.score(request, model, rid, self._request_timeout_s)
        self._leave_out({wire.RANK})
        return scored

    async def check_scores(self, model: str, rid: str) -> None:
        """Check that the server can score.

        Raises:
            RequestRefused: It cannot.
            ServerError: It did not answer.
        """
        await self._scorer.check(model, rid, _CONTROL_TIMEOUT_S)

    async def chat(
        self,
        request: Request,
        model: str,
        rid: str,
        on_first_token: Callable[[], None] | None = None,
        rank: int | None = None,
    ) -> Completion:
        """Send a chat request and return the whole answer.

        With `on_first_token` the answer is streamed, and the callback is called when it begins: from then on
        the prompt is in the server's prefix cache.

        Raises:
            ServerError: No usable answer came; the subclass says what to do next.
        """
        reply = await self._send(request, model, rid, on_first_token, rank)
        if request.body is not None:
            parse = parse_whole
        else:
            parse = parse_chat if on_first_token is None else parse_chat_stream
        sizes = [len(message["content"].encode()) for message in request.messages]
        completion = parse(reply.status, reply.body, Asked(self.url, model, sizes))
        if completion.tokens_estimated and self._has_usage:
            self._has_usage = False
            log.warning("fleet.no_token_counts", server=self.url, then="tokens are estimated from the text")
        return completion

    async def _send(
        self,
        request: Request,
        model: str,
        rid: str,
        on_first_token: Callable[[], None] | None,
        rank: int | None,
    ) -> Reply:
        """Send a chat request; again, without an optional field, if the server refuses that field."""
        headers = trace_headers()
        if request.group:
            headers[wire.ROUTING_KEY] = request.group
        without, is_streamed = self._without, on_first_token is not None
        while True:
            reply = await self.transport.exchange(
                "POST",
                wire.CHAT,
                body=wire.chat_body(
                    request,
                    model,
                    rid,
                    stream=is_streamed,
                    details=self.features.has_details,
                    rank=rank,
                    without=without,
                ),
                headers=headers,
                timeout_s=self._request_timeout_s,
                on_data=on_first_token,
            )
            refused = wire.refused_field(reply.status, reply.body)
            if refused is None or refused in without:
                break
            without |= {refused}
        wire.check_rate_limit(reply.status, reply.body, self.url, reply.retry_after_s)
        new = without - self._without
        if new and reply.status == 200:  # else something else was wrong
            self._leave_out(new)
        return reply

    def _leave_out(self, fields: Collection[str]) -> None:
        """Send no more of the optional fields that it has refused."""
        self._without |= set(fields)
        log.info("fleet.field_refused", server=self.url, fields=sorted(fields), then="sent without")

    async def abort(self, rid: str) -> None:
        """Abort the request with this rid, unless the server does not take rids.

        Raises:
            ServerError: The server did not answer; it notices the lost connection when it writes its answer.
        """
        if "rid" in self._without:
            return
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

    async def ask_features(self) -> None:
        """Ask what it can do: once after each start.

        Raises:
            ServerError: It did not answer.
        """
        self.features = Features()
        reply = await self.transport.exchange("GET", wire.SERVER_INFO, timeout_s=_LOAD_TIMEOUT_S)
        if reply.status == 200:
            self.features = parse_features(reply.body)

    async def weight_version(self) -> str | None:
        """Return the version of its weights; None if it does not report one.

        Raises:
            ServerError: It did not answer.
        """
        reply = await self.transport.exchange("GET", wire.MODEL_INFO, timeout_s=_CONTROL_TIMEOUT_S)
        return wire.name_in(reply.body, "weight_version") if reply.status == 200 else None

    async def _check_health(self) -> None:
        """Ask SGLang's health route; other servers may lack it, or have something else there."""
        try:
            reply = await self.transport.exchange("GET", wire.HEALTH, timeout_s=_CONTROL_TIMEOUT_S)
        except WrongAddress:
            return
        if reply.status >= 500:
            raise ServerUnavailable(f"{self.url}{wire.HEALTH} answered {reply.status}")

    async def models(self) -> list[str]:
        """Return the models it serves, if it is healthy.

        Raises:
            WrongAddress: It has no list of models, or redirects to it.
            ServerError: It is not healthy.
            ConfigError: It does not accept the key.
        """
        await self._check_health()
        reply = await self.transport.exchange("GET", wire.MODELS, timeout_s=_CONTROL_TIMEOUT_S)
        if reply.status in (401, 403):
            raise ConfigError(
                f"{self.url} does not accept the key (HTTP {reply.status}); set {self._key_name}, or give "
                "the user and password in the URL"
            )
        if reply.status in (404, 405):
            asked = route(self.url, wire.MODELS)
            raise WrongAddress(f"{self.url}{asked} answered {reply.status}: {_GIVE_BASE}")
        if reply.status != 200:
            raise wire.error_for(reply.status, "no list of models", self.url)
        try:
            models = wire.parse_models(reply.body)
        except BrokenResponse as error:  # the page of a web interface, most likely
            raise WrongAddress(f"{self.url}: {error}: {_GIVE_BASE}") from error
        return [await self._served_name(model) if model.startswith("/") else model for model in models]

    async def context_tokens(self, model: str) -> int | None:
        """Return the context length of a model in tokens; None if the server does not report one.

        Raises:
            ServerError: It did not answer.
        """
        reply = await self.transport.exchange("GET", wire.MODELS, timeout_s=_CONTROL_TIMEOUT_S)
        return wire.parse_context_tokens(reply.body, model) if reply.status == 200 else None

    async def _served_name(self, model: str) -> str:
        """Return the name of a model before a weight update from the directory `model`.

        After a weight update SGLang 0.5.23 uses the directory as the model's name everywhere but here.
        """
        reply = await self.transport.exchange("GET", wire.SERVER_INFO, timeout_s=_CONTROL_TIMEOUT_S)
        return (wire.name_in(reply.body, "served_model_name") if reply.status == 200 else None) or model
