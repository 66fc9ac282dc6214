"""The simulator's parts: faults, configuration, plain engine, prefix cache, tokens, texts."""

import itertools
from typing import Any

import pytest

from streamsyn.errors import ConfigError
from streamsyn.simulator.costs import H100
from streamsyn.simulator.engine import Work
from streamsyn.simulator.plain_engine import PlainEngine, PrefixCache
from streamsyn.simulator.radix_cache import block_keys, extend_keys
from streamsyn.simulator.settings import Fault, FaultPlan, SimulatorConfig
from streamsyn.simulator.texts import (
    KNOWN_WORD_LOSS,
    NEW_WORD_LOSS,
    Prose,
    Tokenizer,
    answering_sentence,
    given_answer,
    token_ids,
    token_losses,
)
from tests.examples import in_turn


def test_rates_decide_the_same_way_for_a_seed() -> None:
    """Which request meets which fault is fixed by the seed; shares come near the rates."""
    rates: dict[str, float] = {Fault.RESET: 0.1, Fault.EMPTY: 0.3}
    once, again, other = (FaultPlan(rates, seed) for seed in (1, 1, 2))
    drawn = [once.decide(number, {}) for number in range(1, 2001)]
    assert drawn == [again.decide(number, {}) for number in range(1, 2001)]
    assert drawn != [other.decide(number, {}) for number in range(1, 2001)]
    assert 150 <= drawn.count(Fault.RESET) <= 250
    assert 520 <= drawn.count(Fault.EMPTY) <= 680


def test_a_script_comes_before_the_rates() -> None:
    """A sequence decides while it lasts; a function decides always."""
    listed = FaultPlan({Fault.RESET: 1.0}, 0, [None, Fault.EMPTY])
    assert [listed.decide(number, {}) for number in (1, 2, 3)] == [None, Fault.EMPTY, Fault.RESET]
    called = FaultPlan(
        {Fault.RESET: 1.0}, 0, lambda number, body: Fault.QA if body.get("x") == number else None
    )
    assert [called.decide(number, {"x": 2}) for number in (1, 2, 3)] == [None, Fault.QA, None]


@in_turn(
    ("fields", "named"),
    [
        ({"faults": {"flood": 0.1}}, "'flood'"),
        ({"faults": {"reset": 1.5}}, "'reset'"),
        ({"faults": {"reset": 0.6, "stall": 0.6}}, "must not exceed 1"),
        ({"slots": 0}, "slots"),
        ({"latency_ms": -1}, "latency_ms"),
        ({"keep_alive_s": 0}, "keep_alive_s"),
        ({"queue_limit": -1}, "queue_limit"),
        ({"cost_model": "tpu"}, "unknown cost_model 'tpu'; choose one of plain, cpu, h100"),
        ({"cost_model": "cpu", "schedule_policy": "sjf"}, "unknown schedule_policy 'sjf'"),
        ({"cost_model": "cpu", "chunked_prefill_size": 0}, "chunked_prefill_size must be at least 1"),
        ({"cost_model": "cpu", "latency_ms": 5}, "latency_ms has no effect with cost_model 'cpu'"),
        ({"max_prefill_tokens": 5}, "max_prefill_tokens has no effect with cost_model 'plain'"),
        ({"schedule_policy": "lpm"}, "schedule_policy has no effect with cost_model 'plain'"),
        ({"speed": 0}, "speed must be positive"),
        ({"faithful": 1.5}, "faithful must be between 0 and 1"),
    ],
)
def test_wrong_configuration_is_named(fields: dict[str, Any], named: str) -> None:
    """Invalid settings are refused by name."""
    with pytest.raises(ConfigError, match=named):
        SimulatorConfig(**fields)


async def test_slots_pass_on_in_order_of_arrival() -> None:
    """A free slot goes to the first in the queue, also when others have left the queue."""
    engine = PlainEngine(slots=1, queue_limit=None, cache_tokens=0)
    works = [Work(str(number), "prompt") for number in range(4)]
    for work in works:
        engine.enter(work)
    engine.leave(works[1])  # cancelled while waiting
    engine.leave(works[0])
    assert [work.running for work in works[2:]] == [True, False]
    engine.abort("2", exact=True)
    engine.leave(works[2])
    engine.leave(works[3])
    assert (engine.running, engine.waiting, engine.running_tokens, engine.waiting_tokens) == (0, 0, 0, 0)


def test_limits_override_those_of_the_cost_model() -> None:
    """What is not set comes from the preset; a cache of 0 tokens means no caching, not no pool."""
    assert SimulatorConfig().batching is None
    preset = SimulatorConfig(cost_model="h100").batching
    assert preset == H100
    limits = SimulatorConfig(cost_model="h100", slots=3, cache_tokens=900, chunked_prefill_size=64).batching
    assert limits is not None
    assert (limits.max_running_requests, limits.pool_tokens, limits.prefill_tokens) == (3, 900, 64)
    bare = SimulatorConfig(cost_model="h100", cache_tokens=0).batching
    assert bare is not None
    assert bare.pool_tokens == H100.pool_tokens


