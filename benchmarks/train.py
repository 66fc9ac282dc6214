"""Training speed: streamsyn's loop compared with TRL's SFTTrainer on the same packs and the same model.

    python -m benchmarks.train [--rounds N] [--only NAME] [--json FILE]
    python -m benchmarks.train --gpu [--dry] [--only NAME] [--rounds N] [--json FILE]

Both train a randomly initialised Llama on the same rows of samples, in separate processes that take turns.
The first steps are left out, and the median of the rounds counts. The losses of both have to be equal, or the
exit code is 1. TRL (pinned in the extra `dev`) comes from this environment or from --trl PYTHON; without it
only streamsyn is measured. TRL runs with its own best settings: packing best-fit decreasing, which makes it
free of padding, its loss in chunks, the fused AdamW, gradient checkpointing only where ours has it, and the
fastest attention that is installed.

Without --gpu: a CPU, 4 layers of width 256, rows of 1k, 4k and 16k tokens, one thread, tokens per CPU second;
streamsyn once with transformers' SDPA and its mask, like TRL, and once with one attention call a sample.
With --gpu: models of 0.5B and 1.5B parameters, rows of 8k, 32k and 64k tokens (from 32k on with gradient
checkpointing), bf16 with float32 weights; tokens per second of wall time, model FLOPs utilisation of the
dense bf16 peak (by `streamsyn.trainer.metrics.mfu` for both), and peak memory; the loss curves of bf16
with each attention beside that of float32; and 8-bit moments and compiled layers beside neither. If there is
no GPU, the plan is printed. With --dry the same functions run on the CPU with tiny models and short rows.
`benchmarks/train_gpu.sh` runs what fits into ten minutes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.train_sides import best_flash

EQUAL, EQUAL_HALF = 1e-3, 2e-2
"""Largest relative difference between losses of the same step; TRL rounds its own to four digits."""


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
        warm_up: Steps that are not measured.
        curve: Whether to compare attentions and precisions of streamsyn instead of with TRL.
        options: Whether to compare keys that save memory or time instead of with TRL.
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
    warm_up: int = 3
    curve: bool = False
    options: bool = False

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
CPU_CASES = [
    Case("4x256 1k", SMALL, 1024),
    Case("4x256 4k", SMALL, 4096, steps=5, warm_up=2),
    Case("4x256 16k", SMALL, 16_384, steps=2, per_step=1, warm_up=1),
]
MODELS = {"0.5B": (896, 4864, 24, 14, 2, 151_936), "1.5B": (1536, 8960, 28, 12, 2, 151_936)}
TINY = (64, 128, 2, 4, 2, 1024)
SHORTER = 128
"""Rows of a dry run are this much shorter."""


def gpu_cases(*, dry: bool) -> list[Case]:
    """Return both models at all lengths, and their loss curves; tiny models and short rows when `dry`."""
    cases = []
    for name, sizes in MODELS.items():
        shared: dict[str, Any] = {"sizes": TINY if dry else sizes, "tied": True, "gpu": not dry, "half": True}
        for length, steps in ((8192, 12), (32_768, 8), (65_536, 5)):
            size = length // SHORTER if dry else length
            few = 3 if dry else steps
            shown = f"{name} {length // 1024}k"
            long = length > 8192
            cases.append(Case(shown, length=size, checkpointing=long, steps=few, warm_up=2, **shared))
        size, steps = (128, 6) if dry else (4096, 20)
        cases.append(Case(f"{name} curve", length=size, steps=steps, curve=True, **shared))
        size, steps = (128, 6) if dry else (8192, 10)
        cases.append(Case(f"{name} options", length=size, steps=steps, options=True, **shared))
    return cases


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
    from transformers.utils import logging

    from streamsyn.trainer.metrics.mfu import model_flops

    logging.disable_progress_bar()
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(case.config())
    model.save_pretrained(folder)
    plain = Tokenizer(models.WordLevel({"a": 0, "<e>": 1}, "a"))
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<e>", pad_token="<e>").save_pretrained(folder)
    rows = samples(case.steps * case.per_step, case.length)
    measured: list[tuple[int, int]] = [*chain(*rows[case.warm_up * case.per_step :])]
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
    sides = dict.fromkeys(own_sides(case), sys.executable)
    if trl and not case.curve and not case.options:
        sides[TRL] = trl
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as name:
        plan = prepare(Path(name), case)
        for _ in range(rounds):
            for side, python in sides.items():
                one = round_of(side, python, Path(name))
                # Printed now: what follows may run out of memory or time.
                gib = one["peak_bytes"] / 2**30
                print(f"{case.name:9} {side:14} {sum(one['times']):9.1f} s   {gib:.2f} GiB", flush=True)
                found[side].append(one)
    return {side: figures_of(case, plan, rounds_of_side) for side, rounds_of_side in found.items()}


TRL = "trl-auto"


def own_sides(case: Case) -> list[str]:
    """Return the sides of streamsyn to measure."""
    if case.options:
        eighth = ["ours-auto-8bit"] if find_spec("bitsandbytes") else []
        compiled = ["ours-auto-compile"] if case.gpu else []  # takes minutes on a CPU
        return ["ours-auto", *eighth, *compiled]
    if not case.curve:
        return ["ours-auto"] if case.half else ["ours-sdpa", "ours-segments"]
    kernels = ["varlen"] if case.gpu else []
    if case.gpu and (flash := best_flash()) != "sdpa":
        kernels.append(flash)
    return ["ours-segments-fp32", *(f"ours-{name}" for name in ("segments", *kernels))]


def figures_of(case: Case, plan: dict[str, Any], rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of a side: speed of its median round, the least memory, losses of its first."""
    seconds = median(sum(each["times"][case.warm_up :]) for each in rounds)
    figures = {
        "tokens_per_s": plan["tokens"] / seconds,
        "losses": rounds[0]["losses"],
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
        line += f"   loss {found['losses'][0]:.4f} to {found['losses'][-1]:.4f}"
        line += f"   {found['peak_gib']:.2f} GiB"
        if "mfu" in found:
            line += f"   {found['mfu']:.1%} MFU"
        if TRL in sides:
            line += f"   {found['tokens_per_s'] / sides[TRL]['tokens_per_s']:.2f} times TRL"
        print(line, flush=True)


def furthest_losses(sides: dict[str, dict[str, Any]]) -> float:
    """Return the largest relative difference between the losses of a step of any two sides."""
    steps = zip(*(found["losses"] for found in sides.values()), strict=True)
    return max(float(max(losses) / min(losses) - 1) for losses in steps)


def main() -> None:
    """Run the benchmark; without the GPU that it needs, print the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trl", metavar="PYTHON", help="Python interpreter with trl; default: this one")
    parser.add_argument("--only", metavar="NAME", help="only cases whose name contains this, such as 16k")
    parser.add_argument("--gpu", action="store_true", help="large models on a GPU")
    parser.add_argument("--dry", action="store_true", help="with --gpu: tiny models on the CPU")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each side; the median counts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    args = parser.parse_args()
    cases = gpu_cases(dry=args.dry) if args.gpu else CPU_CASES
    cases = [case for case in cases if (args.only or "") in case.name]
    trl = args.trl or (sys.executable if find_spec("trl") else None)
    if not trl:
        print("trl is not installed: only streamsyn is measured")
    if any(case.gpu for case in cases) and not has_gpu():
        print("torch finds no GPU. With one, these cases would run (try --dry for tiny models on the CPU):")
        for case in cases:
            print(
                f"  {case.name}: {case.steps} steps of {case.per_step} rows, bf16{checkpointing_note(case)}"
            )
        return
    found, differing = {}, []
    for case in cases:
        found[case.name] = compare(case, trl, args.rounds)
        report(case, found[case.name])
        differ = furthest_losses(found[case.name])
        print(f"{case.name:9} losses differ by up to {differ:.1e}", flush=True)
        if differ > (EQUAL_HALF if case.half else EQUAL):
            differing.append(case.name)
    if args.dry:
        print("all cases ran; the numbers of tiny models are not meaningful")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    if differing:
        sys.exit(f"the losses of the sides are not equal: {', '.join(differing)}")


def has_gpu() -> bool:
    """Return whether torch finds a GPU."""
    import torch

    return torch.cuda.is_available()


def checkpointing_note(case: Case) -> str:
    """Return the note on gradient checkpointing for the printed plan."""
    return ", gradient checkpointing" if case.checkpointing else ""


if __name__ == "__main__":
    main()
