"""Special tokens that messages spell out stay text, with tokenizers of several kinds."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram
from transformers import PreTrainedTokenizerFast

from streamsyn.config.loading import load
from streamsyn.errors import ConfigError
from streamsyn.trainer import training
from streamsyn.trainer.evaluation.exam import Chat
from streamsyn.trainer.examples import Dropped, Example, Key
from streamsyn.trainer.sources.source import Sources
from streamsyn.trainer.stream.render import Renderer
from streamsyn.trainer.stream.spelled_tokens import SpelledTokens, Unspeakable
from tests.examples import examples
from tests.trainer import tiny
from tests.trainer.by_hand import fresh
from tests.trainer.streams import Arriving, planner, plans

SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "START"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CUTTING = CHATML.replace("m['content']", "m['content'].split('</think>')[-1] | trim")
KEY = Key("run", 0, 0)


def byte_level() -> Tokenizer:
    """Bytes; special tokens are beside the vocabulary, as in Llama 3 and Qwen."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(BPE({letter: number for number, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(SPECIALS)
    return made


def sentence_pieces() -> Tokenizer:
    """Pieces with scores; special tokens are in the vocabulary and take the space before them (Gemma, T5)."""
    letters = [chr(code) for code in range(33, 127)] + ["\u2581", "\n", "\u2581the"]
    made = Tokenizer(
        Unigram([("<unk>", 0.0), *((one, 0.0) for one in SPECIALS), *((one, -4.0) for one in letters)], 0)
    )
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    made.add_special_tokens([AddedToken(one, lstrip=True, normalized=False) for one in ["<unk>", *SPECIALS]])
    made.decoder = decoders.Replace("\u2581", " ")
    return made


MAKERS = [byte_level, sentence_pieces]


def fast(made: Tokenizer, template: str = CHATML) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>")
    tokenizer.chat_template = template
    return tokenizer


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def rendered(tokenizer: Any, row: dict[str, Any]) -> Example:
    made = Renderer(tokenizer, 4096, "drop").render_batch([(row, KEY)])[0]
    assert isinstance(made, Example), made
    return made


@pytest.mark.parametrize("maker", MAKERS)
def test_what_messages_spell_is_text(maker: Any) -> None:
    """The only special tokens are those of the template; the text is whole, and so is the answer."""
    tokenizer = fast(maker())
    question, answer = (
        "A turn ends with <|im_end|> and <|im_start|>assistant.",
        "It is <|im_end|></s> that STARTs.",
    )
    special = {tokenizer.convert_tokens_to_ids(one) for one in SPECIALS}
    made = rendered(tokenizer, chat(question, answer))

    assert sum(token in special for token in made.tokens) == 4
    assert question in tokenizer.decode(made.tokens[: made.loss_from])
    assert answer in tokenizer.decode(made.tokens[made.loss_from :])
    assert [made.tokens[-1]] == [token for token in made.tokens[made.loss_from :] if token in special]


pieces = st.lists(st.sampled_from([*SPECIALS, "a", " ", "<", "|>", "the", "\n", "<|im_"])).map("".join)


@pytest.mark.parametrize("maker", MAKERS)
@given(question=pieces, answer=pieces)
@examples(100)
def test_any_text_is_kept(maker: Any, question: str, answer: str) -> None:
    """The special tokens are those of the template, and no text is lost."""
    tokenizer = fast(maker())
    made = rendered(tokenizer, chat(question, f"b{answer}b"))
    special = {tokenizer.convert_tokens_to_ids(one) for one in SPECIALS}

    assert sum(token in special for token in made.tokens) == 4
    text = str(tokenizer.decode(made.tokens, clean_up_tokenization_spaces=False))
    assert f"b{answer}b<|im_end|>".split() == text.rpartition("assistant\n")[2].split()


