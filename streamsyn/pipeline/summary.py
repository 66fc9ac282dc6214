"""The summary of a run, and its text at the end: what it did, where the directory is, how to resume."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamsyn.config.sections import RecipeSection
from streamsyn.fleet.server import Timings
from streamsyn.pipeline.progress import duration
from streamsyn.pipeline.stages import Queues
from streamsyn.records import RejectReason
from streamsyn.telemetry import Counters

_MAX_SERVERS = 8
"""Servers listed one by one."""
_MAX_DETAIL = 140
"""Characters shown of why a reject was rejected."""
GOVERNED_BY: dict[RejectReason, str] = {
    RejectReason.NOT_A_SEED: "seeds.fields",
    RejectReason.LINE_TOO_LONG: "seeds.max_line_bytes",
    RejectReason.EMPTY: "recipe.tries",
    RejectReason.TOO_SHORT: "checks.min_words",
    RejectReason.TOO_LONG: "checks.max_words",
    RejectReason.REFUSAL: "checks.refusal",
    RejectReason.TRUNCATED: "recipe.max_tokens",
    RejectReason.STILL_THINKING: "recipe.max_tokens",
    RejectReason.REPETITION: "checks.max_repetition",
    RejectReason.PROMPT_ECHO: "checks.prompt_echo",
    RejectReason.QA_PASTED: "checks.qa_pasted",
    RejectReason.NO_PAIR: "recipe.tries",
    RejectReason.NEAR_DUPLICATE: "checks.near_duplicate",
    RejectReason.CONTAMINATED: "checks.on_contaminated",
    RejectReason.LOW_CONTEXT_GAIN: "checks.reject_gain_below",
    RejectReason.NOT_ANSWERABLE: "checks.reject_answer_below",
    RejectReason.REQUEST_REFUSED: "recipe.sampling",
    RejectReason.TIMEOUT: "fleet.request_timeout_s",
    RejectReason.BROKEN_RESPONSE: "fleet.max_attempts",
    RejectReason.SERVER_UNAVAILABLE: "fleet.max_attempts",
}
"""The key that decides whether a seed is rejected for a reason. Reasons without one are faults of the data or
of the code."""
_FAR_OFF = 0.2
"""A mean length that differs from its target by more is reported."""
_LENGTH_FLAGS = {
    "truncated": "were cut off at recipe.max_tokens; see recipe.on_truncated",
    "below_target": "ended before recipe.target_tokens",
}


@dataclass(slots=True)
class RunSummary:
    """The result of a run, filled while it goes on.

    Attributes:
        out: The run directory.
        counters: What this process did.
        stopped: Why the run stopped early; None when it did not.
        too_many_rejects: Whether rejects are why it stopped early.
        interrupted: Whether a signal arrived.
        contexts: Contexts in the directory, of all runs into it.
        rejects: Rejects in the directory that no later outcome supersedes.
        samples: Samples in the directory.
        in_log: Returns the numbers of contexts, rejects that hold, and samples in the directory now; empty
            before it is open.
        servers: Returns the metrics of each server.
        timings: How long requests took.
        queues: Returns how full the queues are; None before the run has begun.
        progress: Returns the present progress; empty before the run has begun. Call it in the event loop of
            the run.
        recipe: What was asked for, to compare with.
        notes: What to know about the seeds, one line each.
    """

    out: Path
    counters: Counters
    stopped: str | None = None
    too_many_rejects: bool = False
    interrupted: bool = False
    contexts: int = 0
    rejects: int = 0
    samples: int = 0
    in_log: Callable[[], dict[str, int]] = dict
    servers: Callable[[], list[dict[str, Any]]] = list
    timings: Timings = field(default_factory=Timings)
    queues: Callable[[], Queues | None] = lambda: None
    progress: Callable[[], dict[str, Any]] = dict
    recipe: RecipeSection | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def reject_fraction(self) -> float:
        """Share of rejects among all outcomes in the directory."""
        return self.rejects / max(1, self.contexts + self.rejects)

    def unfinished(self) -> tuple[int, int]:
        """Number of answers that were aborted, timed out or broken, and of their tokens, as far as known."""
        servers = self.servers()
        return (
            sum(server.get("unfinished", 0) for server in servers),
            sum(server.get("unfinished_tokens", 0) for server in servers),
        )

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON values: of this run, and under `directory` those of all runs into it."""
        counters = self.counters
        unfinished, unfinished_tokens = self.unfinished()
        return {
            "out": str(self.out),
            "stopped": self.stopped,
            "seconds": round(counters.elapsed_s, 3),
            "contexts": counters.contexts,
            "rejects": dict(counters.rejects),
            "samples": counters.samples,
            "finished_before": counters.finished_before,
            "repeated": counters.repeated,
            "other_partitions": counters.other_partitions,
            "useful_tokens": counters.useful_tokens,
            "thinking_tokens": counters.thinking_tokens,
            "wasted_tokens": counters.wasted_tokens + unfinished_tokens,
            "unfinished_answers": unfinished,
            "unfinished_tokens": unfinished_tokens,
            "flags": dict(counters.flags),
            "short_samples": counters.short_samples,
            "prompt_tokens": counters.prompt_tokens,
            "cached_tokens": counters.cached_tokens,
            "cached_host_tokens": counters.cached_host_tokens,
            "cached_storage_tokens": counters.cached_storage_tokens,
            "failed_tries": counters.retries,
            "scored": counters.scored,
            "unscored": counters.unscored,
            "scoring_prompt_tokens": counters.scoring_prompt_tokens,
            "scoring_cached_tokens": counters.scoring_cached_tokens,
            "scoring_tokens": counters.scoring_tokens,
            "scoring_failed_tries": counters.scoring_retries,
            "seeds": self.notes,
            "servers": self.servers(),
            "directory": {
                "contexts": self.contexts,
                "rejects": self.rejects,
                "samples": self.samples,
            },
        }


