"""The verdict of a report."""

from pathlib import Path
from typing import Any

import pytest

from streamsyn.records import Context, Reject, RejectReason
from streamsyn.report.run_metrics import RunMetrics
from streamsyn.report.verdict import Severity, Verdict, percent, verdict
from tests.report.runs import good_run, rejected, sample_of, scored, written

MEASURED: dict[str, Any] = {
    "checks.context_gain": True,
    "checks.answerable": True,
    "checks.near_duplicate": "flag",
}


def judged(root: Path) -> tuple[Verdict, dict[str, Severity]]:
    found = verdict(RunMetrics(root))
    return found, {fact.name: fact.severity for fact in found.facts}


def run_of(root: Path, contexts: list[Context], **settings: Any) -> Path:
    samples = [sample_of(context, seq, ["other"] * 9) for seq, context in enumerate(contexts)]
    return written(root, contexts, samples, **{**MEASURED, **settings})


def test_a_good_run_is_fit(tmp_path: Path) -> None:
    """Six facts, all good."""
    found, severities = judged(good_run(tmp_path))

    assert "Fit for training" == found.headline
    assert {Severity.GOOD} == set(severities.values())
    assert ["Amount", "Rejects", "Context gain", "Answers", "Repeats", "Lengths"] == list(severities)


def test_an_unfinished_run_is_fit_so_far(tmp_path: Path) -> None:
    """The headline says that the run is not finished."""
    contexts = [scored(number) for number in range(220)]
    samples = [sample_of(contexts[0], 0, ["other"] * 9)]
    found, _ = judged(written(tmp_path, contexts, samples, is_final=False, **MEASURED))

    assert ("Fit for training so far", Severity.GOOD) == (found.headline, found.severity)
    assert "not finished" in found.reason


def test_an_unmeasured_run_needs_a_look(tmp_path: Path) -> None:
    """Without gain and answers the verdict is open; the keys that measure them are named."""
    contexts = [scored(number) for number in range(220)]
    plain = [
        Context(**{**{key: getattr(one, key) for key in Context.__slots__}, "checks": {"words": 1900}})
        for one in contexts
    ]
    found, severities = judged(written(tmp_path, plain, [sample_of(plain[0], 0, ["o"] * 9)]))
    sentences = " ".join(sentence for fact in found.facts for _, sentence in fact.sentences)

    assert ("Look closer", Severity.LOOK) == (found.headline, found.severity)
    assert (Severity.UNKNOWN, Severity.UNKNOWN) == (severities["Context gain"], severities["Answers"])
    for key in ("checks.context_gain", "checks.answerable", "checks.near_duplicate", "checks.eval_sets"):
        assert key in sentences


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
def test_one_bad_fact_decides(tmp_path: Path, fact: str, contexts: list[Context]) -> None:
    """A run with one bad fact is not fit, and the reason is a sentence of that fact."""
    found, severities = judged(run_of(tmp_path, contexts))

    assert {fact} == {name for name, severity in severities.items() if severity is Severity.BAD}
    assert "Not fit for training" == found.headline
    assert found.reason in [sentence for one in found.facts for _, sentence in one.sentences]


def test_many_rejects_are_bad(tmp_path: Path) -> None:
    """A third of rejects is bad; the most common reason is named."""
    outcomes: list[Context | Reject] = [
        *(scored(one) for one in range(220)),
        *(rejected(one) for one in range(100)),
    ]
    outcomes += [rejected(1000, RejectReason.TIMEOUT)]
    found, severities = judged(written(tmp_path, outcomes, [sample_of(scored(0), 0, ["o"] * 9)], **MEASURED))

    assert Severity.BAD is severities["Rejects"]
    assert "101 of 321 outcomes are rejects; 100 of them are refusal." == found.reason


def test_truncated_contexts_need_a_look(tmp_path: Path) -> None:
    """A third of truncated contexts is not a reason against training."""
    contexts = [scored(number, flags=["truncated"] * (number % 3 == 0)) for number in range(220)]
    found, severities = judged(run_of(tmp_path, contexts))

    assert (Severity.LOOK, "Look closer") == (severities["Lengths"], found.headline)
    assert "34% of the contexts were cut off at recipe.max_tokens (see recipe.on_truncated)." == found.reason


def test_few_contexts_need_a_look(tmp_path: Path) -> None:
    """Twenty contexts are not enough to train on, however good they are."""
    found, severities = judged(run_of(tmp_path, [scored(number) for number in range(20)]))

    assert (Severity.LOOK, "Look closer") == (severities["Amount"], found.headline)


def test_an_empty_run_is_not_fit(tmp_path: Path) -> None:
    """No contexts, no training; with rejects alone as well."""
    assert ("Not fit for training", "There are no contexts.") == (
        (found := judged(written(tmp_path / "a"))[0]).headline,
        found.reason,
    )
    assert Severity.BAD is judged(written(tmp_path / "b", [rejected(1)]))[0].severity


@pytest.mark.parametrize(
    ("target", "severity"),
    [
        (900, Severity.GOOD),
        (2000, Severity.BAD),
        ({"uniform": [800, 9000]}, Severity.GOOD),
        ({"choices": [5000]}, Severity.BAD),
    ],
)
def test_samples_against_their_target(tmp_path: Path, target: Any, severity: Severity) -> None:
    """Samples of 1,000 tokens reach 900, but not 2,000; of a distribution the lowest length counts."""
    run = run_of(tmp_path, [scored(number) for number in range(220)], **{"assembly.target_tokens": target})

    assert severity is judged(run)[1]["Lengths"]


def test_percentages_are_0_or_100_only_if_exact() -> None:
    """One in a million is not 0%, and all but one are not 100%."""
    assert ["0%", "<0.1%", "2.5%", "50%", ">99.9%", "99.5%", "100%", "0%"] == [
        percent(*pair)
        for pair in ((0, 5), (1, 10**6), (1, 40), (1, 2), (999_999, 10**6), (199, 200), (7, 7), (0, 0))
    ]
