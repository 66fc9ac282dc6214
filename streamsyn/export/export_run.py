"""What is to be exported, and what came of it.

`streamsyn export`: from the log to files that others can train on.
"""

import time
from collections import Counter
from itertools import islice

from streamsyn.export.card import CardFacts, card
from streamsyn.export.export_request import ExportRequest, ExportSummary
from streamsyn.export.formats import Layout, ShardWriter, save_states
from streamsyn.export.log_reader import Source, open_source
from streamsyn.export.rows import Tally
from streamsyn.export.splits import Splits
from streamsyn.export.target import Target

_PROGRESS_EVERY_S = 5.0


def export(request: ExportRequest) -> ExportSummary:
    """Assemble the log of a run directory, and write what comes of it to a folder.

    The same request on the same log makes the same bytes, wherever and whenever. Memory is bounded by the
    window of assembly and what files hold back, whatever the number of contexts and samples.

    Raises:
        ConfigError: Something that was given cannot be used, or the folder cannot be written.
        SinkError: The log is damaged.
    """
    summary = ExportSummary(request.to)
    request.check()
    splits = Splits(request.splits, request.split_seed)
    with open_source(request, summary) as source:
        summary.is_final = source.is_final
        summary.all_contexts = source.sealed_contexts * request.epochs
        summary.notes += _notes(source, request)
        layout = Layout(request.format, splits)
        target = Target(request.to, overwrite=request.overwrite)
        writer, tally = ShardWriter(target, request, layout.stem), Tally()
        try:
            _write(request, source, splits, writer, tally, summary)
        except BaseException:
            writer.abandon()
            raise
        if request.format == "datasets":
            save_states(target, layout, writer.splits)
        summary.files, summary.written_bytes = len(target.files), sum(one["bytes"] for one in target.files)
        facts = CardFacts(
            request=request,
            summary=summary,
            tally=tally,
            configs=layout.configs(writer.splits),
            splits=list(splits.shares),
            contexts_by_model=source.contexts_by_model,
            rejects=Counter(row["reason"] for row in source.rejects()),
            run_config=source.saved,
            config=source.config,
            version=str(source.run.get("versions", {}).get("streamsyn", "?")),
        )
        target.finish(card(facts))
    return summary


def _write(
    request: ExportRequest,
    source: Source,
    splits: Splits,
    writer: ShardWriter,
    tally: Tally,
    summary: ExportSummary,
) -> None:
    said_at = time.monotonic()
    for row in islice(source.rows(), request.limit):
        split = splits.of(row["task"], row["seed_id"])
        summary.bytes += writer.write(split, row)
        summary.samples += 1
        tally.add(row, split.name)
        if time.monotonic() - said_at >= _PROGRESS_EVERY_S:
            said_at = time.monotonic()
            request.on_progress(summary)
    writer.close()
    for split, shards in writer.splits.items():
        summary.splits[" ".join(filter(None, (split.task, split.name)))] = shards.rows


def _notes(source: Source, request: ExportRequest) -> list[str]:
    notes = []
    if request.limit is not None:
        notes.append(f"these are the first {request.limit:,} samples at most; the log may make more")
    if not source.is_final:
        notes.append("the run has not come to its end: what it writes from now on is not in this export")
    if source.changed:
        notes.append(f"not what the run used any more, so samples differ: {', '.join(source.changed)}")
    return notes
