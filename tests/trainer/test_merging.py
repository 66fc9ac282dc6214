"""Adapters of experts, whose weights lie in one tensor, become one with it.

Adapters of linear layers: `test_publish`.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from streamsyn.trainer.evaluation.exam import answering
from streamsyn.trainer.model.placed import whole_layers
from streamsyn.trainer.model.pretrained import merged
from tests.trainer import tiny
from tests.trainer.by_hand import fresh, placed_model, section
from tests.trainer.test_packing_isolation import SMALL

FEW: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
CONFIGS: dict[str, Any] = {
    "qwen3": lambda: transformers.Qwen3MoeConfig(**SMALL, num_experts=4, **FEW),
    "mixtral": lambda: transformers.MixtralConfig(**SMALL, num_local_experts=4),
}


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")  # peft names them itself
@pytest.mark.parametrize("kind", CONFIGS)
def test_adapters_of_experts_are_merged(kind: str, tmp_path: Path) -> None:
    """A model of the merged weights computes what the one with adapters does, which is far from the base."""
    torch.manual_seed(0)
    base: Any = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]())
    base.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    ids = torch.arange(40)[None]
    with fresh():
        placed = placed_model(tmp_path, section(lora={"rank": 4}))
        with torch.no_grad(), answering(placed):
            for name, parameter in placed.plain.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.2)
            weights = {
                name: value
                for layer in whole_layers(placed)
                for name, value in merged(placed, layer)[1].items()
            }
            whole: Any = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]())
            whole.load_state_dict(weights)
            adapted, one, before = (
                model(input_ids=ids, use_cache=False).logits
                for model in (placed.plain, whole.eval(), base.eval())
            )

    assert (one - adapted).norm() / adapted.norm() < 1e-4
    assert (before - adapted).norm() / adapted.norm() > 0.1
