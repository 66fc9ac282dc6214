"""Assembly as a function: every context becomes one sample, with distractors written for other seeds."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from streamsyn.assembly.assembler import Assembler, AssemblyState
from streamsyn.assembly.sample_prompts import SamplePrompts
from streamsyn.assembly.window import Passage, Pool
from streamsyn.config.sections import AssemblySection
from streamsyn.records import Sample, digest
from tests.builders import samples_of
from tests.examples import examples

WORDS = ("alpha beta", "Gamma", "delta", "yes")


def passage(seq: int, *, seed: int | None = None, **given_fields: Any) -> Passage:
    seed_id = f"seed-{seq if seed is None else seed}"
    fields: dict[str, Any] = {
        "seq": seq,
        "id": f"{seed_id}#{seq}",
        "seed_id": seed_id,
        "task": "qa",
        "instruction": f"What is {seq}?",
        "answer": f"answer {seq}.",
        "text": f"[{seq}] text",
        "tokens": 10,
    }
    return Passage(**{**fields, **given_fields})


@cache
def prompts(contexts_per_sample: int) -> SamplePrompts:
    return SamplePrompts(AssemblySection(contexts_per_sample=contexts_per_sample))


def assembler(run_seed: int = 0, **section: Any) -> Assembler:
    config = AssemblySection.model_validate(section)
    return Assembler(config, run_seed, prompts(config.contexts_per_sample))


def assemble(given_assembler: Assembler, log: Sequence[Passage], flushes: Sequence[int] = ()) -> list[Sample]:
    """Return the samples of a whole log, with a flush at the end."""
    made = []
    for one in log:
        if one.seq in flushes:
            made += samples_of(given_assembler.flush())
        made += samples_of(given_assembler.add(one))
    return made + samples_of(given_assembler.flush())


def seqs(sample: Sample) -> list[int]:
    """The `context_seqs` of a sample that has no corpus passages."""
    assert None not in sample.context_seqs
    return [seq for seq in sample.context_seqs if seq is not None]


@dataclass(frozen=True)
class Case:
    """A log and how it is assembled."""

    section: dict[str, Any]
    log: list[Passage]
    flushes: list[int]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Logs of a few tasks, seeds with several drafts, and answers that occur in some of the texts."""
    rows = draw(
        st.lists(
            st.tuples(
                st.sampled_from(["qa", "sum"]),
                st.integers(0, 12),
                st.sampled_from(WORDS),
                st.sampled_from(["", *WORDS, "ALPHA \n beta GAMMA"]),
                st.integers(0, 400),
                st.integers(1, 30),
            ),
            max_size=40,
        )
    )
    log = [
        passage(
            seq,
            # a seed has one task and one answer
            seed=100 * WORDS.index(answer) + 50 * (task == "sum") + seed,
            task=task,
            answer=answer,
            text=f"[{seq}] {inside} {'x' * size}",
            tokens=tokens,
        )
        for seq, (task, seed, answer, inside, size, tokens) in enumerate(rows)
    ]
    length: dict[str, Any] = draw(
        st.sampled_from([{"contexts_per_sample": n} for n in (1, 2, 3, 5)] + [{"target_tokens": 60}])
    )
    window = draw(st.sampled_from([1, 5_000, 20_000, 10**7]))
    return Case({**length, "window_bytes": window}, log, draw(st.lists(st.integers(0, len(log)), max_size=2)))


def holds_answer(candidate: Passage, one: Passage) -> bool:
    plain = [" ".join(text.lower().split()) for text in (one.answer, candidate.text)]
    return len(one.answer) >= 5 and plain[0] in plain[1]


def is_eligible(candidate: Passage, one: Passage) -> bool:
    return (
        candidate.task == one.task and candidate.seed_id != one.seed_id and not holds_answer(candidate, one)
    )


@examples(200)
@given(cases())
def test_each_context_becomes_one_sample(case: Case) -> None:
    """The context is at `relevant_index`; distractors have the same task, other seeds, and not the answer."""
    log = case.log
    samples = assemble(assembler(**case.section), log, case.flushes)

    assert Counter(one.id for one in log) == Counter(sample.id for sample in samples)
    for sample in samples:
        inside = [log[seq] for seq in seqs(sample)]
        relevant = inside.pop(sample.relevant_index)
        assert (relevant.id, relevant.seed_id, relevant.task) == (sample.id, sample.seed_id, sample.task)
        assert relevant.answer == sample.messages[1]["content"]
        assert len(sample.context_seqs) == len({log[seq].seed_id for seq in seqs(sample)})
        assert [True] * len(inside) == [is_eligible(one, relevant) for one in inside]
        assert sum(log[seq].tokens for seq in seqs(sample)) == sample.n_tokens
        user = sample.messages[0]["content"]
        places = [user.index(log[seq].text.strip()) for seq in seqs(sample)]
        assert sorted(places) == places
        assert user.index(relevant.instruction) > places[-1]


