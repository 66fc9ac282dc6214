"""`streamsyn export`: from the log of a run to files that others can train on."""

import time
from collections import Counter
from itertools import islice
from pathlib import Path

from streamsyn.export.card import CardFacts, CardMetrics, card
from streamsyn.export.export_request import ExportRequest, ExportSummary
from streamsyn.export.formats import ShardWriter, save_states
from streamsyn.export.log_reader import LogReader, open_log
from streamsyn.export.splits import Layout, Splits
from streamsyn.export.target import Target
from streamsyn.io.process_files import temporary_files_near

_PROGRESS_INTERVAL_S = 5.0


def export(request: ExportRequest) -> ExportSummary:
    """Assemble the log of a run directory, and write the samples to a folder.

    The same request on the same log gives the same bytes. Memory is bounded by the window of assembly and by
    what open files buffer, whatever the number of contexts and samples.

    Raises:
        ConfigError: The request is invalid, or the folder cannot be written.
        SinkError: The log is damaged.
    """
    summary = ExportSummary(request.to)
    request.check()
    temporary_files_near(request.root if "://" in request.to else Path(request.to))
    splits = Splits(request.splits, request.split_seed)
    with open_log(request, summary) as log:
        summary.is_final = log.is_final
        summary.notes += _notes(log, request)
        layout = Layout(request.format, splits)
        target = Target(request.to, overwrite=request.overwrite)
        writer, metrics = ShardWriter(target, request, layout.stem), CardMetrics()
        try:
            _write(request, log, splits, writer, metrics, summary)
        except BaseException:
            writer.abandon()
            raise
        if request.format == "datasets":
            save_states(target, layout, writer.splits)
        summary.files, summary.written_bytes = len(target.files), sum(one["bytes"] for one in target.files)
        facts = CardFacts(
            request=request,
            summary=summary,
            metrics=metrics,
            configs=layout.configs(writer.splits),
            splits=list(splits.shares),
            contexts_by_model=log.contexts_by_model,
            rejects=Counter(row["reason"] for row in log.rejects()),
            run_config=log.run_config,
            config=log.config,
            version=str(log.run.get("versions", {}).get("streamsyn", "?")),
        )
        target.finish(card(facts))
    return summary


def _write(
    request: ExportRequest,
    log: LogReader,
    splits: Splits,
    writer: ShardWriter,
    metrics: CardMetrics,
    summary: ExportSummary,
) -> None:
    reported_at = time.monotonic()
    for row in islice(log.rows(), request.limit):
        split = splits.of(row["task"], row["seed_id"])
        summary.bytes += writer.write(split, row)
        summary.samples += 1
        metrics.add(row, split.name)
        if time.monotonic() - reported_at >= _PROGRESS_INTERVAL_S:
            reported_at = time.monotonic()
            request.on_progress(summary)
    writer.close()
    for split, shards in writer.splits.items():
        summary.splits[" ".join(filter(None, (split.task, split.name)))] = shards.rows


def _notes(log: LogReader, request: ExportRequest) -> list[str]:
    notes = []
    if request.limit is not None:
        notes.append(f"limited to the first {request.limit:,} samples; the log may have more")
    if not log.is_final:
        notes.append("the run is not finished: contexts that it writes from now on are not in this export")
    if log.changed:
        notes.append(f"samples differ from those of the run, as these have changed: {', '.join(log.changed)}")
    return notes
