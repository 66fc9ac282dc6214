"""How far `streamsyn train --plan` is from the memory that two FSDP2 ranks take, on CPUs.

    python -m benchmarks.train_memory [--layers 8] [--seq-len 512 1024] [--only CASE]

Two gloo ranks make a step over one row, all of it targets, with a model of the shape of SmolLM2-135M (of 8
layers by default) and random weights, in bf16. torch's profiler records which CPU tensors are allocated and
freed in it; torch's FSDPMemTracker says in one more pass what of that pass are activations, and the rest is
`gathered`. Printed for each row of the plan in MB: predicted, measured, and the ratio of the two. Host memory
is CPU memory here, so `total` includes what is offloaded; it leaves out the estimate for CUDA and NCCL.
With rows shared by ranks, gloo frees buffers at times of its own, so `gathered` varies. With rows so short
that gradients are added up at the peak, more is measured than predicted.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from streamsyn.config.command_sections import TrainSection
from streamsyn.trainer.dry_step import largest_row
from streamsyn.trainer.memory_plan import OTHER_BYTES, Need, memory_plan
from streamsyn.trainer.model.head import target_losses
from streamsyn.trainer.model.loss import make_batch
from streamsyn.trainer.model.optimizer import parked_moments
from streamsyn.trainer.model.placed import Placed, place, start_accelerator, trained_parameters
from streamsyn.trainer.model.pretrained import read_model
from tests.trainer.rank_runs import Ranks, rank_runs, said

RANKS = 2
PATIENCE_S = 600
CPU = torch.device("cpu")
ROWS = ("weights", "gradients", "moments", "gathered", "activations", "total")
CASES: dict[str, dict[str, Any]] = {
    "nothing saved": {"gradient_checkpointing": False},
    "selective": {"gradient_checkpointing": "selective"},
    "recomputed": {"gradient_checkpointing": True},
    "rows shared by 2": {"gradient_checkpointing": True, "sequence_parallel": 2},
    "moments offloaded": {"gradient_checkpointing": True, "optimizer_offload": True},
    "all offloaded": {"gradient_checkpointing": True, "optimizer_offload": True, "activation_offload": True},
}


def predicted(need: Need) -> dict[str, int]:
    """The rows of the plan as two ranks on CPUs have them: without CUDA, and host memory is theirs."""
    moments = 2 * need.gradients if need.keys["optimizer_offload"] else 0
    return {
        "weights": need.weights,
        "gradients": need.gradients,
        "moments": need.moments,
        "gathered": need.gathered,
        "activations": need.activations + need.host - moments,
        "total": need.total - OTHER_BYTES + need.host,
    }


def measured(folder: Path, section: TrainSection) -> dict[str, int]:
    """The bytes of the same rows on this rank. A collective: all ranks call it, after `shard`."""
    accelerator = start_accelerator(section)
    placed = place(read_model(str(folder), section, accelerator, seed=0), section, accelerator, torch.float32)
    parameters = [one for _, one in trained_parameters(placed)]

    def two_steps() -> None:
        for one in parameters:
            one.grad = torch.zeros_like(one)  # those of a pass before
        placed.optimizer.step()  # makes moments, whose end the profiler then sees
        one_step(placed, section)

    weights = local_bytes(parameters)
    total = weights + peak_bytes(two_steps)
    found = {"weights": weights, "gradients": local_bytes(one.grad for one in parameters)}
    with parked_moments(placed.optimizer, section):
        found["moments"] = moment_bytes(placed)
        of_pass = peak_bytes(lambda: one_pass(placed, section))
        with FSDPMemTracker(
            placed.plain, placed.optimizer.optimizer
        ) as tracker:  # its hooks stay: it is last
            one_pass(placed, section)
    by_kind: dict[str, int] = tracker.get_tracker_snapshot("peak")[CPU]
    activations = by_kind["Activation"] + by_kind["Temp"]
    return found | {"gathered": of_pass - activations, "activations": activations, "total": total}


def one_pass(placed: Placed, section: TrainSection) -> None:
    """A forward and backward pass over the largest row."""
    batch = placed.sequence.share(make_batch((largest_row(section.seq_len),), [1.0], CPU))
    placed.accelerator.backward((target_losses(placed.model, batch) * batch.weights).sum())


def one_step(placed: Placed, section: TrainSection) -> None:
    """A pass with all that a step does around it."""
    with parked_moments(placed.optimizer, section):
        one_pass(placed, section)
    placed.accelerator.clip_grad_norm_(placed.model.parameters(), section.max_grad_norm)
    placed.optimizer.step()


def peak_bytes(run: Callable[[], None]) -> int:
    """How far memory of CPU tensors rises above what it was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events: Any = profiler.profiler.kineto_results.events()
    moves = sorted((one.start_ns(), int(one.nbytes())) for one in events if one.name() == "[memory]")
    return max(accumulate((size for _, size in moves), initial=0))


