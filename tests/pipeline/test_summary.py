"""The closing words of a run."""

from pathlib import Path

from streamsyn.config.loading import known_keys
from streamsyn.config.sections import RecipeSection
from streamsyn.pipeline.summary import GOVERNED_BY, RunSummary, closing_lines
from streamsyn.records import Reject, RejectReason
from streamsyn.sink.writer import count_outcome
from streamsyn.telemetry import Counters


class Clock(Counters):
    """Counters of a run that took two minutes."""

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return 120.0


def summary(**fields: object) -> RunSummary:
    """A run of 240 outcomes in two minutes."""
    counters = Clock(contexts=230, samples=200, retries=4, useful_tokens=900_000, wasted_tokens=100_000)
    counters.rejects.update({"too_short": 3, "empty": 7})
    counters.prompt_tokens, counters.cached_tokens = 1000, 420
    return RunSummary(Path("out"), counters, contexts=1230, rejects=10, samples=1200, **fields)  # type: ignore[arg-type]


def test_a_run_that_is_done() -> None:
    """What it did, what it cost, where the directory is, how to load it."""
    assert [
        "done after 2 min 00 s",
        "  this run   230 contexts, 10 rejects, 200 samples; 2.0 outcomes/s",
        "  rejects    empty 7, too_short 3",
        "             to ask them again: streamsyn retry out",
        "  tokens     900,000 useful, 100,000 wasted (10.0%); 4 failed tries; 42% of prompt tokens cached",
        "  directory  out: 1,230 contexts, 10 rejects, 1,200 samples",
        '  load       datasets.load_dataset("json", data_files="out/samples/*.jsonl*", split="train")',
    ] == list(closing_lines(summary()))


def test_tiers_of_the_cache() -> None:
    """Host memory and storage are named where servers have cached tokens there."""
    found = summary()
    found.counters.cached_host_tokens = 120

    assert "42% of prompt tokens cached, 12% from host" in "\n".join(closing_lines(found))
    assert (120, 0) == tuple(found.as_dict()[f"cached_{tier}_tokens"] for tier in ("host", "storage"))


def test_one_reject_of_each_reason_is_quoted() -> None:
    """Where, why, and the key that governs it; a traceback by its last line."""
    quoted = summary()
    bug = "Traceback ...\n  File x\nValueError: " + "x" * 300 + "\n"
    for number, (reason, detail) in enumerate(
        [("too_short", "31 words, fewer than 50"), ("too_short", "8 words"), ("internal_error", bug)]
    ):
        count_outcome(
            quoted.counters,
            Reject(key=b"k", reason=RejectReason(reason), detail=detail, origin=f"a.jsonl:{number}"),
        )
    lines = list(closing_lines(quoted))
    at = lines.index("             too_short, such as a.jsonl:0: 31 words, fewer than 50 (checks.min_words)")
    assert lines[at + 1].startswith("             internal_error, such as a.jsonl:2: ValueError: xxx")
    assert lines[at + 1].endswith("x...")


def test_the_key_of_a_reason_exists() -> None:
    """Faults of the data and of the code have none."""
    assert set(GOVERNED_BY.values()) <= {*known_keys(), "seeds.fields"}
    without = {"invalid_utf8", "invalid_json", "internal_error"}
    assert without == {str(reason) for reason in RejectReason} - set(map(str, GOVERNED_BY))


def test_a_run_that_was_stopped() -> None:
    """Why, and how to resume instead of how to load."""
    first, *_, last = closing_lines(summary(stopped="stopped by SIGTERM"))
    assert "stopped early (stopped by SIGTERM) after 2 min 00 s" == first
    assert "  resume     run again with --out out" == last


def test_a_run_that_resumed() -> None:
    """What was skipped is listed, with the reason."""
    resumed = summary()
    resumed.counters.finished_before, resumed.counters.repeated = 1000, 2
    assert "  skipped    1,000 finished before, 2 repeated ids" in closing_lines(resumed)