def test_the_cache_forgets_leaves_first() -> None:
    """Beyond its capacity the cache drops the ends of the least recently used prefixes."""
    cache = PrefixCache(4 * 64)
    old, new = block_keys("a" * 256 * 3), block_keys("b" * 256 * 2)
    cache.insert(old)
    cache.insert(new)
    assert cache.tokens == 4 * 64
    assert cache.match(new, 10**6) == 2 * 64
    assert cache.match(old, 10**6) == 2 * 64
    assert cache.match(old, 100) == 64
    assert PrefixCache(0).match(old, 10**6) == 0


def test_keys_of_a_longer_prompt_extend_those_of_the_shorter() -> None:
    """Extending gives the keys that the joined text has."""
    prompt, output = "geese " * 150, "fly south " * 90
    assert extend_keys(block_keys(prompt), prompt, output) == block_keys(prompt + output)


def runs(text: str) -> set[tuple[str, ...]]:
    """The runs of five words in `text`."""
    words = text.split()
    return set(zip(*(words[start:] for start in range(5)), strict=False))


def test_texts_do_not_repeat_themselves() -> None:
    """Texts have about the wanted length, and hardly a run of five words comes twice in one, however long."""
    prose = Prose(0)
    assert all(120 <= len(prose.write(150).split()) <= 180 for _ in range(200))
    for words in (150, 2000, 20_000):
        text = prose.write(words)
        assert len(runs(text)) > 0.85 * (len(text.split()) - 4)


def test_texts_differ_from_each_other() -> None:
    """No two of many texts share more than a small part of their runs of five words."""
    prose = Prose(0)
    for words, count in ((150, 200), (2000, 20)):
        found = [runs(prose.write(words)) for _ in range(count)]
        pairs = [len(one & other) / len(one | other) for one, other in itertools.combinations(found, 2)]
        assert max(pairs) < 0.2
        assert sum(pairs) / len(pairs) < 0.02


def test_texts_are_determined_by_the_seed() -> None:
    """The same seed writes the same texts, another seed others."""
    assert Prose(1).write(150) == Prose(1).write(150) != Prose(2).write(150)
    assert len(Prose(1).write(4).split()) == 4


def test_ids_are_decoded_to_their_text() -> None:
    """Two joined texts can be decoded, the second cut; unknown ids cannot."""
    tokenizer, first, second = Tokenizer(), "The geese fly south.!", "In autumn, when it is cold."
    ids, more = tokenizer.encode(first), tokenizer.encode(second)
    assert ids == token_ids(first)
    assert tokenizer.decode(ids + more[:3]) == first.ljust(24) + second[:12]
    assert tokenizer.decode([*ids, 7]) is None


def test_known_words_are_likelier() -> None:
    """A token with part of a new word is as unlikely as the word; case does not matter."""
    assert token_losses("the Geese fly", "Geese FLY") == [KNOWN_WORD_LOSS, KNOWN_WORD_LOSS, KNOWN_WORD_LOSS]
    assert token_losses("geese", "a goose. geese") == [
        NEW_WORD_LOSS,
        NEW_WORD_LOSS,
        KNOWN_WORD_LOSS,
        KNOWN_WORD_LOSS,
    ]


def test_a_question_is_answered_with_the_sentence_that_has_most_of_its_words() -> None:
    """The last two paragraphs are the question; without a common word there is no answer."""
    how = "Answer briefly."
    context = "Geese are loud. They fly south in autumn.\n\nDucks stay."
    assert (
        answering_sentence(f"{context}\n\nWhen do geese fly south?\n\n{how}") == "They fly south in autumn."
    )
    assert answering_sentence(f"{context}\n\nWho wrote it?\n\n{how}") == ""
    assert answering_sentence(f"When do geese fly south?\n\n{how}") == ""


def test_faithful_texts_hold_the_answer() -> None:
    """The text after `Answer:` is in that share of texts; the others are unchanged."""
    prompt = "Question:\nWho?\n\nAnswer:\nKeeper Amund\nTarn.\n\nNow write."
    assert given_answer(prompt) == "Keeper Amund Tarn."
    assert given_answer("Write.") == ""
    faithful, half, plain = (Prose(0, share) for share in (1.0, 0.5, 0.0))
    texts = [faithful.about(given_answer(prompt), 100) for _ in range(100)]
    assert all("It is on record: Keeper Amund Tarn. " in text for text in texts)
    assert 30 < sum("Amund" in half.about(given_answer(prompt), 100) for _ in range(100)) < 70
    same = Prose(0)
    assert [plain.about(given_answer(prompt), 60) for _ in range(9)] == [same.write(60) for _ in range(9)]
