"""Tiny models of many architectures from transformers' own classes, and what becomes of each in training.

`python -m tests.trainer.architectures` prints the table of the trainer's README: for each architecture,
whether it is trained packed, one sample a row, or refused, and how far its logits then are from those of its
own eager attention for each sample alone. The samples are longer than every window, chunk and original rotary
length of the models, and these longer than the samples of the check itself.
"""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from streamsyn.config.command_sections import TrainSection
from streamsyn.errors import ConfigError
from streamsyn.trainer.model.attention import implementation
from streamsyn.trainer.model.isolation import choose_packing
from streamsyn.trainer.model.loss import make_batch
from tests.trainer.tiny import VOCABULARY, example

CPU = torch.device("cpu")
SEQ_LEN, WINDOW, ORIGINAL = 512, 96, 128
# First a short one: "dynamic" rotary frequencies are those of the longest sample since the last short one.
ROW = (example(9, 3, 2), example(300, 280, 1), example(40, 12, 4), example(150, 149, 3))

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": SEQ_LEN,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": 256,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
ALL_HEADS: dict[str, Any] = {"num_key_value_heads": 4}
SLIDING: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
LONGROPE: dict[str, Any] = {
    "original_max_position_embeddings": ORIGINAL,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0, 3.0, 2.0, 8.0],
        "original_max_position_embeddings": ORIGINAL,
    },
}
MLA: dict[str, Any] = {
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4,
    "moe_intermediate_size": 16, "first_k_dense_replace": 1, "head_dim": None,
}  # fmt: skip
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 32,
}
DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": ORIGINAL,
            }
        },
    ),
    "llama, dynamic NTK": (
        "llama",
        {
            "max_position_embeddings": ORIGINAL,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        },
    ),
    "mistral, window": ("mistral", {"sliding_window": WINDOW}),
    "ministral3": ("ministral3", {}),
    "mixtral": ("mixtral", EXPERTS),
    "qwen2, window": ("qwen2", {**SLIDING, "use_sliding_window": True}),
    "qwen2_moe, window": (
        "qwen2_moe",
        {**EXPERTS, **SLIDING, "use_sliding_window": True, "shared_expert_intermediate_size": 16},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", EXPERTS),
    "qwen3_next": ("qwen3_next", {**EXPERTS, **DELTA, "shared_expert_intermediate_size": 16}),
    "qwen3_5": ("qwen3_5_text", DELTA),
    "qwen3_5_moe": ("qwen3_5_moe_text", {**EXPERTS, **DELTA, "shared_expert_intermediate_size": 16}),
    "phi": ("phi", {"head_dim": None}),
    "phi3, longrope": ("phi3", {**LONGROPE, "head_dim": None}),
    "phi3, window": ("phi3", {"sliding_window": WINDOW, "head_dim": None}),
    "phimoe, longrope": (
        "phimoe",
        {
            **EXPERTS,
            "head_dim": None,
            **LONGROPE,
            "rope_parameters": {**LONGROPE["rope_parameters"], "short_mscale": 1.0, "long_mscale": 1.0},
        },
    ),
    "phimoe, window": ("phimoe", {**EXPERTS, "head_dim": None, "sliding_window": WINDOW}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {**SLIDING, "query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3_text", {**SLIDING, "query_pre_attn_scalar": 8}),
    "gemma3n": (
        "gemma3n_text",
        {
            **SLIDING,
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "activation_sparsity_pattern": [0.0, 0.0],
            "laurel_rank": 4,
        },
    ),
    "gemma4": (
        "gemma4_text",
        {
            **SLIDING,
            "global_head_dim": 8,
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
        },
    ),
    "gpt2": ("gpt2", {}),
    "gpt_neo, window": ("gpt_neo", {"window_size": WINDOW, "attention_types": [[["global", "local"], 1]]}),
    "gptj": ("gptj", {"rotary_dim": 4}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_oss": ("gpt_oss", {**EXPERTS, **SLIDING}),
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "bloom": ("bloom", {}),
    "mpt": ("mpt", {"max_seq_len": SEQ_LEN}),
    "falcon": ("falcon", {"new_decoder_architecture": False, "multi_query": True, "head_dim": None}),
    "falcon, alibi": ("falcon", {"alibi": True, "head_dim": None}),
    "falcon_h1": ("falcon_h1", {**MAMBA, "mamba_d_ssm": 64}),
    "falcon_mamba": ("falcon_mamba", {"state_size": 8}),
    "mamba": ("mamba", {"state_size": 8}),
    "mamba2": ("mamba2", {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 32}),
    "jamba": ("jamba", {**EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8}),
    "bamba": ("bamba", {**MAMBA, "attn_layer_indices": [1]}),
    "nemotron": ("nemotron", {}),
    "nemotron_h": (
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "attention"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 32,
        },
    ),
    "granite": ("granite", {}),
    "granitemoe": ("granitemoe", EXPERTS),
    "granitemoehybrid": (
        "granitemoehybrid",
        {**EXPERTS, **MAMBA, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 32},
    ),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"], "block_ff_dim": 64}),
    "lfm2_moe": ("lfm2_moe", {**EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "zamba2": (
        "zamba2",
        {
            "num_hidden_layers": 2,
            "layers_block_type": ["mamba", "hybrid"],
            "mamba_d_state": 8,
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "mamba_ngroups": 1,
            "chunk_size": 32,
            "num_mem_blocks": 1,
            "attention_head_dim": 16,
        },
    ),
    "recurrent_gemma": (
        "recurrent_gemma",
        {"lru_width": 32, "attention_window_size": WINDOW, "block_types": ["recurrent", "attention"]},
    ),
    "llama4, chunks": (
        "llama4_text",
        {
            **EXPERTS,
            "attention_chunk_size": WINDOW,
            "intermediate_size_mlp": 64,
            "floor_scale": 64,
            "no_rope_layers": [1, 0],
        },
    ),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", SLIDING),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", SLIDING),
    "olmoe": ("olmoe", EXPERTS),
    "starcoder2, window": ("starcoder2", {"sliding_window": WINDOW}),
    "stablelm": ("stablelm", {}),
    "deepseek_v2": ("deepseek_v2", MLA),
    "deepseek_v3": ("deepseek_v3", MLA),
    "deepseek_v32": ("deepseek_v32", {**MLA, "index_topk": WINDOW, "index_n_heads": 2, "index_head_dim": 16}),
    "glm4": ("glm4", {}),
    "glm4_moe": (
        "glm4_moe",
        {**EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "exaone4": ("exaone4", {**SLIDING, "sliding_window_pattern": 2}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "minimax": (
        "minimax",
        {**EXPERTS, "layer_types": ["linear_attention", "full_attention"], "block_size": 32},
    ),
    "ernie4_5": ("ernie4_5", {}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {}),
    "seed_oss": ("seed_oss", {}),
    "apertus": ("apertus", {}),
    "modernbert-decoder": (
        "modernbert-decoder",
        {
            "bos_token_id": 256,
            "cls_token_id": 256,
            "sep_token_id": 256,
            "local_attention": WINDOW,
            "layer_types": SLIDING["layer_types"],
        },
    ),
    "bert": ("bert", {}),
    "rwkv": ("rwkv", {"context_length": SEQ_LEN}),
    "xlstm": ("xlstm", {"num_heads": 2, "num_blocks": 2}),
}


def build(kind: str) -> Any:
    """A random model of an architecture with its own eager attention, the same each time."""
    name, more = KINDS[kind]
    given = {key: value for key, value in {**SMALL, **more}.items() if (key, value) != ("head_dim", None)}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **given), attn_implementation="eager")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What becomes of an architecture.

    Attributes:
        how: `packed`, `one sample a row` or `refused`.
        detail: The attention that it is trained with, or why it is refused.
        differ: The largest relative difference of a sample's logits; 0 if it is refused.
    """

    how: str
    detail: str
    differ: float = 0.0


@torch.no_grad()
def outcome(kind: str, *, half: bool) -> Outcome:
    """Prepare a model as for training, and compare the logits of its rows with those of each sample alone."""
    ours, plain = build(kind), build(kind)
    ours.config._attn_implementation = implementation("segments", CPU, half=half)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        try:
            packs = choose_packing(ours, ours, CPU, TrainSection(seq_len=SEQ_LEN), half=half)
        except ConfigError as error:
            return Outcome("refused", str(error))
        ours.eval()
        plain.eval()
        found, alone = [], []
        for row in (ROW,) if packs else [(one,) for one in ROW]:
            batch = make_batch(row, [1.0] * len(row), CPU)
            found.append(ours(**batch.forward_arguments()).logits[0].float())
        for one in ROW:
            logits = plain(input_ids=torch.from_numpy(one.tokens).long()[None], use_cache=False).logits
            alone.append(logits[0, one.loss_from - 1 : -1].float())
    parts = torch.cat(found).split([len(one) for one in alone])
    differ = max(float((a - b).norm() / b.norm()) for a, b in zip(parts, alone, strict=True))
    attention = ours.config._attn_implementation.removeprefix("streamsyn_")
    return Outcome("packed" if packs else "one sample a row", attention, differ)


def main() -> None:
    """Print the table, of all architectures or of those named."""
    sys.stdout.write(
        "| architecture | trained | attention, or why not | float32 | bf16 |\n|---|---|---|---|---|\n"
    )
    for kind in sys.argv[1:] or KINDS:
        single, half = (outcome(kind, half=half) for half in (False, True))
        same = (single.how, single.detail) == (half.how, half.detail)
        cells = [kind, single.how, single.detail, f"{single.differ:.0e}", f"{half.differ:.0e}"]
        sys.stdout.write(f"| {' | '.join(cells)} |{'' if same else f' in bf16 {half.how}, {half.detail}'}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
