"""`streamsyn status`: what a run is doing, or how it ended, by what is on disk; or what a daemon answers."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Literal

from streamsyn.errors import ConfigError, SinkError
from streamsyn.following.daemon_client import answers, is_run_url, run_url
from streamsyn.pipeline.progress import duration
from streamsyn.scoring.sidecar import measured
from streamsyn.sink.epoch import writer
from streamsyn.sink.partitions import Partitions, read_partitions
from streamsyn.sink.rundir import holder_of, read_run_json
from streamsyn.sink.snapshot import Part, Snapshot, open_rejects, superseded

State = Literal["running", "finished", "unfinished"]

_RATE_OVER_S: Final = 300.0
"""The rate is that of this time before the last outcome."""
_MAX_RUNS: Final = 100
"""Runs that are shown: those that have not ended come first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What a run directory says.

    Attributes:
        directory: The run directory.
        state: `running` while a process may write to it; else `finished` if every seed has its outcome, or
            `unfinished`: it was stopped or killed.
        process: The process that may: it holds the lock, or has taken over from one that does.
        contexts: Contexts in the log.
        rejects: Rejects that hold.
        superseded: Rejects that retries have superseded.
        reasons: The rejects that hold, by reason.
        samples: Samples in the log.
        retrying: Rejects that a retry is to ask again and has not.
        prompt_tokens: Tokens in, of all contexts in sealed shards.
        completion_tokens: Tokens out, likewise.
        outcomes_per_s: The rate over the last five minutes of work; None where nothing tells.
        started_at: When the run began, in Unix seconds.
        last_outcome_at: When the last outcome was written; None before the first.
        model: The models that write.
        version: The version of streamsyn that ran last.
        scored: Contexts that `streamsyn score` has measured, by measure.
        partitions: The status of each partition that has begun; then the other fields are of all.
    """

    directory: str
    state: State
    process: str | None
    contexts: int
    rejects: int
    superseded: int
    reasons: dict[str, int]
    samples: int
    retrying: int
    prompt_tokens: int
    completion_tokens: int
    outcomes_per_s: float | None
    started_at: float | None
    last_outcome_at: float | None
    model: str
    version: str
    scored: dict[str, int]
    partitions: "list[Status]" = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def status(root: Path) -> Status:
    """Read the status of a run directory, or of all partitions as one; a run may be writing to it.

    Raises:
        ConfigError: It is not a run directory, or its manifest is damaged.
        SinkError: The findings of `streamsyn score` cannot be read.
    """
    partitions = read_partitions(root)
    if partitions is None:
        return _status(root)
    begun = [directory for directory in partitions.directories if (directory / "run.json").exists()]
    return _joined(partitions, [_status(directory) for directory in begun])


def _joined(partitions: Partitions, parts: list[Status]) -> Status:
    """The status of OUT from those of its partitions."""
    process = holder_of(partitions.root)
    is_running = process is not None or any(part.state == "running" for part in parts)
    is_finished = partitions.has_ended and [part.state for part in parts] == ["finished"] * partitions.number
    rates = [part.outcomes_per_s for part in parts if part.outcomes_per_s is not None]
    last = [part.last_outcome_at for part in parts if part.last_outcome_at is not None]
    reasons: Counter[str] = sum((Counter(part.reasons) for part in parts), Counter())
    scored: Counter[str] = sum((Counter(part.scored) for part in parts), Counter())
    return Status(
        directory=str(partitions.root),
        state="running" if is_running else "finished" if is_finished else "unfinished",
        process=process,
        contexts=sum(part.contexts for part in parts),
        rejects=sum(part.rejects for part in parts),
        superseded=sum(part.superseded for part in parts),
        reasons=dict(reasons.most_common()),
        samples=sum(part.samples for part in parts),
        retrying=sum(part.retrying for part in parts),
        prompt_tokens=sum(part.prompt_tokens for part in parts),
        completion_tokens=sum(part.completion_tokens for part in parts),
        outcomes_per_s=sum(rates) if rates else None,
        started_at=partitions.created_at,
        last_outcome_at=max(last, default=None),
        model=", ".join(sorted({part.model for part in parts})),
        version=", ".join(sorted({part.version for part in parts})),
        scored=dict(scored),
        partitions=parts,
    )


def _status(root: Path) -> Status:
    """The status of one run directory."""
    saved = read_run_json(root)
    if saved is None:
        raise ConfigError(f"{root} is not a run directory: it has no run.json")
    process = writer(root, holder_of(root))
    try:
        snapshot = Snapshot(root)
    except SinkError as error:
        raise ConfigError(str(error)) from error
    gone, reasons, rows = superseded(snapshot), Counter[str](), Counter[str]()
    for row in (row for part in snapshot.parts["rejects"] for row in part.rows()):
        rows["rejects"] += 1
        if row.get("seq") not in gone:
            reasons[str(row.get("reason"))] += 1
    for kind in ("contexts", "samples"):
        rows[kind] = sum(map(_rows_of, snapshot.parts[kind]))
    final = snapshot.manifest.final
    is_finished = final is not None and all(final.get(kind, 0) == rows[kind] for kind in rows)
    sealed = [shard.tokens for shard in snapshot.manifest.of_kind("contexts")]
    times = _recent_times(snapshot)
    return Status(
        directory=str(root),
        state="running" if process is not None else "finished" if is_finished else "unfinished",
        process=process,
        contexts=rows["contexts"],
        rejects=reasons.total(),
        superseded=len(gone),
        reasons=dict(reasons.most_common()),
        samples=rows["samples"],
        retrying=sum(1 for _ in open_rejects(snapshot, gone)),
        prompt_tokens=sum(tokens.get("prompt", 0) for tokens in sealed),
        completion_tokens=sum(tokens.get("completion", 0) for tokens in sealed),
        outcomes_per_s=_rate(times),
        started_at=saved.get("created_at"),
        last_outcome_at=times[-1] if times else None,
        model=str(saved["fingerprint"].get("model", "")),
        version=str((saved.get("versions") or {}).get("streamsyn", "?")),
        scored=dict(measured(root)),
    )


def status_lines(found: Status, now: float) -> Iterator[str]:
    """Yield the status as text.

    Args:
        found: The status.
        now: The present time, in Unix seconds.
    """
    how = {
        "running": f"running ({found.process})",
        "finished": "finished: every seed has its outcome",
        "unfinished": f"not finished: stopped or killed; `streamsyn run --out {found.directory}` resumes",
    }
    yield f"{found.directory}: {how[found.state]}"
    yield f"  outcomes   {found.contexts:,} contexts, {found.rejects:,} rejects"
    if found.reasons:
        reasons = ", ".join(f"{reason} {number:,}" for reason, number in found.reasons.items())
        yield f"  rejects    {reasons}"
    if found.superseded or found.retrying:
        yield f"  retries    {found.superseded:,} rejects superseded, {found.retrying:,} not yet asked again"
    yield f"  samples    {found.samples:,}"
    tokens = f"{found.completion_tokens:,} written, {found.prompt_tokens:,} of prompts"
    yield f"  tokens     {tokens}, in sealed shards"
    if found.last_outcome_at is not None:
        ago = duration(max(0.0, now - found.last_outcome_at))
        rate = "" if found.outcomes_per_s is None else f"; {found.outcomes_per_s:,.1f} outcomes/s before it"
        yield f"  last       outcome {ago} ago{rate}"
    if found.scored:
        yield "  scored     " + ", ".join(f"{name} {number:,}" for name, number in found.scored.items())
    yield f"  model      {found.model}; streamsyn {found.version}"
    for part in found.partitions:
        name = Path(part.directory).name
        yield f"  {name}: {part.state}, {part.contexts:,} contexts, {part.rejects:,} rejects"


def _rows_of(part: Part) -> int:
    return part.sealed.rows if part.sealed is not None else sum(1 for _ in part.rows())


def _recent_times(snapshot: Snapshot) -> list[float]:
    """When the latest outcomes were written, in order: those of the last shard of each kind."""
    times = [
        float(time)
        for kind in ("contexts", "rejects")
        for part in [part for part in snapshot.parts[kind] if part.bytes][-1:]
        for row in part.rows()
        if isinstance(time := row.get("written_at"), int | float) and time > 0
    ]
    return sorted(times)


def _rate(times: list[float]) -> float | None:
    recent = [time for time in times if times[-1] - time <= _RATE_OVER_S]
    seconds = sum(after - before for before, after in pairwise(recent))
    return (len(recent) - 1) / seconds if seconds > 0 else None


async def daemon_status(url: str) -> dict[str, Any]:
    """Ask a daemon for its state: of one run if the URL names one, else `runs` and `servers`.

    Raises:
        ConfigError: The URL is invalid, or the daemon has no such run, or it refuses access.
        ServerUnavailable: The daemon cannot be reached.
    """
    if is_run_url(url):
        return (await answers([run_url(url).url]))[0]
    if "?" in url or "#" in url:
        raise ConfigError(f"{url}: expected http://HOST:PORT, or http://HOST:PORT/v1/runs/ID")
    base = url.rstrip("/").removesuffix("/v1")
    runs, servers = await answers([f"{base}/v1/runs?limit={_MAX_RUNS}", f"{base}/v1/servers"])
    return {"runs": runs["data"], "has_more_runs": runs["has_more"], "servers": servers["data"]}


def daemon_status_lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield the answer of `daemon_status` as text."""
    if "runs" not in found:
        yield from _run_lines(found)
        return
    for run in found["runs"]:
        yield from _run_lines(run)
    if not found["runs"]:
        yield "no runs yet: POST /v1/runs creates one"
    if found["has_more_runs"]:
        yield f"  and more than these {len(found['runs'])} runs"
    for server in found["servers"]:
        load = f"{server['in_flight']} of {server['cap']} in flight, {server['queue']} waiting"
        why = f": {server['error']}" if server["error"] else ""
        yield f"server {server['name']}: {server['state']}{why}; {load}; {server['completions']:,} answers"
    if not found["servers"]:
        yield "no servers: POST /v1/servers adds one"


def _run_lines(run: dict[str, Any]) -> Iterator[str]:
    counts, why = run["counts"], f": {run['error']}" if run["error"] else ""
    yield f"run {run['id']}: {run['state']}{why}"
    yield (
        f"  outcomes   {counts['contexts']:,} contexts, {counts['rejects']:,} rejects of "
        f"{counts['accepted']:,} seeds; {counts['in_flight']:,} in flight, {counts['waiting']:,} waiting"
    )
    if run["rejects"]:
        yield "  rejects    " + ", ".join(f"{reason} {number:,}" for reason, number in run["rejects"].items())
    rates = run["rates"]
    yield (
        f"  samples    {counts['samples']:,}; {rates['outcomes_per_s']:,.1f} outcomes/s, "
        f"{rates['output_tokens_per_s']:,.0f} output tokens/s"
    )
