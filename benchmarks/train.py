"""Our loop beside TRL's SFTTrainer: the same packs and the same model.

    python -m benchmarks.train [--trl PYTHON] [--rounds N] [--json FILE]
    python -m benchmarks.train --gpu [--dry] [--trl PYTHON] [--rounds N] [--json FILE]

Both train a random Llama on the same rows of samples, each in a process of its own, in turns; the first steps
are left out, and of all rounds the fastest counts. PYTHON is one that has trl besides torch, transformers,
accelerate and datasets; without it, only our side runs. Such a one, which takes all but trl from here:

    python -m venv V; V/bin/pip install --no-deps trl==1.16.0
    echo "$PWD"/.venv/lib/python3*/site-packages > "$(echo V/lib/python3*/site-packages)"/here.pth

The first form is for a CPU: 4 layers of 256, rows of 1k tokens and of 4k, one thread, tokens per CPU second;
ours with transformers' SDPA and its mask, as TRL has it, and with a call for each sample. The second is for a
GPU: 0.5 and 1.5 billion weights, rows of 8k tokens and of 32k (these with gradient checkpointing), bf16 over
float32 weights, the best attention that is installed on each side; tokens a second of wall time, the share of
the device's dense bf16 peak (as `streamsyn.trainer.metrics.mfu` counts it, the same for both), the highest
memory. Without a GPU it says what it would do; with --dry it does so in small on the CPU: the same functions,
tiny models and short rows.
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
    """One model and one length of rows."""

    name: str
    sizes: tuple[int, int, int, int, int, int]
    """Width, width of the MLP, layers, heads, key heads, vocabulary."""
    length: int
    tied: bool = False
    gpu: bool = False
    half: bool = False
    checkpointing: bool = False
    steps: int = 12
    per_step: int = 2

    def config(self) -> Any:
        """The Llama."""
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
    """Both models at both lengths; in small when `dry`."""
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
    """Rows of samples as (tokens, targets): about three to a row, answers of a few to some hundred tokens."""
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
    """Run a worker."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [python, "-m", "benchmarks.train_sides", side, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
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
        "weights": sum(one.numel() for one in model.parameters()),
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    return plan


def compare(case: Case, trl: str | None, rounds: int) -> dict[str, Any]:
    """All sides in turns; what each came to, by its name."""
    ours_are = ["ours"] if case.half else ["ours-sdpa", "ours-segments"]
    sides = {**dict.fromkeys(ours_are, sys.executable), **({"trl": trl} if trl else {})}
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as name:
        plan = prepare(Path(name), case)
        for _ in range(rounds):
            for side, python in sides.items():
                found[side].append(round_of(side, python, Path(name)))
    return {side: figures_of(case, plan, some) for side, some in found.items()}


def figures_of(case: Case, plan: dict[str, Any], rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the fastest round of a side."""
    took = min(sum(one["times"][WARM_UP:]) for one in rounds)
    losses = rounds[0]["losses"]
    figures = {
        "tokens_per_s": plan["tokens"] / took,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "peak_gib": min(one["peak_bytes"] for one in rounds) / 2**30,
        "weights": plan["weights"],
    }
    peak = device_peak() if case.gpu else None
    return figures if peak is None else {**figures, "mfu": plan["flops"] / took / peak}


def device_peak() -> float | None:
    """Dense bf16 FLOPs a second of the GPU; None when it is not known."""
    import torch

    from streamsyn.trainer.metrics.mfu import peak_flops

    return peak_flops(torch.cuda.get_device_name())


def report(case: Case, sides: dict[str, dict[str, Any]]) -> None:
    """A line for each side."""
    for side, found in sides.items():
        line = f"{case.name:9} {side:14} {found['tokens_per_s']:9,.0f} tokens/s"
        line += f"   loss {found['first_loss']:.4f} to {found['last_loss']:.4f}"
        line += f"   {found['peak_gib']:.2f} GiB"
        if "mfu" in found:
            line += f"   {found['mfu']:.1%} of the peak"
        if "trl" in sides:
            line += f"   {found['tokens_per_s'] / sides['trl']['tokens_per_s']:.2f} times TRL"
        print(line)


def main() -> None:
    """Run what can be run, and say what came of it."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--trl", metavar="PYTHON", help="a Python that has trl")
    options.add_argument("--gpu", action="store_true", help="large models on a GPU")
    options.add_argument("--dry", action="store_true", help="with --gpu: in small, on the CPU")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    given = options.parse_args()
    cases = gpu_cases(dry=given.dry) if given.gpu else CPU_CASES
    if not given.trl:
        print("no --trl PYTHON: TRL's SFTTrainer would be fed the same packs, in turns with ours")
    if any(case.gpu for case in cases) and not has_gpu():
        print("there is no GPU here; with one, this would train, and --dry does so in small:")
        for case in cases:
            print(f"  {case.name}: {case.steps} steps of {case.per_step} rows, bf16{checkpointed(case)}")
        return
    found = {}
    for case in cases:
        found[case.name] = compare(case, given.trl, given.rounds)
        report(case, found[case.name])
    if given.dry:
        print("it works; at this size the figures say nothing")
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


def has_gpu() -> bool:
    """Whether torch sees one."""
    import torch

    return torch.cuda.is_available()


def checkpointed(case: Case) -> str:
    """In words."""
    return ", gradient checkpointing" if case.checkpointing else ""


if __name__ == "__main__":
    main()
