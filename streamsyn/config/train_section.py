"""The sections of online instruction tuning."""

from typing import Annotated, Literal

from pydantic import Field

from streamsyn.config.fields import (
    Count,
    CountOrZero,
    NotNegative,
    Positive,
    Seconds,
    Section,
    Unit,
    operational,
)

Beta = Annotated[Unit, Field(lt=1)]
AttentionKind = Literal["auto", "segments", "varlen", "flash_attention_2", "flash_attention_3"]
FiniteSeconds = Annotated[Seconds, Field(allow_inf_nan=False)]


class MixSection(Section):
    """General chat data that is mixed in: one source."""

    path: str
    """A file, directory or glob of chat rows (`messages`): JSON lines, Parquet or a saved data set. Of an
    export, or a data set with splits, `train` alone."""
    weight: Positive = 1.0
    """Examples from here for each one from the stream."""


class LoraSection(Section):
    """Low-rank adapters in place of full fine-tuning (needs peft)."""

    rank: Count = 16
    """Rank of each adapter."""
    alpha: Count = 32
    """Scale of each adapter, over its rank."""
    targets: tuple[str, ...] = ()
    """Names of the modules that get one; by default all linear ones but the head."""


NeedleKind = Literal["single", "multi_key", "multi_value", "multi_query"]


class NeedlesSection(Section):
    """Synthetic retrieval: values to be found in long texts, as in RULER (arXiv 2404.06654)."""

    lengths: Annotated[tuple[Annotated[Count, Field(ge=256)], ...], Field(min_length=1)] = (
        2048,
        8192,
        32_768,
    )
    """Tokens of the prompts."""
    kinds: Annotated[tuple[NeedleKind, ...], Field(min_length=1)] = (
        "single",
        "multi_key",
        "multi_value",
        "multi_query",
    )
    """One key, one among others like it, one with several values, several keys at once."""
    samples: Count = 8
    """Prompts of each kind and length, at depths that are spread evenly."""


class LongBenchSection(Section):
    """Questions with long contexts in LongBench's format, answered greedily; F1 or ROUGE-L."""

    path: str
    """A file, directory or glob of JSON lines: input, context, answers, dataset."""
    samples: Count | None = None
    """So many of each dataset at most: the first ones."""
    prompt_tokens: Count | None = None
    """Longer prompts are cut in their middle; by default to `train.seq_len` with the answer."""


class PublishSection(Section):
    """Weights for the servers that write the contexts."""

    every_steps: Count = 100
    """Steps between publications; the last weights are always published."""
    keep: Count = 2
    """So many of the newest stay in OUT/weights."""
    servers: tuple[str, ...] = ()
    """URLs of SGLang servers that are made to load them; they have to see OUT under the same path. Without
    any, the weights are only written."""
    pause: Literal["retract", "in_place", "abort"] = "retract"
    """What becomes of requests in flight while a server loads: computed again from their tokens, held as
    they are, or given up (and asked again by whoever asked)."""
    timeout_s: FiniteSeconds = 600.0
    """A server that has not loaded them after this is passed over, until the next time."""


