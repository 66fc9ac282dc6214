"""`streamsyn evaluate`: published suites of questions, asked of servers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from streamsyn.cli.options import LOG_JSON, SERVER, SETTINGS, examples, resolve
from streamsyn.errors import ConfigError, SinkError

if TYPE_CHECKING:
    from streamsyn.scoring.suites.suite_run import Answered, SuiteRow


@click.command(
    epilog=examples(
        "streamsyn evaluate --server http://gpu-1:30000 --suite 'longbench/*.jsonl' --out answers.jsonl",
        "streamsyn evaluate --server http://gpu-1:30000 --suite ruler/4096/data --suite mrcr/2needle.parquet",
        "streamsyn evaluate --server http://gpu-1:30000 --suite needles --set train.needles.lengths=[4096]",
    )
)
@SERVER
@click.option(
    "--suite",
    "suites",
    multiple=True,
    required=True,
    metavar="FILE|needles",
    help="File, directory or glob with rows of LongBench, LongBench v2, RULER, HELMET's recall, MRCR or "
    "GraphWalks, as published; or needles: generated questions, as in [train.needles]. Repeatable.",
)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path, dir_okay=False),
    help="JSON file with a prompt for each data set of LongBench, as it is published, or task of HELMET.",
)
@click.option(
    "--prompt-chars",
    type=click.IntRange(min=1),
    metavar="N",
    help="Cut contexts of LongBench and HELMET in the middle to prompts of N characters.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="Maximum tokens of an answer. By default as published, or enough for the right answer.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Ask at most N questions of a part.")
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="Write each answer to this file as NDJSON."
)
@SETTINGS
@LOG_JSON
def evaluate(
    *,
    suites: tuple[str, ...],
    prompts: Path | None,
    prompt_chars: int | None,
    max_tokens: int | None,
    limit: int | None,
    out: Path | None,
    **given: Any,
) -> None:
    """Ask servers the questions of published suites, and print scores with 95 % intervals.

    Answers are greedy, and scored by the published rules. Exit code 1 if a question had no answer.
    """
    import asyncio
    from functools import partial

    from streamsyn.config.command_sections import NeedlesSection
    from streamsyn.scoring.suites.needle_suite import NEEDLES, needle_count
    from streamsyn.scoring.suites.suite_files import read_suites
    from streamsyn.scoring.suites.suite_run import SuiteRun, suite_table
    from streamsyn.telemetry import configure_logs

    configure_logs(as_json=given["log_json"])
    config = resolve(given, None)
    paths = [suite for suite in suites if suite != NEEDLES]
    needles = (config.train.needles or NeedlesSection(), config.run.seed) if NEEDLES in suites else None
    questions = partial(read_suites, paths, prompts, prompt_chars, limit, max_tokens)
    total = sum(1 for _ in questions())  # a mistake in a file ends the command before the first request
    total += needle_count(needles[0]) if needles else 0
    with _writing(out) as write:
        run = SuiteRun(
            questions=questions(),
            total=total,
            fleet=config.fleet,
            needles=needles,
            model=config.scoring.model,
            on_answer=write,
        )
        answered = asyncio.run(run.run())
    failed = sum(one.error is not None for one in answered)
    _print(suite_table(answered), failed, as_json=given["log_json"])
    if failed:
        raise SystemExit(1)


@contextmanager
def _writing(out: Path | None) -> "Iterator[Callable[[Answered], None]]":
    """What writes an answer to the file `--out`, or nowhere without one."""
    import orjson

    if out is None:
        yield lambda _: None
        return
    try:
        file = out.open("wb")
    except OSError as error:
        raise ConfigError(f"--out: cannot write {out}: {error.strerror}") from error
    with file:

        def write(found: "Answered") -> None:
            try:
                file.write(orjson.dumps(found.row(), option=orjson.OPT_APPEND_NEWLINE))
                file.flush()
            except OSError as error:
                raise SinkError(f"cannot write {out}: {error.strerror}") from error

        yield write


def _print(rows: "list[SuiteRow]", failed: int, *, as_json: bool) -> None:
    """Print the table to stdout, or log it as evaluate.done."""
    from dataclasses import asdict

    import structlog

    if as_json:
        structlog.get_logger().info("evaluate.done", rows=[asdict(row) for row in rows], failed=failed)
        return
    suite, part = (
        max(map(len, names))
        for names in zip(("suite", "part"), *((row.suite, row.part) for row in rows), strict=True)
    )
    click.echo(f"{'suite':{suite}}  {'part':{part}} {'questions':>9} {'score':>7}   95 % interval")
    for row in rows:
        click.echo(
            f"{row.suite:{suite}}  {row.part:{part}} {row.questions:9,} {row.score:7.2f}"
            f"   {row.low:.2f} to {row.high:.2f}"
        )
    if failed:
        click.echo(f"{failed:,} questions had no answer, and are left out", err=True)
