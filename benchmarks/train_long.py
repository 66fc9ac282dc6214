"""Does a training with everything that long rows need end where a plain one does?

    python -m benchmarks.train_long RUN --model MODEL --out FOLDER [--steps 6] [--seq-len 8192]

RUN is a finished run directory, MODEL a Hugging Face directory. Two gloo ranks train on CPUs, by `streamsyn
train` with everything for memory and speed switched on (`ALL`): FSDP2, sequence parallelism, the head in
pieces, selective recomputation, activations and moments offloaded, moments in bf16, layers compiled, a dry
step, packing by cost, and asynchronous sharded checkpoints, one every two steps. --set
changes keys, such as `train.moments=fp32`.

The plain training is written here with transformers and torch alone. It takes the samples and the learning
rate of each step from what the ranks record, and trains on each sample by itself, in one process: whole
logits, nothing recomputed, AdamW in float32. The loss of each sample at each step and the weights at the end
are compared; FOLDER/compared.json and FOLDER/compared.svg show both.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from streamsyn.trainer.metrics.step_log import read_lines
from tests.trainer.rank_runs import free_port

RANKS = 2
RATE, BETAS, CLIP = 1e-4, (0.9, 0.95), 1.0
ALL = {
    "train.sequence_parallel": RANKS,
    "train.gradient_checkpointing": '"selective"',
    "train.activation_offload": True,
    "train.optimizer_offload": True,
    "train.moments": '"bf16"',
    "train.compile": True,
    "train.dry_step": True,
    "train.save_every_steps": 2,
}
RANK = "from tests.trainer.sharding import shard; shard('fsdp2'); from streamsyn.cli.main import main; main()"


@dataclass(frozen=True, slots=True)
class Compared:
    """One optimizer step of both trainings.

    Attributes:
        step: Its number, from 1.
        tokens: Tokens of its row.
        samples: Samples packed into it.
        loss: Mean loss per target token of the ranks, in nats.
        plain: The same of the plain training.
        furthest: Largest relative difference between the losses of a sample.
        norm: Gradient norm of the ranks, before clipping.
        plain_norm: The same of the plain training.
    """

    step: int
    tokens: int
    samples: int
    loss: float
    plain: float
    furthest: float
    norm: float
    plain_norm: float


def start_ranks(arguments: list[str], log: Path) -> list[subprocess.Popen[bytes]]:
    """Start one process for each rank, with one thread each."""
    port, ranks = free_port(), []
    for rank in range(RANKS):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(RANKS),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        with log.with_suffix(f".rank{rank}").open("ab") as file:
            command = [sys.executable, "-c", RANK, "train", *arguments]
            ranks.append(subprocess.Popen(command, env=environment, stdout=file, stderr=file))
    return ranks


def steps_of(out: Path) -> list[dict[str, Any]]:
    """The recorded steps."""
    return [line for line in read_lines(out / "metrics.jsonl") if line["kind"] == "step"]


def recorded(out: Path, ranks: list[subprocess.Popen[bytes]], steps: int) -> Iterator[dict[str, Any]]:
    """The steps that the ranks record in OUT, with their `samples`, each as soon as it is there."""
    for step in range(1, steps + 1):
        while True:
            ended = all(one.poll() is not None for one in ranks)
            if (out / "metrics.jsonl").exists() and len(found := steps_of(out)) >= step:
                trained = {line["step"]: line["examples"] for line in read_lines(out / "trained.jsonl")}
                yield {**found[step - 1], "samples": trained[step]}
                break
            if ended:
                return
            time.sleep(0.5)  # they are other processes


def json_of(value: Any) -> str:
    """A value of `--set`."""
    return value if isinstance(value, str) else json.dumps(value)


def samples_of(run: Path, tokenizer: Any) -> dict[str, tuple[list[int], int]]:
    """Of each sample in a run directory: its tokens up to the end of the answer, and where it begins."""
    found = {}
    for path in sorted((run / "samples").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            asked, answer = row["messages"]
            prompt = tokenizer.apply_chat_template([asked], tokenize=False, add_generation_prompt=True)
            whole = prompt + answer["content"] + tokenizer.eos_token
            ids, start = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (whole, prompt))
            found[row["id"]] = (ids, len(start))
    return found


def train_plainly(
    args: argparse.Namespace, lines: Iterator[dict[str, Any]]
) -> tuple[list[Compared], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Train on the same samples at each step; return the steps, and the weights before and after."""
    base = args.out / "base"
    samples = samples_of(args.run, AutoTokenizer.from_pretrained(base))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.train()
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), betas=BETAS, weight_decay=0.0)
    made = []
    for line in lines:
        chosen = [(*samples[name], loss) for *_, name, loss in line["samples"]]
        targets = sum(len(ids) - start for ids, start, _ in chosen)
        total, furthest = 0.0, 0.0
        for ids, start, its_loss in chosen:
            given = torch.tensor([ids])
            logits = model(given, use_cache=False).logits[0, start - 1 : -1]
            loss = cross_entropy(logits.float(), given[0, start:], reduction="sum")
            (loss / targets).backward()
            mean = loss.item() / (len(ids) - start)
            total += loss.item()
            furthest = max(furthest, abs(its_loss / mean - 1))
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP))
        optimizer.param_groups[0]["lr"] = line["rate"]
        optimizer.step()
        optimizer.zero_grad()
        made.append(
            Compared(
                line["step"],
                line["tokens"],
                line["examples"],
                line["loss"],
                total / targets,
                furthest,
                line["grad_norm"],
                norm,
            )
        )
        print(made[-1], flush=True)
    return made, before, {name: one.detach() for name, one in model.named_parameters()}


