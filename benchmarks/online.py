"""The whole loop for real: SGLang writes contexts while a model is tuned on them. Do the two overlap?

    python -m benchmarks.online FOLDER [--per-task 17] [--out DIR] [--plot FILE.png] [--set key=value]...

FOLDER holds files of seeds, one a task. A real SGLang with the packaged model (SmolLM2-135M) writes a context
for some seeds of each, and `streamsyn train`, started at the same time, tunes that model on the samples as
they come. Server and run have the first core for themselves, the trainer the second. Then each of the two is
done once more with the other core idle: the same seeds written again, and the same samples trained on again.

- overlap = max(T_gen, T_train) / T_wall, each time from the start of the process to its end: 1 when the
  shorter of the two costs nothing; 0.5 when both take as long alone and the one waits for the other;
- first step: seconds from the first context in the log to the end of the first optimizer step; beside it the
  same had training waited for the end of the run, as it would with files;
- the loss on held-out samples (their seeds are never trained on): as the training measured it while they
  became more, and before and after tuning on all of them;
- the tuned model, loaded by a real SGLang, answers a held-out question.

What such a small model writes often does not hold the answer. That tuning works is shown here; what the
contexts of a good model are worth is not.
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

from benchmarks.gain import chosen
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
    """The two command lines, and where their files go.

    Attributes:
        seeds: Folder of the seeds.
        model: What writes and is tuned.
        folder: Holds everything.
        writing: Keys of the run.
        training: Keys of the training.
    """

    seeds: Path
    model: Path
    folder: Path
    writing: Mapping[str, str]
    training: Mapping[str, str]

    def run(self, url: str, out: Path) -> subprocess.Popen[bytes]:
        """`streamsyn run`, on the first core."""
        seeds = [part for path in sorted(self.seeds.glob("*.jsonl")) for part in ("--seeds", str(path))]
        given = ["--server", url, "--out", str(out), "--no-progress"]
        return self._start(0, out, "run", *seeds, *given, *sets(self.writing))

    def train(self, run: Path, out: Path) -> subprocess.Popen[bytes]:
        """`streamsyn train`, on the second."""
        given = ["--from", str(run), "--model", str(self.model), "--out", str(out)]
        return self._start(1, out, "train", *given, *sets(self.training))

    def _start(self, core: int, out: Path, command: str, *given: str) -> subprocess.Popen[bytes]:
        with out.with_suffix(".log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "streamsyn", command, *given],
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        os.sched_setaffinity(process.pid, {core})
        return process


def sets(keys: Mapping[str, str]) -> list[str]:
    return [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]


@asynccontextmanager
async def server(model: Path, log: Path) -> Any:
    """A real SGLang on the first core; what it starts stays there too."""
    every = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {0})
    try:
        async with launched(str(model), log_path=log) as started:
            os.sched_setaffinity(0, every)
            yield started
    finally:
        os.sched_setaffinity(0, every)


def finished(process: subprocess.Popen[bytes], log: Path) -> float:
    """When it came to a good end."""
    if process.wait():
        raise RuntimeError(f"exit code {process.returncode}: {log.read_text()[-2000:]}")
    return time.time()


async def both(programs: Programs, url: str) -> float:
    """Both at once, begun at the same time; seconds until both have ended."""
    run, tuned = programs.folder / "run", programs.folder / "tuned"
    began = time.time()
    training = programs.train(run, tuned)
    try:
        running = programs.run(url, run)
        async with asyncio.TaskGroup() as group:
            ends = [
                group.create_task(
                    asyncio.to_thread(finished, process, out.with_suffix(".log")), name=out.name
                )
                for process, out in ((running, run), (training, tuned))
            ]
    finally:
        training.kill()
    return max(end.result() for end in ends) - began


async def alone(process: subprocess.Popen[bytes], out: Path) -> float:
    """Seconds that one takes with nothing beside it."""
    began = time.time()
    return await asyncio.to_thread(finished, process, out.with_suffix(".log")) - began


def lines(path: Path) -> list[Row]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


def rows(run: Path, kind: str) -> list[Row]:
    return [row for shard in sorted((run / kind).glob("*.jsonl")) for row in lines(shard)]


def tell_first_step(run: Path, tuned: Path) -> None:
    """How soon the training got going."""
    contexts = rows(run, "contexts")
    written = sorted(row["attempts"][-1]["at"] + row["attempts"][-1]["seconds"] for row in contexts)
    steps = [line for line in lines(tuned / "metrics.jsonl") if line["kind"] == "step"]
    first, last = written[0], written[-1]
    during = sum(step["at"] < last for step in steps)
    print(
        f"first context to first optimizer step: {steps[0]['at'] - first:.1f} s "
        f"({last - first:.1f} s to the last context; {during} of {len(steps)} steps before that)"
    )


def tell_losses(tuned: Path) -> None:
    """The evaluations, in the order of steps."""
    for line in lines(tuned / "metrics.jsonl"):
        if line["kind"] == "evaluation":
            shown = {key: value for key, value in line.items() if isinstance(value, float) and key != "at"}
            print(
                f"step {line['step']:3}: " + ", ".join(f"{key} {value:.3f}" for key, value in shown.items())
            )


def held_out(run: Path, training: Mapping[str, str]) -> list[Row]:
    """The samples that were never trained on."""
    from streamsyn.trainer.examples import is_held_out

    return [row for row in rows(run, "samples") if is_held_out(row, float(training["train.holdout"]))]


def tell_held_out(run: Path, models: Mapping[str, Path], training: Mapping[str, str]) -> None:
    """The loss of each model on all samples that were held out, each sample weighing the same."""
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
        print(f"{name}: {statistics.mean(losses):.3f} nats a target on {len(losses)} held-out samples")


async def answer(model: Path, log: Path, question: Sequence[Row]) -> str:
    """What the model in a directory of ours answers when a real SGLang serves it."""
    async with server(model, log) as started, aiohttp.ClientSession() as session:
        body = {"model": started.model, "messages": question, "temperature": 0, "max_tokens": 48}
        async with session.post(started.url + CHAT, json=body) as response:
            response.raise_for_status()
            found: str = (await response.json())["choices"][0]["message"]["content"]
            return found


async def measure(args: argparse.Namespace, folder: Path) -> None:
    settings = dict(text.split("=", 1) for text in args.settings)
    load(None, [parse_override(f"{key}={value}") for key, value in settings.items()])
    model = find_packaged_model()
    seeds = chosen(args.folder, folder / "seeds", args.per_task, args.seed)
    training = {key: value for key, value in settings.items() if key.startswith("train.")}
    writing = {key: value for key, value in settings.items() if key not in training}
    programs = Programs(seeds, model, folder, {**WRITING, **writing}, {**TRAINING, **training})
    run, tuned = folder / "run", folder / "tuned"
    async with server(model, folder / "sglang.log") as started:
        wall = await both(programs, started.url)
        again = folder / "run-alone"
        generating = await alone(programs.run(started.url, again), again)
    counts = [len(rows(run, kind)) for kind in ("contexts", "rejects", "samples")]
    print("{} contexts, {} rejects, {} samples".format(*counts))
    tell_first_step(run, tuned)
    tell_losses(tuned)
    tell_held_out(run, {"before": model, "after": tuned / "model"}, programs.training)
    again = folder / "tuned-alone"
    tuning = await alone(programs.train(run, again), again)
    overlap = max(generating, tuning) / wall
    print(f"T_gen {generating:.0f} s, T_train {tuning:.0f} s, both at once {wall:.0f} s")
    print(f"overlap {overlap:.2f} (aim: {TARGET}); one after the other would be {generating + tuning:.0f} s")
    sample = held_out(run, programs.training)[0]
    said = await answer(tuned / "model", folder / "tuned-sglang.log", sample["messages"][:-1])
    print(
        f"served by SGLang, the tuned model answers {said!r} (wanted: {sample['messages'][-1]['content']!r})"
    )
    if args.plot is not None:
        from streamsyn.trainer.metrics.plot import draw

        shutil.copyfile(draw(tuned), args.plot)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="holds files of seeds, one a task")
    parser.add_argument("--per-task", type=int, default=17)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="keep all files here; by default they are removed")
    parser.add_argument("--plot", type=Path, help="draw the training here")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    if args.out is not None:
        args.out.mkdir(parents=True)
        asyncio.run(measure(args, args.out))
        return
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(measure(args, Path(folder)))


if __name__ == "__main__":
    main()
