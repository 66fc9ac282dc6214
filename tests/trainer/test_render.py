import asyncio
import json
import threading
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from streamsyn.errors import ConfigError
from streamsyn.trainer.examples import Dropped, Example, Key
from streamsyn.trainer.sources.run_samples import RunSamples
from streamsyn.trainer.sources.source import Sources
from streamsyn.trainer.stream.render import MIN_PROMPT_TOKENS, Renderer
from tests.assembly.tokenizers_made import SUPPORTED, UNSUPPORTED
from tests.assembly.tokenizers_made import made as made_tokenizer
from tests.builders import opened, sample, sink
from tests.examples import examples, in_turn
from tests.trainer.streams import keys, planner, plans

SPECIALS = ["<s>", "</s>", "<|start|>", "<|end|>"]
CHATML = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ '\n' if not loop.first else '' }}"
    "{{ 'Q' if m['role'] == 'user' else 'A' }}:{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\nA:' }}{% endif %}"
)
TWO_ENDS = CHATML + "{% if not add_generation_prompt %}</s>{% endif %}"
THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
OPENING = (
    "{% for m in messages %}<|start|>{{ m['role'] }}<s>\n\n{{ m['content'] | trim }}<|end|>{% endfor %}"
    "{{ '<|start|>assistant<s>\n\n' }}"
)
LINE_BEFORE = CHATML.replace("<|end|>", "\n<|end|>")
FIXED = PLAIN.replace("m['content']", "'hello'")
SHORT_ENDED = CHATML.replace("{% endfor %}", "{% if loop.index > 3 %}</s>{% endif %}{% endfor %}")
FORGETFUL = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}<|end|>"
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHATML
)
ENDLESS = "{% macro more() %}{{ more() }}{% endmacro %}"
KEY = Key("run", 1, 5)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def tokenizer(template: str | None = CHATML, eos: str | None = "</s>") -> PreTrainedTokenizerFast:
    """Bytes, with some neighbours merged, across any boundary: `\\n\\n`, `: `."""
    made = Tokenizer(BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=320, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator([":\n\n", "A:\n\n", "the: answer\n\n", "A: yes\n"] * 20, trainer)
    made.add_special_tokens(SPECIALS)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=eos)
    fast.chat_template = template
    return fast


