"""A sharded model is read in slices: of each weight, a rank reads what it will hold."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from streamsyn.config.command_sections import LoraSection
from streamsyn.errors import ConfigError
from streamsyn.trainer.model.pretrained import with_adapters
from streamsyn.trainer.model.slices import SlicedWeights, can_be_sliced
from tests.trainer import tiny
from tests.trainer.test_packing_isolation import SMALL

RANKS = 4


@contextmanager
def rank_of_several() -> Iterator[None]:
    """This process is rank 0 of a group whose other ranks do not exist."""
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    yield
    dist.destroy_process_group()


def state(model: Any) -> dict[str, torch.Tensor]:
    """All weights and buffers, also those that are not saved."""
    return {name: one.detach() for name, one in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_is_the_same_as_read_whole(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    """All weights and buffers, in float32, and its generation configuration."""
    made: Any = tiny.model(tie_word_embeddings=tied)
    made.generation_config.temperature, made.generation_config.do_sample = 0.3, True
    made.to(dtype).save_pretrained(tmp_path, max_shard_size="60KB")
    assert can_be_sliced(str(tmp_path))
    weights = SlicedWeights(tmp_path)
    model = weights.empty_model("sdpa")
    weights.read_into(model)

    whole: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert tiny.furthest(state(whole), state(model)) == 0
    assert {torch.float32} == {one.dtype for one in model.parameters()}
    assert tied == (model.lm_head.weight is model.model.embed_tokens.weight)
    assert 0.3 == model.generation_config.temperature


@pytest.mark.filterwarnings("ignore:.*_state_dict.*:FutureWarning")
def test_a_rank_reads_what_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four ranks, rank 0 reads a fourth of each weight, into its shards. Adapters are left alone."""
    tiny.write_model(tmp_path)
    counts: list[int] = []
    process: Any = HuggingFaceStorageReader._process_read_request

    def counted(self: Any, file: Any, request: Any, planner: Any) -> None:
        counts.append(prod(request.lengths))
        process(self, file, request, planner)

    monkeypatch.setattr(HuggingFaceStorageReader, "_process_read_request", counted)
    expected = load_file(tmp_path / "model.safetensors")
    weights = SlicedWeights(tmp_path)
    model = with_adapters(weights.empty_model("sdpa"), LoraSection(rank=4, alpha=8))
    with rank_of_several():
        fully_shard(model)
        adapters = {name: one.to_local().clone() for name, one in model.named_parameters() if "lora_" in name}
        weights.read_into(model)
        shards = {name: one.to_local().detach() for name, one in model.named_parameters()}

    assert sum(one.numel() for one in expected.values()) / RANKS == pytest.approx(sum(counts), rel=0.05)
    for name, shard in shards.items():
        whole = expected.get(name.removeprefix("base_model.model.").replace(".base_layer", ""))
        assert torch.equal(shard, adapters[name] if whole is None else whole[: len(shard)])
    assert len(shards) - len(adapters) == len(expected)


@pytest.mark.parametrize("kind", ["converted", "incomplete", "without weights", "with others"])
def test_others_are_read_whole(tmp_path: Path, kind: str) -> None:
    """Models whose tensors transformers joins, and files that lack some: transformers says what is wrong."""
    if kind == "converted":
        few: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        config = transformers.Qwen3MoeConfig(**SMALL, **few)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    else:
        path = tiny.write_model(tmp_path) / "model.safetensors"
        found = load_file(path)
        if kind == "with others":
            save_file(found, tmp_path / "consolidated.safetensors")
        else:
            path.unlink()
        del found["model.norm.weight"]
        if kind == "incomplete":
            save_file(found, path, {"format": "pt"})

    assert not can_be_sliced(str(tmp_path))


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    """It names the model."""
    tiny.write_model(tmp_path)
    weights = SlicedWeights(tmp_path)
    model = weights.empty_model("sdpa")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])

    with pytest.raises(ConfigError) as raised:
        weights.read_into(model)
    assert str(raised.value).startswith(f"--model {tmp_path}: its weights cannot be read: ")
    assert "\n" not in str(raised.value)
