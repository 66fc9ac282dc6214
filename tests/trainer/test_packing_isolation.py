"""The check at the start: a model isolates the samples of a row, trains one sample a row, or is refused."""

import re
from typing import Any

import pytest
import torch
import transformers

from streamsyn.config.command_sections import TrainSection
from streamsyn.errors import ConfigError
from streamsyn.trainer.model.attention import SEGMENTS, implementation
from streamsyn.trainer.model.isolation import choose_packing
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
    assert packs(ours)
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


def packs(model: Any, *, half: bool = False, **given: Any) -> bool:
    """Whether a model is trained with several samples in a row; each has up to 512 tokens by default."""
    section = TrainSection.model_validate({"seq_len": 512, **given})
    return choose_packing(model, model, CPU, section, half=half)


def segments(kind: str) -> Any:
    """A model with our attention."""
    return made(kind, implementation("segments", CPU, half=False))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("gemma2", r"the model's attention has softcap.*flash_attention_2"),
        ("mpt", r"calling it raises AttributeError: "),
    ],
)
def test_what_only_eager_attention_can_do_is_refused_for_long_rows(kind: str, says: str) -> None:
    """Its scores would not fit into memory. In one line, whether the model raises an error or we do."""
    with pytest.raises(ConfigError, match=rf"^the model cannot be trained: {says}.*[^\n]$"):
        packs(segments(kind), seq_len=8193)


def test_none_is_the_users_choice(capsys: pytest.CaptureFixture[str]) -> None:
    """`train.packing = "none"` holds for a model that could be packed, and is logged."""
    assert not packs(segments("qwen3"), packing="none")
    assert re.search(
        r"train\.packing .*segments.*one sample a row: train\.packing is", capsys.readouterr().out
    )


@pytest.mark.parametrize(("seq_len", "packed"), [(40, True), (64, True), (65, False)])
def test_rotary_frequencies_count_from_the_length_on_that_changes_them(
    seq_len: int, capsys: pytest.CaptureFixture[str], *, packed: bool
) -> None:
    """Rows up to the original length of longrope are packed; one token more, and they are not."""
    longrope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 4.0, 8.0, 8.0]}
    config = transformers.Phi3Config(
        **PHI,
        rope_parameters={**longrope, "rope_theta": 1e4, "original_max_position_embeddings": 64},
        original_max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.config._attn_implementation = implementation("segments", CPU, half=False)

    assert packed is packs(model, seq_len=seq_len)
    assert packed is ("rotary frequencies" not in capsys.readouterr().out)


def test_windows_count_if_a_row_can_exceed_them() -> None:
    """A window that no row reaches needs no mask; the model and its configuration keep theirs."""
    given: Any = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "use_sliding_window": True,
        "sliding_window": 100,
    }
    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(**SMALL, **given, layer_types=["sliding_attention"] * 2)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for seq_len, packed in ((100, True), (101, False)):
        model.config._attn_implementation = implementation("segments", CPU, half=False)
        assert packed is packs(model, seq_len=seq_len)
        assert 100 == model.config.sliding_window == model.model.layers[0].self_attn.sliding_window


def test_a_loss_of_packed_rows_needs_packed_rows() -> None:
    """LongWriter's loss would weigh samples otherwise than asked for."""
    with pytest.raises(ConfigError, match=r"train\.loss: longwriter .* use sequence or token"):
        packs(segments("qwen3"), packing="none", loss="longwriter")


class Careless(torch.nn.Module):
    """A model that ignores one of its arguments, or raises an unusual error when it is given."""

    def __init__(self, lost: str) -> None:
        super().__init__()
        self.inner = made("gpt2", "sdpa")
        self.config = self.inner.config
        self.lost = lost

    def forward(self, **given: Any) -> Any:
        """As the inner model, without what is lost."""
        if self.lost in given and self.lost == "segments":
            raise ZeroDivisionError("by it\nand more lines")
        known = ("input_ids", "position_ids", "use_cache", "logits_to_keep")
        given = {key: given[key] for key in known if key in given and key != self.lost}
        if self.lost == "bounds":  # transformers finds them by positions, but not with a cache
            given["use_cache"] = True
        self.config._attn_implementation = "sdpa"
        return self.inner(**given)


@pytest.mark.parametrize("half", [False, True])
def test_what_a_model_ignores_is_found_out(capsys: pytest.CaptureFixture[str], *, half: bool) -> None:
    """Positions or boundaries that a model silently drops; also with bf16's tolerance."""
    assert packs(Careless("nothing"), half=half)
    assert not packs(Careless("bounds"), half=half)
    assert "depend on the sample before it" in capsys.readouterr().out
    assert not packs(Careless("position_ids"), half=half)
    for lost, says in (
        ("logits_to_keep", "logits of chosen positions"),
        ("segments", "raises ZeroDivisionError: by it"),
    ):
        with pytest.raises(ConfigError, match=rf"the model cannot be trained: .*{says}[^\n]*$"):
            packs(Careless(lost), half=half)


def test_broken_weights_have_an_error_of_their_own() -> None:
    """The error for NaN weights differs from that for a model that mixes samples."""
    model = segments("gpt2")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = torch.nan
    with pytest.raises(ConfigError, match="logits are not finite"):
        packs(model)


def test_a_model_is_left_as_it_was() -> None:
    """The check leaves no gradient and no evaluation mode, and does not advance random states."""
    model = segments("gpt2")
    model.train()
    before = torch.get_rng_state()
    assert packs(model)

    assert model.training
    assert model.config._attn_implementation == SEGMENTS
    assert gradients(model) == {}
    assert torch.equal(before, torch.get_rng_state())
