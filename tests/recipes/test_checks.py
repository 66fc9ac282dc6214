"""What is not fit to be a context, and what only looks so."""

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.config.sections import ChecksSection
from streamsyn.recipes.checks import Checks, Failure, repetition
from streamsyn.records import RejectReason, Seed
from streamsyn.words import normalised
from tests.examples import in_turn

SEED = Seed("s", "qa", "When did the mill of Aldersby burn down?", "In 1847.", "f:1")
PROSE = " ".join(f"The {number}th year saw the river rise by {number * 7} feet." for number in range(1, 21))
OWN_LINE = normalised("The document alone, from its first sentence to its last, and nothing else.")


def failure(text: str, seed: Seed = SEED, **section: Any) -> Failure | None:
    """The first check that a text fails."""
    checks = Checks(ChecksSection(**section))
    figures, failure = checks.judge(text, seed, [OWN_LINE])
    assert figures == checks.measure(text)
    assert failure == checks.failure(text, figures, seed, [OWN_LINE])
    return failure


def reason(text: str, seed: Seed = SEED, **section: Any) -> RejectReason | None:
    """Its reason."""
    found = failure(text, seed, **section)
    return found.reason if found is not None else None


@in_turn(
    "start",
    [
        "I'm sorry, but I can't help with that.",
        "I\u2019m sorry, but I can\u2019t help with writing this document.",
        "I am very sorry, but I am unable to write this.",
        "Sorry, I cannot comply with this request.",
        "I apologize, but I cannot provide that.",
        "Unfortunately, I am not able to generate such a document.",
        "I cannot assist with this request.",
        "I can't do that.",
        "We are unable to provide this text.",
        "As an AI language model, I do not have access to the document.",
        "As an AI, I must decline.",
        "As a large language model I was not trained for this.",
        "**I'm sorry**, but I won't write that.",
    ],
)
def test_refusals(start: str) -> None:
    """An answer that begins by declining, whatever comes then."""
    assert RejectReason.REFUSAL is reason(f"{start} {PROSE}")


@in_turn(
    "start",
    [
        "I'm sorry to say the mill burned down.",
        "Sorry sights met the council at the bridge.",
        "I am afraid of water, said the miller.",
        "I cannot help thinking of the mill.",
        "I can't help but wonder who lit the fire.",
        "We cannot do without the river, the old millers said.",
        "I will not forget the night of the fire.",
        "As an AI researcher at Leeds, she read the parish books.",
        "As an artificial lake, it had no name.",
        "As an AI company, Aldersby Labs has no mill.",
        "Unable to sleep, the miller rose.",
        "The court cannot help you, the clerk said.",
        "Unfortunately, the mill burned.",
    ],
)
def test_what_is_no_refusal(start: str) -> None:
    """People in documents are sorry, afraid and unable too."""
    assert reason(f"{start} {PROSE}") is None


@in_turn(
    "text",
    [
        f"Question: {SEED.instruction}\nAnswer: {SEED.answer}\n\n{PROSE}",
        f"**Instruction:** tell of the mill\n\n**Answer:** it burned\n\n{PROSE}",
        f"{PROSE}\n\n{SEED.instruction} {SEED.answer}",
        f"{PROSE} When did the mill of\nAldersby burn down? As the books say: in 1847. {PROSE}",
        f"{SEED.instruction} Nobody knew. {PROSE} {SEED.instruction} In 1847.",
    ],
)
def test_a_pasted_pair(text: str) -> None:
    """Labelled, or the question with its answer right behind it, wherever it stands."""
    assert RejectReason.QA_PASTED is reason(text)


def test_hardly_more_than_the_answer() -> None:
    """A summary that comes back as it was is no document."""
    seed = Seed("s", "summary", "Sum up the meeting.", PROSE, "f:1")
    assert RejectReason.QA_PASTED is reason(f"So it went. {PROSE}", seed)
    assert reason(f"{PROSE} {' '.join(f'Then {n} men spoke of {n} mills.' for n in range(99))}", seed) is None


YES_NO = Seed("s", "qa", "Did the council approve the budget?", "No", "f:1")


