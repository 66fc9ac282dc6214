"""What a report concludes."""

from pathlib import Path
from typing import Any

import pytest

from streamsyn.records import Context, Reject, RejectReason
from streamsyn.report.collection import RunMetrics
from streamsyn.report.verdict import Severity, Verdict, percent, verdict
from tests.report.runs import good_run, rejected, sample_of, scored, written

MEASURED: dict[str, Any] = {
    "checks.context_gain": True,
    "checks.answerable": True,
    "checks.near_duplicate": "flag",
}


def judged(root: Path) -> tuple[Verdict, dict[str, Severity]]:
    found = verdict(RunMetrics(root))
    return found, {fact.name: fact.mark for fact in found.facts}


def run_of(root: Path, contexts: list[Context], **settings: Any) -> Path:
    samples = [sample_of(context, seq, ["other"] * 9) for seq, context in enumerate(contexts)]
    return written(root, contexts, samples, **{**MEASURED, **settings})


def test_a_good_run_is_fit(tmp_path: Path) -> None:
    """Six facts, all good."""
    found, marks = judged(good_run(tmp_path))

    assert "Fit for training" == found.headline
    assert {Severity.GOOD} == set(marks.values())
    assert ["Amount", "Rejects", "Context gain", "Answers", "Repeats", "Lengths"] == list(marks)


def test_a_run_that_goes_on_is_fit_so_far(tmp_path: Path) -> None:
    """What is not finished says so in the headline."""
    contexts = [scored(number) for number in range(220)]
    samples = [sample_of(contexts[0], 0, ["other"] * 9)]
    found, _ = judged(written(tmp_path, contexts, samples, is_final=False, **MEASURED))

    assert ("Fit for training so far", Severity.GOOD) == (found.headline, found.mark)
    assert "not finished" in found.reason


def test_what_was_not_measured_is_no_praise(tmp_path: Path) -> None:
    """Without gain and answers nobody knows whether a run is fit; the keys that measure them are named."""
    contexts = [scored(number) for number in range(220)]
    plain = [
        Context(**{**{key: getattr(one, key) for key in Context.__slots__}, "checks": {"words": 1900}})
        for one in contexts
    ]
    found, marks = judged(written(tmp_path, plain, [sample_of(plain[0], 0, ["o"] * 9)]))
    said = " ".join(sentence for fact in found.facts for _, sentence in fact.said)

    assert ("Look closer", Severity.LOOK) == (found.headline, found.mark)
    assert (Severity.UNKNOWN, Severity.UNKNOWN) == (marks["Context gain"], marks["Answers"])
    for key in ("checks.context_gain", "checks.answerable", "checks.near_duplicate", "checks.eval_sets"):
        assert key in said


@pytest.mark.parametrize(
    ("fact", "contexts"),
    [
        ("Context gain", [scored(number, gain=0.5 if number % 2 else -0.5) for number in range(220)]),
        ("Answers", [scored(number, score=0.0 if number % 3 else 1.0) for number in range(220)]),
        ("Answers", [scored(number, score=0.9, closed_book=0.95) for number in range(220)]),
        ("Repeats", [scored(number, flags=["near_duplicate"] * (number % 10 == 0)) for number in range(220)]),
        ("Repeats", [scored(number, flags=["contaminated"] * (number % 10 == 0)) for number in range(220)]),
        ("Lengths", [scored(number, checks={"words": 90}) for number in range(220)]),
    ],
)
def test_one_bad_fact_is_enough(tmp_path: Path, fact: str, contexts: list[Context]) -> None:
    """A run with one bad fact is not fit, and the verdict says which, in that fact's words."""
    found, marks = judged(run_of(tmp_path, contexts))

    assert {fact} == {name for name, mark in marks.items() if mark is Severity.BAD}
    assert "Not fit for training" == found.headline
    assert found.reason in [sentence for one in found.facts for _, sentence in one.said]


def test_rejects_count_and_the_commonest_reason_is_named(tmp_path: Path) -> None:
    """A third of rejects is bad."""
    outcomes: list[Context | Reject] = [
        *(scored(one) for one in range(220)),
        *(rejected(one) for one in range(100)),
    ]
    outcomes += [rejected(1000, RejectReason.TIMEOUT)]
    found, marks = judged(written(tmp_path, outcomes, [sample_of(scored(0), 0, ["o"] * 9)], **MEASURED))

    assert Severity.BAD is marks["Rejects"]
    assert "101 of 321 outcomes are rejects; 100 of them are refusal." == found.reason


def test_contexts_that_are_cut_off_deserve_a_look(tmp_path: Path) -> None:
    """A third of them without an end is no reason not to train, but to see why."""
    contexts = [scored(number, flags=["truncated"] * (number % 3 == 0)) for number in range(220)]
    found, marks = judged(run_of(tmp_path, contexts))

    assert (Severity.LOOK, "Look closer") == (marks["Lengths"], found.headline)
    assert "34% of the contexts were cut off." == found.reason


def test_few_contexts_deserve_a_look(tmp_path: Path) -> None:
    """Twenty contexts are not enough to train on, however good they are."""
    found, marks = judged(run_of(tmp_path, [scored(number) for number in range(20)]))

    assert (Severity.LOOK, "Look closer") == (marks["Amount"], found.headline)


def test_an_empty_run_is_not_fit(tmp_path: Path) -> None:
    """No contexts, no training; with rejects alone as well."""
    assert ("Not fit for training", "There are no contexts.") == (
        (found := judged(written(tmp_path / "a"))[0]).headline,
        found.reason,
    )
    assert Severity.BAD is judged(written(tmp_path / "b", [rejected(1)]))[0].mark


@pytest.mark.parametrize(
    ("target", "mark"),
    [
        (900, Severity.GOOD),
        (2000, Severity.BAD),
        ({"uniform": [800, 9000]}, Severity.GOOD),
        ({"choices": [5000]}, Severity.BAD),
    ],
)
def test_samples_against_their_target(tmp_path: Path, target: Any, mark: Severity) -> None:
    """Samples of 1,000 tokens reach 900, and not 2,000; of a distribution its lowest counts."""
    run = run_of(tmp_path, [scored(number) for number in range(220)], **{"assembly.target_tokens": target})

    assert mark is judged(run)[1]["Lengths"]


def test_shares_are_whole_only_where_they_are_exact() -> None:
    """One in a million is not 0%, and all but one are not 100%."""
    assert ["0%", "<0.1%", "2.5%", "50%", ">99.9%", "99.5%", "100%", "0%"] == [
        percent(*pair)
        for pair in ((0, 5), (1, 10**6), (1, 40), (1, 2), (999_999, 10**6), (199, 200), (7, 7), (0, 0))
    ]
