"""Samples in a row do not attend to each other, with any implementation."""

from inspect import signature
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn

from streamsyn.errors import ConfigError
from streamsyn.trainer.model import attention
from streamsyn.trainer.model.attention import SEGMENTS, implementation, segments
from streamsyn.trainer.model.loss import Batch, make_batch
from tests.trainer.tiny import example, furthest, gradients, model

CPU = torch.device("cpu")
ROW = (example(9, 3, 1), example(1 + 1, 1, 2), example(40, 12, 3), example(17, 16, 4))


def batch_of(row: Any) -> Batch:
    return make_batch(row, [1.0] * len(row), CPU)


def segments_model(**given: Any) -> Any:
    return model(implementation("segments", CPU, half=False), **given)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_row_equals_its_samples_one_by_one(*, checkpointing: bool) -> None:
    """Logits of a row's targets and gradients are those of its samples without packing."""
    packed, apart = segments_model(), model("eager")
    if checkpointing:
        packed.gradient_checkpointing_enable({"use_reentrant": False})
    logits = packed(**batch_of(ROW).forward_arguments()).logits[0]
    logits.square().sum().backward()
    alone = []
    for one in ROW:
        ids = torch.from_numpy(one.tokens).long()[None]
        alone.append(apart(input_ids=ids, use_cache=False).logits[0, one.loss_from - 1 : -1])
    torch.cat(alone).square().sum().backward()

    assert torch.allclose(torch.cat(alone), logits, atol=1e-6)
    assert furthest(gradients(apart), gradients(packed)) < 1e-4 * max(
        float(one.abs().max()) for one in gradients(apart).values()
    )


def test_segments_equal_a_block_mask() -> None:
    """One call per sample gives the results of transformers' attention with a block-diagonal mask."""
    ours, masked = segments_model(), model("sdpa")
    arguments = batch_of(ROW).forward_arguments()

    logits = ours(**arguments).logits
    expected = masked(
        **{key: arguments[key] for key in ("input_ids", "position_ids", "use_cache", "logits_to_keep")}
    ).logits

    assert torch.allclose(expected, logits, atol=1e-6)
    logits.logsumexp(-1).sum().backward()
    expected.logsumexp(-1).sum().backward()
    assert furthest(gradients(masked), gradients(ours)) < 1e-5


def test_a_different_sample_before_it_changes_nothing() -> None:
    """What comes before a sample in its row does not change its logits in a single bit."""
    tuned = segments_model()
    last = example(30, 8, 9)
    one = tuned(**batch_of((example(20, 4, 1), last)).forward_arguments()).logits[0, -8:]
    other = tuned(**batch_of((example(20, 4, 2), last)).forward_arguments()).logits[0, -8:]

    assert torch.equal(one, other)


def test_a_cache_would_leak_and_is_not_made() -> None:
    """With a cache, transformers lets samples attend to each other; our arguments forbid one."""
    masked = model("sdpa")
    rows = [(example(20, 4, seed), example(30, 8, 9)) for seed in (1, 2)]
    arguments = [
        {
            key: one.forward_arguments()[key]
            for key in ("input_ids", "position_ids", "logits_to_keep", "use_cache")
        }
        for one in map(batch_of, rows)
    ]

    assert all(one["use_cache"] is False for one in arguments)
    safe = [masked(**one).logits[0, -8:] for one in arguments]
    leaking = [masked(**{**one, "use_cache": True}).logits[0, -8:] for one in arguments]
    assert torch.allclose(safe[0], safe[1], atol=1e-6)
    assert not torch.allclose(leaking[0], leaking[1], atol=1e-3), "transformers leaks no more"


def test_attention_without_boundaries_is_refused() -> None:
    """A model that does not pass the boundaries to its attention is refused."""
    tuned = segments_model()
    arguments = batch_of(ROW).forward_arguments()
    del arguments["segments"]

    with pytest.raises(ConfigError, match="boundaries"):
        tuned(**arguments)


def varlen_as_documented(*given: Any, **named: Any) -> torch.Tensor:
    """`varlen_attn`, which only GPUs have, written out from torch's documentation, with its signature."""
    call = signature(varlen_attn).bind(*given, **named)
    call.apply_defaults()
    asked = call.arguments
    query, key, value = (asked[name].double() for name in ("query", "key", "value"))
    assert {torch.bfloat16} == {asked[name].dtype for name in ("query", "key", "value")}
    assert {torch.int32} == {asked[name].dtype for name in ("cu_seq_q", "cu_seq_k")}
    bounds = asked["cu_seq_q"].tolist()
    assert bounds == asked["cu_seq_k"].tolist()
    assert asked["max_q"] == asked["max_k"] == max(end - begin for begin, end in pairwise(bounds))
    shared = query.shape[1] // key.shape[1]
    assert shared == 1 or asked["enable_gqa"]
    key, value = (one.repeat_interleave(shared, 1) for one in (key, value))
    left, right = asked["window_size"]
    assert right == 0
    out = torch.empty_like(query)
    for begin, end in pairwise(bounds):
        back = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        seen = (back >= 0) & ((back <= left) | torch.tensor(left < 0))
        scores = torch.einsum("qhd,khd->hqk", query[begin:end], key[begin:end]) * (
            asked["scale"] or query.shape[-1] ** -0.5
        )
        shares = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out[begin:end] = torch.einsum("hqk,khd->qhd", shares, value[begin:end])
    return out.to(torch.bfloat16)


@pytest.mark.parametrize("window", [None, 7])
def test_varlen_is_asked_for_what_segments_compute(
    monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    """With autocast's dtypes: rotary embeddings leave queries and keys, but not values, in float32."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_as_documented)
    rng = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 68, 16, generator=rng) for heads in (4, 2, 2))
    more = batch_of(ROW).forward_arguments() | {"sliding_window": window}

    expected, _ = segments(torch.nn.Identity(), query, key, value, None, **more)
    found, _ = attention.varlen(torch.nn.Identity(), query, key, value.bfloat16(), None, **more)

    assert float((found - expected).norm() / expected.norm()) < 0.01


def test_what_needs_a_gpu_says_so() -> None:
    """Unsupported attention is refused with the key's name; `auto` always works."""
    for name in ("varlen", "flash_attention_2", "flash_attention_3"):
        with pytest.raises(ConfigError, match=r"train\.attention"):
            implementation(name, CPU, half=True)
    assert SEGMENTS == implementation("auto", CPU, half=True)
