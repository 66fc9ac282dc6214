"""`streamsyn demo`: the main job on a real SGLang server, from packaged seeds to a sample to read."""

import textwrap
import time
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import click
import orjson

from streamsyn.config.loading import Config, load
from streamsyn.fleet.launch import find_packaged_model, find_python
from streamsyn.pipeline.request import RunRequest
from streamsyn.pipeline.run import run
from streamsyn.pipeline.summary import closing_lines
from streamsyn.pipeline.verify import verify

_SETTINGS = {
    # Sized for a small model on two cores: a few minutes in all. Everything else is the default.
    "recipe.target_words": 150,
    "recipe.max_tokens": 320,
    "recipe.tries": 2,
    "checks.min_words": 40,
    "fleet.max_in_flight": 12,
    "assembly.contexts_per_sample": 3,
}
_SHOWN_CHARS = 700


def demo(out: Path, model: str | None, sglang_python: Path | None) -> int:
    """Run it into a new folder below `out`; the exit code.

    Raises:
        ConfigError: There is no SGLang, or no model, to be found.
        LaunchError: The server did not come up.
    """
    python = find_python(sglang_python)
    model = model or str(find_packaged_model())
    folder = out / time.strftime("%Y%m%d-%H%M%S")
    with as_file(files("streamsyn") / "data" / "seeds") as seeds:
        config = load(None, [*_SETTINGS.items(), ("seeds.sources", [{"path": str(seeds)}])])
        click.echo(
            f"12 packaged seeds of 4 tasks -> {model}, served by a real SGLang -> {folder}\n", err=True
        )
        summary = run(RunRequest(config=config, out=folder, launch=model, launch_python=python))
    problems, _ = verify(folder)
    for line in [*_sample(folder), *closing_lines(summary), *_where(folder, config)]:
        click.echo(line)
    for problem in problems:
        click.echo(f"problem: {problem}", err=True)
    return 75 if summary.stopped else 1 if problems or not summary.samples else 0


def _sample(folder: Path) -> list[str]:
    """The first sample, readably: the start of each of its contexts, the question, the answer."""
    contexts = {row["seq"]: row for row in _rows(folder / "contexts")}
    sample = next(iter(_rows(folder / "samples")), None)
    if sample is None:
        return ["No sample was made: every seed was rejected; see rejects/."]
    lines = [
        f"One sample ({sample['id']}, task {sample['task']}), its contexts cut to their first words:",
        "",
    ]
    for place, seq in enumerate(sample["context_seqs"]):
        what = "relevant" if place == sample["relevant_index"] else "distractor"
        lines += [f"  [{place + 1}: {what}, {contexts[seq]['checks']['words']} words]"]
        text = textwrap.shorten(contexts[seq]["context"], _SHOWN_CHARS, placeholder=" ...")
        lines += [*textwrap.wrap(text, 100, initial_indent="    ", subsequent_indent="    "), ""]
    relevant = contexts[sample["context_seqs"][sample["relevant_index"]]]
    lines += textwrap.wrap(f"user:      ... {relevant['instruction']}", 100, subsequent_indent=" " * 11)
    lines += textwrap.wrap(f"assistant: {relevant['answer']}", 100, subsequent_indent=" " * 11)
    return [*lines, ""]


def _where(folder: Path, config: Config) -> list[str]:
    """Where everything lies."""
    return [
        "",
        f"  {folder}/contexts/    what the LLM wrote, one line a seed, with tokens, tries and checks",
        f"  {folder}/samples/     chat samples of {config.assembly.contexts_per_sample} contexts each",
        f"  {folder}/rejects/     seeds that got no context, and why",
        f"  {folder}/manifest.jsonl, run.json, sglang.log",
    ]


def _rows(folder: Path) -> list[dict[str, Any]]:
    lines = (line for path in sorted(folder.glob("*.jsonl")) for line in path.read_bytes().splitlines())
    return [orjson.loads(line) for line in lines]