def test_a_run_that_had_nothing_to_do() -> None:
    """Nothing is divided by zero, and there is nothing to load."""
    nothing = RunSummary(Path("out"), Counters())
    lines = list(closing_lines(nothing))
    assert "  directory  out: 0 contexts, 0 rejects, 0 samples" == lines[-1]
    assert not [line for line in lines if line.startswith(("  rejects", "  skipped", "  load"))]
    assert 0 == nothing.reject_fraction


def test_the_share_of_rejects() -> None:
    """Of all outcomes in the directory, not of this run alone: it decides the exit code."""
    assert 10 / 1240 == summary().reject_fraction


def test_figures_for_a_program() -> None:
    """Counts of this run, and those of the directory."""
    figures = summary(stopped="stopped by SIGTERM").as_dict()

    assert ("out", "stopped by SIGTERM", 120.0) == (figures["out"], figures["stopped"], figures["seconds"])
    assert (230, 200, {"too_short": 3, "empty": 7}) == (
        figures["contexts"],
        figures["samples"],
        figures["rejects"],
    )
    assert (900_000, 100_000, 4) == (
        figures["useful_tokens"],
        figures["wasted_tokens"],
        figures["failed_tries"],
    )
    assert {"contexts": 1230, "rejects": 10, "samples": 1200} == figures["directory"]


def test_a_run_that_scored() -> None:
    """The cost of scoring is listed apart, in the text and in the JSON."""
    scored = summary()
    assert not [line for line in closing_lines(scored) if line.startswith("  scoring")]
    figures = {"prompt_tokens": 2000, "cached_tokens": 500, "completion_tokens": 30}
    scored.counters.count_scoring(figures, 1, failed=False)
    scored.counters.count_scoring(figures, 2, failed=True)
    assert (
        "  scoring    2 contexts, 1 of them without a score; 4,000 prompt tokens (25% cached), 60 written; "
        "3 failed tries"
    ) in closing_lines(scored)
    assert (2, 1, 4000, 1000, 60, 3) == tuple(
        scored.as_dict()[name]
        for name in (
            *("scored", "unscored", "scoring_prompt_tokens", "scoring_cached_tokens", "scoring_tokens"),
            "scoring_failed_tries",
        )
    )
    assert 42 == scored.as_dict()["cached_tokens"] / 10


def test_tokens_of_unfinished_answers_are_wasted() -> None:
    """Aborted, timed out and broken answers: their tokens are estimated and count as waste."""
    stopped = summary(servers=lambda: [server(unfinished=141, unfinished_tokens=300_000)])
    assert (
        "  tokens     900,000 useful, 400,000 wasted "
        "(30.8%, about 300,000 of them in 141 unfinished answers); 4 failed tries; "
        "42% of prompt tokens cached"
    ) in closing_lines(stopped)
    figures = stopped.as_dict()
    assert (400_000, 141) == (figures["wasted_tokens"], figures["unfinished_answers"])


def server(**counts: int) -> dict[str, object]:
    """The figures of a server."""
    names = ("completions", "cap", "prompt_tokens", "cached_tokens", "planned_cached_tokens")
    return {"server": "http://gpu-1:30000", **dict.fromkeys(names, 0), **counts}


def test_lengths_that_were_missed() -> None:
    """Each is listed with the key that governs it; lengths as asked for are not."""
    missed = summary(recipe=RecipeSection())
    missed.counters.context_words = 230 * 2100
    assert not [line for line in closing_lines(missed) if "  lengths" in line]
    missed.counters.context_words = 230 * 640
    missed.counters.flags["truncated"], missed.counters.short_samples = 46, 100
    lines = "\n".join(closing_lines(missed))
    assert (
        "  lengths    640 words a context (mean), recipe.target_words = 2,000\n"
        "             20% of the contexts were cut off at recipe.max_tokens; see recipe.on_truncated\n"
        "             50% of the samples are shorter than assembly.target_tokens\n"
    ) in lines
