"""Thinking: what is sent to switch it, answers without thoughts, and prompts that open a thought."""

import asyncio
import re
from typing import Any

import orjson
import pytest
from structlog.testing import capture_logs

from streamsyn.config.sections import RecipeSection
from streamsyn.errors import ServerTimeout
from streamsyn.fleet import prefixes
from streamsyn.fleet.client import ServerClient
from streamsyn.fleet.thinking import SWITCHES, PromptEnd, PromptEnds, Thinking, cleaned, switched
from streamsyn.fleet.transport import Reply
from streamsyn.records import Completion, Request
from streamsyn.scoring.measures import AnswerPrompt, Answers, Gain, Likelihood, Question, ScoringClient
from tests.examples import in_turn

REQUEST = Request([{"role": "user", "content": "Write."}], {"temperature": 0.8, "max_tokens": 100})
THOUGHT = "I will write of the river.\n"
TEXT = "The river rose."


def completion(text: str, finish_reason: str = "stop", **more: Any) -> Completion:
    return Completion(text, finish_reason, 10, 0, 20, "m", "http://one", **more)


def added(mode: Any, model: str) -> dict[str, Any]:
    """What a mode adds to a request."""
    sampling = switched(REQUEST, mode, model).sampling
    return {name: value for name, value in sampling.items() if name not in REQUEST.sampling}