def local_bytes(tensors: Iterable[torch.Tensor | None]) -> int:
    """The bytes of this rank's shards."""
    parts = (one.to_local() if isinstance(one, DTensor) else one for one in tensors if one is not None)
    return sum(one.nbytes for one in parts)


def moment_bytes(placed: Placed) -> int:
    """The bytes of this rank's moments that the optimizer has now."""
    states = placed.optimizer.state.values()
    return local_bytes(state.get(name) for state in states for name in ("exp_avg", "exp_avg_sq"))


def rank() -> None:
    """Measure as one of several ranks: `memory FOLDER SETTINGS`, in the environment of a launcher."""
    signal.alarm(PATIENCE_S)
    folder = Path(sys.argv[2])
    section = TrainSection.model_validate_json(sys.argv[3])
    found = measured(folder, section)
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def settings(**given: Any) -> TrainSection:
    """Keys for a row in bf16."""
    return TrainSection.model_validate({"precision": "bf16", "attention": "segments", **given})


def compare(ranks: Ranks, folder: Path, section: TrainSection) -> dict[str, tuple[int, int]]:
    """For each row of the plan, bytes predicted and measured, of the rank that is further from the plan.

    Args:
        ranks: Starts the two ranks.
        folder: A Hugging Face directory.
        section: The section `train`, with bf16.
    """
    expected = predicted(memory_plan(str(folder), section, RANKS)[0])
    argv = ["memory", str(folder), section.model_dump_json()]
    codes = ranks.ask(argv, RANKS, folder / "out", sharded="fsdp2")
    assert codes == [0] * RANKS, said(folder / "out")
    each = [json.loads((folder / f"rank-{number}.json").read_text()) for number in range(RANKS)]
    return {
        row: (size, max((one[row] for one in each), key=lambda found: abs(found - size)))
        for row, size in expected.items()
    }


def main() -> None:
    """Print the rows of each case and length."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=8, help="layers of the model")
    parser.add_argument("--seq-len", type=int, nargs="+", default=[512, 1024], help="tokens of the row")
    parser.add_argument("--only", metavar="NAME", default="", help="only cases whose name contains this")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, rank_runs() as ranks:
        folder = Path(name)
        config = LlamaConfig(
            vocab_size=49_152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=args.layers,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        print("| case | tokens |", " | ".join(ROWS), "|")
        for length in args.seq_len:
            for case, keys in CASES.items():
                if args.only in case:
                    found = compare(ranks, folder, settings(seq_len=length, **keys))
                    cells = (f"{a / 1e6:.1f}, {b / 1e6:.1f} ({ratio(a, b)})" for a, b in found.values())
                    print(f"| {case} | {length} |", " | ".join(cells), "|", flush=True)


def ratio(expected: int, found: int) -> str:
    """Predicted over measured."""
    return f"{expected / found:.3f}" if found else "equal" if expected == found else "?"


if __name__ == "__main__":
    main()
