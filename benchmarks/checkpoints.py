"""What a checkpoint costs: for how long it holds up two FSDP2 ranks on CPUs, and their peak memory meanwhile.

Beside the earlier way as the baseline: all weights and moments are gathered on rank 0, which writes them.

python -m benchmarks.checkpoints [--layers 12] [--width 512] [--rounds 3]
"""

import argparse
import ctypes
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from streamsyn.io.durable import sync_folder
from streamsyn.trainer.model.placed import Placed, saved_weights, trained_parameters
from streamsyn.trainer.model.sequence_parallel import SequenceGroup
from streamsyn.trainer.saving.checkpoint import Checkpoints
from streamsyn.trainer.saving.sharded import Saver

RANKS = 2
Figures = tuple[float, float, float]
"""Seconds held up, seconds until it is on disk, and peak memory above that before the save in MiB."""


def gathered(placed: Placed, folder: Path) -> Callable[[], None]:
    """The earlier way. Returns once rank 0 has written."""
    tensors: dict[str, torch.Tensor] = {}
    state = dict(saved_weights(placed))
    for name, parameter in trained_parameters(placed):
        state |= {f"{kind}.{name}": value for kind, value in placed.optimizer.state[parameter].items()}
    for name, one in state.items():
        whole = one.full_tensor() if isinstance(one, DTensor) else one
        if dist.get_rank() == 0:
            tensors[name] = whole.detach().contiguous()
    if dist.get_rank() == 0:
        path = folder / "state.safetensors"
        save_file(tensors, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        sync_folder(folder)
    dist.barrier()  # the other ranks wait for the next command
    return lambda: None


def asynchronous(placed: Placed, folder: Path) -> Callable[[], None]:
    """The present way. Returns once what each rank holds is copied."""
    checkpoints = Checkpoints(folder, 1)
    checkpoints.prepare()
    saver = Saver(checkpoints, dist.new_group(backend="gloo"), dist.get_rank(), RANKS)
    future = saver.start(placed, {"step": 1}, None)
    dist.barrier()
    return future.result


WAYS: dict[str, Callable[[Placed, Path], Callable[[], None]]] = {
    "gathered": gathered,
    "asynchronous": asynchronous,
}


def run_rank(rank: int, port: int, way: str, shape: tuple[int, int], folder: Path, results: Any) -> None:
    """One rank: a model after a step, and one checkpoint of it."""
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
    }
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    accelerator = Accelerator()
    layers, width = shape
    config = LlamaConfig(
        vocab_size=600,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model: Any = LlamaForCausalLM(config)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ids = torch.arange(64)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    placed = Placed(
        accelerator, model, model, optimizer, torch.float32, SequenceGroup.join(1, rank), packs=True
    )
    dist.barrier()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # else a part would reuse what gradients have freed
    before = memory_mib(peak=False)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    began = time.monotonic()
    finish = WAYS[way](placed, folder)
    held_up_s = time.monotonic() - began
    finish()
    figures: Figures = held_up_s, time.monotonic() - began, memory_mib(peak=True) - before
    weights = sum(one.numel() for one in model.parameters())
    results.put((rank, weights, figures))
    dist.barrier()
    dist.destroy_process_group()


def memory_mib(*, peak: bool) -> float:
    """Resident memory of this process, now or at its peak."""
    name = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def run_once(way: str, shape: tuple[int, int]) -> tuple[int, dict[int, Figures]]:
    """One checkpoint by two new processes: the number of weights, and the figures of each rank."""
    context = multiprocessing.get_context("fork")  # this one has imported everything
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        results = context.Queue()
        ranks = [
            context.Process(target=run_rank, args=(rank, port, way, shape, Path(folder), results))
            for rank in range(RANKS)
        ]
        for one in ranks:
            one.start()
        found = [results.get() for _ in ranks]
        for one in ranks:
            one.join()
    return found[0][1], {rank: figures for rank, _, figures in found}


def main() -> None:
    """Print the medians of several rounds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=12, help="layers of the model")
    parser.add_argument("--width", type=int, default=512, help="width of the model")
    parser.add_argument("--rounds", type=int, default=3, help="checkpoints of each way, in turn")
    args = parser.parse_args()
    shape = (args.layers, args.width)
    runs: dict[str, list[dict[int, Figures]]] = {way: [] for way in WAYS}
    weights = 0
    for _ in range(args.rounds):
        for way, found in runs.items():
            weights, figures = run_once(way, shape)
            found.append(figures)
    print(f"{weights / 1e6:.1f} M weights in float32 with two moments, {RANKS} FSDP2 ranks on CPUs")
    print(f"{'':14}{'held up s':>12}{'written s':>12}{'rank 0 +MiB':>14}{'rank 1 +MiB':>14}")
    for way, found in runs.items():
        held_up, written, first = (median(one[0][n] for one in found) for n in range(3))
        other = median(one[1][2] for one in found)
        print(f"{way:14}{held_up:12.2f}{written:12.2f}{first:14.0f}{other:14.0f}", flush=True)


if __name__ == "__main__":
    main()
