"""The whole loop on a real SGLang: contexts are written while a model is tuned on them. Do the two overlap?

    python -m benchmarks.online FOLDER [--per-task 17] [--out DIR] [--plot FILE.png] [--set key=value]...

FOLDER holds seed files (*.jsonl), one a task. A real SGLang with the packaged model (SmolLM2-135M) writes a
context for some seeds of each file. `streamsyn train` starts at the same time and tunes that model on the
samples as they arrive. Server and run share the first core, the trainer has the second. Then each runs
again with the other core idle: the same seeds are written, and the same samples are trained on. Printed are

- overlap = max(T_gen, T_train) / T_wall, each from the start of the processes to their end: 1 when the
  shorter of the two costs nothing, 0.5 when both take equally long and one waits for the other;
- first step: seconds from the first context in the log to the end of the first optimizer step, and to the
  last context, which is how long training would have waited if it had started after the run;
- the loss on held-out samples (their seeds are never trained on): during training, on those that had
  arrived, and before and after tuning, on all of them;
- the answer to a held-out question by the tuned model, loaded into a real SGLang.

This shows that tuning works. It does not show what the contexts of a good model are worth: what such a
small model writes often does not contain the answer.
"""

import argparse
import asyncio
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from benchmarks.gain import sample_seeds
from streamsyn.config.loading import load, parse_override
from streamsyn.fleet.launch import find_packaged_model, launched
from streamsyn.fleet.wire import CHAT

WRITING = {
    "seeds.interleave": "true",
    "recipe.target_words": "90",
    "recipe.max_tokens": "180",
    "recipe.on_truncated": "keep",
    "checks.min_words": "30",
    "fleet.max_in_flight": "6",
    "assembly.contexts_per_sample": "2",
}
TRAINING = {
    "train.seq_len": "1536",
    "train.rows_per_step": "2",
    "train.shuffle_size": "16",
    "train.shuffle_min": "6",
    "train.max_wait_s": "20",
    "train.learning_rate": "1e-4",
    "train.warmup_steps": "3",
    "train.decay_steps": "4",
    "train.holdout": "0.15",
    "train.eval_every_steps": "4",
    "train.save_every_steps": "1000",
}
TARGET = 0.8

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Programs:
    """The two command lines and the folder of their files.

    Attributes:
        seeds: Folder of the seeds.
        model: Folder of the model that writes the contexts and is tuned.
        folder: Folder of the seeds, logs and results.
        writing: Configuration keys of the run.
        training: Configuration keys of the training.
    """

    seeds: Path
    model: Path
    folder: Path
    writing: Mapping[str, str]
    training: Mapping[str, str]

    def run(self, url: str, out: Path) -> subprocess.Popen[bytes]:
        """Start `streamsyn run` on the first core."""
        seeds = [part for path in sorted(self.seeds.glob("*.jsonl")) for part in ("--seeds", str(path))]
        options = ["--server", url, "--out", str(out), "--no-progress"]
        return self._start(0, out, "run", *seeds, *options, *set_options(self.writing))

    def train(self, run: Path, out: Path) -> subprocess.Popen[bytes]:
        """Start `streamsyn train` on the second core."""
        options = ["--from", str(run), "--model", str(self.model), "--out", str(out)]
        return self._start(1, out, "train", *options, *set_options(self.training))

    def _start(self, core: int, out: Path, command: str, *options: str) -> subprocess.Popen[bytes]:
        with out.with_suffix(".log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "streamsyn", command, *options],
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        os.sched_setaffinity(process.pid, {core})
        return process


def set_options(keys: Mapping[str, str]) -> list[str]:
    return [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]


@asynccontextmanager
async def server(model: Path, log: Path) -> Any:
    """Context manager: a real SGLang whose processes all stay on the first core."""
    all_cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {0})
    try:
        async with launched(str(model), log_path=log) as started:
            os.sched_setaffinity(0, all_cores)
            yield started
    finally:
        os.sched_setaffinity(0, all_cores)


def wait_for(process: subprocess.Popen[bytes], log: Path) -> float:
    """Wait for a process and return the time of its end, in seconds since the epoch.

    Raises:
        RuntimeError: The exit code is not 0.
    """
    if process.wait():
        raise RuntimeError(f"exit code {process.returncode}; end of {log}:\n{log.read_text()[-2000:]}")
    return time.time()


async def run_together(programs: Programs, url: str) -> float:
    """Start both at the same time and return the seconds until both have ended."""
    run, tuned = programs.folder / "run", programs.folder / "tuned"
    started = time.time()
    training = programs.train(run, tuned)
    try:
        running = programs.run(url, run)
        async with asyncio.TaskGroup() as group:
            ends = [
                group.create_task(
                    asyncio.to_thread(wait_for, process, out.with_suffix(".log")), name=out.name
                )
                for process, out in ((running, run), (training, tuned))
            ]
    finally:
        training.kill()
    return max(end.result() for end in ends) - started


async def run_alone(process: subprocess.Popen[bytes], out: Path) -> float:
    """Return the seconds that one process takes with the other core idle."""
    started = time.time()
    return await asyncio.to_thread(wait_for, process, out.with_suffix(".log")) - started


def lines(path: Path) -> list[Row]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


def rows(run: Path, kind: str) -> list[Row]:
    return [row for shard in sorted((run / kind).glob("*.jsonl")) for row in lines(shard)]


