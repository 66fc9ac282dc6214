"""Attention for packed rows on a GPU: each kernel against eager attention with a mask, and its speed.

    python -m benchmarks.train_kernels [--dry]

First one packed row through a Llama of two layers: the logits and the gradients of each kernel in bf16,
compared with eager attention in float32; beside it the same for eager attention in bf16, which is the
rounding that cannot be avoided. Then the time of a forward and backward pass, per kernel and length. The exit
code is 1 if a kernel is further off than three times eager attention in bf16. With --dry on the CPU, with
short rows: `segments` alone.
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.train_sides import best_flash
from streamsyn.trainer.examples import Example, Key
from streamsyn.trainer.model.attention import implementation
from streamsyn.trainer.model.loss import Batch, make_batch, token_losses

LENGTHS = (700, 1300, 37, 512, 900, 599)
EAGER_UP_TO = 8192
"""Eager attention holds a product for each pair of tokens and head: 2 GiB a head group at 16k."""
ALLOWED = 3.0
"""A kernel may be this many times further from float32 than eager attention in bf16."""


def batch_of(lengths: tuple[int, ...], device: torch.device) -> Batch:
    """Return a packed row of samples whose tokens are all targets but the first."""
    rng = numpy.random.default_rng(0)
    row = tuple(
        Example(Key("k", 0, n), "", "", rng.integers(0, 1000, size).astype(numpy.int32), size // 2)
        for n, size in enumerate(lengths)
    )
    return make_batch(row, [1.0] * len(row), device)


def model_with(attention: str, device: torch.device, layers: int = 2) -> Any:
    """Return the same Llama each time, with heads of 64 and groups of seven to a key head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=896,
        intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=1000,
        max_position_embeddings=131_072,
        initializer_range=0.05,
    )
    config._attn_implementation = attention  # noqa: SLF001 - the constructor's argument is not typed
    model: Any = LlamaForCausalLM(config)
    return model.to(device)


def block_mask(batch: Batch) -> torch.Tensor:
    """Return the mask of causal attention within samples, as eager attention adds it to its products."""
    owner = torch.bucketize(
        torch.arange(batch.bounds[-1], device=batch.input_ids.device),
        torch.tensor(batch.bounds[1:-1], device=batch.input_ids.device),
        right=True,
    )
    seen = (owner[:, None] == owner[None]).tril()
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]


def passes(attention: str, batch: Batch, *, half: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of the targets and all gradients of one pass, flat and in float32."""
    device = batch.input_ids.device
    model = model_with(attention, device)
    arguments = batch.forward_arguments()
    if attention == "eager":
        arguments = {name: arguments[name] for name in ("input_ids", "position_ids", "logits_to_keep")}
        arguments["attention_mask"] = block_mask(batch).to(torch.bfloat16 if half else torch.float32)
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        logits = (
            model(**arguments, use_cache=False).logits if attention == "eager" else model(**arguments).logits
        )
    token_losses(logits, batch.labels).mean().backward()
    gradients = torch.cat([one.grad.flatten() for one in model.parameters()])
    return logits.detach().float().flatten(), gradients.float()


def compare(kernels: dict[str, str], lengths: tuple[int, ...], device: torch.device) -> list[str]:
    """Print how far each kernel is from eager attention in float32, and return those too far off."""
    batch = batch_of(lengths, device)
    exact = passes("eager", batch, half=False)

    def distances(attention: str) -> list[float]:
        found = passes(attention, batch, half=True)
        return [float((one - other).norm() / other.norm()) for one, other in zip(found, exact, strict=True)]

    rounding = distances("eager")
    print(f"{'eager':18} logits off by {rounding[0]:.2e}   gradients off by {rounding[1]:.2e}   (bf16)")
    wrong = []
    for shown, attention in kernels.items():
        found = distances(attention)
        print(f"{shown:18} logits off by {found[0]:.2e}   gradients off by {found[1]:.2e}")
        if any(not one <= ALLOWED * other for one, other in zip(found, rounding, strict=True)):
            wrong.append(shown)
    return wrong


def seconds_of(step: Callable[[], None], device: torch.device) -> float:
    """Return the seconds of the fastest of three calls, after one that is not counted."""
    found = []
    for _ in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return min(found[1:])


def measure(kernels: dict[str, str], lengths: list[int], device: torch.device) -> None:
    """Print milliseconds of a forward and backward pass of one layer, for rows of three samples."""
    for length in lengths:
        batch = batch_of((length // 2, length // 3, length - length // 2 - length // 3), device)
        for shown, attention in kernels.items():
            model = model_with(attention, device, layers=1)

            def step(model: Any = model, batch: Batch = batch) -> None:
                with torch.autocast(device.type, torch.bfloat16):
                    logits = model(**batch.forward_arguments()).logits
                token_losses(logits, batch.labels).mean().backward()
                model.zero_grad(set_to_none=True)

            print(f"{length:7} tokens  {shown:18} {1000 * seconds_of(step, device):9.2f} ms", flush=True)


def main() -> None:
    """Compare and measure; exit code 1 if a kernel is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="short rows on the CPU")
    args = parser.parse_args()
    if not args.dry and not torch.cuda.is_available():
        sys.exit("torch finds no GPU; try --dry")
    device = torch.device("cpu" if args.dry else "cuda")
    names = ["segments"] if args.dry else ["segments", "varlen"]
    if not args.dry and (flash := best_flash()) != "sdpa":
        names.append(flash)
    kernels = {name: implementation(name, device, half=True) for name in names}
    lengths = (70, 130, 5, 51) if args.dry else LENGTHS
    wrong = compare(kernels, lengths, device)
    measure(kernels, [256] if args.dry else [8192, 32_768, 65_536], device)
    if wrong:
        sys.exit(f"further from float32 than eager attention in bf16: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
