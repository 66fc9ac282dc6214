"""Model architectures of transformers: each isolates the samples of a row, or is refused at the start."""

from typing import Any

import pytest
import torch
import transformers

from streamsyn.errors import ConfigError
from streamsyn.trainer.model.attention import check_packing_isolation, implementation
from streamsyn.trainer.model.loss import make_batch
from tests.trainer.tiny import VOCABULARY, example, furthest, gradients

CPU = torch.device("cpu")
WINDOW = 16
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": 256,
}
SLIDING: dict[str, Any] = {**SMALL, "sliding_window": WINDOW, "query_pre_attn_scalar": 8}
NEOX = {key: value for key, value in SMALL.items() if key not in ("num_key_value_heads", "head_dim")}
PHI = {key: value for key, value in SMALL.items() if key != "head_dim"}


def made(kind: str, attention: str) -> Any:
    """A random model of an architecture with an attention implementation, the same each time."""
    configs: dict[str, Any] = {
        "qwen3": lambda: transformers.Qwen3Config(**SMALL),
        "mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=WINDOW),
        "gemma3": lambda: transformers.Gemma3TextConfig(
            **SLIDING, layer_types=["sliding_attention", "full_attention"]
        ),
        "neox": lambda: transformers.GPTNeoXConfig(**NEOX),
        "phi": lambda: transformers.PhiConfig(**PHI),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=512, **ENDS, **NO_DROPOUT
        ),
        "gemma2": lambda: transformers.Gemma2Config(**SLIDING),
        "bloom": lambda: transformers.BloomConfig(
            vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, **ENDS
        ),
        "mpt": lambda: transformers.MptConfig(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4),
    }
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(configs[kind](), attn_implementation=attention)


ENDS: dict[str, Any] = {"bos_token_id": 256, "eos_token_id": 256}
NO_DROPOUT: dict[str, Any] = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}


@pytest.mark.parametrize("kind", ["qwen3", "mistral", "gemma3", "neox", "phi", "gpt2"])
def test_architectures_isolate_samples(kind: str) -> None:
    """Logits of a packed row are those of transformers' own attention for each sample alone (1e-5), as are
    gradients (1e-4 of the largest). Some samples are longer than the sliding window."""
    ours, plain = made(kind, implementation("segments", CPU, half=False)), made(kind, "eager")
    row = (example(9, 3, 1), example(50, 12, 2), example(WINDOW, 5, 3), example(WINDOW + 1, 4, 4))
    check_packing_isolation(ours, CPU, half=False)
    logits = ours(**make_batch(row, [1.0] * 4, CPU).forward_arguments()).logits[0]
    logits.square().sum().backward()
    alone = []
    for one in row:
        ids = torch.from_numpy(one.tokens).long()[None]
        alone.append(plain(input_ids=ids, use_cache=False).logits[0, one.loss_from - 1 : -1])
    torch.cat(alone).square().sum().backward()

    assert torch.allclose(torch.cat(alone), logits, atol=1e-5)
    largest = max(float(one.abs().max()) for one in gradients(plain).values())
    assert furthest(gradients(plain), gradients(ours)) < 1e-4 * largest


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("gemma2", r"the model's attention has softcap.*flash_attention_2"),
        ("bloom", r"does not isolate the samples of a row: .* differ by"),
        ("mpt", r"cannot be called with packed samples: AttributeError"),
    ],
)
def test_a_model_that_cannot_be_packed_is_refused(kind: str, says: str) -> None:
    """In one line, whether it raises an error itself, computes something else or cannot be called."""
    with pytest.raises(ConfigError, match=says):
        check_packing_isolation(made(kind, implementation("segments", CPU, half=False)), CPU, half=False)


class Careless(torch.nn.Module):
    """A model that ignores one of its arguments."""

    def __init__(self, lost: str) -> None:
        super().__init__()
        self.inner = made("gpt2", "sdpa")
        self.lost = lost

    def forward(self, **given: Any) -> Any:
        """As the inner model, without what is lost."""
        known = ("input_ids", "position_ids", "use_cache", "logits_to_keep")
        given = {key: given[key] for key in known if key != self.lost}
        if self.lost == "bounds":  # transformers finds them by positions, but not with a cache
            given["use_cache"] = True
        return self.inner(**given)


@pytest.mark.parametrize(
    ("lost", "says"),
    [
        ("logits_to_keep", "logits of chosen positions"),
        ("position_ids", "does not isolate the samples"),
        ("bounds", "does not isolate the samples"),
    ],
)
@pytest.mark.parametrize("half", [False, True])
def test_what_a_model_ignores_is_found_out(lost: str, says: str, *, half: bool) -> None:
    """Positions, boundaries or chosen logits that a model silently drops; also with bf16's tolerance."""
    with pytest.raises(ConfigError, match=says):
        check_packing_isolation(Careless(lost), CPU, half=half)
    check_packing_isolation(Careless("nothing"), CPU, half=half)


def test_broken_weights_have_an_error_of_their_own() -> None:
    """The error for NaN weights differs from that for a model that mixes samples."""
    model = made("gpt2", implementation("segments", CPU, half=False))
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = torch.nan
    with pytest.raises(ConfigError, match="logits are not finite"):
        check_packing_isolation(model, CPU, half=False)


def test_a_model_is_left_as_it_was() -> None:
    """The check leaves no gradient and no evaluation mode, and does not advance random states."""
    model = made("gpt2", implementation("segments", CPU, half=False))
    model.train()
    before = torch.get_rng_state()
    check_packing_isolation(model, CPU, half=False)

    assert model.training
    assert gradients(model) == {}
    assert torch.equal(before, torch.get_rng_state())
