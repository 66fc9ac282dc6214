"""Models and tokenizers small enough to be made in a test, and examples by hand."""

from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from streamsyn.trainer.examples import Example, Key

torch.set_num_threads(1)

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIALS = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
VOCABULARY = 256 + len(SPECIALS)


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and those of the chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(SPECIALS))
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = TEMPLATE
    return fast


def model(attention: str = "sdpa", **given: Any) -> LlamaForCausalLM:
    """A random Llama, the same each time: two layers, four heads that share two keys."""
    torch.manual_seed(given.pop("seed", 0))
    config = LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
            "eos_token_id": 256,
            "bos_token_id": None,
            "pad_token_id": 256,
            **given,
        }
    )
    config._attn_implementation = attention
    made: LlamaForCausalLM = LlamaForCausalLM(config)
    made.train()
    return made


def write_model(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A directory with such a model and its tokenizer."""
    made: Any = model()
    made.to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def saved(checkpoint: Path, part: str = "model") -> dict[str, torch.Tensor]:
    """The weights in a checkpoint, or what the optimizer keeps: `part` is "optimizer"."""
    whole = checkpoint.parent.parent / f"{checkpoint.name}.pt"
    dcp_to_torch_save(checkpoint / "state", whole)
    found: dict[str, torch.Tensor] = torch.load(whole)[part]
    return found


def model_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights in a directory with a model."""
    return load_file(folder / "model.safetensors")


def example(length: int, targets: int, seed: int = 0) -> Example:
    """Random tokens, the last `targets` of which carry loss."""
    rng = numpy.random.default_rng([length, targets, seed])
    tokens = rng.integers(0, VOCABULARY, length).astype(numpy.int32)
    return Example(Key("test", 0, seed), f"sample-{seed}", "qa", tokens, length - targets)


def gradients(of: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The gradient of each weight."""
    return {name: one.grad.clone() for name, one in of.named_parameters() if one.grad is not None}


def furthest(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """The largest difference between tensors of the same names."""
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)