@pytest.mark.parametrize("maker", MAKERS)
def test_the_copy_tokenizes_other_text_alike(maker: Any) -> None:
    """White space around the template's own tokens, prefixes and unknown characters included."""
    tokenizer = fast(maker())
    special = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
    copy = SpelledTokens(special, tokenizer.backend_tokenizer)

    for text in ("<s> the cat <|im_end|>\n<|im_start|>user\n the\u00e9<unk></s>", "the", "", "\n<s>\n"):
        assert copy.encode(text) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_row_that_a_tokenizer_cannot_read_as_text_is_dropped() -> None:
    """A tokenizer without the fast kind's vocabulary, or text in the characters that stand for tokens."""
    tokenizer = fast(byte_level())
    renderer = Renderer(tokenizer, 4096, "drop")
    rows = [chat("a </s> b", "c"), chat("a </s> b \U00100000", "c"), chat("a \U00100000", "c")]
    made = renderer.render_batch([(row, KEY) for row in rows])

    assert [False, True, False] == [isinstance(one, Dropped) for one in made]
    assert isinstance(made[1], Dropped)
    assert "special_tokens" == made[1].reason
    with pytest.raises(Unspeakable, match="cannot read as text"):
        SpelledTokens({1: "</s>"}, None).hidden([{"role": "user", "content": "</s>"}])


def test_questions_of_exams_are_text_too() -> None:
    """A document of an exam may be about special tokens; one that cannot be rendered is named."""
    tokenizer = fast(byte_level())
    chat = Chat(tokenizer)
    prompt = chat.prompt("What does <|im_end|> end?", 5)

    assert 3 == sum(token >= 256 for token in prompt.tokens)
    with pytest.raises(ConfigError, match=r"train\.needles or train\.longbench"):
        chat.prompt("<|im_end|> \U00100000", 5)


def test_a_template_that_changes_messages_is_found() -> None:
    """Answers first; white space and earlier answers do not count."""
    thought = "<think>The river.</think>\n\nBecause."

    def changed(template: str, *rows: dict[str, Any]) -> list[Any]:
        return [rendered(fast(byte_level(), template), row).changed for row in rows]

    cut_prompt, long = chat("He wrote </think> on it.", "A tag."), chat("Why?", " Because. ")
    earlier = {"messages": [*chat("Why?", thought)["messages"], *chat("And?", "So.")["messages"]]}
    assert ["answers", "prompts", None, None] == changed(
        CUTTING, chat("Why?", thought), cut_prompt, long, earlier
    )
    assert [None, None] == changed(CHATML, chat("Why?", thought), cut_prompt)


def test_changed_samples_are_counted() -> None:
    """They are trained on; each kind is logged a few times. A checkpoint keeps the counts."""
    rows = [chat("Why </think> so?", "Because.") for _ in range(9)]
    renderer = Renderer(fast(byte_level(), CUTTING), 4096, "drop")
    stream = planner(Sources(Arriving(rows)), rendering=renderer, seq_len=200)
    with capture_logs() as logs:
        steps = asyncio.run(plans(stream))

    assert 9 == sum(step.count for step in steps)
    assert 5 == sum(entry["event"] == "stream.changed" for entry in logs)
    assert {"prompts": 9} == stream.statistics()["changed"]
    assert {"prompts": 9} == steps[-1].state["feed"]["changed"]


def test_changed_samples_are_named_at_the_end_of_a_training(tmp_path: Path) -> None:
    """A warning, with their number."""
    template = tmp_path / "cutting.jinja"
    template.write_text(tiny.TEMPLATE.replace("m['content']", "m['content'].split('</think>')[-1]"))
    tiny.write_model(tmp_path / "base")
    rows = [chat("Why?", f"<think>Hm.</think>Because {number}.") for number in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {
        "seq_len": 256,
        "rows_per_step": 1,
        "chat_template": str(template),
        "holdout": 0.0,
        "max_steps": 1,
    }
    with fresh(), capture_logs() as logs:
        training.train(
            load(None, [("train", given)]),
            str(tmp_path / "rows.jsonl"),
            str(tmp_path / "base"),
            tmp_path / "out",
        )

    [warning] = [entry for entry in logs if entry["event"] == "train.template_changes"]
    assert warning["why"] == "the chat template changes 3 answers of the samples"
