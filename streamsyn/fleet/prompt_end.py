"""How a server's chat template ends a prompt: with the opening mark of a thought, or not.

An answer to a prompt that opens a thought begins with the rest of that thought. What is scored after such a
prompt would be scored as a thought, so the thought is closed first.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson
import structlog

from streamsyn.errors import ServerError
from streamsyn.fleet import wire
from streamsyn.fleet.transport import Transport
from streamsyn.thoughts import opens_thought

log = structlog.get_logger()

_PROBE = [{"role": "user", "content": "Is it?"}]
_WINDOW = 16
"""Tokens at the end of a prompt that are looked at."""
_MAX_SPACE = 4
"""Tokens of white space after an opening mark that are recognised."""
_CHANNELS = ("<|start|>assistant", "<|channel|>final<|message|>")
"""The end of a gpt-oss prompt, and the start of an answer without a thought."""
_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class PromptEnd:
    """The end of the prompts of one chat template.

    Attributes:
        is_open: Whether it opens a thought, and the server leaves it to us to find where that ends.
        space: Number of tokens of white space after the opening mark.
        closing: Tokens that, in place of that white space, end an empty thought; () if none is open.
    """

    is_open: bool = False
    space: int = 0
    closing: tuple[int, ...] = ()

    def closed(self, prompt: list[int]) -> list[int]:
        """Return a prompt after which an answer is not part of a thought."""
        return [*prompt[: len(prompt) - self.space], *self.closing] if self.closing else prompt


class PromptEnds:
    """The ends of the prompts of one server, each found out when it is first needed.

    Servers without the routes, or that fail, are taken to open no thought.

    Args:
        transport: Carries requests to the server.
        url: Its URL, for the log.
    """

    def __init__(self, transport: Transport, url: str) -> None:
        self._transport = transport
        self._url = url
        self._known: dict[bytes, PromptEnd] = {}
        self._asking = asyncio.Lock()

    async def of(self, model: str, fields: Mapping[str, Any]) -> PromptEnd:
        """Return the end of prompts.

        Args:
            model: The model.
            fields: The fields of a request that its chat template sees besides the messages.
        """
        key = orjson.dumps([model, fields], option=orjson.OPT_SORT_KEYS)
        if key not in self._known:
            async with self._asking:
                if key not in self._known:
                    self._known[key] = await self._ask(model, fields)
        return self._known[key]

    async def _ask(self, model: str, fields: Mapping[str, Any]) -> PromptEnd:
        try:
            return await self._find_out(model, fields)
        except (ServerError, KeyError, TypeError, AttributeError) as error:
            log.debug("fleet.prompt_end_unknown", server=self._url, error=repr(error))
            return PromptEnd()

    async def _find_out(self, model: str, fields: Mapping[str, Any]) -> PromptEnd:
        window = (await self._tokens(model, {"messages": _PROBE, **fields}))[-_WINDOW:]
        text = await self._text(model, window)
        if text.endswith(_CHANNELS[0]):
            return PromptEnd(closing=await self._tokens_of(model, _CHANNELS[1]))
        form = opens_thought(text)
        if form is None:
            return PromptEnd()
        space = 0
        while not text.endswith(form.opening) and space < _MAX_SPACE:
            space += 1
            text = await self._text(model, window[: len(window) - space])
        closing = await self._tokens_of(model, f"\n\n{form.closing}\n\n")
        is_open = not await self._has_parser()
        log.info("fleet.thought_opened", server=self._url, mark=form.opening, parsed_by_server=not is_open)
        return PromptEnd(is_open, space, closing)

    async def _tokens_of(self, model: str, text: str) -> tuple[int, ...]:
        return tuple(await self._tokens(model, {"prompt": text, "add_special_tokens": False}))

    async def _tokens(self, model: str, body: dict[str, Any]) -> list[int]:
        answer = await self._exchange("POST", wire.TOKENIZE, {"model": model, **body})
        return [wire.token_count(token) for token in answer["tokens"]]

    async def _text(self, model: str, tokens: list[int]) -> str:
        body = {"model": model, "tokens": tokens, "skip_special_tokens": False}
        answer = await self._exchange("POST", wire.DETOKENIZE, body)
        return wire.expect(answer["text"] if "text" in answer else answer["prompt"], str)  # SGLang's, vLLM's

    async def _has_parser(self) -> bool:
        """Whether the server keeps thoughts apart itself: then its texts have no marks."""
        try:
            return bool((await self._exchange("GET", wire.SERVER_INFO)).get("reasoning_parser"))
        except ServerError:  # others than SGLang do not have the route
            return False

    async def _exchange(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        sent = None if body is None else orjson.dumps(body)
        reply = await self._transport.exchange(method, path, body=sent, timeout_s=_TIMEOUT_S)
        return wire.parse_object(reply.status, reply.body, self._url)
