"""Layers under torch.compile compute what they compute without, and are not compiled for each row."""

from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AttentionInterface

from streamsyn.trainer.model import placed
from streamsyn.trainer.model.activations import recompute
from streamsyn.trainer.model.attention import VARLEN, implementation
from streamsyn.trainer.model.head import LossHead, target_losses
from streamsyn.trainer.model.loss import Batch, make_batch
from streamsyn.trainer.model.placed import compile_layers, layers_of
from streamsyn.trainer.model.sequence_parallel import SequenceGroup
from tests.trainer import tiny
from tests.trainer.by_hand import fresh, placed_model, section

CPU = torch.device("cpu")
ROWS = [
    ((30, 8), (12, 3)),
    ((50, 20),),
    ((9, 1), (25, 6), (40, 2)),
    ((18, 9), (11, 4)),
    ((70, 5), (20, 2), (15, 5), (33, 3)),
]


@pytest.mark.filterwarnings("ignore")  # dynamo looks at .grad of tensors that have none
@pytest.mark.parametrize(
    ("checkpointing", "shared"),
    [
        pytest.param(False, False, marks=pytest.mark.torture),
        pytest.param(True, False, marks=pytest.mark.torture),
        (True, True),
    ],
)
def test_layers_are_compiled_for_any_row(
    monkeypatch: pytest.MonkeyPatch, *, checkpointing: bool, shared: bool
) -> None:
    """Two layers share four graphs, parted by attention, also by that of ranks that share rows. The second
    row makes new ones of any length, and no later row does. Losses and gradients are those without
    compilation (1e-6). No code is generated: that takes a compiler minutes.
    """
    torch._dynamo.reset()
    attention = implementation("segments", CPU, half=False)
    if shared:
        monkeypatch.setitem(AttentionInterface._global_mapping, attention, AttentionInterface()[attention])
        SequenceGroup(2, 0).wrap_attention(attention)
    plain, tuned = tiny.model(attention), tiny.model(attention)
    counter = CompileCounterWithBackend("aot_eager")
    for one in (plain, tuned):
        recompute(one, section(gradient_checkpointing=checkpointing))
        LossHead(one)
    compile_layers(layers_of(tuned), counter)
    graphs = []
    for number, sizes in enumerate(ROWS):
        row = tuple(tiny.example(*size, seed=number) for size in sizes)
        batch = make_batch(row, [1.0] * len(row), CPU)
        losses = []
        for one in (plain, tuned):
            one.zero_grad()
            losses.append(target_losses(one, batch))
            losses[-1].sum().backward()
        assert torch.allclose(losses[0], losses[1], atol=1e-6)
        assert tiny.furthest(tiny.gradients(plain), tiny.gradients(tuned)) < 1e-6
        graphs.append(counter.frame_count)

    assert [4, 8, 8, 8, 8] == graphs


@pytest.mark.filterwarnings("ignore")  # as above
@pytest.mark.parametrize(
    ("checkpointing", "single_first"),
    [
        (False, True),
        pytest.param(True, False, marks=pytest.mark.torture),
        ("selective", False),
    ],
)
def test_a_layer_is_one_graph_where_a_kernel_takes_the_boundaries(
    checkpointing: Any, *, single_first: bool
) -> None:
    """As on GPUs: all layers share a graph for the first row and one for rows of any length. Rows of a single
    sample need one of their own if they come first, as torch then takes the lengths of row and sample for
    the same. Nothing is computed: meta tensors have no data.
    """
    torch._dynamo.reset()
    implementation("segments", CPU, half=False)
    with torch.device("meta"):
        model: Any = tiny.model(VARLEN, num_key_value_heads=4)
    model.to(torch.bfloat16)
    recompute(model, section(gradient_checkpointing=checkpointing))
    LossHead(model)
    counter = CompileCounterWithBackend("eager")
    compile_layers(layers_of(model), counter)
    graphs = []
    for sizes in [((20, 8),), *ROWS[1:2], *ROWS] if single_first else ROWS:
        row = tuple(tiny.example(*size) for size in sizes)
        target_losses(model, on_meta(make_batch(row, [1.0] * len(row), CPU))).sum().backward()
        graphs.append(counter.frame_count)

    assert ([1, 2, 3, 3, 3, 3, 3] if single_first else [1, 2, 2, 2, 2]) == graphs


def on_meta(batch: Batch) -> Batch:
    """A batch without data."""
    parts = {one.name: getattr(batch, one.name) for one in fields(batch)}
    moved: dict[str, Any] = {
        name: one.to("meta") for name, one in parts.items() if isinstance(one, torch.Tensor)
    }
    return replace(batch, **moved)


@pytest.mark.filterwarnings("ignore")  # as above
def test_checks_of_the_model_compile_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch compiles a function 8 times at most: the rows that a model is checked with would use that up."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(placed, "compile_layers", partial(compile_layers, backend=counter))
    tiny.write_model(tmp_path)
    with fresh():
        model = placed_model(tmp_path, section(compile=True)).model
    assert 0 == counter.frame_count

    batch = make_batch((tiny.example(30, 8),), [1.0], CPU)
    target_losses(model, batch)
    assert 4 == counter.frame_count
