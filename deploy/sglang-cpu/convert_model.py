"""Turns the packaged GGUF into a model directory that SGLang serves: `convert_model.py FOLDER MODEL_DIR`."""

import sys
from pathlib import Path

import sglang_cpu_server  # noqa: F401  (transformers imports torchvision, which needs its declarations)
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

# Facts about the file, not about the model that the folder happens to hold.
OF_THE_FILE = ("quantization_config", "_model_name_or_path", "transformers_version", "dtype", "architectures")


def load_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    """The tokenizer with its chat template, which the server's chat route cannot do without."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if not tokenizer.chat_template:
        raise SystemExit(f"{gguf}: holds no chat template")
    return tokenizer


def load_model(gguf: Path, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """The weights, dequantised, in a model of our own: transformers 5 refuses to save what it read."""
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = {key: value for key, value in read.config.to_dict().items() if key not in OF_THE_FILE}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return model.to(torch.bfloat16)


def main(source: Path, target: Path) -> None:
    """Write `target` from the one GGUF below `source`."""
    [gguf] = source.rglob("*.gguf")
    tokenizer = load_tokenizer(gguf)
    model = load_model(gguf, tokenizer)
    model.save_pretrained(target)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