@in_turn(
    ("text", "seed"),
    [
        (f"{SEED.instruction} the visitor asked. {PROSE} It was in 1847.", SEED),
        (f"The mill burned down in 1847. {PROSE} {SEED.instruction} Few remember.", SEED),
        (f"Q: State your name.\nA: John Hale.\nQ: Where were you?\nA: At the mill.\n{PROSE}", SEED),
        (f"Question time was short. {PROSE}", SEED),
        (f"Did the council approve the budget? Nobody could say, as notes were lost. {PROSE}", YES_NO),
        (f"In 1847. {PROSE}", SEED),
    ],
)
def test_a_document_may_speak_of_the_pair(text: str, seed: Seed) -> None:
    """A question with its answer far away, an interview, half of the pair: all that is natural."""
    assert reason(text, seed) is None


def test_an_echo_of_our_prompt() -> None:
    """A long line of ours, in whatever case and spacing; the detail shows it."""
    found = failure(f"{PROSE}\nTHE DOCUMENT alone,  from its first sentence\nto its last, and nothing else.")
    assert Failure(RejectReason.PROMPT_ECHO, f"repeats our prompt: {OWN_LINE!r}") == found
    checks = Checks(ChecksSection())
    assert checks.failure(PROSE, checks.measure(PROSE), SEED, ["the river rise by 7 feet."]) is None


def test_length() -> None:
    """At the bounds a text still passes; beyond them the detail names bound and key."""
    words = [f"word{number}" for number in range(101)]
    limits: dict[str, Any] = {"min_words": 10, "max_words": 100}
    assert [None, None] == [reason(" ".join(words[:count]), **limits) for count in (10, 100)]
    short, long = failure(" ".join(words[:9]), **limits), failure(" ".join(words), **limits)
    assert Failure(RejectReason.TOO_SHORT, "9 words, fewer than checks.min_words = 10") == short
    assert Failure(RejectReason.TOO_LONG, "101 words, more than checks.max_words = 100") == long


def test_repetition() -> None:
    """The share of five-word runs that have stood before; a loop is found, a refrain is not."""
    loop = "round and round the mill wheel goes " * 20
    assert RejectReason.REPETITION is reason(loop)
    assert (
        reason(f"{PROSE} so the river runs to the sea. {PROSE[:300]} so the river runs to the sea.") is None
    )
    assert reason(loop, max_repetition=1) is None


@pytest.mark.parametrize(
    ("switch", "text"),
    [
        ("refusal", f"I'm sorry, but I can't. {PROSE}"),
        ("prompt_echo", f"{PROSE} {OWN_LINE}"),
        ("qa_pasted", f"{SEED.instruction} {SEED.answer} {PROSE}"),
    ],
)
def test_a_check_that_is_off(switch: str, text: str) -> None:
    """Each can be left out by itself."""
    assert reason(text) is not None
    off: dict[str, Any] = {switch: False}
    assert reason(text, **off) is None


def test_nothing_at_all() -> None:
    """An empty text is `empty`, even where no length is asked for."""
    assert [RejectReason.EMPTY] * 2 == [reason(text, min_words=0) for text in ("", " \n\t ")]


def test_the_measures_that_stay_with_a_context() -> None:
    """Words, and the share of repeated runs."""
    assert {"words": 6, "repetition": 0.0} == Checks(ChecksSection()).measure("a b c\nd e f")
    assert 0.5 == Checks(ChecksSection()).measure("a a a a a a")["repetition"]


@given(st.lists(st.sampled_from("ab"), max_size=30))
def test_repetition_is_a_share(words: list[str]) -> None:
    """From nothing to nearly all, whatever the length."""
    assert 0 <= repetition(words) < 1


@given(text=st.text(max_size=200), instruction=st.text(min_size=1), answer=st.text(min_size=1))
def test_any_text_can_be_checked(text: str, instruction: str, answer: str) -> None:
    """Whatever stands in a pair or an answer, a check says yes or names its reason."""
    found = failure(text, Seed("s", "t", instruction, answer, "f:1"), min_words=0)
    assert found is None or found.detail


@pytest.mark.parametrize("start", ["As an AI", "I'm sorry", "Question:", "Question", "I cannot"])
def test_a_loop_of_white_space_is_checked_in_no_time(start: str) -> None:
    """Checks run beside all other requests: no answer, however odd, may hold them up for long."""
    began = time.process_time()
    for loop in (" ", "\n", "\n ", "\nanswer "):
        reason(start + loop * 20_000)
    assert 10 > time.process_time() - began