@in_turn(
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


MARKS = re.compile(r"<[^<>\s]+>|.", re.DOTALL)
PROMPT = AnswerPrompt()
QUESTION = Question("When?", "In 1931.", "qa")


class ThinkingServer:
    """A server with a token for each mark and each character, and the template of a thinking model.

    Args:
        end: What the template writes before an answer. If it opens a thought, `enable_thinking = false`
            closes that at once.
        answers: What the model writes.
        parser: The server's reasoning parser.
        switch: Whether the template has that variable.
    """

    def __init__(
        self,
        end: str = "<|im_start|>assistant\n<think>\n",
        *answers: str,
        parser: str | None = None,
        switch: bool = True,
    ) -> None:
        self._end = end
        self._answers = list(answers)
        self._parser = parser
        self._switch = switch
        self._marks: list[str] = []
        self.paths: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.failing: set[str] = set()

    async def exchange(self, _method: str, path: str, *, body: bytes | None = None, **_: Any) -> Reply:
        await asyncio.sleep(0)
        self.paths.append(path)
        if path in self.failing:
            raise ServerTimeout("late")
        asked = orjson.loads(body) if body else {}
        self.bodies.append(asked)
        answer = {
            "/tokenize": self._tokenize,
            "/detokenize": lambda asked: {"text": self.text(asked["tokens"])},
            "/server_info": lambda _: {"reasoning_parser": self._parser},
            "/generate": self._score,
            "/v1/chat/completions": self._chat,
        }[path](asked)
        return Reply(200, orjson.dumps(answer))

    def text(self, tokens: list[int]) -> str:
        return "".join(chr(token) if token < 2**21 else self._marks[token - 2**21] for token in tokens)

    def _tokens(self, text: str) -> list[int]:
        pieces = MARKS.findall(text)
        self._marks += [piece for piece in pieces if len(piece) > 1 and piece not in self._marks]
        return [ord(one) if len(one) == 1 else 2**21 + self._marks.index(one) for one in pieces]

    def _tokenize(self, asked: dict[str, Any]) -> dict[str, Any]:
        text = asked.get("prompt")
        if text is None:
            turns = [f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in asked["messages"]]
            text = "".join(turns) + self._end
            if self._switch and asked.get("chat_template_kwargs", {}).get("enable_thinking") is False:
                text += "\n</think>\n\n"
        return {"tokens": self._tokens(text)}

    def _score(self, asked: dict[str, Any]) -> dict[str, Any]:
        rows = [[-0.5, token, None] for token in asked["input_ids"]]
        meta = {"finish_reason": {"type": "length"}, "prompt_tokens": len(rows), "input_token_logprobs": rows}
        return {"meta_info": meta}

    def _chat(self, asked: dict[str, Any]) -> dict[str, Any]:
        text = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        finish_reason = "length" if len(text) >= asked["max_tokens"] else "stop"
        message = {"role": "assistant", "content": text[: asked["max_tokens"]]}
        usage = {"prompt_tokens": 9, "completion_tokens": len(message["content"])}
        return {
            "model": "m",
            "choices": [{"message": message, "finish_reason": finish_reason}],
            "usage": usage,
        }


def client_of(server: Any) -> ServerClient:
    return ServerClient("http://s", server, 5.0)


class OneServer:
    """A fleet of one server."""

    def __init__(self, server: Any) -> None:
        self._client = client_of(server)

    async def complete(self, request: Request, _attempts: Any, model: str) -> Completion:
        return await self._client.complete(request, model, "rid")


def scoring(server: Any) -> ScoringClient:
    fleet: Any = OneServer(server)
    return ScoringClient(fleet, "m")


async def scored_text(server: ThinkingServer) -> str:
    """The text that the server scores for a gold answer, from the last turn on."""
    likelihood = await Gain(PROMPT, 256).likelihood(scoring(server), QUESTION)
    assert likelihood == Likelihood(0.5, len(QUESTION.answer))
    return server.text(server.bodies[-1]["input_ids"]).rpartition("<|im_end|>\n")[2]


@pytest.mark.parametrize("switch", [True, False])
async def test_an_answer_is_never_scored_as_a_thought(switch: bool) -> None:
    """By the template's switch, or else the open thought is closed as templates close it."""
    server = ThinkingServer(switch=switch)

    assert await scored_text(server) == "<|im_start|>assistant\n<think>\n\n</think>\n\nIn 1931."


@pytest.mark.parametrize(
    ("end", "scored"),
    [
        ("<|im_start|>assistant\n", "<|im_start|>assistant\nIn 1931."),
        ("<|im_start|>assistant\n<think>", "<|im_start|>assistant\n<think>\n\n</think>\n\nIn 1931."),
        (
            "<|im_start|>assistant\n<seed:think>\n\n",
            "<|im_start|>assistant\n<seed:think>\n\n</seed:think>\n\nIn 1931.",
        ),
        ("<|start|>assistant", "<|start|>assistant<|channel|>final<|message|>In 1931."),
        ("<|im_start|>assistant\n<think>\nOkay,", "<|im_start|>assistant\n<think>\nOkay,In 1931."),
    ],
)
async def test_prompts_of_other_templates(end: str, scored: str) -> None:
    """Only an opening mark at the end of the prompt is closed."""
    assert await scored_text(ThinkingServer(end, switch=False)) == scored


async def test_the_end_of_prompts_is_found_out_once() -> None:
    """For each set of fields, also by requests at the same time, and if the server fails."""
    server = ThinkingServer()
    ends = PromptEnds(server, "http://s")  # type: ignore[arg-type]
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    found = await asyncio.gather(*(ends.of("m", {}) for _ in range(5)), ends.of("m", off))

    assert [True] * 5 + [False] == [end.is_open for end in found]
    assert 2 == server.paths.count("/server_info") + found.count(PromptEnd())
    asked = len(server.paths)
    assert found[0] == await ends.of("m", {})
    assert asked == len(server.paths)

    server.failing = {"/detokenize"}
    assert [PromptEnd()] * 2 == [await ends.of("other", {}) for _ in range(2)]
    assert asked + 2 == len(server.paths)


SHORT = Request([{"role": "user", "content": "Write."}], {"max_tokens": 30})


@pytest.mark.parametrize(
    ("text", "parser", "sampling", "made"),
    [
        ("I will write of a mill, and then of a river", None, {}, ("", True)),
        ("So.\n</think>\n\nThe mill.", None, {}, ("The mill.", False)),
        (
            "The mill stood by the river until it burned",
            "qwen3",
            {},
            ("The mill stood by the river un", False),
        ),
        (
            "The mill stood by the river until it burned",
            None,
            {"continue_final_message": True},
            ("The mill stood by the river un", False),
        ),
    ],
)
async def test_an_answer_to_a_prompt_that_opens_a_thought(
    text: str, parser: str | None, sampling: dict[str, Any], made: tuple[str, bool]
) -> None:
    """Without a closing mark it is all thought, unless the server keeps thoughts apart, or it continues."""
    request = Request(SHORT.messages, SHORT.sampling | sampling)
    completion = await client_of(ThinkingServer("<think>\n", text, parser=parser)).complete(
        request, "m", "rid"
    )

    assert made == (completion.text, completion.is_only_thought)


async def test_a_model_that_thinks_gets_room_to_answer() -> None:
    """It is asked again with more tokens, and then always; a thought that fills those, too, is an error."""
    thought = "<think>" + "Hm. " * 20 + "</think>In 1931."
    server = ThinkingServer("", thought, thought, thought, "<think>" + "Hm. " * 80)
    answers, client = Answers(PROMPT, 20, "auto", 200), scoring(server)

    assert ["In 1931."] * 2 == [await answers.answer(client, QUESTION) for _ in range(2)]
    asked = [body["max_tokens"] for body in server.bodies if "max_tokens" in body]
    assert [20, 220, 220] == asked
    with pytest.raises(Exception, match=r"still thinking at scoring\.max_answer_tokens .* = 220"):
        await answers.answer(client, QUESTION)


def test_what_templates_see_is_part_of_the_prefix() -> None:
    """Two requests whose template gets other variables share no prefix; the same ones do."""
    off, on = (prefixes.conversation_text(switched(SHORT, mode, "m")) for mode in ("off", "on"))
    longer = Request([*SHORT.messages, {"role": "assistant", "content": "Yes."}], SHORT.sampling)

    assert prefixes.block_keys(off * 9)[0] != prefixes.block_keys(on * 9)[0]
    assert prefixes.conversation_text(switched(longer, "off", "m")).startswith(off)
    assert prefixes.conversation_text(longer).startswith(prefixes.conversation_text(SHORT))
