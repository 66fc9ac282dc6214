"""Lengths, sources, positions and exclusions: the rules hold for every configuration of assembly."""

import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import permutations
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.assembly.assembler import Assembler, AssemblyState, Sampling
from streamsyn.assembly.chat_tokenizer import ChatTokenizer
from streamsyn.assembly.corpus import Corpus
from streamsyn.assembly.sample_prompts import SamplePrompts
from streamsyn.assembly.token_counter import ChatTokenCounter
from streamsyn.assembly.window import Passage
from streamsyn.config.sections import AssemblySection
from streamsyn.records import Sample, digest, is_held_out
from streamsyn.shingles import signature, similarity
from tests.assembly.test_assembler import assemble, passage
from tests.assembly.tokenizers_made import SUPPORTED, made
from tests.builders import samples_of
from tests.examples import examples

STORIES = [
    "the keeper of the old light went up the stairs at dusk to see the ships",
    "a cold wind blew over the harbour and no boat came in that whole long night",
    "in the town below they counted barrels of oil and wrote it all down with care",
    "her brother had left for the islands before the first snow fell on the roofs",
]
ANSWER = "seven grey barrels"


@cache
def corpus() -> Corpus:
    chance = random.Random(5)
    words = " ".join(STORIES).split()
    documents = [
        [" ".join(chance.choices(words, k=60)) + (f" {ANSWER}" if n % 5 == 0 else "")] for n in range(30)
    ]
    return Corpus([*documents, documents[1]], passage_words=50, cached_bytes=10**6)


@cache
def tokenizer() -> ChatTokenizer:
    return made(SUPPORTED["llama3"], STORIES, vocabulary=400)


def assembler(section: AssemblySection, *, by_tokens: bool = False, run_seed: int = 0) -> Assembler:
    prompts = SamplePrompts(section)
    counter = ChatTokenCounter(tokenizer(), prompts) if by_tokens else None
    return Assembler(section, run_seed, prompts, counter, corpus())


def log_of(seed: int, count: int) -> list[Passage]:
    """Contexts of two tasks; some are similar, some contain an answer, some have flags or a gain."""
    chance = random.Random(seed)
    words = " ".join(STORIES).split()
    log: list[Passage] = []
    for seq in range(count):
        text = " ".join(chance.choices(words, k=chance.choice([8, 30, 60])))
        if chance.random() < 0.2 and log:
            text = chance.choice(log).text + chance.choice(["", " again", "\n"])
        if chance.random() < 0.2:
            text += f"\nIn all {ANSWER}."
        log.append(
            passage(
                seq,
                seed=chance.randrange(2 * count),
                task=chance.choice(["qa", "sum"]),
                answer=chance.choice([ANSWER, "yes", f"answer {seq}"]),
                text=text,
                tokens=2 * len(text.split()),
                flags=chance.choice([(), (), ("low_context_gain",)]),
                context_gain=chance.choice([None, 0.1, 0.9]),
            )
        )
    return log


SOURCES: list[Any] = [
    *("same_task", "any_task", "corpus", "none"),
    {"same_task": 3, "corpus": 1},
    {"any_task": 1, "same_task": 1},
    {"same_task": 1, "any_task": 2, "corpus": 0.5},
]
LENGTHS: list[dict[str, Any]] = [
    {"contexts_per_sample": 1},
    {"contexts_per_sample": 4},
    {"contexts_per_sample": 6, "max_tokens": 400},
    {"target_tokens": 300},
    {"target_tokens": 300, "max_tokens": 330},
    {"target_tokens": {"uniform": [50, 500]}},
    {"target_tokens": {"log_uniform": [50, 800]}, "max_tokens": 500},
    {"target_tokens": {"choices": [100, 400], "weights": [3, 1]}},
    {"target_tokens": {"schedule": [[0, 100], [10, 300], [20, 600]]}},
]
OTHERS: list[dict[str, Any]] = [
    {},
    {"position": 1},
    {"position": [0, 0.5, 1], "epoch": 3},
    {"exclude_flags": ["low_context_gain"], "max_similarity": 0.5},
    {"min_context_gain": 0.5, "max_similarity": 1, "min_answer_chars": 3},
    {"holdout": 0.2},
]


