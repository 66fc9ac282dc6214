"""The summary at the end of a run: what it did, where the directory is, how to resume."""

from collections.abc import Iterator
from typing import Any

from streamsyn.pipeline.progress import duration
from streamsyn.pipeline.request import RunSummary

_MAX_SERVERS = 8
"""Servers listed one by one."""


def closing_lines(summary: RunSummary) -> Iterator[str]:
    """The summary as lines of text."""
    counters, out = summary.counters, summary.out
    written = counters.useful_tokens + counters.wasted_tokens
    how = f"stopped early ({summary.stopped})" if summary.stopped else "done"
    yield f"{how} after {duration(counters.elapsed_s)}"
    yield (
        f"  this run   {counters.contexts:,} contexts, {counters.rejects.total():,} rejects, "
        f"{counters.samples:,} samples; {counters.outcomes / max(counters.elapsed_s, 1e-9):,.1f} outcomes/s"
    )
    if counters.rejects:
        reasons = ", ".join(f"{reason} {number:,}" for reason, number in counters.rejects.most_common())
        yield f"  rejects    {reasons}"
    if counters.finished_before or counters.repeated:
        yield f"  skipped    {counters.finished_before:,} finished before, {counters.repeated:,} repeated ids"
    yield (
        f"  tokens     {counters.useful_tokens:,} useful, {counters.wasted_tokens:,} wasted "
        f"({counters.wasted_tokens / max(1, written):.1%}); {counters.retries:,} failed tries; "
        f"{counters.cached_tokens / max(1, counters.prompt_tokens):.0%} of prompt tokens cached"
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
    if summary.stopped:
        yield f"  resume     run again with --out {out}"
    elif summary.samples:
        pattern = f"{out}/samples/*.jsonl*"
        yield f'  load       datasets.load_dataset("json", data_files="{pattern}", split="train")'


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


def closing_figures(summary: RunSummary) -> dict[str, Any]:
    """The summary as JSON: counts of this run, and under `directory` those of all runs into it."""
    counters = summary.counters
    return {
        "out": str(summary.out),
        "stopped": summary.stopped,
        "seconds": round(counters.elapsed_s, 3),
        "contexts": counters.contexts,
        "rejects": dict(counters.rejects),
        "samples": counters.samples,
        "finished_before": counters.finished_before,
        "repeated": counters.repeated,
        "useful_tokens": counters.useful_tokens,
        "thinking_tokens": counters.thinking_tokens,
        "wasted_tokens": counters.wasted_tokens,
        "prompt_tokens": counters.prompt_tokens,
        "cached_tokens": counters.cached_tokens,
        "failed_tries": counters.retries,
        "scored": counters.scored,
        "unscored": counters.unscored,
        "scoring_prompt_tokens": counters.scoring_prompt_tokens,
        "scoring_cached_tokens": counters.scoring_cached_tokens,
        "scoring_tokens": counters.scoring_tokens,
        "scoring_failed_tries": counters.scoring_retries,
        "servers": summary.servers(),
        "directory": {
            "contexts": summary.contexts,
            "rejects": summary.rejects,
            "samples": summary.samples,
        },
    }
