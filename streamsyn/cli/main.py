"""The command group. Commands import what they need when they run, so that `--help` is fast."""

import signal
import sys
import traceback
from typing import NoReturn

import click

import streamsyn
from streamsyn.cli.bench import bench
from streamsyn.cli.config import show_config
from streamsyn.cli.demo import demo
from streamsyn.cli.exits import EXIT_OTHER, EXIT_STOPPED, EXIT_USAGE, as_json, fail, on_signals, stop_early
from streamsyn.cli.export import export
from streamsyn.cli.init import init_config
from streamsyn.cli.preview import preview
from streamsyn.cli.report import report
from streamsyn.cli.retry import retry
from streamsyn.cli.run import run
from streamsyn.cli.score import score
from streamsyn.cli.serve import serve
from streamsyn.cli.simulate import simulate
from streamsyn.cli.status import status
from streamsyn.cli.train import train
from streamsyn.cli.verify import verify
from streamsyn.errors import ConfigError, LaunchError, SinkError, StreamsynError, TrainingFailed
from streamsyn.pipeline.stdout import secure_stdio
from streamsyn.plain_text import visible, without_userinfo


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(streamsyn.__version__)
def cli() -> None:
    """Write long contexts for short instruction-answer pairs, and assemble them into training samples.

    \b
    Examples:
      streamsyn demo
      streamsyn run --seeds pairs.jsonl --server http://gpu-1:30000 --out runs/first
      streamsyn export runs/first --to data --format parquet

    \b
    Exit codes:
      0   every seed has an outcome
      1   any other error
      2   usage or configuration error
      3   too many rejects
      4   bench --compare found a regression
      75  stopped early; run again to resume
    """  # noqa: D301 - click keeps the line breaks of a paragraph that starts with \b


for _command in (
    run,
    retry,
    score,
    preview,
    verify,
    export,
    report,
    bench,
    train,
    serve,
    show_config,
    demo,
    simulate,
    status,
    init_config,
):
    cli.add_command(_command)


def main() -> None:
    """Run the command line. Expected errors are printed as one line, without a traceback."""
    if sys.argv[1:2] in (["run"], ["retry"], ["demo"], ["train"]):
        on_signals(stop_early)  # until the run sets its own handlers
        if "--tethered" in sys.argv:
            for number in (signal.SIGINT, signal.SIGHUP):  # they come from the terminal, to the run too
                signal.signal(number, signal.SIG_IGN)
    secure_stdio()
    try:
        cli.main(standalone_mode=False)
    except click.NoSuchOption as error:
        keys = _keys_named(error.option_name)
        _refuse(click.UsageError(f"No such option {error.option_name}; {keys}", error.ctx) if keys else error)
    except click.ClickException as error:
        _refuse(error)
    except click.Abort:
        sys.exit(EXIT_STOPPED)
    except ConfigError as error:
        fail(str(error), EXIT_USAGE)
    except (SinkError, LaunchError, TrainingFailed) as error:
        fail(str(error), EXIT_OTHER)
    except StreamsynError as error:
        fail(str(error), EXIT_STOPPED)
    except Exception as error:  # noqa: BLE001 - whatever it is, its text may have passwords
        if not as_json():
            click.echo(visible(without_userinfo(traceback.format_exc())), err=True, nl=False)
            sys.exit(EXIT_OTHER)
        fail(repr(error), EXIT_OTHER, exc_info=True)


def _refuse(error: click.ClickException) -> NoReturn:
    """Report a mistake in the command line, and exit."""
    if as_json():
        fail(error.format_message(), EXIT_USAGE)
    context = error.ctx if isinstance(error, click.UsageError) else None
    click.UsageError(without_userinfo(error.format_message()), context).show()
    sys.exit(EXIT_USAGE)


def _keys_named(option: str) -> str:
    """What to write in place of an option that does not exist, if a configuration key has its name."""
    from streamsyn.config.loading import keys_named, known_keys

    keys = keys_named(option, known_keys())
    return " or ".join(f"--set {key}=VALUE" for key in keys[:3])
