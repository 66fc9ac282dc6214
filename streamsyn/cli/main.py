"""The command group. Commands import what they need when they run, so that `--help` is fast."""

import signal
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Final, NoReturn

import click

import streamsyn
from streamsyn.cli.exits import EXIT_OTHER, EXIT_STOPPED, EXIT_USAGE, as_json, fail, on_signals, stop_early
from streamsyn.errors import ConfigError, LaunchError, SinkError, StreamsynError, TrainingFailed
from streamsyn.pipeline.stdout import secure_stdio
from streamsyn.plain_text import visible, without_userinfo

_COMMANDS: Final = {
    "bench": "Measure the throughput of a fleet on this workload, and find what limits it.",
    "config": "Print the resolved configuration as TOML: every key with its meaning and value.",
    "demo": "Start a real SGLang server, write contexts for 12 packaged seeds, print the best sample.",
    "deploy": "Start streamsyn and its servers on a cluster.",
    "evaluate": "Ask servers the questions of published suites, and print scores with 95 % intervals.",
    "export": "Assemble the contexts of a run into a data set with a dataset card.",
    "init": "Write a short commented configuration to PATH (run.toml).",
    "merge": "Merge finished runs into one run directory.",
    "preview": "Print what would be sent for the first seeds (3, or --limit).",
    "report": "Write one HTML page about a run: whether it is fit for training, statistics, samples to read.",
    "retry": "Ask the rejects of a run again, with the settings of the run or with changed ones.",
    "run": "Write contexts for seeds and assemble samples.",
    "score": (
        "Measure the contexts of a run: context gain, answers, near-duplicates, leaks of evaluation data."
    ),
    "serve": "Hold many runs over one fleet, and serve them over HTTP: seeds in, samples out.",
    "simulate": "Serve a simulated SGLang on CPU: its wire protocol, without a model.",
    "status": "Print what a run or a daemon is doing, or how a run ended.",
    "submit": "Start `streamsyn run` on a node of a Ray cluster, and again on another when it dies.",
    "train": "Tune a model on samples while they are written.",
    "verify": "Check every guarantee of a run directory by reading all of it.",
}
"""What each command does; `streamsyn.cli.NAME` has the command, which is imported when it is used."""
_FUNCTIONS: Final = {"config": "show_config", "init": "init_config"}
"""Names of functions that are not those of their commands."""


class _Commands(Mapping[str, click.Command]):
    """All commands by name."""

    def __getitem__(self, name: str) -> click.Command:
        if name not in _COMMANDS:
            raise KeyError(name)
        command: click.Command = getattr(import_module(f"streamsyn.cli.{name}"), _FUNCTIONS.get(name, name))
        return command

    def __iter__(self) -> Iterator[str]:
        return iter(_COMMANDS)

    def __len__(self) -> int:
        return len(_COMMANDS)


class _Group(click.Group):
    """Lists the commands without importing them."""

    def format_commands(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
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


cli.commands = _Commands()  # type: ignore[assignment] # of which click only reads


def main() -> None:
    """Run the command line. Expected errors are printed as one line, without a traceback."""
    if sys.argv[1:2] in (["run"], ["retry"], ["demo"], ["train"], ["submit"]):
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
            import traceback

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
