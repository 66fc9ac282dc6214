"""What must not change a training: activation checkpointing, the number of rows, precision.

Elsewhere: 1 against 2 ranks and 1, 2 and 4 rows in passes (`test_loop`), packed against separate samples
(`test_packing_isolation`), attentions against each other (`test_attention`), losses against references
(`test_loss`).
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from streamsyn.errors import ConfigError
from streamsyn.trainer.loop import Progress
from streamsyn.trainer.model.placed import start_accelerator
from tests.trainer import tiny
from tests.trainer.by_hand import plans, section, train, weights

STEPS = 4
LORA = {"rank": 4, "alpha": 8}


def trained(out: Path, rows: int = 4, **given: Any) -> tuple[dict[str, torch.Tensor], Progress]:
    """The weights of a tiny model after some steps, and the progress."""
    out.mkdir()
    torch.manual_seed(0)  # adapters begin at random
    settings = section(rows_per_step=rows, seq_len=64 * 4 // rows, **given)
    loop, _, placed = train(out, settings, plans(STEPS, rows))
    return weights(placed), loop.progress


@pytest.mark.parametrize("lora", [None, LORA])
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, lora: Any) -> None:
    """With gradient checkpointing the weights are the same (1e-6), of the model or of its adapters."""
    kept, _ = trained(tmp_path / "kept", lora=lora)
    again, _ = trained(tmp_path / "again", lora=lora, gradient_checkpointing=True)

    assert tiny.furthest(kept, again) < 1e-6
    assert tiny.furthest(kept, weights_at_first(tmp_path, lora=lora)) > 1e-4


def weights_at_first(folder: Path, **given: Any) -> dict[str, torch.Tensor]:
    """Before any step: after one with a rate of next to nothing."""
    out = folder / "first"
    return trained(out, learning_rate=1e-12, **given)[0]


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_step_does_not_depend_on_rows(tmp_path: Path, lora: Any) -> None:
    """Four rows in four passes or all in one: the same loss (1e-5) and norm of the gradient (1e-3),
    without clipping. (Adam does not depend on the size of gradients; clipping does.)"""
    _, one = trained(tmp_path / "1", 1, lora=lora, max_grad_norm=1000.0)
    _, four = trained(tmp_path / "4", 4, lora=lora, max_grad_norm=1000.0)

    assert pytest.approx(one.loss, rel=1e-5) == four.loss
    assert pytest.approx(one.grad_norm, rel=1e-3) == four.grad_norm


def test_bf16_is_close(tmp_path: Path) -> None:
    """In bf16 the loss is that of float32 (1 %), weights stay in float32, and no weight is further off than
    the steps could have taken it."""
    single, exact = trained(tmp_path / "fp32")
    half, rounded = trained(tmp_path / "bf16", precision="bf16")

    assert pytest.approx(exact.loss, rel=0.01) == rounded.loss
    assert exact.loss != rounded.loss
    assert {torch.float32} == {one.dtype for one in half.values()}
    assert tiny.furthest(single, half) < 2 * STEPS * 0.001


@pytest.mark.parametrize("kind", ["CP", "SP", "TP"])
def test_a_row_is_never_split(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A launcher that asks to split rows is refused: the samples' boundaries would be lost."""
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{kind}_SIZE", "2")
    with pytest.raises(ConfigError, match=kind.lower()):
        start_accelerator(section())


def test_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher that asks for DeepSpeed gets one line that recommends FSDP2 with offload."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match=r"DeepSpeed.*FSDP2.*fsdp_offload_params: true") as refused:
        start_accelerator(section())

    assert "\n" not in str(refused.value)