@st.composite
def sections(draw: st.DrawFn) -> AssemblySection:
    return AssemblySection.model_validate(
        {
            "distractors": draw(st.sampled_from(SOURCES)),
            "window_bytes": draw(st.sampled_from([3_000, 20_000, 10**7])),
            **draw(st.sampled_from(LENGTHS)),
            **draw(st.sampled_from(OTHERS)),
        }
    )


def texts_of(sample: Sample, log: Sequence[Passage]) -> list[str]:
    """Return the passages of a sample; those of the corpus are found by their text."""
    user = sample.messages[0]["content"]
    found = [log[seq].text for seq in sample.context_seqs if seq is not None]
    of_corpus = {corpus()[n].text for n in range(len(corpus()))}
    foreign = []
    for text in sorted({*found, *of_corpus}, key=len, reverse=True):
        if text in user:
            foreign += [text] if text in of_corpus else []
            user = user.replace(text, "")  # a shorter passage may be a part of it
    return found + foreign[: sample.context_seqs.count(None)]


@examples(120)
@given(sections(), st.booleans(), st.integers(0, 99), st.integers(0, 30))
def test_no_sample_breaks_a_rule(section: AssemblySection, by_tokens: bool, seed: int, count: int) -> None:
    """Only configured sources, no answer, no near-duplicate, one draft per seed, at most `max_tokens`."""
    log = log_of(seed, count)
    one = assembler(section, by_tokens=by_tokens)
    samples = assemble(one, log)
    sources = set(section.distractors) if isinstance(section.distractors, dict) else {section.distractors}
    left_out = set(range(count)) - {int(sample.id.split("#")[1]) for sample in samples}

    assert count == len(samples) + one.left_out.total()
    for seq in left_out:
        excluded = not set(section.exclude_flags).isdisjoint(log[seq].flags)
        gain = log[seq].context_gain
        poor = section.min_context_gain is not None and gain is not None and gain < section.min_context_gain
        assert excluded or poor or section.max_tokens is not None
    for sample in samples:
        place = sample.context_seqs[sample.relevant_index]
        assert place is not None
        relevant = log[place]
        assert relevant.id == sample.id
        seqs = [other for other in sample.context_seqs if other is not None]
        assert len({log[other].seed_id for other in seqs}) == len(seqs)
        if "any_task" not in sources:
            assert {relevant.task} == {log[other].task for other in seqs}
        if sources <= {"corpus", "none"}:
            assert [relevant.seq] == seqs
        if "corpus" not in sources:
            assert None not in sample.context_seqs
        texts = texts_of(sample, log)
        if len(relevant.answer) >= section.min_answer_chars:
            others = [text for text in texts if text != relevant.text]
            assert not any(relevant.answer in " ".join(text.split()) for text in others)
        if section.max_similarity < 1:
            signatures = [signature(text) for text in texts]
            pairs = [(a, b) for n, a in enumerate(signatures) for b in signatures[:n]]
            assert all(
                similarity(a, b) < section.max_similarity for a, b in pairs if set(a.bands) & set(b.bands)
            )
        if by_tokens:
            chat = tokenizer().render(*(message["content"] for message in sample.messages))
            assert tokenizer().count(chat) == sample.n_tokens
        if section.max_tokens is not None:
            assert sample.n_tokens <= section.max_tokens


