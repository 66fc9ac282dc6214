"""A run while it is executed, and what all runs share for that."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from streamsyn.background import Background
from streamsyn.config.loading import Config
from streamsyn.daemon.run_record import Figures
from streamsyn.daemon.tail import Streams
from streamsyn.daemon.webhooks import Webhooks
from streamsyn.fleet.membership import Connect
from streamsyn.fleet.shared_servers import Servers
from streamsyn.pipeline.stop import RunControl
from streamsyn.pipeline.summary import RunSummary
from streamsyn.sink.epoch import Epoch
from streamsyn.sink.shards import KINDS
from streamsyn.sink.snapshot import Part, Snapshot, holding_rejects
from streamsyn.telemetry import Counters, Tracer

_TOKENS: Final[Mapping[str, Callable[[Counters], int]]] = {
    "prompt": lambda counters: counters.prompt_tokens,
    "cached": lambda counters: counters.cached_tokens,
    "completion": lambda counters: counters.useful_tokens,
    "thinking": lambda counters: counters.thinking_tokens,
    "wasted": lambda counters: counters.wasted_tokens,
}


@dataclass(slots=True)
class Hosting:
    """What all runs share.

    Attributes:
        config: The operator's configuration.
        environ: The environment, which holds the servers' credentials.
        connect: The transport to servers; None is HTTP.
        servers: The servers, which runs share.
        tasks: Starts the tasks of runs.
        streams: What the readers of all runs share.
        webhooks: Send events.
        epoch: That of ROOT: of several daemons, the newest one may write.
        tracer: Takes the spans of all runs, if `run.traces` is set.
        ending: Whether the daemon is ending: no run is begun any more.
        held: Why no run is begun for the time being, such as a low disk; "" if they are.
    """

    config: Config
    environ: Mapping[str, str]
    connect: Connect | None
    servers: Servers
    tasks: Background
    streams: Streams
    webhooks: Webhooks
    epoch: Epoch
    tracer: Tracer | None = None
    ending: bool = False
    held: str = ""


@dataclass(slots=True)
class Execution:
    """A run while it is executed."""

    summary: RunSummary
    control: RunControl = field(default_factory=RunControl)
    rows: dict[str, int] = field(default_factory=dict)
    """Rows of each kind that readers may see."""
    is_stopped: bool = False
    """Whether it was asked to stop early."""

    def stop(self, why: str, *, at_once: bool = False) -> None:
        """Stop early: finish what is in flight, or give that up too."""
        self.is_stopped = True
        if at_once:
            self.control.cancel(why)
        else:
            self.control.drain(why)

    def figures(self, before: Figures, rows: dict[str, int]) -> Figures:
        """The totals of a run, from those before this execution.

        Args:
            before: The totals before it.
            rows: Rows of each kind that readers may see.
        """
        counters, in_log = self.summary.counters, self.summary.in_log()
        reasons = Counter(before.reasons)
        reasons.update({str(reason): number for reason, number in counters.rejects.items()})
        return Figures(
            contexts=in_log.get("contexts", before.contexts),
            rejects=in_log.get("rejects", before.rejects),
            samples=in_log.get("samples", before.samples),
            rows=rows,
            reasons=dict(reasons),
            tokens={kind: before.tokens.get(kind, 0) + count(counters) for kind, count in _TOKENS.items()},
            prefix=prefix_shares(self.summary.servers()) or before.prefix,
        )


def recounted(root: Path, figures: Figures, *, after_retry: bool = False) -> Figures:
    """The totals of a run that are kept between executions, mended by its log. Blocks on the disk.

    A kill loses what an execution has counted, and a retry makes rejects hold no longer. If neither was the
    case, only the rows in unsealed shards are read.

    Args:
        root: The run directory.
        figures: The totals.
        after_retry: Whether rejects were asked again since.

    Raises:
        SinkError: The log cannot be read.
    """
    snapshot = Snapshot(root)
    rows = {kind: sum(map(_rows_of, snapshot.parts[kind])) for kind in KINDS}
    reasons, tokens = figures.reasons, figures.tokens
    if after_retry or rows["rejects"] != figures.rows.get("rejects", 0):
        reasons = dict(Counter(str(row.get("reason")) for row in holding_rejects(snapshot)))
    if rows["contexts"] != figures.rows.get("contexts", 0):
        tokens = tokens | _tokens_of(snapshot.parts["contexts"])
    return figures.model_copy(update={"rows": rows, "reasons": reasons, "tokens": tokens})


def _rows_of(part: Part) -> int:
    return part.sealed.rows if part.sealed is not None else sum(1 for _ in part.rows())


def _tokens_of(parts: Iterable[Part]) -> dict[str, int]:
    """The tokens of contexts: sealed shards are listed with theirs."""
    tokens = Counter({"prompt": 0, "cached": 0, "completion": 0})
    for part in parts:
        if part.sealed is not None:
            tokens.update(part.sealed.tokens)
        else:
            for row in part.rows():
                tokens.update({kind: row.get(f"{kind}_tokens") or 0 for kind in list(tokens)})
    return dict(tokens)


def prefix_shares(servers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Shares of the prompt tokens that were planned to be cached, and were, by the metrics of servers.

    Empty before the first answer.
    """
    prompt = sum(server["prompt_tokens"] for server in servers)
    if not prompt:
        return {}
    return {
        "planned": sum(server["planned_cached_tokens"] for server in servers) / prompt,
        "achieved": sum(server["cached_tokens"] for server in servers) / prompt,
    }
