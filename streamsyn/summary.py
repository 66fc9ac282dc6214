"""The closing words of a run: what it did, where it lies, how to go on."""

from collections.abc import Iterator
from typing import Any

from streamsyn.progress import duration
from streamsyn.run import RunSummary


def closing_lines(summary: RunSummary) -> Iterator[str]:
    """Lines for a person."""
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
    yield (
        f"  directory  {out}: {summary.contexts:,} contexts, {summary.rejects:,} rejects, "
        f"{summary.samples:,} samples"
    )
    if summary.stopped:
        yield f"  go on      run again with --out {out}"
    elif summary.samples:
        pattern = f"{out}/samples/*.jsonl*"
        yield f'  load       datasets.load_dataset("json", data_files="{pattern}", split="train")'


def closing_figures(summary: RunSummary) -> dict[str, Any]:
    """The same for a program: counts of this run, and below `directory` those of all runs into it."""
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
        "wasted_tokens": counters.wasted_tokens,
        "prompt_tokens": counters.prompt_tokens,
        "cached_tokens": counters.cached_tokens,
        "failed_tries": counters.retries,
        "directory": {
            "contexts": summary.contexts,
            "rejects": summary.rejects,
            "samples": summary.samples,
        },
    }