@examples(80)
@given(
    sections(),
    st.booleans(),
    st.integers(0, 99),
    st.integers(0, 25),
    st.lists(st.integers(0, 25), max_size=2),
)
def test_a_restart_anywhere_changes_nothing(
    section: AssemblySection, by_tokens: bool, seed: int, count: int, flushes: list[int]
) -> None:
    """At every prefix of the log, the state and the log's passages give the samples that were to come."""
    log = log_of(seed, count)
    undisturbed = assembler(section, by_tokens=by_tokens)
    made: list[Sample] = []
    states = []
    for one in log:
        if one.seq in flushes:
            made += samples_of(undisturbed.flush())
        states.append((len(made), orjson.dumps(undisturbed.state().as_dict())))
        made += samples_of(undisturbed.add(one))
    made += samples_of(undisturbed.flush())
    for consumed, (samples, saved) in enumerate(states):
        state = AssemblyState(**orjson.loads(saved))
        again = assembler(section, by_tokens=by_tokens)
        again.restore(state, log[state.window_start : consumed])
        assert orjson.loads(saved) == orjson.loads(orjson.dumps(again.state().as_dict()))
        rest = []
        for one in log[consumed:]:
            if one.seq in flushes and one.seq > consumed:
                rest += samples_of(again.flush())
            rest += samples_of(again.add(one))
        assert made[samples:] == rest + samples_of(again.flush())
        assert undisturbed.left_out == again.left_out


def test_a_state_of_an_older_version_is_understood() -> None:
    """Such a state has no keys for other tasks and for contexts that are left out."""
    log = [passage(seq) for seq in range(12)]
    section = AssemblySection(contexts_per_sample=5)
    before = assembler(section)
    made = [sample for one in log[:3] for sample in samples_of(before.add(one))]
    saved = before.state().as_dict()
    del saved["pending_any"], saved["left_out"]
    again = assembler(section)
    again.restore(AssemblyState(**saved), log[:3])
    rest = [sample for one in log[3:] for sample in samples_of(again.add(one))]

    assert [] == made
    assert assemble(assembler(section), log) == rest + samples_of(again.flush())


@examples(60)
@given(
    st.integers(0, 99),
    st.sampled_from(["same_task", "any_task", "corpus", {"any_task": 1, "corpus": 1}]),
    st.sampled_from([200, 700, {"log_uniform": [100, 2000]}]),
)
def test_a_target_is_reached_within_one_distractor(seed: int, source: Any, target: Any) -> None:
    """The sample has the target's tokens, and would not have them with one distractor less."""
    section = AssemblySection.model_validate({"distractors": source, "target_tokens": target})
    one_by_one = assembler(section, by_tokens=True)
    log = log_of(seed, 80)
    arranged = [one for row in log for one in one_by_one.add(row)]

    assert arranged
    for one in arranged:
        sample = one.sample()
        assert sample.target_tokens is not None
        assert sample.n_tokens >= sample.target_tokens
        relevant = one.passages[one.relevant_index]
        assert isinstance(relevant, Passage)
        distractors = [other for other in one.passages if other is not relevant]
        if distractors:
            index = Sampling(section, 0).relevant_index(relevant, len(distractors) - 1)
            shorter = [*distractors[:-1][:index], relevant, *distractors[:-1][index:]]
            assert one.counter.count(relevant, shorter) < sample.target_tokens


def test_a_context_that_is_too_long_gets_no_sample() -> None:
    """It is counted as `too_long`, and does not make another sample too long either."""
    log = [passage(seq, tokens=500 if seq == 2 else 30) for seq in range(6)]
    one = assembler(AssemblySection(contexts_per_sample=3, max_tokens=100))
    samples = assemble(one, log)

    assert {"too_long": 1} == dict(one.left_out)
    assert [0, 1, 3, 4, 5] == sorted(int(sample.id.split("#")[1]) for sample in samples)
    assert [90] * 5 == [sample.n_tokens for sample in samples]


@pytest.mark.parametrize("distractors", ["same_task", {"any_task": 2, "corpus": 1}])
def test_held_out_contexts_are_not_in_samples_to_train_on(distractors: Any) -> None:
    """Contexts of held-out seeds are distractors in samples of held-out seeds only, given the share."""
    log = [passage(seq, task="qa", text=f"{STORIES[seq % 4]} {seq}") for seq in range(120)]
    out = {one.seq for one in log if is_held_out(one.seed_id, 0.2)}

    def leaks(holdout: float) -> tuple[int, int]:
        """The distractors of held-out seeds in other samples, and in those of held-out seeds."""
        section = AssemblySection(
            contexts_per_sample=5, distractors=distractors, max_similarity=1, holdout=holdout
        )
        samples = assemble(assembler(section), log)
        assert 120 == len(samples)
        held = [sample.seed_id in {f"seed-{seq}" for seq in out} for sample in samples]
        found = [len(out.intersection(sample.context_seqs)) for sample in samples]
        return sum(n for n, is_out in zip(found, held, strict=True) if not is_out), sum(
            n - 1 for n, is_out in zip(found, held, strict=True) if is_out
        )

    assert leaks(0.0)[0] > 10
    assert 0 == leaks(0.2)[0]
    assert leaks(0.2)[1] > 0