def is_complete(sample: Sample, case: Case) -> bool:
    if (target := case.section.get("target_tokens")) is not None:
        return sample.n_tokens >= int(target)
    return len(sample.context_seqs) == int(case.section["contexts_per_sample"])


@examples(200)
@given(cases())
def test_a_sample_has_fewer_contexts_only_if_there_are_no_more(case: Case) -> None:
    """A sample with fewer than n contexts holds all eligible ones that were in the window."""
    log, single = case.log, case.section.get("contexts_per_sample") == 1
    one_by_one = assembler(**case.section)
    window: list[Passage] = []

    def check(samples: list[Sample], *, flushed: bool) -> None:
        for sample in samples:
            relevant = log[seqs(sample)[sample.relevant_index]]
            if "contexts_per_sample" in case.section:
                assert len(sample.context_seqs) <= case.section["contexts_per_sample"]
            if is_complete(sample, case):
                continue
            # it left the window, as its oldest passage, or the stream ended
            there = window if flushed else [one for one in window if one.seq >= relevant.seq]
            eligible = {one.seed_id for one in there if is_eligible(one, relevant)}
            assert eligible == {log[seq].seed_id for seq in seqs(sample)} - {relevant.seed_id}

    for one in log:
        if one.seq in case.flushes:
            check(samples_of(one_by_one.flush()), flushed=True)
        samples = samples_of(one_by_one.add(one))
        window.append(one)
        check(samples, flushed=False)
        while (
            not single
            and sum(there.size for there in window) > case.section["window_bytes"]
            and len(window) > 1
        ):
            window.pop(0)
        assert [there.seq for there in window if not single] == [there.seq for there in one_by_one.window]
    check(samples_of(one_by_one.flush()), flushed=True)


@examples(60)
@given(cases())
def test_a_restored_assembler_continues_as_if_undisturbed(case: Case) -> None:
    """At every prefix of the log, the state (through JSON) and the log's passages give the same samples."""
    log, undisturbed = case.log, assembler(**case.section)
    made: list[Sample] = []
    states = []
    for one in log:
        if one.seq in case.flushes:
            made += samples_of(undisturbed.flush())
        states.append((len(made), orjson.dumps(undisturbed.state().as_dict())))
        made += samples_of(undisturbed.add(one))
    made += samples_of(undisturbed.flush())
    for consumed, (samples, saved) in enumerate(states):
        state = AssemblyState(**orjson.loads(saved))
        again = assembler(**case.section)
        again.restore(state, log[state.window_start : consumed])
        assert (consumed, samples) == (again.consumed, again.samples)
        assert orjson.loads(saved) == orjson.loads(orjson.dumps(again.state().as_dict()))
        rest = []
        for one in log[consumed:]:
            if one.seq in case.flushes and one.seq > consumed:
                rest += samples_of(again.flush())
            rest += samples_of(again.add(one))
        assert made[samples:] == rest + samples_of(again.flush())


def test_a_sample_is_made_as_soon_as_there_are_enough() -> None:
    """The first n contexts of a task give n samples; each later context gives one at once."""
    one_by_one = assembler(contexts_per_sample=4)
    counts = [
        len(samples_of(one_by_one.add(passage(seq, task="qa" if seq % 2 else "sum")))) for seq in range(16)
    ]

    assert [0] * 6 + [4, 4] + [1] * 8 == counts
    assert [] == samples_of(one_by_one.flush())


def test_a_flush_makes_the_waiting_samples() -> None:
    """Waiting samples are made with the contexts there are, in the order of the log."""
    one_by_one = assembler(contexts_per_sample=5)
    waiting = [samples_of(one_by_one.add(passage(seq))) for seq in range(3)]
    flushed = samples_of(one_by_one.flush())

    assert [[], [], []] == waiting
    assert [(f"seed-{seq}#{seq}", [0, 1, 2]) for seq in range(3)] == [
        (sample.id, sorted(seqs(sample))) for sample in flushed
    ]
    assert [] == samples_of(one_by_one.flush())
    assert [0, 2] == [len(samples_of(one_by_one.add(passage(seq)))) for seq in (3, 4)]


def test_target_tokens_replace_the_number_of_contexts() -> None:
    """Distractors are added until the contexts have the target's tokens, and no further."""
    samples = assemble(assembler(target_tokens=35), [passage(seq) for seq in range(10)])
    long = assemble(assembler(target_tokens=35), [passage(0, tokens=35), passage(1)])

    assert [4] * 10 == [len(sample.context_seqs) for sample in samples]
    assert [[0], [0, 1]] == [sorted(seqs(sample)) for sample in long]


@pytest.mark.parametrize(
    ("answer", "contexts"), [("yes", 3), ("Paris", 1), ("  pARis\n", 1), ("Paris France", 1)]
)
def test_only_short_answers_may_be_in_distractors(answer: str, contexts: int) -> None:
    """A distractor must not contain the answer, in any case and spacing, unless it is as short as "yes"."""
    text = "Oh yes, it is PARIS  \n France."
    log = [passage(0, answer=answer), passage(1, text=text), passage(2, text=text)]
    samples = assemble(assembler(contexts_per_sample=3, max_similarity=1), log)

    assert contexts == next(len(one.context_seqs) for one in samples if one.id == "seed-0#0")


