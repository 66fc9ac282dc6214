"""Models that think: how thinking is switched on and off, and answers without their thoughts.

There is no common switch. Chat templates read a variable, most of them `enable_thinking` or `thinking`, and
ignore variables that they do not know; some models and services take `reasoning_effort`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal, TypeAlias

import structlog

from streamsyn.config.sections import RecipeSection
from streamsyn.control_tokens import first_turn
from streamsyn.records import Completion, Request
from streamsyn.thoughts import split_thought, thought_tokens

log = structlog.get_logger()

Mode: TypeAlias = Literal["auto", "off", "on"]

TEMPLATE_VARIABLES = "chat_template_kwargs"
EFFORT = "reasoning_effort"
CONTINUES = "continue_final_message"


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
