"""Reading, adapting and placing a model, and what is refused.

Elsewhere: other models that cannot be tuned (`test_command_mistakes`), packed samples
(`test_packing_isolation`).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, MambaConfig, MambaForCausalLM

from streamsyn.errors import ConfigError
from streamsyn.trainer.model.loss import make_batch
from streamsyn.trainer.model.placed import start_accelerator
from streamsyn.trainer.model.pretrained import model_dtype, read_model, read_tokenizer
from tests.trainer import tiny
from tests.trainer.by_hand import fresh, placed_model, section
from tests.trainer.conftest import Start
from tests.trainer.test_command import write_run

pytestmark = pytest.mark.timeout(300)

SAMPLING = {"eos_token_id": 256, "temperature": 0.6, "top_p": 0.9}
"""Found in many models: transformers reads it, but does not save it without `do_sample`."""
LORA = {"rank": 4}


def read(folder: Path, seed: int = 0, **given: Any) -> Any:
    """Read a model, without placing it."""
    settings = section(**given)
    with fresh():
        accelerator = start_accelerator(settings)
    model_dtype(str(folder))
    read_tokenizer(str(folder))
    return read_model(str(folder), settings, accelerator, seed=seed)


def changed(path: Path, **values: Any) -> None:
    """Change values in a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("lora", [None, pytest.param("{rank = 4}", marks=pytest.mark.torture)])
def test_values_for_sampling_alone_are_saved_with_the_switch(
    start: Start, tmp_path: Path, lora: str | None
) -> None:
    """A model with a temperature but no `do_sample` is trained, saved and published with it; it is logged."""
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(SAMPLING))
    given = {"max_steps": 2, "publish": "{every_steps = 1}"} | ({} if lora is None else {"lora": lora})
    out = tmp_path / "out"
    training = start(write_run(tmp_path / "run", range(20)), out, **given)

    assert 0 == training.wait(), training.stderr()
    assert "train.generation_config" in training.stderr()
    assert "train.not_published" not in training.stderr()
    for folder in ("model", "weights/step_1", "weights/step_2"):
        saved = GenerationConfig.from_pretrained(out / folder)
        assert (True, 0.6, 0.9) == (saved.do_sample, saved.temperature, saved.top_p)


@pytest.mark.parametrize(("key", "value"), [("temperature", 0.0), ("length_penalty", 0.5)])
def test_a_generation_config_that_cannot_be_saved_is_refused(tmp_path: Path, key: str, value: float) -> None:
    """At the start, with its name, and not at the first checkpoint."""
    changed(tiny.write_model(tmp_path) / "generation_config.json", **{key: value})
    with pytest.raises(ConfigError, match=f"generation_config.json cannot be saved again.*{key}"):
        read(tmp_path)


def no_tokens(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def odd_heads(folder: Path) -> None:
    changed(folder / "config.json", num_attention_heads=3)


def wrong_kind(folder: Path) -> None:
    changed(folder / "config.json", hidden_size="many")


def unknown_rope(folder: Path) -> None:
    changed(folder / "config.json", rope_parameters={"rope_type": "nonsense"})


def quantised(folder: Path) -> None:
    changed(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (no_tokens, "its tokenizer cannot be read: KeyError: 'added_tokens'"),
        (odd_heads, "not a multiple of the number of attention heads"),
        (wrong_kind, "hidden_size"),
        (unknown_rope, "cannot be read: KeyError: 'nonsense'"),
        (quantised, "cannot be read: .*optimum"),
    ],
)
def test_a_file_of_any_content_is_one_line(tmp_path: Path, spoil: Callable[[Path], None], named: str) -> None:
    """Whatever error transformers raises."""
    spoil(tiny.write_model(tmp_path))
    with pytest.raises(ConfigError, match=named) as refused:
        read(tmp_path)
    assert str(refused.value).startswith(f"--model {tmp_path}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("target", "named"),
    [
        ("nope", "no module 'nope'"),
        ("proj", "no module 'proj'"),
        ("input_layernorm", "input_layernorm is not a linear module"),
        ("embed_tokens", "model.embed_tokens is not a linear module"),
        ("lm_head", "lm_head shares its weight with model.embed_tokens"),
    ],
)
def test_adapters_that_would_not_be_merged_are_refused(tmp_path: Path, target: str, named: str) -> None:
    """Also beside valid targets: they would be trained, and missing from OUT/model."""
    tiny.write_model(tmp_path)
    with pytest.raises(ConfigError, match=rf"train\.lora\.targets: .*{named}"):
        read(tmp_path, lora={**LORA, "targets": ["q_proj", target]})


def test_an_untied_head_can_have_an_adapter(tmp_path: Path) -> None:
    """The target may be the whole module name or its end."""
    tiny.write_model(tmp_path)
    tiny.model(tie_word_embeddings=False).save_pretrained(tmp_path)
    made = read(tmp_path, lora={**LORA, "targets": ["lm_head", "layers.1.mlp.up_proj"]})

    found = {name.partition(".lora_")[0] for name, one in made.named_parameters() if one.requires_grad}
    assert {"base_model.model.lm_head", "base_model.model.model.layers.1.mlp.up_proj"} == found


def test_a_model_that_peft_refuses_is_named(tmp_path: Path) -> None:
    """The error names the setting."""
    tiny.write_model(tmp_path)
    MambaForCausalLM(
        MambaConfig(vocab_size=tiny.VOCABULARY, hidden_size=32, num_hidden_layers=1)
    ).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"train\.lora\.targets"):
        read(tmp_path, lora=LORA)


def test_adapters_begin_from_the_seed(start: Start, tmp_path: Path) -> None:
    """Processes with the same `run.seed` begin with the same adapters, with a different seed they do not."""
    given = {"lora": "{rank = 4}", "max_steps": 1, "learning_rate": 1e-12}
    training = start(write_run(tmp_path / "run", range(8)), tmp_path / "out", "--set", "run.seed=7", **given)
    assert 0 == training.wait(), training.stderr()
    left = tiny.saved(tmp_path / "out/checkpoints/step-0000001")
    same, other = (
        {name: one.detach() for name, one in made.named_parameters() if one.requires_grad}
        for made in (read(tmp_path / "base", seed, lora=LORA) for seed in (7, 8))
    )

    assert tiny.furthest(left, same) < 1e-9
    assert tiny.furthest(left, other) > 0.1


@pytest.mark.parametrize("lora", [None, LORA])
def test_logits_stay_in_half(tmp_path: Path, lora: Any) -> None:
    """In bf16 there is no float32 copy of the logits, and their values are those of accelerate's copy."""
    settings = section(precision="bf16", lora=lora)
    with fresh():
        placed = placed_model(tiny.write_model(tmp_path), settings)
    batch = make_batch((tiny.example(20, 9),), [1.0], placed.accelerator.device)
    logits = placed.model(**batch.forward_arguments()).logits

    assert torch.bfloat16 == logits.dtype
    torch.manual_seed(0)
    with fresh():
        accelerator = start_accelerator(settings)
        wrapped = accelerator.prepare(read_model(str(tmp_path), settings, accelerator, seed=0))
    expected = wrapped(**batch.forward_arguments()).logits
    assert torch.float32 == expected.dtype
    assert torch.equal(expected, logits.float())
