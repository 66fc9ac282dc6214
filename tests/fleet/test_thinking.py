"""Thinking: what is sent to switch it, and answers without thoughts."""

from typing import Any

import pytest
from structlog.testing import capture_logs

from streamsyn.config.sections import RecipeSection
from streamsyn.fleet.thinking import SWITCHES, Thinking, cleaned, switched
from streamsyn.records import Completion, Request

REQUEST = Request([{"role": "user", "content": "Write."}], {"temperature": 0.8, "max_tokens": 100})
THOUGHT = "I will write of the river.\n"
TEXT = "The river rose."


def completion(text: str, finish_reason: str = "stop", **more: Any) -> Completion:
    return Completion(text, finish_reason, 10, 0, 20, "m", "http://one", **more)


def added(mode: Any, model: str) -> dict[str, Any]:
    """What a mode adds to a request."""
    sampling = switched(REQUEST, mode, model).sampling
    return {name: value for name, value in sampling.items() if name not in REQUEST.sampling}


@pytest.mark.parametrize(
    ("model", "off"),
    [
        ("Qwen/Qwen3-8B", {"chat_template_kwargs": {"enable_thinking": False, "thinking": False}}),
        (
            "deepseek-ai/DeepSeek-V3.1",
            {"chat_template_kwargs": {"enable_thinking": False, "thinking": False}},
        ),
        ("anything", {"chat_template_kwargs": {"enable_thinking": False, "thinking": False}}),
        ("", {"chat_template_kwargs": {"enable_thinking": False, "thinking": False}}),
        ("openai/gpt-oss-20b", {"reasoning_effort": "low"}),
        ("openai/o3-mini", {"reasoning_effort": "low"}),
        ("gpt-5.1", {"reasoning_effort": "low"}),
        ("mistralai/Mistral-Small-4-119B", {"reasoning_effort": "none"}),
        ("ByteDance-Seed/Seed-OSS-36B-Instruct", {"chat_template_kwargs": {"thinking_budget": 0}}),
        ("MiniMaxAI/MiniMax-M3", {"chat_template_kwargs": {"thinking_mode": "disabled"}}),
    ],
)
def test_thinking_is_switched_off_by_the_model(model: str, off: dict[str, Any]) -> None:
    """By its name; switching it on sends something else, or nothing."""
    assert added("off", model) == off
    assert added("on", model) != off
    assert added("auto", model) == {}


def test_every_switch_is_tried() -> None:
    """The table above has a model for each."""
    assert len(SWITCHES) == 6
    assert SWITCHES[-1].pattern == ""


def test_the_fields_of_the_user_win() -> None:
    """One by one within the template's variables."""
    own = {"chat_template_kwargs": {"thinking": True, "date": "today"}, "reasoning_effort": "high"}
    request = Request(REQUEST.messages, own)

    assert switched(request, "off", "Qwen3").sampling == {
        "chat_template_kwargs": {"enable_thinking": False, "thinking": True, "date": "today"},
        "reasoning_effort": "high",
    }
    assert switched(request, "off", "gpt-oss-20b").sampling == own
    assert request.sampling == own


def test_thinking_gets_room_only_when_it_is_on() -> None:
    """The maximum of the answer itself stays."""

    def max_tokens(mode: Any) -> int:
        section = RecipeSection(thinking=mode, thinking_tokens=500)
        return int(Thinking(section).request(REQUEST, "m").sampling["max_tokens"])

    assert (600, 100, 100) == (max_tokens("on"), max_tokens("off"), max_tokens("auto"))


def test_a_model_that_thinks_although_it_is_off_is_logged_once() -> None:
    """Once for each model; not if thinking is wanted."""
    thought = cleaned(completion(f"<think>{THOUGHT}</think>{TEXT}"))
    with capture_logs() as logs:
        for mode in ("off", "auto"):
            thinking = Thinking(RecipeSection(thinking=mode))
            for answer in (completion(TEXT), thought, thought):
                thinking.answered(answer)

    assert [("recipe.still_thinks", "m")] == [(entry["event"], entry["model"]) for entry in logs]


def test_an_answer_is_cleaned() -> None:
    """Its thought is kept apart, and its tokens are estimated; the text and the thought are the answer."""
    raw = f"<think>{THOUGHT}</think>\n{TEXT}"
    made = cleaned(completion(raw, "length"))

    assert (TEXT, raw, "length") == (made.text, made.thought + made.text, made.finish_reason)
    assert (15, 5) == (made.thinking_tokens, made.text_tokens)
    assert not made.is_only_thought


def test_tokens_that_the_server_counted_are_kept() -> None:
    """They are exact."""
    assert 9 == cleaned(completion(f"<think>{THOUGHT}</think>{TEXT}", thinking_tokens=9)).thinking_tokens


def test_a_text_beside_a_thought_that_the_server_keeps_apart_is_text() -> None:
    """Also if the prompt opens a thought: the server has closed it."""
    assert TEXT == cleaned(completion(TEXT, thinking_tokens=9), is_open=True).text


def test_a_second_turn_is_cut() -> None:
    """The first one ended, whatever ended the second."""
    made = cleaned(completion(f"{TEXT}<|im_end|>\n<|im_start|>user\nMore?", "length"))

    assert (TEXT, "stop") == (made.text, made.finish_reason)


@pytest.mark.parametrize("text", [THOUGHT, f"<think>{THOUGHT}"])
def test_a_cut_thought_is_only_thought(text: str) -> None:
    """With its mark, or with the mark in the prompt."""
    made = cleaned(completion(text, "length"), is_open=True)

    assert ("", 20, True) == (made.text, made.thinking_tokens, made.is_only_thought)
