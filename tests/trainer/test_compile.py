"""Layers under torch.compile compute what they compute without, and are not compiled for each row."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from streamsyn.trainer.model.activations import recompute
from streamsyn.trainer.model.attention import implementation
from streamsyn.trainer.model.head import LossHead, target_losses
from streamsyn.trainer.model.loss import make_batch
from streamsyn.trainer.model.placed import compile_layers
from tests.trainer import tiny
from tests.trainer.by_hand import section

CPU = torch.device("cpu")
ROWS = [
    ((30, 8), (12, 3)),
    ((50, 20),),
    ((9, 1), (25, 6), (40, 2)),
    ((18, 9), (11, 4)),
    ((70, 5), (20, 2), (15, 5), (33, 3)),
]


@pytest.mark.filterwarnings("ignore")  # dynamo looks at .grad of tensors that have none
@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_are_compiled_for_any_row(*, checkpointing: bool) -> None:
    """Two layers share four graphs, parted by attention. The second row makes new ones of any length, and no
    later row does. Losses and gradients are those without compilation (1e-6). No code is generated: that
    takes a compiler minutes.
    """
    torch._dynamo.reset()
    attention = implementation("segments", CPU, half=False)
    plain, tuned = tiny.model(attention), tiny.model(attention)
    counter = CompileCounterWithBackend("aot_eager")
    for one in (plain, tuned):
        recompute(one, section(gradient_checkpointing=checkpointing))
        LossHead(one)
    compile_layers(tuned, counter)
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