def too_many_rejects(summary: RunSummary, allowed: float) -> str | None:
    """What to report if more than `allowed` of the outcomes in the directory are rejects; None if not."""
    if summary.reject_fraction <= allowed:
        return None
    return (
        f"rejects are {summary.reject_fraction:.1%} of the outcomes, more than "
        f"run.max_reject_fraction = {allowed:.1%}"
    )


def closing_lines(summary: RunSummary) -> Iterator[str]:
    """The summary as lines of text."""
    counters, out = summary.counters, summary.out
    unfinished, unfinished_tokens = summary.unfinished()
    wasted = counters.wasted_tokens + unfinished_tokens
    how = f"stopped early ({summary.stopped})" if summary.stopped else "done"
    yield f"{how} after {duration(counters.elapsed_s)}"
    yield (
        f"  this run   {counters.contexts:,} contexts, {counters.rejects.total():,} rejects, "
        f"{counters.samples:,} samples; {counters.outcomes / max(counters.elapsed_s, 1e-9):,.1f} outcomes/s"
    )
    if counters.rejects:
        reasons = ", ".join(f"{reason} {number:,}" for reason, number in counters.rejects.most_common())
        yield f"  rejects    {reasons}"
        for reason, (origin, detail) in counters.reject_examples.items():
            yield f"  {'':10} {_example(reason, origin, detail)}"
        yield f"  {'':10} to ask them again: streamsyn retry {out}"
    if counters.finished_before or counters.repeated:
        yield f"  skipped    {counters.finished_before:,} finished before, {counters.repeated:,} repeated ids"
    if counters.other_partitions:
        yield f"  {'':10} {counters.other_partitions:,} seeds of other partitions"
    yield from (f"  seeds      {note}" for note in summary.notes)
    yield from _length_lines(summary)
    within = (
        f", about {unfinished_tokens:,} of them in {unfinished:,} unfinished answers" if unfinished else ""
    )
    share = wasted / max(1, counters.useful_tokens + wasted)
    prompt, tiers = max(1, counters.prompt_tokens), counters.cached_by_tier
    elsewhere = "".join(
        f", {tiers[tier] / prompt:.0%} from {tier}" for tier in ("host", "storage") if tiers[tier]
    )
    yield (
        f"  tokens     {counters.useful_tokens:,} useful, {wasted:,} wasted "
        f"({share:.1%}{within}); {counters.retries:,} failed tries; "
        f"{counters.cached_tokens / prompt:.0%} of prompt tokens cached{elsewhere}"
    )
    if counters.thinking_tokens:
        share = counters.thinking_tokens / max(1, counters.useful_tokens)
        yield f"  thinking   {counters.thinking_tokens:,} of the useful tokens ({share:.1%})"
    if counters.scored:
        yield (
            f"  scoring    {counters.scored:,} contexts, {counters.unscored:,} of them without a score; "
            f"{counters.scoring_prompt_tokens:,} prompt tokens "
            f"({counters.scoring_cached_tokens / max(1, counters.scoring_prompt_tokens):.0%} cached), "
            f"{counters.scoring_tokens:,} written; {counters.scoring_retries:,} failed tries"
        )
    yield from _server_lines(summary)
    yield (
        f"  directory  {out}: {summary.contexts:,} contexts, {summary.rejects:,} rejects, "
        f"{summary.samples:,} samples"
    )
    if summary.too_many_rejects:
        yield f"  resume     mend the cause, then run again with --out {out}"
        yield f"  {'':10} or accept such rejects: --set run.max_reject_fraction=1"
    elif summary.stopped:
        yield f"  resume     run again with --out {out}"
    elif summary.samples:
        pattern = f"{out}/samples/*.jsonl*"
        yield f'  load       datasets.load_dataset("json", data_files="{pattern}", split="train")'


