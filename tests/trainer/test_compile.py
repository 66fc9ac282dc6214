"""Layers under torch.compile compute what they compute without, and are not compiled for each row."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AttentionInterface

from streamsyn.trainer.model import placed
from streamsyn.trainer.model.activations import recompute
from streamsyn.trainer.model.attention import implementation
from streamsyn.trainer.model.head import LossHead, target_losses
from streamsyn.trainer.model.loss import make_batch
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
