"""`streamsyn export` on the command line; imports what it needs when it runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from streamsyn.export.export_request import ExportSummary

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_ASSEMBLY = {
    "contexts_per_sample": "Contexts in a sample, in place of a length.",
    "target_tokens": "Length of a sample: tokens, or a distribution as in {uniform = [8000, 32000]}.",
    "max_tokens": "No sample is longer.",
    "tokenizer": "Folder or name of the tokenizer that counts.",
    "distractors": "same_task, any_task, corpus, none, or a mix as in {same_task = 3, corpus = 1}.",
    "position": "uniform, a depth from 0 to 1, or a list of them.",
    "epoch": "Another number draws other distractors, lengths and positions.",
}


class _Size(click.ParamType[int]):
    """Bytes, as in 500MB or 1GiB."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = str(value).strip().lower().removesuffix("b")
        number = text.rstrip("kmgi")
        try:
            size = float(number) * _UNITS[text[len(number) :]]
        except (ValueError, KeyError):
            size = 0
        if not 1 <= size < 2**63:
            self.fail(f"{value!r} is no size; give bytes, or such as 500MB or 1GiB", param, ctx)
        return int(size)


def _assembly_options(command: Any) -> Any:
    for name, meaning in reversed(_ASSEMBLY.items()):
        option = click.option(
            f"--{name.replace('_', '-')}", name, metavar="VALUE", help=f"{meaning}  [default: as the run]"
        )
        command = option(command)
    return command


@click.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--to", required=True, metavar="PATH|URL", help="Folder to write: new or empty.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["jsonl", "parquet", "datasets"]),
    default="jsonl",
    show_default=True,
    help="datasets: as by save_to_disk.",
)
@click.option("--compression", metavar="NAME", help="none, zstd; Parquet also snappy, gzip, lz4, brotli.")
@click.option(
    "--split",
    "splits",
    multiple=True,
    metavar="task|NAME=SHARE,...",
    help="A configuration a task, or splits at random by seed, as in train=0.95,test=0.05, or both.",
)
@click.option("--split-seed", default=0, show_default=True, help="Another one splits otherwise.")
@click.option(
    "--shard-bytes",
    type=_Size(),
    default=500_000_000,
    show_default=True,
    help="Begin a new file after this much, before compression.",
)
@click.option("--shard-rows", type=click.IntRange(min=1), metavar="N", help="Or after so many rows.")
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Samples of each context, each with other distractors.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="The first N samples only.")
@_assembly_options
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="assembly.KEY=VALUE",
    help="Any key of assembly in place of the run's. Repeatable.",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A TOML file whose section [assembly] is laid over the run's, before the options.",
)
@click.option("--flush", is_flag=True, help="Of an unfinished run, also samples that lack distractors yet.")
@click.option("--license", "license_", metavar="ID", help="For the card.  [default: left to you]")
@click.option("--overwrite", is_flag=True, help="Replace an earlier export; nothing else is removed.")
@click.option("--log-json", is_flag=True, help="One JSON object a line on stderr.")
def export(directory: Path, **given: Any) -> None:
    """Assemble a run's contexts again, and write data that others can load, with a dataset card.

    With no options on assembly the rows are those of DIRECTORY/samples. A run may be writing to DIRECTORY.
    The same command makes the same bytes.
    """
    import structlog

    from streamsyn.config.loading import parse_override
    from streamsyn.export.export_request import ExportRequest
    from streamsyn.export.export_run import export as export_run
    from streamsyn.telemetry import configure_logs

    configure_logs(as_json=given["log_json"])
    log = structlog.get_logger()

    def say(so_far: "ExportSummary") -> None:
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
        on_progress=say,
    )
    for line in closing_lines(directory, export_run(request)):
        click.echo(line)


def closing_lines(directory: Path, summary: "ExportSummary") -> list[str]:
    """What has been exported, for a person."""
    if not summary.contexts:
        lines = [f"{directory} -> {summary.to}: no context in the log yet, so there is only a card"]
    else:
        made = f"{summary.samples:,} samples of {summary.contexts:,} contexts"
        size = f"{summary.written_bytes / 1e6:,.1f} MB in {summary.files:,} files"
        lines = [f"{directory} -> {summary.to}: {made}, {size}"]
    if len(summary.splits) > 1:
        lines += [f"  {rows:>12,} {split}" for split, rows in sorted(summary.splits.items())]
    lines += [f"  {number:>12,} left out: {why}" for why, number in sorted(summary.left_out.items())]
    if summary.waiting:
        lines.append(
            f"  {summary.waiting:>12,} contexts wait for distractors; --flush makes samples of them, too"
        )
    return lines + [f"note: {line}" for line in summary.notes]
