"""Models that think, on the real SGLang: a chat template that opens `<think>` in the prompt.

The packaged model does not think. A grammar makes it write a thought, the closing mark, and a text.
"""

import asyncio
import json
import re
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from streamsyn.config.sections import FleetSection
from streamsyn.fleet.fleet import open_fleet
from streamsyn.fleet.launch import find_packaged_model
from streamsyn.records import Request
from tests.real.conftest import RealServer
from tests.real.test_job import HELPS, PROMPT, QUESTION, SEEDS
from tests.system.conftest import assert_clean, rows, streamsyn

pytestmark = [pytest.mark.real_sglang, pytest.mark.timeout(300)]

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' + m['content'] }}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '\n</think>\n\n' }}{% endif %}{% endif %}"
)
"""As that of Qwen 3: thinking is on unless it is switched off."""
ALWAYS = TEMPLATE.replace("enable_thinking", "other")
"""As that of DeepSeek R1: it has no switch."""
THINKS = r"SECRET [a-z ]{20,50}\n</think>\n\n[A-Z][a-z]{2,9}( [a-z]{2,9}){8,14}\."
OPTIONS = {
    "recipe.max_tokens": 90,
    "recipe.tries": 1,
    "checks.min_words": 5,
    "checks.max_repetition": 1,
    "fleet.concurrency": 4,
    "assembly.contexts_per_sample": 2,
    "seeds.limit": 2,
}


def test_contexts_are_without_the_thought_that_the_prompt_opened(
    real_server: RealServer, tmp_path: Path
) -> None:
    """Only its closing mark is in the answers."""
    config, out = tmp_path / "run.toml", tmp_path / "out"
    config.write_text(
        "[recipe.sampling]\n"
        f"regex = '{THINKS}'\n"
        f"chat_template_kwargs = {{chat_template = {json.dumps(ALWAYS)}}}\n"
    )
    settings = [part for key, value in OPTIONS.items() for part in ("--set", f"{key}={value}")]
    command = ["run", config, "--seeds", SEEDS, "--server", real_server.url, "--out", out, "--no-progress"]

    done = streamsyn(*command, *settings, timeout_s=250)

    assert done.returncode == 0, done.stderr
    assert_clean(out)
    contexts = rows(out, "contexts")
    assert len(contexts) == 2
    for row in contexts:
        assert not {"SECRET", "think", "/think"} & set(re.findall(r"[\w/]+", row["context"]))
        assert 0 < row["thinking_tokens"] < row["completion_tokens"]
        assert set(row["checks"]["flags"]) <= {"truncated"}, "a small model may write on and on"


async def test_an_answer_that_was_cut_before_the_mark_is_only_thought(real_server: RealServer) -> None:
    """It has no mark at all: that the prompt opened the thought is asked of the server."""
    sampling = {"max_tokens": 8, "regex": THINKS, "chat_template_kwargs": {"chat_template": ALWAYS}}
    async with open_fleet(FleetSection(servers=(real_server.url,)), lambda _: None) as fleet:
        await fleet.ask_models()
        completion = await fleet.complete(Request(PROMPT.messages(QUESTION), sampling), [])

    assert ("", 8, 8) == (completion.text, completion.completion_tokens, completion.thinking_tokens)
    assert completion.thought.startswith("SECRET ")


@pytest.mark.parametrize("template", [TEMPLATE, ALWAYS])
async def test_the_context_gain_is_that_of_an_answer_after_the_thought(
    real_server: RealServer, template: str
) -> None:
    """As plain transformers compute it after an empty thought, within the rounding of bfloat16."""
    variables: dict[str, Any] = {"chat_template": template, "enable_thinking": False}
    nll: dict[str, float] = {}
    section = FleetSection(servers=(real_server.url,))
    async with open_fleet(section, lambda _: None) as fleet:
        await fleet.ask_models()
        for context in (HELPS, ""):
            request = Request(
                PROMPT.messages(QUESTION, context),
                {"chat_template_kwargs": variables},
                scored=QUESTION.answer,
            )
            nll[context] = -fmean((await fleet.complete(request, [])).logprobs)

    expected = {context: await asyncio.to_thread(plain_nll, context) for context in (HELPS, "")}
    assert nll == pytest.approx(expected, abs=0.05)
    assert nll[""] - nll[HELPS] == pytest.approx(expected[""] - expected[HELPS], abs=0.05)
    assert nll[""] - nll[HELPS] > 0.3


@cache
def plain_nll(context: str) -> float:
    """The mean negative log-likelihood of the gold answer, by transformers in float32."""
    tokenizer, model = plain_model()
    tokenizer.chat_template = TEMPLATE
    text = tokenizer.apply_chat_template(
        PROMPT.messages(QUESTION, context), tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert text.endswith("<think>\n\n</think>\n\n")
    prompt, answer = (
        tokenizer(one, add_special_tokens=False)["input_ids"] for one in (text, QUESTION.answer)
    )
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    logprobs = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
    return -float(logprobs.mean())


@cache
def plain_model() -> tuple[Any, Any]:
    """The packaged model with its tokenizer."""
    folder = find_packaged_model()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return AutoTokenizer.from_pretrained(folder), model
