"""Exam questions in the model's chat format: stop tokens, and templates that fail."""

from pathlib import Path

import orjson
import pytest

from streamsyn.config.command_sections import LongBenchSection, NeedlesSection
from streamsyn.errors import ConfigError
from streamsyn.scoring.suites.needle_suite import needle_questions
from streamsyn.trainer.evaluation.exam import Chat
from streamsyn.trainer.evaluation.longbench import longbench_questions
from tests.trainer import tiny

OPENING = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|system|>{% endfor %}<|assistant|>"
LONG_REFUSED = tiny.TEMPLATE + "{{ '' if 1 // (0 if messages[0]['content'] | length > 100 else 1) }}"


def chat(template: str) -> Chat:
    """The chat of a model with this template."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    return Chat(tokenizer, more_stops=(7,))


def test_stop_tokens() -> None:
    """The token that the template puts after an answer, eos, and those given; not what follows them."""
    eos, system = (tiny.tokenizer().convert_tokens_to_ids(one) for one in ("<|end|>", "<|system|>"))

    assert {eos, 7} == chat(tiny.TEMPLATE).stop
    assert {eos, 7, system} == chat(OPENING).stop == chat(OPENING).prompt("why", 3).stop


def test_a_template_that_refuses_a_question_is_an_error(tmp_path: Path) -> None:
    """Whatever it raises: one line with the keys that the question comes from."""
    row = {"input": "Who?", "context": "Ada. " * 100, "answers": ["Ada"], "dataset": "qasper"}
    (tmp_path / "rows.jsonl").write_bytes(orjson.dumps(row))
    failing = chat(LONG_REFUSED)
    why = r"^train\.needles or train\.longbench: .* the chat template fails: .* by zero$"

    with pytest.raises(ConfigError, match=why):
        list(needle_questions(NeedlesSection(lengths=(1024,)), 0, failing))
    with pytest.raises(ConfigError, match=why):
        longbench_questions(LongBenchSection(path=str(tmp_path / "rows.jsonl")), failing, 1024)
