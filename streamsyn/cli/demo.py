"""`streamsyn demo`: write contexts for packaged seeds on a real SGLang server and print a sample."""

import logging
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from streamsyn.cli.options import examples
from streamsyn.plain_text import visible

if TYPE_CHECKING:
    from streamsyn.pipeline.summary import RunSummary

_SETTINGS = {
    # Sized for a small model on two cores: a few minutes in all. Everything else is the default.
    "recipe.target_words": 150,
    "recipe.max_tokens": 320,
    "recipe.tries": 2,
    "checks.min_words": 40,
    "checks.context_gain": True,
    "fleet.max_in_flight": 12,
    "assembly.contexts_per_sample": 3,
}
_SEEDS = 12
_EXCERPT_CHARS = 700
_STATUS_EVERY_S = 5.0


@click.command(
    epilog=examples(
        "streamsyn demo",
        "streamsyn demo --model Qwen/Qwen3-0.6B --out /tmp/demo",
    )
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("demo-out"),
    show_default=True,
    help="Directory for the run directory.",
)
@click.option("--model", help="Model to serve.  [default: the packaged one]")
@click.option(
    "--sglang-python", type=click.Path(path_type=Path), help="Python interpreter with sglang installed."
)
def demo(out: Path, model: str | None, sglang_python: Path | None) -> None:
    """Start a real SGLang server, write contexts for 12 packaged seeds, print the best sample."""
    from importlib.resources import as_file, files

    from streamsyn.fleet.launch import find_packaged_model, find_python
    from streamsyn.library.arguments import make_request
    from streamsyn.library.run_thread import run_to_end
    from streamsyn.pipeline.summary import RunSummary, closing_lines
    from streamsyn.pipeline.verify import verify
    from streamsyn.telemetry import Counters, configure_logs

    configure_logs(as_json=False, level=logging.WARNING)  # the status lines replace the log
    python = find_python(sglang_python)
    model = model or str(find_packaged_model())
    folder = out / time.strftime("%Y%m%d-%H%M%S")
    click.echo(f"{_SEEDS} packaged seeds -> {model} on a real SGLang server -> {folder}", err=True)
    with as_file(files("streamsyn") / "data" / "seeds") as seeds:
        request, _ = make_request(
            None,
            out=folder,
            seeds=seeds,
            overrides=_SETTINGS,
            launch=model,
            launch_python=python,
            show_progress=False,
        )
        summary = RunSummary(folder, Counters())
        with _status_lines(summary):
            run_to_end(request, summary=summary)
    problems, _ = verify(folder)
    for line in [*_best_sample(folder), *closing_lines(summary), *_directory(folder)]:
        click.echo(visible(line))
    for problem in problems:
        click.echo(f"problem: {visible(problem)}", err=True)
    sys.exit(75 if summary.stopped else 1 if problems or not summary.samples else 0)


@contextmanager
def _status_lines(summary: "RunSummary") -> Iterator[None]:
    """Print the progress every 5 seconds while the block runs.

    In a thread, because the run blocks the event loop's thread.
    """
    ended = threading.Event()

    def report() -> None:
        began, counters = time.monotonic(), summary.counters
        while not ended.wait(_STATUS_EVERY_S):
            servers = summary.servers()
            seconds = f"{time.monotonic() - began:4.0f} s"
            if not servers:
                click.echo(
                    f"{seconds}  starting the server; its log is {summary.out / 'sglang.log'}", err=True
                )
                continue
            running = servers[0]["running"] or 0
            click.echo(
                f"{seconds}  {counters.contexts} contexts, {counters.rejects.total()} rejects of {_SEEDS}; "
                f"server: {running} running, {servers[0]['generated_per_s'] or 0:.0f} tokens/s",
                err=True,
            )

    thread = threading.Thread(target=report, name="demo-status", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _best_sample(folder: Path) -> list[str]:
    """Describe the sample whose relevant context has the highest context gain."""
    contexts = {row["seq"]: row for row in _rows(folder / "contexts")}

    def relevant(sample: dict[str, Any]) -> dict[str, Any]:
        context: dict[str, Any] = contexts[sample["context_seqs"][sample["relevant_index"]]]
        return context

    samples = _rows(folder / "samples")
    if not samples:
        return [f"No samples: every seed was rejected. The reasons are in {folder}/rejects/."]
    best = max(samples, key=lambda sample: relevant(sample)["checks"].get("context_gain") or float("-inf"))
    context = relevant(best)
    gain = context["checks"].get("context_gain")
    lines = [
        "",
        f"The sample with the highest context gain of {len(samples)}: {best['id']}, task {best['task']}.",
        f"Its contexts were written by {context['model']}. Expect better text from a larger model.",
    ]
    if gain is not None:
        lines.append(f"Context gain: {gain:+.2f} nats per token of the gold answer.")
    for place, seq in enumerate(best["context_seqs"]):
        kind = "relevant" if place == best["relevant_index"] else "distractor"
        lines += ["", f"  [context {place + 1}: {kind}, {contexts[seq]['checks']['words']} words]"]
        text = textwrap.shorten(contexts[seq]["context"], _EXCERPT_CHARS, placeholder=" ...")
        lines += textwrap.wrap(text, 100, initial_indent="    ", subsequent_indent="    ")
    lines += ["", *textwrap.wrap(f"user:      ... {context['instruction']}", 100, subsequent_indent=" " * 11)]
    lines += textwrap.wrap(f"assistant: {context['answer']}", 100, subsequent_indent=" " * 11)
    return [*lines, ""]


def _directory(folder: Path) -> list[str]:
    """Describe the files of the run directory."""
    contexts = _SETTINGS["assembly.contexts_per_sample"]
    return [
        "",
        f"  {folder}/contexts/    what the LLM wrote: one line per seed, with tokens, attempts and checks",
        f"  {folder}/samples/     chat samples of {contexts} contexts each",
        f"  {folder}/rejects/     seeds that got no context, and why",
        f"  {folder}/manifest.jsonl, run.json, sglang.log",
    ]


def _rows(folder: Path) -> list[dict[str, Any]]:
    import orjson

    lines = (line for path in sorted(folder.glob("*.jsonl")) for line in path.read_bytes().splitlines())
    return [orjson.loads(line) for line in lines]
