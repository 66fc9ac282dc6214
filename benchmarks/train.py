"""Training speed: streamsyn's loop compared with TRL's SFTTrainer on the same packs and the same model.

    python -m benchmarks.train [--trl PYTHON] [--rounds N] [--json FILE]
    python -m benchmarks.train --gpu [--dry] [--trl PYTHON] [--rounds N] [--json FILE]

Both train a randomly initialised Llama on the same rows of samples, in separate processes that take turns.
The first steps are left out, and the fastest round counts. PYTHON has trl, torch, transformers, accelerate
and datasets; without --trl only streamsyn is measured. To make one that takes all but trl from this
environment:

    python -m venv V; V/bin/pip install --no-deps trl==1.16.0
    echo "$PWD"/.venv/lib/python3*/site-packages > "$(echo V/lib/python3*/site-packages)"/here.pth

Without --gpu: a CPU, 4 layers of width 256, rows of 1k and 4k tokens, one thread, tokens per CPU second;
streamsyn once with transformers' SDPA and its mask, like TRL, and once with one attention call a sample.
With --gpu: models of 0.5B and 1.5B parameters, rows of 8k and 32k tokens (32k with gradient checkpointing),
bf16 with float32 weights, the best attention that each side has installed; tokens per second of wall time,
model FLOPs utilisation of the dense bf16 peak (by `streamsyn.trainer.metrics.mfu` for both), and peak
memory. If there is no GPU, the plan is printed. With --dry the same functions run on the CPU with tiny
models and short rows.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

WARM_UP = 3


@dataclass(frozen=True, slots=True)
class Case:
    """One model and one row length.

    Attributes:
        name: Label in the table.
        sizes: Hidden size, MLP size, layers, attention heads, key-value heads, vocabulary size.
        length: Tokens of a row.
        tied: Whether input and output embeddings share weights.
        gpu: Whether it needs a GPU.
        half: Whether to train in bf16.
        checkpointing: Whether to use gradient checkpointing.
        steps: Optimizer steps, warm-up included.
        per_step: Rows of a step.
    """

    name: str
    sizes: tuple[int, int, int, int, int, int]
    length: int
    tied: bool = False
    gpu: bool = False
    half: bool = False
    checkpointing: bool = False
    steps: int = 12
    per_step: int = 2

    def config(self) -> Any:
        """Return the transformers configuration of the Llama."""
        from transformers import LlamaConfig

        names = [
            *("hidden_size", "intermediate_size", "num_hidden_layers"),
            *("num_attention_heads", "num_key_value_heads", "vocab_size"),
        ]
        chosen: dict[str, Any] = dict(zip(names, self.sizes, strict=True))
        return LlamaConfig(**chosen, max_position_embeddings=65_536, tie_word_embeddings=self.tied)


SMALL = (256, 1024, 4, 8, 4, 4096)
CPU_CASES = [Case("4x256 1k", SMALL, 1024), Case("4x256 4k", SMALL, 4096, steps=WARM_UP + 3)]
MODELS = {"0.5B": (896, 4864, 24, 14, 2, 151_936), "1.5B": (1536, 8960, 28, 12, 2, 151_936)}
TINY = (64, 128, 2, 4, 2, 1024)


def gpu_cases(*, dry: bool) -> list[Case]:
    """Return both models at both lengths; tiny models and short rows when `dry`."""
    return [
        Case(
            f"{name} {length // 1024}k",
            TINY if dry else sizes,
            length // 64 if dry else length,
            tied=True,
            gpu=not dry,
            half=True,
            checkpointing=length > 8192,
            steps=WARM_UP + 2 if dry else 12,
        )
        for name, sizes in MODELS.items()
        for length in (8192, 32_768)
    ]


def samples(rows: int, length: int) -> list[list[tuple[int, int]]]:
    """Return rows of samples, each as (tokens, target tokens): about three a row, at most 128 targets."""
    import random

    rng, made = random.Random(0), []
    for _ in range(rows):
        row, room = [], length
        while room > length // 8:
            size = min(room, rng.randint(length // 6, length // 2))
            row.append((size, min(size // 2, rng.choice([4, 8, 16, 64, 128]))))
            room -= size
        made.append(row)
    return made


def round_of(side: str, python: str, folder: Path) -> dict[str, Any]:
    """Run one round of one side in its own process and return what it prints."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [python, "-m", "benchmarks.train_sides", side, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{side} failed with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def prepare(folder: Path, case: Case) -> dict[str, Any]:
    """The model, a tokenizer and the packs, in `folder`."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from streamsyn.trainer.metrics.mfu import model_flops

    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(case.config())
    model.save_pretrained(folder)
    plain = Tokenizer(models.WordLevel({"a": 0, "<e>": 1}, "a"))
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<e>", pad_token="<e>").save_pretrained(folder)
    rows = samples(case.steps * case.per_step, case.length)
    measured: list[tuple[int, int]] = [*chain(*rows[WARM_UP * case.per_step :])]
    work = model_flops(model)
    assert work is not None
    plan = {
        **asdict(case),
        "rows": rows,
        "vocabulary": case.sizes[-1],
        "tokens": sum(size for size, _ in measured),
        "flops": work.flops(measured),
        "weights": sum(each.numel() for each in model.parameters()),
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    return plan


def compare(case: Case, trl: str | None, rounds: int) -> dict[str, Any]:
    """Run all sides in turns and return the figures of each."""
    own_sides = ["ours"] if case.half else ["ours-sdpa", "ours-segments"]
    sides = {**dict.fromkeys(own_sides, sys.executable), **({"trl": trl} if trl else {})}
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as name:
        plan = prepare(Path(name), case)
        for _ in range(rounds):
            for side, python in sides.items():
                found[side].append(round_of(side, python, Path(name)))
    return {side: figures_of(case, plan, rounds_of_side) for side, rounds_of_side in found.items()}


def figures_of(case: Case, plan: dict[str, Any], rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of a side: speed and memory of its best round, losses of its first."""
    seconds = min(sum(each["times"][WARM_UP:]) for each in rounds)
    losses = rounds[0]["losses"]
    figures = {
        "tokens_per_s": plan["tokens"] / seconds,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "peak_gib": min(each["peak_bytes"] for each in rounds) / 2**30,
        "weights": plan["weights"],
    }
    peak = device_peak() if case.gpu else None
    return figures if peak is None else {**figures, "mfu": plan["flops"] / seconds / peak}


