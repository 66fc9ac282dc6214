"""The rows of `streamsyn train --plan`, against the memory that two FSDP2 ranks take."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.train_memory import compare, settings
from tests.trainer import tiny
from tests.trainer.rank_runs import Ranks

pytestmark = pytest.mark.timeout(120)

HEADS: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 160, "num_key_value_heads": 4}
"""As wide as kernels want them."""


@pytest.mark.parametrize(
    ("tied", "keys"),
    [
        pytest.param(True, {"gradient_checkpointing": False}, id="nothing saved", marks=pytest.mark.torture),
        pytest.param(False, {"gradient_checkpointing": True}, id="recomputed", marks=pytest.mark.torture),
        pytest.param(
            False,
            {"gradient_checkpointing": True, "optimizer_offload": True, "activation_offload": True},
            id="offloaded",
        ),
    ],
)
def test_two_ranks_take_what_the_plan_says(
    ranks: Ranks, tmp_path: Path, tied: bool, keys: dict[str, Any]
) -> None:
    """Weights, gradients and moments exactly; what is gathered within a tenth, activations and the total
    within a twentieth.
    """
    model: Any = tiny.model(vocab_size=500, tie_word_embeddings=tied, **HEADS)
    model.save_pretrained(tmp_path)
    found = compare(ranks, tmp_path, settings(seq_len=512, **keys))

    bounds = {"gathered": 0.1, "activations": 0.05, "total": 0.05}
    for row, (expected, measured) in found.items():
        assert pytest.approx(measured, rel=bounds.get(row, 0.0)) == expected, row