def weights_differ(
    before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], found: dict[str, torch.Tensor]
) -> tuple[float, float]:
    """How far apart the weights end, relative to how far the plain training moved them; and the largest
    difference of a weight.
    """
    moved = sum(float((after[name] - before[name]).double().square().sum()) for name in after)
    apart = sum(float((after[name] - found[name].float()).double().square().sum()) for name in after)
    furthest = max(float((after[name] - found[name].float()).abs().max()) for name in after)
    return (apart / moved) ** 0.5, furthest


def draw(steps: list[Compared], path: Path) -> None:
    """Draw both loss curves, and below them how far apart the samples' losses are."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    numbers = [one.step for one in steps]
    figure, (curves, apart) = pyplot.subplots(2, 1, figsize=(7, 5), sharex=True, height_ratios=[2, 1])
    curves.plot(numbers, [one.plain for one in steps], "o-", color="#999999", lw=4, label="plain")
    curves.plot(numbers, [one.loss for one in steps], "o-", color="#d62728", lw=1, ms=3, label="all of it")
    curves.set_ylabel("loss per target (nats)")
    curves.legend()
    apart.semilogy(numbers, [one.furthest for one in steps], "o-", color="#1f77b4")
    apart.set_ylabel("largest relative\ndifference of a sample")
    apart.set_xlabel("optimizer step")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Train both ways and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a finished run directory")
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face directory")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new directory for both")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of one row")
    parser.add_argument("--seq-len", type=int, default=8192, help="tokens of a row")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="other keys")
    parser.add_argument("--bound", type=float, default=1e-5, help="largest relative difference of a loss")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).save_pretrained(args.out / "base")
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out / "base")
    keys = ALL | {
        "train.seq_len": args.seq_len,
        "train.rows_per_step": 1,
        "train.max_steps": args.steps,
        "train.loss": '"token"',
        "train.learning_rate": RATE,
        "train.betas": list(BETAS),
        "train.max_grad_norm": CLIP,
        "train.warmup_steps": 2,
        "train.decay_steps": 0,
    }
    keys |= dict(one.split("=", 1) for one in args.set)
    out = args.out / "ranks"
    sets = [part for key, value in keys.items() for part in ("--set", f"{key}={json_of(value)}")]
    arguments = ["--from", str(args.run), "--model", str(args.out / "base"), "--out", str(out), *sets]
    ranks = start_ranks(arguments, args.out / "log")
    steps, before, after = train_plainly(args, recorded(out, ranks, args.steps))
    codes = [one.wait() for one in ranks]
    if any(codes):
        sys.exit(f"the ranks failed; see {args.out}/log.rank*")
    apart, furthest = weights_differ(before, after, load_file(out / "model" / "model.safetensors"))
    draw(steps, args.out / "compared.svg")
    whole = {"steps": [asdict(one) for one in steps], "weights_apart": apart, "furthest_weight": furthest}
    (args.out / "compared.json").write_text(json.dumps(whole, indent=2) + "\n")
    print("| step | tokens | samples | loss | plain | largest difference of a sample |")
    for one in steps:
        print(
            f"| {one.step} | {one.tokens:,} | {one.samples} | {one.loss:.6f} | {one.plain:.6f} "
            f"| {one.furthest:.1e} |"
        )
    print(f"weights: {apart:.1e} of the way that they moved, at most {furthest:.1e} each")
    if max(one.furthest for one in steps) > args.bound:
        sys.exit(f"a loss differs by more than {args.bound}")


if __name__ == "__main__":
    main()