def test_drafts_of_a_seed_are_never_in_one_sample() -> None:
    """However many drafts a seed has, a sample holds one of them."""
    log = [passage(seq, seed=seq // 4) for seq in range(24)]
    samples = assemble(assembler(contexts_per_sample=3), log)

    assert [3] * 24 == [len({seq // 4 for seq in seqs(sample)}) for sample in samples]


def test_the_relevant_position_is_uniform() -> None:
    """Each position is equally likely, for samples made at once and for those that waited."""
    samples = assemble(assembler(contexts_per_sample=5), [passage(seq) for seq in range(3000)])
    places = Counter(sample.relevant_index for sample in samples)

    expected = 600
    chi_squared = sum((places[place] - expected) ** 2 / expected for place in range(5))
    assert chi_squared < 18.5  # the 0.999 quantile for four degrees of freedom


def test_every_context_is_a_distractor_about_as_often() -> None:
    """Distractors are drawn uniformly from the window."""
    log = [passage(seq) for seq in range(40)]
    one_by_one = assembler(contexts_per_sample=5)
    for one in log:
        samples_of(one_by_one.add(one))
    drawn = Counter[int]()
    for seq in range(40, 1040):
        choice = one_by_one.choose(passage(seq), final=True)
        drawn.update(one.log_seq for one in choice.distractors if one.log_seq is not None)

    assert 4000 == sum(drawn.values())
    assert set(range(40)) == set(drawn)
    assert max(drawn.values()) < 2 * min(drawn.values())


def test_samples_depend_on_the_run_seed() -> None:
    """The same run seed draws the same samples, a different one draws others."""
    log = [passage(seq) for seq in range(30)]
    first, again, other = (assemble(assembler(seed, contexts_per_sample=4), log) for seed in (1, 1, 2))

    assert first == again
    assert first != other


def made_here() -> str:
    """A digest of samples."""
    log = [passage(seq, task=f"task {seq % 3}", text="text" * (seq % 7)) for seq in range(60)]
    samples = assemble(assembler(contexts_per_sample=4, window_bytes=30_000), log)
    return digest(*map(repr, samples)).hex()


def test_samples_do_not_depend_on_the_process() -> None:
    """A process with a different hash seed makes the same samples."""
    script = "from tests.assembly.test_assembler import made_here; print(made_here())"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True
    )

    assert made_here() == done.stdout.strip()


# Memory


def held(one: Assembler) -> int:
    """The number of objects an assembler holds."""
    window = one.window
    pools = sum(len(pool._passages) for pool in [*window.pools.values(), window.everything])
    return len(one.waiting) + pools + len(list(window)) + len(window.pools)


@pytest.mark.parametrize(
    "log",
    [
        pytest.param(lambda seq: {"task": f"task {seq}"}, id="every context of its own task"),
        pytest.param(lambda seq: {"answer": "text ", "task": "qa"}, id="an answer that stands everywhere"),
        pytest.param(lambda seq: {"task": f"task {seq % 50}"}, id="many tasks"),
        pytest.param(lambda seq: {"text": ""}, id="no text"),
        pytest.param(lambda seq: {"text": "", "instruction": "x" * 999}, id="a long instruction"),
    ],
)
@pytest.mark.parametrize(
    "length",
    [pytest.param({"contexts_per_sample": 10}, marks=pytest.mark.torture), {"target_tokens": 10**9}],
)
def test_memory_is_bounded_by_the_window(log: Any, length: dict[str, int]) -> None:
    """Whatever the log, no more is held than fits the window."""
    one_by_one = assembler(window_bytes=12_500, **length)
    most = 0
    for seq in range(800):
        samples_of(one_by_one.add(passage(seq, **log(seq))))
        most = max(most, held(one_by_one))
        assert sum(one.size for one in one_by_one.window) <= 12_500

    # 12 passages of a kilobyte at least; each is in the window, in a pool, and may wait
    assert most < 12 * 8 + 130


def test_one_context_larger_than_the_window_is_held() -> None:
    """The newest passage stays, so that a window too small for one passage still makes samples."""
    log = [passage(seq, text=f"{seq}" * 100) for seq in range(5)]
    samples = assemble(assembler(window_bytes=1), log)

    assert [[0, 1], [1, 2], [2, 3], [3, 4], [4]] == [sorted(seqs(sample)) for sample in samples]


@example(length=0, dropped=0)
@examples(50)
@given(length=st.integers(0, 300), dropped=st.integers(0, 300))
def test_a_pool_is_shuffled_whole(length: int, dropped: int) -> None:
    """A shuffle that is drawn to the end yields each remaining passage once."""
    from random import Random

    pool = Pool()
    for seq in range(length):
        pool.add(passage(seq))
    for _ in range(min(dropped, length)):
        pool.drop_oldest()

    assert list(range(min(dropped, length), length)) == sorted(one.seq for one in pool.shuffled(Random(1)))
