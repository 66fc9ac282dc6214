"""The sections of online instruction tuning."""

from typing import Annotated, Literal

from pydantic import Field

from streamsyn.sections.base import Count, Seconds, Section, Share, Unit


class MixSection(Section):
    """General chat data that is mixed in: one source."""

    path: str
    """A file, directory or glob of chat rows (`messages`): JSON lines, Parquet or a saved data set."""
    weight: Share = 1.0
    """Examples from here for each one from the stream."""


class LoraSection(Section):
    """Low-rank adapters in place of full fine-tuning (needs peft)."""

    rank: Count = 16
    """Rank of each adapter."""
    alpha: Count = 32
    """Scale of each adapter, over its rank."""
    targets: tuple[str, ...] = ()
    """Names of the modules that get one; by default all linear ones but the head."""


class TrainSection(Section):
    """Online instruction tuning: `streamsyn train`."""

    seq_len: Annotated[Count, Field(ge=16)] = 32_768
    """Tokens of a row at most: samples are packed into rows, whole."""
    rows_per_step: Count = 8
    """Rows in an optimizer step, over all ranks together; a multiple of their number."""
    epochs: Count = 1
    """Passes over the stream; the later ones read it again from disk."""
    max_steps: Count | None = None
    """Stop after so many optimizer steps."""
    overlong: Literal["drop", "truncate"] = "drop"
    """A sample longer than `train.seq_len`: left out, or cut in the middle of its prompt."""
    mix: tuple[MixSection, ...] = ()
    """Other chat data, mixed in."""
    shuffle_size: Count = 512
    """Samples that the next one is drawn from."""
    shuffle_min: Count = 64
    """No sample is drawn before so many are there, unless the stream has ended or paused."""
    max_wait_s: Seconds = 60.0
    """When the stream has brought nothing for so long, what is there is trained on, however little."""
    stall_s: Seconds = 1800.0
    """When the stream has brought nothing for so long, and has not ended, it is stalled."""
    on_stall: Literal["wait", "stop"] = "wait"
    """Then: say so and wait on, or save and exit with 75."""
    loss: Literal["sequence", "token", "longwriter"] = "sequence"
    """What weighs the same: each sample (LongAlign, eq. 4), each token, or as in LongWriter's code."""
    learning_rate: Share = 2e-5
    """Highest learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of AdamW."""
    betas: tuple[Unit, Unit] = (0.9, 0.95)
    """Of AdamW."""
    max_grad_norm: Share = 1.0
    """Gradients are clipped to this norm."""
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    """Steps over which the learning rate rises."""
    total_steps: Count | None = None
    """With a number, the rate falls along a cosine over so many steps. Without, it is held until the stream
    has ended, and then falls over `train.decay_steps`."""
    decay_steps: Annotated[int, Field(ge=0)] = 20
    """Steps at the end of an open stream over which the learning rate falls to nothing, as far as there are
    so many left when the end is known."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of forward and backward; the weights are fp32. `auto` is bf16 on a GPU, fp32 elsewhere."""
    attention: Literal["auto", "segments", "varlen", "flash_attention_2", "flash_attention_3"] = "auto"
    """How samples in a row are kept apart: a call for each of them, or one that knows their bounds."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass, in place of keeping them."""
    lora: LoraSection | None = None
    """Train adapters only."""
    save_every_steps: Count = 100
    """Steps between checkpoints."""
    keep_checkpoints: Count = 2
    """So many of the newest are kept."""
    holdout: Annotated[Unit, Field(lt=1)] = 0.0
    """Share of the seeds, drawn by their ids, that is kept for evaluation and never trained on."""
    holdout_samples: Count = 64
    """So many of them are evaluated at most."""
    eval_every_steps: Count = 50
    """Steps between evaluations."""