class TrainSection(Section):
    """Online instruction tuning: `streamsyn train`.

    What is operational does not shape the weights, or only in how far the training goes. (Where weights are
    published, the samples change; but those shape no weights here.)
    """

    model: Annotated[str | None, operational] = None
    """Model to tune: a Hugging Face directory (`--model`)."""
    out: Annotated[str | None, operational] = None
    """Where the training keeps its files (`--out`); with `run --train`, by default `training` in the run
    directory."""
    launcher: Annotated[tuple[str, ...], operational] = ()
    """What `run --train` starts the trainer by, for several ranks: ["accelerate", "launch", "--config_file",
    "deploy/accelerate/fsdp2.yaml"]. By default one process."""
    chat_template: str | None = None
    """A file with a chat template (Jinja), for a model that has none, or in place of its own."""
    seq_len: Annotated[Count, Field(ge=16)] = 32_768
    """Tokens of a row at most: samples are packed into rows, whole."""
    rows_per_step: Count = 8
    """Rows in an optimizer step, over all ranks together; a multiple of their number."""
    epochs: Count = 1
    """Passes over the stream; the later ones read it again from disk."""
    max_steps: Annotated[Count | None, operational] = None
    """Stop after so many optimizer steps."""
    overlong: Literal["drop", "truncate"] = "drop"
    """A sample longer than `train.seq_len`: left out, or cut in the middle of its prompt."""
    mix: tuple[MixSection, ...] = ()
    """Other chat data, mixed in."""
    shuffle_size: Count = 512
    """Samples that the next one is drawn from."""
    shuffle_min: Count = 64
    """No sample is drawn before so many are there, unless the stream has ended or paused."""
    max_wait_s: Annotated[FiniteSeconds, operational] = 60.0
    """When the stream has brought nothing for so long, what is there is trained on, however little."""
    stall_s: Annotated[FiniteSeconds, operational] = 1800.0
    """When the stream has brought nothing for so long, and has not ended, it is stalled."""
    on_stall: Annotated[Literal["wait", "stop"], operational] = "wait"
    """Then: say so and wait on, or save and exit with 75."""
    loss: Literal["sequence", "token", "longwriter"] = "sequence"
    """What weighs the same: each sample (LongAlign, eq. 4), each token, or as in LongWriter's code."""
    learning_rate: Positive = 2e-5
    """Highest learning rate."""
    weight_decay: NotNegative = 0.0
    """Of AdamW."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Of AdamW."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm."""
    warmup_steps: CountOrZero = 10
    """Steps over which the learning rate rises."""
    total_steps: Count | None = None
    """With a number, the rate falls along a cosine over so many steps. Without, it is held until the stream
    has ended, and then falls over `train.decay_steps`."""
    decay_steps: CountOrZero = 20
    """Steps at the end of an open stream over which the learning rate falls to nothing, as far as there are
    so many left when the end is known."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of forward and backward; the weights are fp32. `auto` is bf16 on a GPU, fp32 elsewhere."""
    attention: Annotated[AttentionKind, operational] = "auto"
    """How samples in a row are kept apart: a call for each of them, or one that knows their bounds."""
    gradient_checkpointing: Annotated[bool, operational] = False
    """Compute activations again in the backward pass, in place of keeping them."""
    lora: LoraSection | None = None
    """Train adapters only."""
    save_every_steps: Annotated[Count, operational] = 100
    """Steps between checkpoints."""
    keep_checkpoints: Annotated[Count, operational] = 2
    """So many of the newest are kept."""
    holdout: Annotated[Unit, Field(lt=1)] = 0.0
    """Share of the seeds, drawn by their ids, that is kept for evaluation and never trained on."""
    holdout_samples: Annotated[Count, operational] = 64
    """So many of them are evaluated at most."""
    eval_every_steps: Annotated[Count, operational] = 50
    """Steps between evaluations; there is one before the first step and one at the end."""
    control: Annotated[str | None, operational] = None
    """Short chat data (file, directory or glob) whose loss is measured too, never trained on: what a model
    forgets while it learns to read long contexts."""
    control_samples: Annotated[Count, operational] = 64
    """So many of them at most: the first ones."""
    needles: Annotated[NeedlesSection | None, operational] = None
    """Test retrieval from synthetic long texts."""
    longbench: Annotated[LongBenchSection | None, operational] = None
    """Test on questions in LongBench's format."""
    tests_every_steps: Annotated[Count | None, operational] = None
    """Steps between the tests above, which generate and so take their time; by default, with each
    evaluation."""
    trackers: Annotated[tuple[Literal["tensorboard", "trackio", "wandb"], ...], operational] = ()
    """Where figures go besides OUT/metrics.jsonl, by accelerate."""
    publish: Annotated[PublishSection | None, operational] = None
    """Hand the weights to the servers that write the contexts. Off by default: the paper's generator is a
    fixed teacher."""