def print_first_step(run: Path, tuned: Path) -> None:
    """Print how long after the first context the first optimizer step ended."""
    contexts = rows(run, "contexts")
    written = sorted(row["attempts"][-1]["at"] + row["attempts"][-1]["seconds"] for row in contexts)
    steps = [line for line in lines(tuned / "metrics.jsonl") if line["kind"] == "step"]
    first, last = written[0], written[-1]
    during = sum(step["at"] < last for step in steps)
    print(
        f"first context to first optimizer step: {steps[0]['at'] - first:.1f} s "
        f"({last - first:.1f} s to the last context; {during} of {len(steps)} steps before that)"
    )


def print_losses(tuned: Path) -> None:
    """Print the evaluations during training, in the order of steps."""
    for line in lines(tuned / "metrics.jsonl"):
        if line["kind"] == "evaluation":
            losses = {key: value for key, value in line.items() if isinstance(value, float) and key != "at"}
            print(
                f"step {line['step']:3}: " + ", ".join(f"{key} {value:.3f}" for key, value in losses.items())
            )


def held_out(run: Path, training: Mapping[str, str]) -> list[Row]:
    """Return the samples that were never trained on."""
    from streamsyn.trainer.examples import row_is_held_out

    return [row for row in rows(run, "samples") if row_is_held_out(row, float(training["train.holdout"]))]


def print_held_out_losses(run: Path, models: Mapping[str, Path], training: Mapping[str, str]) -> None:
    """Print the mean loss of each model over the held-out samples; each sample has the same weight."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from streamsyn.trainer.examples import Example, Key
    from streamsyn.trainer.stream.render import Renderer

    torch.set_num_threads(1)
    for name, path in models.items():
        renderer = Renderer(AutoTokenizer.from_pretrained(path), int(training["train.seq_len"]), "drop")
        made = renderer.render_batch([(row, Key("run", 0, row["seq"])) for row in held_out(run, training)])
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        losses = []
        for example in (one for one in made if isinstance(one, Example)):
            tokens = torch.from_numpy(example.tokens).long()[None]
            labels = tokens.clone()
            labels[:, : example.loss_from] = -100
            with torch.no_grad():
                losses.append(float(model(input_ids=tokens, labels=labels).loss))
        print(f"{name}: {statistics.mean(losses):.3f} nats a target token on {len(losses)} held-out samples")


async def answer(model: Path, log: Path, question: Sequence[Row]) -> str:
    """Serve the model with a real SGLang and return its answer to a chat."""
    async with server(model, log) as started, aiohttp.ClientSession() as session:
        body = {"model": started.model, "messages": question, "temperature": 0, "max_tokens": 48}
        async with session.post(started.url + CHAT, json=body) as response:
            response.raise_for_status()
            found: str = (await response.json())["choices"][0]["message"]["content"]
            return found


async def measure(args: argparse.Namespace, folder: Path) -> None:
    settings = dict(setting.split("=", 1) for setting in args.settings)
    load(None, [parse_override(f"{key}={value}") for key, value in settings.items()])
    model = find_packaged_model()
    seeds = sample_seeds(args.folder, folder / "seeds", args.per_task, args.seed)
    training = {key: value for key, value in settings.items() if key.startswith("train.")}
    writing = {key: value for key, value in settings.items() if key not in training}
    programs = Programs(seeds, model, folder, {**WRITING, **writing}, {**TRAINING, **training})
    run, tuned = folder / "run", folder / "tuned"
    async with server(model, folder / "sglang.log") as started:
        wall = await run_together(programs, started.url)
        again = folder / "run-alone"
        generating = await run_alone(programs.run(started.url, again), again)
    counts = [len(rows(run, kind)) for kind in ("contexts", "rejects", "samples")]
    print("{} contexts, {} rejects, {} samples".format(*counts))
    print_first_step(run, tuned)
    print_losses(tuned)
    print_held_out_losses(run, {"before": model, "after": tuned / "model"}, programs.training)
    again = folder / "tuned-alone"
    tuning = await run_alone(programs.train(run, again), again)
    overlap = max(generating, tuning) / wall
    print(f"T_gen {generating:.0f} s, T_train {tuning:.0f} s, both at once {wall:.0f} s")
    print(f"overlap {overlap:.2f} (target: {TARGET}); in sequence: {generating + tuning:.0f} s")
    sample = held_out(run, programs.training)[0]
    text = await answer(tuned / "model", folder / "tuned-sglang.log", sample["messages"][:-1])
    print(f"the tuned model in SGLang answers {text!r} (expected: {sample['messages'][-1]['content']!r})")
    if args.plot is not None:
        from streamsyn.trainer.metrics.plot import draw

        shutil.copyfile(draw(tuned), args.plot)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder of seed files (*.jsonl), one a task")
    parser.add_argument("--per-task", type=int, default=17, help="seeds of each file")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random sample")
    parser.add_argument("--out", type=Path, help="keep all files in this new folder")
    parser.add_argument("--plot", type=Path, help="write a plot of the training to this file")
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="configuration keys"
    )
    args = parser.parse_args()
    if args.out is not None:
        args.out.mkdir(parents=True)
        asyncio.run(measure(args, args.out))
        return
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(measure(args, Path(folder)))


if __name__ == "__main__":
    main()
