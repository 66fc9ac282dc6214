"""The command line. Commands import what they need when they run, so that `--help` is quick."""

import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

import streamsyn
from streamsyn.errors import ConfigError, LaunchError, SinkError, StreamsynError, TrainingFailed
from streamsyn.export.command import export
from streamsyn.report.command import report
from streamsyn.sglang.simulator.command import simulate
from streamsyn.stdout import secure_stdio
from streamsyn.trainer.command import train

if TYPE_CHECKING:
    from streamsyn.config import Config
    from streamsyn.request import RunSummary

EXIT_OTHER = 1
EXIT_USAGE = 2
EXIT_REJECTS = 3
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again later

Command = Callable[..., Any]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(streamsyn.__version__)
def cli() -> None:
    """Write long contexts for short instruction-answer pairs, and make training samples of them.

    \b
    Exit codes: 0 every seed has an outcome; 2 usage or configuration; 3 too many rejects;
    75 stopped early, run again to go on; 1 anything else.
    """  # noqa: D301 - click keeps the lines of a paragraph that begins with a backspace


cli.add_command(simulate)
cli.add_command(export)
cli.add_command(report)
cli.add_command(train)


def run_options(command: Command) -> Command:
    """The options of `run`, and of what takes the command line of a run; only `run` insists on --out."""
    options = [
        click.argument("config", required=False, type=click.Path(path_type=Path, dir_okay=False)),
        click.option(
            "--seeds",
            multiple=True,
            metavar="PATH|-",
            help="File, directory, glob, or - for NDJSON on stdin. Repeatable.",
        ),
        click.option("--server", multiple=True, metavar="URL", help="An SGLang server. Repeatable."),
        click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Take at most N seeds."),
        click.option(
            "--set",
            "settings",
            multiple=True,
            metavar="KEY=VALUE",
            help="Override a key of the configuration. Repeatable.",
        ),
        click.option(
            "--out",
            type=click.Path(path_type=Path, file_okay=False),
            required=command.__name__ == "run",
            help="Run directory; an existing one is resumed.",
        ),
        click.option(
            "--stdout",
            "to_stdout",
            is_flag=True,
            help="Print samples as NDJSON; nothing else gets to stdout.",
        ),
        click.option(
            "--replay",
            is_flag=True,
            help="With --stdout: begin with the samples that earlier runs have printed.",
        ),
        click.option("--no-progress", is_flag=True, help="Plain log lines, even on a terminal."),
        click.option("--log-json", is_flag=True, help="One JSON object a line on stderr, and nothing else."),
        click.option(
            "--train",
            metavar="CONFIG",
            type=click.Path(path_type=Path, dir_okay=False),
            help="Tune a model on the samples as they come: a TOML file with train.model.",
        ),
        click.option("--launch", metavar="MODEL", help="Start an SGLang server for MODEL, for this run."),
        click.option(
            "--sglang-python", type=click.Path(path_type=Path), help="Python that has sglang, for --launch."
        ),
        click.option(
            "--sglang-arg",
            multiple=True,
            metavar="FLAG",
            help="A further flag for the launched server. Repeatable.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@cli.command()
@run_options
def run(**given: Any) -> None:
    """Write contexts for seeds, and assemble samples. Resumes where an earlier run left off.

    With --train, a training follows the run; one signal stops first the run, then the training.
    """
    from streamsyn.request import RunRequest
    from streamsyn.run import run as run_pipeline
    from streamsyn.stdout import SampleStream
    from streamsyn.tandem.load import training_beside
    from streamsyn.telemetry import configure_logs

    configure_logs(as_json=given["log_json"])
    config = _resolve(given, given["out"])
    if given["launch"] and given["server"]:
        raise ConfigError("--launch starts a server; give it or --server, not both")
    if given["replay"] and not given["to_stdout"]:
        raise ConfigError("--replay prints samples once more; give --stdout, too")
    training = None
    if given["train"]:
        training = training_beside(given["train"], given["out"], as_json=given["log_json"])
    stream = SampleStream() if given["to_stdout"] else None
    request = RunRequest(
        config=config,
        out=given["out"],
        stream=stream,
        replay=given["replay"],
        launch=given["launch"],
        launch_python=given["sglang_python"],
        launch_args=given["sglang_arg"],
        show_progress=not (given["no_progress"] or given["log_json"]),
        companion=training,
    )
    with nullcontext() if training is None else training.beside():
        try:
            summary = run_pipeline(request)
        finally:
            if training is None:
                # The outcome stands: a signal that comes now has nothing left to stop.
                _on_signals(signal.SIG_IGN)
            if stream is not None:
                stream.close()
        _close(summary, as_json=given["log_json"])
        stopped = summary.stopped is not None or summary.interrupted
        trained = 0 if training is None else training.finish(stopped=stopped)
    _on_signals(signal.SIG_IGN)
    if training is not None and trained == EXIT_USAGE:
        _fail(f"the training cannot go on: {training.complaint}", EXIT_USAGE)
    if summary.stopped:
        sys.exit(EXIT_STOPPED)
    if training is not None and trained == EXIT_OTHER:
        _fail(f"the run has ended, but not its training: {training.complaint}", EXIT_OTHER)
    if trained:
        sys.exit(EXIT_STOPPED)
    if summary.reject_fraction > config.run.max_reject_fraction:
        _fail(
            f"rejects are {summary.reject_fraction:.1%} of the outcomes, more than "
            f"run.max_reject_fraction = {config.run.max_reject_fraction:.1%}",
            EXIT_REJECTS,
            prefix="",
        )


def _close(summary: "RunSummary", *, as_json: bool) -> None:
    """Say what came of a run."""
    import structlog

    from streamsyn.summary import closing_figures, closing_lines

    if as_json:
        structlog.get_logger().info("run.done", **closing_figures(summary))
        return
    for line in closing_lines(summary):
        click.echo(line, err=True)


@cli.command()
@run_options
def preview(**given: Any) -> None:
    """Print what would be sent for the first seeds (3, or --limit); asks no server, writes nothing.

    Takes the command line of a run; options that shape no prompt have no effect.
    """
    from streamsyn.preview import preview as preview_seeds

    config = _resolve(given, given["out"])
    try:
        for text in preview_seeds(config, given["limit"] or 3):
            click.echo(text)
    except BrokenPipeError:
        # Whoever reads (`head`, a pager) has seen enough. What is still buffered has to go somewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--repair", is_flag=True, help="Cut torn ends, list unlisted shards, make the index anew.")
def verify(directory: Path, repair: bool) -> None:
    """Check every guarantee of a run directory, by reading all of it. Exits 1 if one is broken."""
    from streamsyn.telemetry import configure_logs
    from streamsyn.verify import repair as repair_directory
    from streamsyn.verify import verify as verify_directory

    configure_logs(as_json=False, level=logging.WARNING)
    if repair:
        repair_directory(directory)
    problems, found = verify_directory(directory)
    for line in found.notes:
        click.echo(f"note: {line}")
    for line in problems:
        click.echo(f"problem: {line}")
    counts = ", ".join(f"{number:,} {kind}" for kind, number in found.counts.items())
    click.echo(f"{directory}: {counts}; " + (f"{len(problems)} problems" if problems else "no problem"))
    sys.exit(EXIT_OTHER if problems else 0)


@cli.command("config")
@click.argument("config", required=False, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a key. Repeatable.")
def show_config(config: Path | None, settings: tuple[str, ...]) -> None:
    """Print the resolved configuration as TOML: every key, its meaning, its value."""
    from streamsyn.config import load, parse_override
    from streamsyn.config_text import as_toml

    click.echo(as_toml(load(config, map(parse_override, settings))), nl=False)


@cli.command()
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path("demo-out"), show_default=True
)
@click.option("--model", help="Model to serve; by default the packaged one.")
@click.option("--sglang-python", type=click.Path(path_type=Path), help="Python that has sglang.")
def demo(out: Path, model: str | None, sglang_python: Path | None) -> None:
    """Start a real SGLang server, write contexts for a dozen packaged seeds, show one sample."""
    from streamsyn.demo import demo as run_demo
    from streamsyn.telemetry import configure_logs

    configure_logs(as_json=False)
    sys.exit(run_demo(out, model, sglang_python))


def _resolve(given: dict[str, Any], out: Path | None) -> "Config":
    """The configuration: the file, or what the directory was made with; flags and --set over it."""
    from streamsyn.config import load, parse_override

    overrides: list[tuple[str, Any]] = []
    if given["config"] is None and out is not None:
        overrides += _remembered(out)
    if given["seeds"]:
        overrides.append(("seeds.sources", [{"path": path} for path in given["seeds"]]))
    if given["server"]:
        overrides.append(("fleet.servers", list(given["server"])))
        overrides += [("fleet.servers_file", None), ("fleet.servers_dns", None)]
    if given["limit"]:
        overrides.append(("seeds.limit", given["limit"]))
    overrides += map(parse_override, given["settings"])
    return load(given["config"], overrides)


def _remembered(out: Path) -> list[tuple[str, Any]]:
    """The sections that a run directory was made with, but for what holds for one run only."""
    from streamsyn.sink.rundir import saved_config

    saved = saved_config(out)
    if saved is None:
        return []
    sections = saved.model_dump(exclude_none=True)
    sections["seeds"].pop("limit", None)
    sections["seeds"]["sources"] = [
        source for source in sections["seeds"]["sources"] if source["path"] != "-"
    ]
    return list(sections.items())


def main() -> None:
    """Run the command line; errors that are the user's to mend are one line each."""
    if sys.argv[1:2] in (["run"], ["demo"], ["train"]):
        _on_signals(_stop_early)  # until the run has handlers of its own
        if "--tethered" in sys.argv:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # it means the run, which will tell us
    secure_stdio()
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        if not _as_json():
            error.show()
            sys.exit(EXIT_USAGE)
        _fail(error.format_message(), EXIT_USAGE)
    except click.Abort:
        sys.exit(EXIT_STOPPED)
    except ConfigError as error:
        _fail(str(error), EXIT_USAGE)
    except (SinkError, LaunchError, TrainingFailed) as error:
        _fail(str(error), EXIT_OTHER)
    except StreamsynError as error:
        _fail(str(error), EXIT_STOPPED)
    except Exception as error:
        if not _as_json():
            raise
        _fail(repr(error), EXIT_OTHER, exc_info=True)


def _on_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def _stop_early(_number: int, _frame: FrameType | None) -> NoReturn:
    """Before a run has begun there is nothing to drain, nor to close.

    Not by SystemExit: it is raised wherever the imports are just then, and may be swallowed on its way.
    Measured: one signal of a hundred was lost.
    """
    os._exit(EXIT_STOPPED)


def _fail(text: str, code: int, *, prefix: str = "streamsyn: ", **more: Any) -> NoReturn:
    """Say on stderr why, in the form in which the rest is there, and exit."""
    if _as_json():
        import structlog

        from streamsyn.telemetry import configure_logs

        configure_logs(as_json=True)
        structlog.get_logger().error("run.failed", error=text, exit_code=code, **more)
    else:
        click.echo(prefix + text, err=True)
    sys.exit(code)


def _as_json() -> bool:
    """Whether --log-json is given; asked of the arguments themselves, for they may be what is wrong."""
    return "--log-json" in sys.argv