@cache
def of_kind(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer that splits text in its own way."""
    ways = {**SUPPORTED, **UNSUPPORTED}
    counted = made_tokenizer(ways[kind], ["why is it so", "because (it is) 12345\n\n", "ab ab1 abab"] * 20)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(counted.spec)), eos_token="</s>"
    )
    fast.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    return fast


def chat(*contents: str, **more: Any) -> dict[str, Any]:
    """A row of user and assistant in turn."""
    roles = ("user", "assistant")
    return {
        "messages": [{"role": roles[at % 2], "content": content} for at, content in enumerate(contents)],
        **more,
    }


def rendered(row: dict[str, Any], template: str = CHATML, **given: Any) -> Example:
    """The example of a row that makes one."""
    made = Renderer(tokenizer(template), given.get("seq_len", 4096), "truncate").render_batch([(row, KEY)])[0]
    assert isinstance(made, Example), made
    return made


def dropped(row: dict[str, Any], template: str = CHATML, **given: Any) -> Dropped:
    """Why a row makes no example."""
    renderer = Renderer(tokenizer(template), given.get("seq_len", 4096), given.get("overlong", "drop"))
    made = renderer.render_batch([(row, KEY)])[0]
    assert isinstance(made, Dropped), made
    return made


def parts(example: Example) -> tuple[str, str]:
    """The text of the prompt and that of the targets."""
    made = tokenizer()
    prompt, target = example.tokens[: example.loss_from], example.tokens[example.loss_from :]
    return str(made.decode(prompt)), str(made.decode(target))


@given(question=text, answer=text.filter(lambda it: bool(it.strip())))
def test_targets_are_the_answer_and_its_stop_token(question: str, answer: str) -> None:
    """The prompt is what the model will be given, token by token; nothing after the end is learnt."""
    made = rendered(chat(question, answer))
    prompt, target = parts(made)
    asked = f"<|start|>user\n{question}<|end|>\n<|start|>assistant\n"

    assert asked == prompt
    assert f"{answer}<|end|>" == target
    assert tokenizer()(asked, add_special_tokens=False)["input_ids"] == made.tokens[: made.loss_from].tolist()


def test_an_example_has_id_and_task() -> None:
    """Those of the row, or else its place and source."""
    named = rendered(chat("q", "a", id="seed-1", task="qa"))
    nameless = rendered(chat("q", "a", id=7, task=None))

    assert ("seed-1", "qa", KEY) == (named.id, named.task, named.key)
    assert ("run:5", "run") == (nameless.id, nameless.task)
    assert "int32" == named.tokens.dtype


def test_a_template_without_an_end_gets_the_eos() -> None:
    """The answer ends with the tokenizer's eos."""
    assert ("Q:why\nA:", "because</s>") == parts(rendered(chat("why", "because"), PLAIN))


def test_only_the_first_end_is_learnt() -> None:
    """If a template ends the turn and then the text, the end of the turn is the stop token."""
    assert ("because<|end|>") == parts(rendered(chat("why", "because"), TWO_ENDS))[1]


@pytest.mark.parametrize(
    ("template", "answer", "target"),
    [
        (OPENING, "because", "because<|end|>"),
        (OPENING, " because\n", "because<|end|>"),
        (OPENING, "<|end|> and <|start|>", "<|end|> and <|start|><|end|>"),
        (CHATML, "it is <|end|>", "it is <|end|><|end|>"),
        (CHATML, "it is <|end|>\n", "it is <|end|>\n<|end|>"),
        (PLAIN, "it is </s>", "it is </s></s>"),
        (LINE_BEFORE, "because", "because\n<|end|>"),
        (TWO_ENDS, "</s>", "</s><|end|>"),
    ],
)
def test_an_answer_ends_where_the_template_ends_it(template: str, answer: str, target: str) -> None:
    """The opening of the next turn is not learnt, and text in the answer does not end it."""
    made = rendered(chat("why", answer), template)
    several = rendered(chat("why", "because", "why", answer), template)

    assert target == parts(made)[1] == parts(several)[1]
    assert made.tokens[-1] == Renderer(tokenizer(template), 64, "drop").stop


def test_text_before_a_stop_token_may_be_one_token_with_the_answer() -> None:
    """It is learnt, and the answer still ends at the stop token."""
    made = rendered(chat("why", "the: answer\n"), LINE_BEFORE)

    assert "the: answer\n\n<|end|>" == parts(made)[1]
    assert 2 == made.target_tokens


def test_an_answer_with_a_different_end_is_dropped() -> None:
    """The place of its stop token would be a guess."""
    made = dropped(chat("one", "two", "three", "four"), SHORT_ENDED)

    assert "template" == made.reason
    assert "does not end this answer as it ends others" in made.detail
    assert "two<|end|>" == parts(rendered(chat("one", "two"), SHORT_ENDED))[1]


def test_a_token_across_the_boundary_is_split() -> None:
    """If prompt and answer share a token, they are tokenized separately: the model is given the prompt
    alone."""
    made = rendered(chat("why", "\n\nbecause"), PLAIN)
    prompt = tokenizer()("Q:why\nA:", add_special_tokens=False)["input_ids"]
    whole = tokenizer()("Q:why\nA:\n\nbecause", add_special_tokens=False)["input_ids"]

    assert prompt != whole[: len(prompt)]  # else this shows nothing
    assert prompt == made.tokens[: made.loss_from].tolist()
    assert "\n\nbecause</s>" == parts(made)[1]


def test_the_last_answer_of_a_conversation_is_learnt() -> None:
    """Turns before it are prompt; an open question after it is left out."""
    made = rendered(chat("one", "two", "three", "four", "five"))

    assert "four<|end|>" == parts(made)[1]
    assert "two<|end|>" in parts(made)[0]
    assert "five" not in parts(made)[0]


@in_turn(
    ("row", "reason", "why"),
    [
        ({}, "bad_row", "`messages` is missing"),
        ({"messages": "text"}, "bad_row", "`messages` is missing"),
        ({"messages": [{"role": "user", "content": None}]}, "bad_row", "`messages` is missing"),
        ({"messages": [{"content": "x"}]}, "bad_row", "`messages` is missing"),
        (chat("why"), "bad_row", "no message of an assistant"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "bad_row", "no message of an assistant"),
        (chat("why", " \n"), "empty_answer", "empty"),
    ],
)
def test_rows_without_a_conversation_are_dropped(row: dict[str, Any], reason: str, why: str) -> None:
    """With the reason, and no exception."""
    made = dropped(row)

    assert reason == made.reason
    assert why in made.detail


@pytest.mark.parametrize(
    ("refusing", "why"),
    [
        (ALTERNATING, "roles must alternate"),
        (CHATML + "{{ '' if 1 // (3 - messages | length) }}", "by zero"),
        (CHATML + "{% if messages | length == 3 %}{{ range(1000000) }}{% endif %}", "Range too big"),
        (CHATML + ENDLESS + "{% if messages | length == 3 %}{{ more() }}{% endif %}", "recursion"),
    ],
)
def test_rows_on_which_the_template_fails_are_dropped(refusing: str, why: str) -> None:
    """A template may require alternating roles, or fail in any way: the row is counted, others are
    rendered."""
    renderer = Renderer(tokenizer(refusing), 4096, "drop")
    odd = {"messages": [*chat("a")["messages"], *chat("b", "c")["messages"]]}
    first, second, third = renderer.render_batch([(chat("q", "a"), KEY), (odd, KEY), (chat("q", "b"), KEY)])

    assert isinstance(first, Example)
    assert isinstance(third, Example)
    assert isinstance(second, Dropped)
    assert "template" == second.reason
    assert why in second.detail
    assert "b<|end|>" == parts(third)[1]


@given(length=st.integers(0, 400), seq_len=st.integers(40, 300))
def test_a_long_prompt_keeps_its_ends(length: int, seq_len: int) -> None:
    """With `truncate`, head and tail of the prompt and the whole answer stay, and the row is filled
    exactly."""
    row = chat("".join(chr(97 + at % 26) for at in range(length)), "the answer")
    whole = rendered(row)
    made = rendered(row, seq_len=seq_len)
    kept = made.loss_from
    prompt, cut = whole.tokens[: whole.loss_from].tolist(), made.tokens[:kept].tolist()

    assert min(whole.length, seq_len) == made.length
    assert whole.tokens[whole.loss_from :].tolist() == made.tokens[kept:].tolist()
    if whole.length > seq_len:
        assert prompt[: kept // 4] == cut[: kept // 4]
        assert prompt[-(kept // 4) :] == cut[-(kept // 4) :]


def test_over_long_samples_are_dropped_unless_they_may_be_cut() -> None:
    """`drop` drops; `truncate` drops only samples with too long an answer."""
    long_prompt, long_answer = chat("x" * 200, "y"), chat("x", "y" * 200)

    assert "overlong" == dropped(long_prompt, seq_len=100).reason
    assert "overlong" == dropped(long_answer, seq_len=100, overlong="truncate").reason
    assert 201 + MIN_PROMPT_TOKENS == rendered(long_answer, seq_len=201 + MIN_PROMPT_TOKENS).length
    assert "overlong" == dropped(long_answer, seq_len=200 + MIN_PROMPT_TOKENS, overlong="truncate").reason


@in_turn(
    ("template", "eos", "why"),
    [
        (None, "</s>", "has no chat template"),
        (PLAIN, None, "no token ends an answer"),
        (THINKING, "</s>", "not the prompt that the model is given"),
        (FORGETFUL, "</s>", "not the prompt that the model is given|leaves the answer out"),
        ("{{ raise_exception('not for chat') }}", "</s>", "not for chat"),
        ("{{ broken", "</s>", "template fails"),
        ("{{ 1 // 0 }}", "</s>", "template fails: .* by zero"),
        (ENDLESS + "{{ more() }}", "</s>", "template fails: .*recursion"),
        (FIXED, "</s>", "leaves the answer out"),
    ],
)
def test_a_tokenizer_that_cannot_be_trained_with_is_refused(
    template: str | None, eos: str | None, why: str
) -> None:
    """Before anything is read, in one line."""
    with pytest.raises(ConfigError, match=why):
        Renderer(tokenizer(template, eos), 4096, "drop")


def test_two_threads_may_render_at_once() -> None:
    """Evaluation renders beside the stream: a bare tokenizer would refuse that."""
    renderer = Renderer(tokenizer(), 4096, "drop")
    rows = [(chat("q" * number, "a"), KEY) for number in range(100)]
    made: list[list[Example | Dropped]] = []
    threads = [threading.Thread(target=lambda: made.append(renderer.render_batch(rows))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [100] * 4 == [sum(isinstance(one, Example) for one in batch) for batch in made]


async def test_a_run_is_planned_while_it_is_written(tmp_path: Path) -> None:
    """Samples that are written while the planner follows come as plans: each once, and nothing blocks."""
    renderer = Renderer(tokenizer(), 100, "drop")
    stream = planner(Sources(RunSamples(tmp_path)), rendering=renderer, max_wait_s=0.2, shuffle_min=8)

    def write() -> None:
        with opened(tmp_path, sink()) as log:
            for number in range(120):
                log.samples.append([sample(number)])
            log.finish()

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        group.create_task(asyncio.to_thread(write), name="run")
        steps = await plans(stream, 0.1)

    assert list(range(120)) == sorted(key.seq for key in keys(steps))
    assert {"overlong": 0} | stream.statistics()["dropped"] == {"overlong": 0}


@pytest.mark.parametrize("kind", sorted({**SUPPORTED, **UNSUPPORTED}))
@examples(15)
@given(turns=st.lists(text, min_size=2, max_size=4), answer=text)
def test_an_answer_tokenized_without_its_prompt_is_the_same(kind: str, turns: list[str], answer: str) -> None:
    """Whatever the tokenizer does between special tokens, the tokens are those of the whole text."""
    tokens = of_kind(kind)
    once, twice = Renderer(tokens, 4096, "drop"), Renderer(tokens, 4096, "drop")
    twice.last_special = None
    row = chat(*turns[: 2 * (len(turns) // 2) - 1], answer)

    for expected, found in zip(
        twice.render_batch([(row, KEY)]), once.render_batch([(row, KEY)]), strict=True
    ):
        if isinstance(expected, Dropped):
            assert expected == found
        else:
            assert isinstance(found, Example)
            assert (expected.tokens.tolist(), expected.loss_from) == (found.tokens.tolist(), found.loss_from)


def test_a_prompt_is_tokenized_once() -> None:
    """What is tokenized is little more than the text."""
    lengths: list[int] = []

    class Counting(PreTrainedTokenizerFast):
        def __call__(self, text: Any, **options: Any) -> Any:
            lengths.append(sum(map(len, text)))
            return super().__call__(text, **options)

    made = tokenizer()
    counting: Any = Counting(tokenizer_object=made.backend_tokenizer, eos_token="</s>")  # type: ignore[no-untyped-call]
    counting.chat_template = CHATML
    renderer = Renderer(counting, 4096, "drop")
    lengths.clear()
    [one] = renderer.render_batch([(chat("word " * 500, "yes"), KEY)])

    assert isinstance(one, Example)
    assert sum(lengths) < 2500 + 200