def device_peak() -> float | None:
    """Return the dense bf16 peak of the GPU in FLOPs a second; None for an unknown GPU."""
    import torch

    from streamsyn.trainer.metrics.mfu import peak_flops

    return peak_flops(torch.cuda.get_device_name())


def report(case: Case, sides: dict[str, dict[str, Any]]) -> None:
    """Print one line for each side."""
    for side, found in sides.items():
        line = f"{case.name:9} {side:14} {found['tokens_per_s']:9,.0f} tokens/s"
        line += f"   loss {found['first_loss']:.4f} to {found['last_loss']:.4f}"
        line += f"   {found['peak_gib']:.2f} GiB"
        if "mfu" in found:
            line += f"   {found['mfu']:.1%} MFU"
        if "trl" in sides:
            line += f"   {found['tokens_per_s'] / sides['trl']['tokens_per_s']:.2f} times TRL"
        print(line)


def main() -> None:
    """Run the benchmark; without the GPU that it needs, print the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--trl", metavar="PYTHON", help="Python interpreter with trl; default: measure only streamsyn"
    )
    parser.add_argument("--gpu", action="store_true", help="large models on a GPU")
    parser.add_argument("--dry", action="store_true", help="with --gpu: tiny models on the CPU")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each side; the fastest counts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    args = parser.parse_args()
    cases = gpu_cases(dry=args.dry) if args.gpu else CPU_CASES
    if not args.trl:
        print("without --trl PYTHON only streamsyn is measured")
    if any(case.gpu for case in cases) and not has_gpu():
        print("torch finds no GPU. With one, these cases would run (try --dry for tiny models on the CPU):")
        for case in cases:
            print(
                f"  {case.name}: {case.steps} steps of {case.per_step} rows, bf16{checkpointing_note(case)}"
            )
        return
    found = {}
    for case in cases:
        found[case.name] = compare(case, args.trl, args.rounds)
        report(case, found[case.name])
    if args.dry:
        print("all cases ran; the numbers of tiny models are not meaningful")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


def has_gpu() -> bool:
    """Return whether torch finds a GPU."""
    import torch

    return torch.cuda.is_available()


def checkpointing_note(case: Case) -> str:
    """Return the note on gradient checkpointing for the printed plan."""
    return ", gradient checkpointing" if case.checkpointing else ""


if __name__ == "__main__":
    main()
