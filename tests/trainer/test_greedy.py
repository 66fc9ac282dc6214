"""Greedy answers during training equal those of transformers' `generate`, and leave the model unchanged."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM

from streamsyn.config.command_sections import TrainSection
from streamsyn.trainer.commands import Prompt, Ranks
from streamsyn.trainer.evaluation.exam import _answer, answer_all, answering
from streamsyn.trainer.metrics.mfu import model_flops
from streamsyn.trainer.model.attention import SEGMENTS
from streamsyn.trainer.model.placed import Placed
from tests.trainer import tiny
from tests.trainer.by_hand import fresh, placed_model, section

TOKENS = 24
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "checkpointing": {"gradient_checkpointing": True},
    "adapters": {"lora": {"rank": 4}},
    "adapters, checkpointing": {"lora": {"rank": 4}, "gradient_checkpointing": True},
    "bf16": {"precision": "bf16"},
}


def placed_in(folder: Path, settings: TrainSection) -> Placed:
    """The tiny model as in training, with adapters that are not zero."""
    tiny.write_model(folder)
    with fresh():
        placed = placed_model(folder, settings)
    torch.manual_seed(1)
    for name, one in placed.plain.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(one, std=0.5)
    return placed


def prompts(stop: frozenset[int] = frozenset()) -> list[Prompt]:
    """A few of different lengths."""
    return [Prompt(tiny.example(length, 1, length).tokens, TOKENS, stop) for length in (1, 7, 40, 130)]


def plainly(placed: Placed, folder: Path, prompt: Prompt) -> list[int]:
    """The answer of `generate` with the same weights and transformers' own attention."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    if hasattr(placed.plain, "merge_and_unload"):
        merged = copy.deepcopy(placed.plain).merge_and_unload()
        model.load_state_dict(merged.state_dict())
    model.eval()
    ids = torch.from_numpy(prompt.tokens).long()[None]
    with torch.autocast("cpu", torch.bfloat16, enabled=placed.accelerator.mixed_precision == "bf16"):
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=TOKENS,
            eos_token_id=None,
        )
    found: list[int] = out[0, ids.shape[1] :].tolist()
    return found


@pytest.mark.parametrize("settings", WAYS.values(), ids=WAYS)
def test_answers_are_those_of_generate(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Token by token, with any training settings; cut at the first stop token."""
    placed = placed_in(tmp_path, section(**settings))
    expected = [plainly(placed, tmp_path, prompt) for prompt in prompts()]
    found = answer_all(placed, prompts(), Ranks(0, 1), bool)

    assert expected == [list(one) for one in found]
    stop = expected[0][5]
    ended = answer_all(placed, prompts(frozenset({stop})), Ranks(0, 1), bool)
    cut = [one[: one.index(stop)] if stop in one else one for one in expected]
    assert cut == [list(one) for one in ended]
    assert len(cut[0]) < TOKENS


@pytest.mark.parametrize("settings", WAYS.values(), ids=WAYS)
def test_the_model_is_as_before(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Attention, mode, weights, gradients and random states are unchanged."""
    placed = placed_in(tmp_path, section(**settings))
    before = {name: one.detach().clone() for name, one in placed.plain.named_parameters()}
    chance = torch.get_rng_state()
    answer_all(placed, prompts(), Ranks(0, 1), bool)

    assert placed.plain.config._attn_implementation == SEGMENTS
    assert all(module.training for module in placed.model.modules())
    assert torch.equal(chance, torch.get_rng_state())
    assert all(one.grad is None for one in placed.plain.parameters())
    assert all(torch.equal(before[name], one) for name, one in placed.plain.named_parameters())


def test_the_model_is_as_before_after_an_error(tmp_path: Path) -> None:
    """An error is raised; attention and mode are restored."""
    placed = placed_in(tmp_path, section())

    def fail() -> None:
        with answering(placed):
            assert placed.plain.config._attn_implementation == "sdpa"
            assert not placed.plain.training
            raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        fail()

    assert placed.plain.config._attn_implementation == SEGMENTS
    assert placed.plain.training


def test_a_stop_takes_effect_between_questions(tmp_path: Path) -> None:
    """Finished answers are kept, and no further question is begun."""
    placed = placed_in(tmp_path, section())
    wishes = iter([False, False, True])
    found = answer_all(placed, prompts(), Ranks(0, 1), lambda: next(wishes))

    assert 2 == len(found)


def test_ranks_that_need_each_other_go_on_together(tmp_path: Path) -> None:
    """With sharded weights, each rank makes as many passes as the rank with the longest answer, with or
    without a question; its own answer is unchanged."""
    placed = placed_in(tmp_path, section())
    passes: list[bool] = []
    placed.plain.register_forward_pre_hook(
        lambda _module, _given, more: passes.append(more["use_cache"]), with_kwargs=True
    )
    placed.plain.eval()
    prompt = prompts()[2]
    placed.plain.config._attn_implementation = "sdpa"

    def until(number: int) -> Any:
        return lambda _wants: len(passes) < number

    with torch.no_grad():
        alone = _answer(placed.plain, prompt, torch.device("cpu"), bool)
        assert [True] * TOKENS == passes
        passes.clear()
        assert alone == _answer(placed.plain, prompt, torch.device("cpu"), until(TOKENS + 3))
        assert [True] * TOKENS + [False] * 3 == passes
        passes.clear()
        assert () == _answer(placed.plain, None, torch.device("cpu"), until(5))
        assert [False] * 5 == passes


def test_a_model_without_a_cache_of_keys_answers(tmp_path: Path) -> None:
    """A purely recurrent model chooses the tokens that it chooses without a cache."""
    tiny.write_model(tmp_path)
    shape: Any = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "eos_token_id": 256}
    torch.manual_seed(0)
    MambaForCausalLM(MambaConfig(vocab_size=tiny.VOCABULARY, **shape)).save_pretrained(tmp_path)
    with fresh():
        placed = placed_model(tmp_path, section(seq_len=512))
    prompt = prompts()[2]
    with answering(placed), torch.no_grad():
        found = _answer(placed.plain, prompt, torch.device("cpu"), bool)
        read = [*prompt.tokens.tolist(), *found]
        chosen = placed.plain(input_ids=torch.tensor([read])).logits[0].argmax(-1)

    assert not placed.packs
    assert chosen[-TOKENS - 1 : -1].tolist() == list(found)
    assert model_flops(placed.plain) is None


def test_a_rank_without_a_question_answers_nothing(tmp_path: Path) -> None:
    """It only takes part for the other ranks."""
    placed = placed_in(tmp_path, section())

    assert [(), TOKENS] == [
        one if not one else len(one) for one in answer_all(placed, [None, prompts()[0]], Ranks(0, 1), bool)
    ]