def _example(reason: str, origin: str, detail: str) -> str:
    """One reject of a reason: where, why, and the key that governs it."""
    key = GOVERNED_BY.get(RejectReason(reason))
    why = detail.strip()
    if reason == RejectReason.INTERNAL_ERROR:
        why = why.rpartition("\n")[2]  # the last line of a traceback names the error
    why = " ".join(why.split())
    why = why if len(why) <= _MAX_DETAIL else f"{why[: _MAX_DETAIL - 3]}..."
    return f"{reason}, such as {origin}: {why}" + (f" ({key})" if key and key not in why else "")


def _length_lines(summary: RunSummary) -> Iterator[str]:
    """Lengths that differ from what the configuration asks for, with the keys that govern them."""
    counters, recipe = summary.counters, summary.recipe
    contexts, samples = max(1, counters.contexts), max(1, counters.samples)
    found: list[str] = []
    if recipe is not None and recipe.use == "context" and not recipe.tasks:
        words = counters.context_words / contexts
        if counters.contexts and not 1 - _FAR_OFF < words / recipe.target_words < 1 + _FAR_OFF:
            found.append(
                f"{words:,.0f} words a context (mean), recipe.target_words = {recipe.target_words:,}"
            )
    for flag, advice in _LENGTH_FLAGS.items():
        if number := counters.flags[flag]:
            found.append(f"{number / contexts:.0%} of the contexts {advice}")
    if number := counters.short_samples:
        found.append(f"{number / samples:.0%} of the samples are shorter than assembly.target_tokens")
    for place, text in enumerate(found):
        yield f"  {'lengths' if place == 0 else '':10} {text}"


def _server_lines(summary: RunSummary) -> Iterator[str]:
    """One line for each server, busiest first: its answers, cap, and cached tokens against the plan."""
    servers = sorted(summary.servers(), key=lambda server: -server["completions"])
    for place, server in enumerate(servers[:_MAX_SERVERS]):
        prompt = max(1, server["prompt_tokens"])
        yield (
            f"  {'servers' if place == 0 else '':10} {server['server']}: {server['completions']:,} answers, "
            f"cap {server['cap']}, cached {server['cached_tokens'] / prompt:.0%} of prompt tokens "
            f"({server['planned_cached_tokens'] / prompt:.0%} planned)"
        )
    if len(servers) > _MAX_SERVERS:
        yield f"  {'':10} and {len(servers) - _MAX_SERVERS} more"