def test_flagged_contexts_are_distractors_only() -> None:
    """Contexts with an excluded flag or too little gain get no sample; unmeasured ones do."""
    gains = [None, 0.1, 0.5, 0.9]
    log = [passage(seq, flags=("f",) if seq == 0 else (), context_gain=gains[seq % 4]) for seq in range(8)]
    one = assembler(AssemblySection(contexts_per_sample=8, exclude_flags=("f",), min_context_gain=0.5))
    samples = assemble(one, log)

    assert {"excluded": 3} == dict(one.left_out)
    assert [2, 3, 4, 6, 7] == [int(sample.id.split("#")[1]) for sample in samples]
    assert [list(range(8))] * 5 == [sorted(seq for seq in s.context_seqs if seq is not None) for s in samples]


@pytest.mark.parametrize(
    ("position", "places"),
    [(0, [0, 0, 0, 0]), (1, [4, 4, 4, 4]), (0.5, [2, 2, 2, 2]), ([0, 1, 0.25], [0, 4, 1, 0])],
)
def test_the_position_is_as_configured(position: Any, places: list[int]) -> None:
    """A depth applies to all samples; a list is cycled through in the order of the log."""
    log = [passage(seq) for seq in range(8)]
    samples = assemble(
        assembler(AssemblySection.model_validate({"contexts_per_sample": 5, "position": position})), log
    )
    by_seq = {int(sample.id.split("#")[1]): sample.relevant_index for sample in samples}

    assert places == [by_seq[seq] for seq in range(4)]


def test_each_epoch_draws_differently() -> None:
    """Distractors, lengths and positions are drawn again."""
    log = [passage(seq) for seq in range(30)]
    epochs = [
        assemble(assembler(AssemblySection(contexts_per_sample=4, epoch=epoch)), log)
        for epoch in (0, 1, 1, 2)
    ]

    assert epochs[1] == epochs[2]
    assert 3 == len({repr(samples) for samples in epochs})


def test_epoch_0_draws_as_older_versions_did() -> None:
    """Old runs still verify: these digests are from a version without epochs, sources or lengths."""
    log = [
        passage(seq, task=f"task {seq % 2}", text=f"[{seq}] " + "text " * (seq % 7), tokens=10 + seq % 5)
        for seq in range(60)
    ]
    made = [
        assemble(assembler(AssemblySection.model_validate(section), run_seed=3), log)
        for section in ({"contexts_per_sample": 4}, {"target_tokens": 60})
    ]
    digests = [
        digest(
            *(
                repr((one.id, one.context_seqs, one.relevant_index, one.n_tokens, one.messages))
                for one in samples
            )
        ).hex()
        for samples in made
    ]

    assert ["5fdf4523ce59a727c7d3a34bcf4c69d0", "7a026322697d933ba36dec6f5840b1f0"] == digests


def test_a_mix_is_drawn_by_weight() -> None:
    """With weights 3 and 1, three of four distractors are of the same task."""
    section = AssemblySection.model_validate(
        {"contexts_per_sample": 9, "distractors": {"same_task": 3, "corpus": 1}, "max_similarity": 1}
    )
    samples = assemble(assembler(section), [passage(seq, answer="") for seq in range(300)])
    foreign = Counter(seq is None for sample in samples for seq in sample.context_seqs)

    assert {9} == {len(sample.context_seqs) for sample in samples}
    assert 0.22 < foreign[True] / (8 * 300) < 0.28


