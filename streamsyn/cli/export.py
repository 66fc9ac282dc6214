"""`streamsyn export`: assemble the contexts of a run into a data set."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from streamsyn.cli.options import Size, examples
from streamsyn.plain_text import visible

if TYPE_CHECKING:
    from streamsyn.export.export_request import ExportSummary

_ASSEMBLY = {
    "contexts_per_sample": "Contexts per sample, in place of a length.",
    "target_tokens": "Tokens per sample, or a distribution such as {uniform = [8000, 32000]}.",
    "max_tokens": "Maximum tokens per sample.",
    "tokenizer": "Tokenizer that counts tokens: directory or name on the hub.",
    "distractors": "same_task, any_task, corpus, none, or a mix such as {same_task = 3, corpus = 1}.",
    "position": "Of the relevant context: uniform, a depth from 0 to 1, or a list of depths.",
    "epoch": "Different numbers draw different distractors, lengths and positions.",
}


def _assembly_options(command: Any) -> Any:
    for name, meaning in reversed(_ASSEMBLY.items()):
        option = click.option(
            f"--{name.replace('_', '-')}", name, metavar="VALUE", help=f"{meaning}  [default: as the run]"
        )
        command = option(command)
    return command


@click.command(
    epilog=examples(
        "streamsyn export runs/first --to data",
        "streamsyn export runs/first --to data --format parquet --split train=0.95,test=0.05",
        "streamsyn export runs/first --to data --target-tokens '{uniform = [8000, 32000]}'",
    )
)
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--to", required=True, metavar="PATH|URL", help="Directory to write; new or empty.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["jsonl", "parquet", "datasets"]),
    default="jsonl",
    show_default=True,
    help="File format; datasets is that of save_to_disk.",
)
@click.option(
    "--compression", metavar="NAME", help="none or zstd; for Parquet also snappy, gzip, lz4, brotli."
)
@click.option(
    "--split",
    "splits",
    multiple=True,
    metavar="task|NAME=SHARE,...",
    help="task: one configuration per task. train=0.95,test=0.05: random splits by seed. Repeatable.",
)
@click.option("--split-seed", default=0, show_default=True, help="Seed of the random splits.")
@click.option(
    "--shard-bytes",
    type=Size(),
    default=500_000_000,
    show_default=True,
    help="Maximum bytes per shard, before compression.",
)
@click.option("--shard-rows", type=click.IntRange(min=1), metavar="N", help="Maximum rows per shard.")
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Samples per context, each with different distractors.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Write only the first N samples.")
@_assembly_options
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="assembly.KEY=VALUE",
    help="Override a key of [assembly]. Repeatable.",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    help="TOML file whose [assembly] overrides the run's. Options override it.",
)
@click.option(
    "--flush", is_flag=True, help="Include contexts of an unfinished run that still lack distractors."
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Processes for a large log; the files are the same with any number.  [default: number of cores]",
)
@click.option(
    "--ray",
    is_flag=False,
    flag_value="auto",
    metavar="[ADDRESS]",
    help="Have the nodes of this Ray cluster read and sign the contexts; without ADDRESS, of the one here.",
)
@click.option("--license", "license_", metavar="ID", help="License to state in the dataset card.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier export. Other files stay.")
@click.option("--log-json", is_flag=True, help="Log one JSON object a line to stderr.")
def export(directory: Path, **given: Any) -> None:
    """Assemble the contexts of a run into a data set with a dataset card.

    Without assembly options the rows are those of DIRECTORY/samples. The run may still be going on. The same
    command gives the same bytes.
    """
    import structlog

    from streamsyn.config.loading import parse_override
    from streamsyn.export.export_request import ExportRequest
    from streamsyn.export.export_run import export as export_run
    from streamsyn.plain_text import without_userinfo
    from streamsyn.telemetry import configure_logs

    configure_logs(as_json=given["log_json"])
    workers = given["workers"] or len(os.sched_getaffinity(0))
    os.environ.setdefault("RAYON_NUM_THREADS", str(workers))  # threads of the tokenizer
    log = structlog.get_logger()

    def log_progress(so_far: "ExportSummary") -> None:
        megabytes = round(so_far.bytes / 1e6)
        log.info("export.progress", contexts=so_far.contexts, samples=so_far.samples, megabytes=megabytes)

    settings = []
    if given["contexts_per_sample"] is not None:
        settings.append(("assembly.target_tokens", None))
    settings += [
        parse_override(f"assembly.{name}={given[name]}") for name in _ASSEMBLY if given[name] is not None
    ]
    request = ExportRequest(
        root=directory,
        to=given["to"],
        format=given["form"],
        compression=given["compression"],
        splits=given["splits"],
        split_seed=given["split_seed"],
        shard_bytes=given["shard_bytes"],
        shard_rows=given["shard_rows"],
        epochs=given["epochs"],
        limit=given["limit"],
        settings=[*settings, *map(parse_override, given["settings"])],
        config=given["config"],
        overwrite=given["overwrite"],
        flush=given["flush"],
        license=given["license_"],
        workers=workers,
        ray=given["ray"],
        on_progress=log_progress,
    )
    for line in closing_lines(directory, export_run(request)):
        click.echo(visible(without_userinfo(line)))


def closing_lines(directory: Path, summary: "ExportSummary") -> list[str]:
    """Summarise an export in lines for the terminal."""
    if not summary.contexts:
        lines = [f"{directory} -> {summary.to}: the log has no contexts yet; only a card was written"]
    else:
        made = f"{summary.samples:,} samples of {summary.contexts:,} contexts"
        files = "1 file" if summary.files == 1 else f"{summary.files:,} files"
        size = f"{summary.written_bytes / 1e6:,.2f} MB in {files}"
        lines = [f"{directory} -> {summary.to}: {made}, {size}"]
    if len(summary.splits) > 1:
        lines += [f"  {rows:>12,} {split}" for split, rows in sorted(summary.splits.items())]
    lines += [f"  {number:>12,} left out: {why}" for why, number in sorted(summary.left_out.items())]
    if summary.waiting:
        lines.append(f"  {summary.waiting:>12,} contexts still lack distractors; --flush includes them")
    return lines + [f"note: {line}" for line in summary.notes]
