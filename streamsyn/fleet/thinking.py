"""Models that think: how thinking is switched on and off, and how thoughts in answers and prompts are found.

There is no common switch. Chat templates read a variable, most of them `enable_thinking` or `thinking`, and
ignore variables that they do not know; some models and services take `reasoning_effort`.

Some chat templates end a prompt with the opening mark of a thought: then an answer begins with the rest of
that thought, and what is scored would be scored as a thought, so the thought is closed first.
"""

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal, TypeAlias

import orjson
import structlog

from streamsyn.answer_text import first_turn, opens_thought, split_thought, thought_tokens
from streamsyn.config.sections import RecipeSection
from streamsyn.errors import ServerError
from streamsyn.fleet import wire
from streamsyn.fleet.transport import Transport
from streamsyn.records import Completion, Request

log = structlog.get_logger()

Mode: TypeAlias = Literal["auto", "off", "on"]

TEMPLATE_VARIABLES = "chat_template_kwargs"
EFFORT = "reasoning_effort"
CONTINUES = "continue_final_message"
_PROBE = [{"role": "user", "content": "Is it?"}]
_WINDOW = 16
"""Tokens at the end of a prompt that are looked at."""
_MAX_SPACE = 4
"""Tokens of white space after an opening mark that are recognised."""
_CHANNELS = ("<|start|>assistant", "<|channel|>final<|message|>")
"""The end of a gpt-oss prompt, and the start of an answer without a thought."""
_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Switch:
    """The fields of a request that switch thinking, for models whose name has `pattern`."""

    pattern: str
    off: Mapping[str, Any] = field(default_factory=dict)
    on: Mapping[str, Any] = field(default_factory=dict)


SWITCHES = (
    # These always think: the least they can do, and their default.
    Switch(r"gpt-?oss", {EFFORT: "low"}, {EFFORT: "medium"}),
    Switch(r"(?:^|/)(?:o\d|gpt-5)(?![a-z])", {EFFORT: "low"}, {EFFORT: "medium"}),
    Switch(r"mistral-(?:small-4|medium-3\.5)", {EFFORT: "none"}, {EFFORT: "high"}),
    Switch(r"seed-?oss", {TEMPLATE_VARIABLES: {"thinking_budget": 0}}),
    Switch(
        r"minimax-?m3",
        {TEMPLATE_VARIABLES: {"thinking_mode": "disabled"}},
        {TEMPLATE_VARIABLES: {"thinking_mode": "enabled"}},
    ),
    # Qwen 3, GLM 4.5, Nemotron 3, SmolLM3, Hunyuan, ERNIE read the first; DeepSeek V3.1, Kimi K2, Granite
    # the second. Models without a switch ignore both.
    Switch(
        "",
        {TEMPLATE_VARIABLES: {"enable_thinking": False, "thinking": False}},
        {TEMPLATE_VARIABLES: {"enable_thinking": True, "thinking": True}},
    ),
)
"""The first one whose pattern is found in the model's name counts; upper and lower case do not matter."""


def switched(request: Request, mode: Mode, model: str, *, more_tokens: int = 0) -> Request:
    """Return a request with the fields that switch thinking; those that it has already win.

    Args:
        request: The request.
        mode: `auto` adds nothing.
        model: The name of the model, by which `SWITCHES` is searched.
        more_tokens: Added to its `max_tokens`, as room for the thought.
    """
    if mode == "auto" and not more_tokens:
        return request
    switch = _switch_of(model)
    fields = {"auto": {}, "off": switch.off, "on": switch.on}[mode]
    sampling = {**fields, **request.sampling}
    given = request.sampling.get(TEMPLATE_VARIABLES)
    if isinstance(given, dict) and TEMPLATE_VARIABLES in fields:
        sampling[TEMPLATE_VARIABLES] = {**fields[TEMPLATE_VARIABLES], **given}
    if more_tokens and isinstance(sampling.get("max_tokens"), int):
        sampling["max_tokens"] += more_tokens
    return replace(request, sampling=sampling)


@cache
def _switch_of(model: str) -> Switch:
    return next(one for one in SWITCHES if re.search(one.pattern, model, re.IGNORECASE))


def template_fields(request: Request) -> dict[str, Any]:
    """Return the fields of a request that its chat template sees besides the messages."""
    return {name: request.sampling[name] for name in (TEMPLATE_VARIABLES, EFFORT) if name in request.sampling}


class Thinking:
    """Asks models for what `recipe.thinking` says, and warns once if a model thinks although it is off.

    Args:
        section: The section `recipe`.
    """

    def __init__(self, section: RecipeSection) -> None:
        self._mode: Mode = section.thinking
        self._more_tokens = section.thinking_tokens if section.thinking == "on" else 0
        self._warned: set[str] = set()

    def request(self, request: Request, model: str) -> Request:
        """Return a recipe's request as it is sent to a model."""
        return switched(request, self._mode, model, more_tokens=self._more_tokens)

    def answered(self, completion: Completion) -> None:
        """Look at an answer."""
        if self._mode == "off" and completion.thinking_tokens and completion.model not in self._warned:
            self._warned.add(completion.model)
            log.warning(
                "recipe.still_thinks",
                model=completion.model,
                why="it thinks although recipe.thinking = off; if its chat template has a different switch, "
                "set it in recipe.sampling.chat_template_kwargs; otherwise leave room in recipe.max_tokens",
            )


def cleaned(completion: Completion, *, is_open: bool = False) -> Completion:
    """Return a completion whose text has no thought before it and no second turn behind it.

    Args:
        completion: As the server sent it; `thinking_tokens` are those that the server counted.
        is_open: Whether the prompt ends with the opening mark of a thought.
    """
    kept_apart = completion.thinking_tokens > 0
    thought, text = split_thought(completion.text, is_open=is_open and not kept_apart)
    text, has_ended = first_turn(text)
    if len(text) == len(completion.text):
        return completion  # nothing was removed
    thinking_tokens = completion.thinking_tokens or thought_tokens(
        thought, text, completion.completion_tokens
    )
    return replace(
        completion,
        text=text,
        thought=thought,
        thinking_tokens=thinking_tokens,
        # What was cut, if anything was, is a second turn.
        finish_reason="stop" if has_ended else completion.finish_reason,
    )


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