def test_an_exhausted_source_is_replaced_by_the_others() -> None:
    """At the end of the stream, the other sources fill what one source lacks."""
    section = AssemblySection.model_validate(
        {"contexts_per_sample": 9, "distractors": {"same_task": 1, "corpus": 1}, "max_similarity": 1}
    )
    samples = assemble(assembler(section), [passage(seq, answer="") for seq in range(3)])

    assert [9] * 3 == [len(sample.context_seqs) for sample in samples]
    assert {3} == {len(sample.context_seqs) - sample.context_seqs.count(None) for sample in samples}


def test_a_corpus_never_waits() -> None:
    """Each context gets its sample at once."""
    one = assembler(AssemblySection(contexts_per_sample=5, distractors="corpus"))
    counts = [len(samples_of(one.add(passage(seq, answer="")))) for seq in range(4)]

    assert [1] * 4 == counts


@pytest.mark.parametrize("section", [{"distractors": "any_task"}, {"distractors": {"any_task": 1}}])
def test_any_task_waits_for_contexts_of_all(section: dict[str, Any]) -> None:
    """The first n contexts give n samples, whatever their tasks."""
    one = assembler(AssemblySection.model_validate({"contexts_per_sample": 4, **section}))
    counts = [len(samples_of(one.add(passage(seq, task=f"task {seq}")))) for seq in range(7)]

    assert [0, 0, 0, 4, 1, 1, 1] == counts


def test_lengths_follow_their_distribution() -> None:
    """Uniform and log-uniform lengths fill their range, choices follow weights, a schedule the seq."""

    def drawn(**lengths: Any) -> list[int]:
        sampling = Sampling(AssemblySection.model_validate({"target_tokens": lengths}), 0)
        return [sampling.target_tokens(passage(seq)) or 0 for seq in range(2000)]

    uniform, doublings = drawn(uniform=[1000, 3000]), drawn(log_uniform=[1000, 64_000])
    chosen = Counter(drawn(choices=[10, 20], weights=[3, 1]))
    schedule = drawn(schedule=[[0, 10], [5, 20], [1000, 30]])

    assert 1000 <= min(uniform) < 1010 < 2990 < max(uniform) <= 3000
    assert 0.45 < sum(length < 2000 for length in uniform) / 2000 < 0.55
    assert 1000 <= min(doublings) < 1010 < 63_000 < max(doublings) <= 64_000
    assert 0.45 < sum(length < 8000 for length in doublings) / 2000 < 0.55
    assert 0.72 < chosen[10] / 2000 < 0.78
    assert [10] * 5 + [20] * 995 + [30] * 1000 == schedule


SCRIPT = """
from streamsyn.records import digest
from streamsyn.config.sections import AssemblySection
from tests.assembly.test_assembler import assemble
from tests.assembly.test_options import assembler, log_of
section = AssemblySection.model_validate({
    "distractors": {"same_task": 1, "any_task": 1, "corpus": 1}, "target_tokens": {"log_uniform": [100, 900]},
    "max_tokens": 800, "window_bytes": 20_000, "exclude_flags": ["low_context_gain"],
})
one = assembler(section, by_tokens=True)
print(digest(*map(repr, assemble(one, log_of(1, 60)))).hex(), one.left_out)
"""


def test_samples_do_not_depend_on_the_process() -> None:
    """Hash seeds and the number of tokenizer threads do not change the bytes."""
    made_by = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": seed},
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("1", "2")
    }

    assert 1 == len(made_by)
    assert b"excluded" in next(iter(made_by))


@pytest.mark.parametrize("order", list(permutations(["same_task", "any_task", "corpus"]))[1:])
def test_the_order_of_a_mix_does_not_matter(order: Sequence[str]) -> None:
    """The fingerprint does not have it, so a resume with a different order must make the same samples."""
    weights = {"same_task": 3.0, "any_task": 1.0, "corpus": 0.5}

    def made_with(names: Iterable[str]) -> list[Sample]:
        mix = {name: weights[name] for name in names}
        section = AssemblySection.model_validate({"contexts_per_sample": 4, "distractors": mix})
        return assemble(assembler(section), log_of(1, 100))

    assert made_with(weights) == made_with(order)
