"""Sections beside the stages: `train` for online tuning, `serve` for the daemon, `cluster` for Ray."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

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
_MAX_BETA_BF16 = 0.99
"""A step changes the second moment by at least 1 - beta of it where a gradient stays away; bf16 rounds to
2^-8."""
FiniteSeconds = Annotated[Seconds, Field(allow_inf_nan=False)]
NeedleKind = Literal["single", "multi_key", "multi_value", "multi_query"]


class MixSection(Section):
    """One source of general chat data that is mixed in."""

    path: str
    """A file, directory or glob of chat rows (`messages`): JSON lines, Parquet or a saved data set. From an
    export, or a data set with splits, only `train` is read."""
    weight: Positive = 1.0
    """Examples from this source for each example of the stream."""


class LoraSection(Section):
    """Low-rank adapters in place of full fine-tuning (needs peft)."""

    rank: Count = 16
    """Rank of each adapter."""
    alpha: Count = 32
    """LoRA alpha: adapters are scaled by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Names of the modules that get an adapter. By default all linear modules except the head."""


class NeedlesSection(Section):
    """Synthetic retrieval: values to find in long texts, as in RULER (arXiv 2404.06654)."""

    lengths: Annotated[tuple[Annotated[Count, Field(ge=256)], ...], Field(min_length=1)] = (
        2048,
        8192,
        32_768,
    )
    """Lengths of the prompts, in tokens."""
    kinds: Annotated[tuple[NeedleKind, ...], Field(min_length=1)] = (
        "single",
        "multi_key",
        "multi_value",
        "multi_query",
    )
    """`single`: one key. `multi_key`: one key among similar ones. `multi_value`: a key with several values.
    `multi_query`: several keys at once."""
    samples: Count = 8
    """Prompts of each kind and length, with the needles at evenly spread depths."""


class LongBenchSection(Section):
    """Questions with long contexts in LongBench's format, answered greedily and scored by F1 or ROUGE-L."""

    path: str
    """A file, directory or glob of JSON lines with the fields input, context, answers, dataset."""
    samples: Count | None = None
    """Maximum number of questions per dataset: the first ones. By default all."""
    prompt_tokens: Count | None = None
    """Maximum tokens of a prompt; longer ones are cut in the middle. By default prompt and answer fit in
    `train.seq_len`."""


class PublishSection(Section):
    """Sending the weights to the servers that write the contexts."""

    every_steps: Count = 100
    """Optimizer steps between publications. The final weights are always published."""
    keep: Count = 2
    """Number of the newest publications that stay in OUT/weights."""
    servers: tuple[str, ...] = ()
    """URLs of SGLang servers that load the weights; they must see OUT under the same path. Without any, the
    weights are only written."""
    pause: Literal["retract", "in_place", "abort"] = "retract"
    """What happens to requests in flight while a server loads: `retract` computes them again from their
    tokens, `in_place` holds them as they are, `abort` ends them for the client to ask again."""
    timeout_s: FiniteSeconds = 600.0
    """Maximum seconds for a server to load the weights. A server that takes longer is skipped until the next
    publication."""


class TrainSection(Section):
    """Online instruction tuning with `streamsyn train`; operational keys do not shape the weights, or only
    how long the training goes on.
    """

    model: Annotated[str | None, operational] = None
    """Model to tune: a Hugging Face directory (`--model`)."""
    out: Annotated[str | None, operational] = None
    """Directory for the training's files (`--out`). With `run --train` the default is `training` in the run
    directory."""
    launcher: Annotated[tuple[str, ...], operational] = ()
    """Command prefix with which `run --train` starts a trainer of several ranks, such as ["accelerate",
    "launch", "--config_file", "deploy/accelerate/fsdp2.yaml"]. By default one process is started."""
    chat_template: str | None = None
    """A file with a chat template (Jinja2), for a model that has none, or in place of one that changes
    messages, as some do that cut thoughts at `</think>`."""
    seq_len: Annotated[Count, Field(ge=16)] = 32_768
    """Maximum tokens of a row. Whole samples are packed into rows."""
    rows_per_step: Count = 8
    """Rows per optimizer step over all ranks; a multiple of the number of ranks, or of groups of
    `train.sequence_parallel` ranks."""
    epochs: Count = 1
    """Passes over the stream. After the first, it is read again from disk."""
    max_steps: Annotated[Count | None, operational] = None
    """Maximum number of optimizer steps. By default the stream's end decides. Without `train.total_steps` the
    learning rate falls over the last `train.decay_steps` of them."""
    overlong: Literal["drop", "truncate"] = "drop"
    """What to do with a sample longer than `train.seq_len`: `drop` it, or `truncate` it: of the samples of a
    run, in a directory or at a daemon, distractors are left out first; then the relevant context is cut
    around what it has in common with answer and instruction. Prompts of other sources are cut between their
    beginning and end. Neither loses a word of the answer, nor of the instruction if the row has the field
    `instruction`."""
    mix: tuple[MixSection, ...] = ()
    """Other chat data to mix in."""
    shuffle_size: Count = 512
    """Size of the shuffle buffer, in samples. The rows of each step are packed from all samples in it: full
    ones, that cost about the same."""
    shuffle_min: Count = 64
    """Minimum number of samples in the shuffle buffer before one is drawn, unless the stream has ended or
    paused."""
    max_wait_s: Annotated[FiniteSeconds, operational] = 60.0
    """Train on the samples in the buffer, however few, when the stream has delivered nothing for this many
    seconds. The learning rate of a step that is not full is lower in proportion to its tokens."""
    stall_s: Annotated[FiniteSeconds, operational] = 1800.0
    """The stream is stalled when it has not ended and has delivered nothing for this many seconds."""
    on_stall: Annotated[Literal["wait", "stop"], operational] = "wait"
    """What to do when the stream is stalled: log it and `wait`, or save, `stop` and exit with code 75."""
    loss: Literal["sequence", "token", "longwriter"] = "sequence"
    """Normalization of the loss: `sequence` weighs each sample equally (LongAlign, eq. 4), `token` each
    token, `longwriter` as LongWriter's code does."""
    token_loss_steps: CountOrZero = 0
    """Optimizer steps at the beginning with the loss of `token`, whatever `train.loss` is after them: long
    answers first teach the form, then each sample counts the same."""
    learning_rate: Positive = 2e-5
    """Peak learning rate."""
    weight_decay: NotNegative = 0.0
    """Weight decay of AdamW."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Betas of AdamW."""
    max_grad_norm: Positive = 1.0
    """Norm that gradients are clipped to."""
    warmup_steps: CountOrZero = 10
    """Steps over which the learning rate rises."""
    total_steps: Count | None = None
    """Steps over which the learning rate falls along a cosine. By default it is held until the stream has
    ended, and then falls over `train.decay_steps`."""
    decay_steps: CountOrZero = 20
    """Steps at the end of an open stream over which the learning rate falls to zero; fewer if fewer are left
    when the end is known."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of forward and backward passes; the weights are fp32. `auto` is bf16 on a GPU, fp32
    elsewhere."""
    attention: Annotated[AttentionKind, operational] = "auto"
    """How the samples of a row are isolated: `segments` calls attention once per sample; `varlen` and
    `flash_attention_*` are kernels that take the boundaries."""
    packing: Annotated[Literal["auto", "none"], operational] = "auto"
    """Whether rows hold several samples. With `none` each sample gets a row of its own, as many as fit into
    `train.rows_per_step` rows of `train.seq_len` tokens; `auto` does so for a model that cannot keep packed
    samples apart, which is checked and logged at the start."""
    sequence_parallel: Annotated[Literal[1, 2, 4, 8], operational] = 1
    """Number of ranks that share each row, so that rows may be that much longer. It has to divide the number
    of ranks. Attention heads that it does not divide are filled up with heads of zeros."""
    gradient_checkpointing: Annotated[bool | Literal["auto", "selective"], operational] = "auto"
    """Recompute activations in the backward pass instead of keeping them, to save memory. `auto` does so from
    `train.seq_len` = 8192 on; `selective` recomputes all but the results of attention."""
    compile: Annotated[bool, operational] = False
    """Compile the layers with torch.compile: faster steps after some minutes of compilation at the start."""
    activation_offload: Annotated[bool, operational] = False
    """Keep the activations that are not recomputed, the inputs of the layers, in host memory until the
    backward pass needs them. Implies `train.gradient_checkpointing`."""
    optimizer_offload: Annotated[bool, operational] = False
    """Keep the optimizer's moments in host memory during forward and backward passes."""
    moments: Literal["fp32", "bf16", "8bit"] = "fp32"
    """Precision of the optimizer's moments between steps. `bf16` halves their memory. `8bit` quarters it,
    also during the update (needs bitsandbytes: `pip install 'streamsyn[8bit]'`)."""
    dry_step: Annotated[bool, operational] = True
    """Make a forward and backward pass over the largest row that `train.seq_len` allows before the training
    starts, so that it runs out of memory at once or not at all. It changes nothing."""
    lora: LoraSection | None = None
    """Train low-rank adapters only."""
    save_every_steps: Annotated[Count, operational] = 100
    """Optimizer steps between checkpoints."""
    keep_checkpoints: Annotated[Count, operational] = 2
    """Number of the newest checkpoints that are kept."""
    holdout: Annotated[Unit, Field(lt=1)] = 0.0
    """Fraction of the seeds, chosen by id, that is never trained on and kept for evaluation. Rows of these
    seeds in `train.mix` and `train.control` are left out. Give the run the same share as `assembly.holdout`,
    or their contexts are distractors in other samples."""
    holdout_samples: Annotated[Count, operational] = 64
    """Maximum number of held-out samples to evaluate: about as many of each task, chosen by id."""
    eval_every_steps: Annotated[Count, operational] = 50
    """Optimizer steps between evaluations. There is also one before the first step and one at the end."""
    control: Annotated[str | None, operational] = None
    """Short chat data (file, directory or glob) whose loss is measured but never trained on: it shows what a
    model forgets while it learns to read long contexts."""
    control_samples: Annotated[Count, operational] = 64
    """Maximum number of control samples: the first ones."""
    needles: Annotated[NeedlesSection | None, operational] = None
    """Test retrieval from synthetic long texts."""
    longbench: Annotated[LongBenchSection | None, operational] = None
    """Test on questions in LongBench's format."""
    tests_every_steps: Annotated[Count | None, operational] = None
    """Optimizer steps between these two tests, which are slow because they generate. By default they run with
    each evaluation; with `train.eval_servers`, only before the first step and at the end."""
    eval_servers: Annotated[tuple[str, ...], operational] = ()
    """URLs of SGLang servers that are asked the questions of these two tests while the training goes on. They
    load each publication (`train.publish`) and must see OUT under the same path. A publication that comes
    while they are still asked about an earlier one waits, and is skipped if another one follows."""
    eval_wait_s: Annotated[FiniteSeconds, operational] = 600.0
    """Maximum seconds that the end of a training waits for `train.eval_servers`."""
    trackers: Annotated[tuple[Literal["tensorboard", "trackio", "wandb"], ...], operational] = ()
    """Experiment trackers, by accelerate, that get the metrics besides OUT/metrics.jsonl."""
    publish: Annotated[PublishSection | None, operational] = None
    """Send the weights to the servers that write the contexts. Off by default: the paper's generator is a
    fixed teacher."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.activation_offload and self.gradient_checkpointing is False:
            raise ValueError("activation_offload needs gradient_checkpointing, which is false")
        if self.moments == "bf16" and self.betas[1] > _MAX_BETA_BF16:
            raise ValueError(
                f'moments = "bf16" needs a second beta of at most {_MAX_BETA_BF16}, not {self.betas[1]}: the '
                "changes of one step would be lost in rounding"
            )
        if self.eval_servers and self.publish is None:
            raise ValueError("eval_servers needs publish: the weights that the servers load")
        if self.eval_servers and self.needles is None and self.longbench is None:
            raise ValueError("eval_servers needs needles or longbench: the questions that are asked")
        return self


class ClusterSection(Section):
    """SGLang servers and training workers that Ray starts (needs `streamsyn[ray]`, on its nodes too)."""

    address: str | None = None
    """The Ray cluster: `HOST:PORT`, or `auto` for the one of this machine or job. By default none is used."""
    model: str | None = None
    """The model to serve: a directory that every node has, or a name on the Hugging Face hub."""
    replicas: Count = 1
    """Number of servers."""
    max_replicas: Count | None = None
    """Number of servers up to which more are started while there is work for them. By default `replicas`."""
    idle_s: FiniteSeconds = 120.0
    """Seconds for which there was too little work for a server beyond `replicas` before it is stopped."""
    gpus_per_replica: CountOrZero = 1
    """GPUs of each server on each of its nodes."""
    cpus_per_replica: Count = 1
    """CPUs that Ray reserves for each server on each of its nodes."""
    nodes_per_replica: Count = 1
    """Nodes of each server: more than one for a model that one node cannot hold."""
    workers: Count = 1
    """Number of workers of `train --ray`: each is one rank of the training."""
    max_workers: Count | None = None
    """Number of workers up to which Ray adds some where the cluster has room. The training goes on from its
    last checkpoint at each change of their number. By default `workers`."""
    gpus_per_worker: CountOrZero = 1
    """GPUs of each worker: 1, or 0 to train on CPUs."""
    cpus_per_worker: Count = 1
    """CPUs that Ray reserves for each worker."""
    args: tuple[str, ...] = ()
    """Further flags of each server, such as `--tp-size=8`."""
    python: Path | None = None
    """Interpreter with sglang on the nodes. By default it is looked for there as for `--launch`."""
    command: tuple[str, ...] = ()
    """Command that starts a server in place of SGLang's own. `{model}`, `{host}`, `{port}`, `{rank}`,
    `{nodes}` and `{head}` (`HOST:PORT` for the nodes of one server to meet) are replaced."""
    start_timeout_s: FiniteSeconds = 900.0
    """Longest start of a server."""
    log_dir: Path | None = None
    """Directory of the servers' logs on each node. By default `streamsyn-servers` in the one for temporary
    files."""


class ServeSection(Section):
    """The daemon: where it listens, who may use it, and its limits."""

    listen: str = "127.0.0.1:8200"
    """`HOST:PORT` to listen at. `--listen` on the command line replaces it. An address that other machines
    can reach needs `serve.tokens_file`. Port 0 picks a free one."""
    tokens_file: Path | None = None
    """A file with one token a line: `NAME SCOPE[,SCOPE] TOKEN`, or `sha256:` and the SHA-256 of the token in
    hexadecimal in its place. The scopes are `read`, `write` (includes `read`) and `admin` (includes both).
    Clients send `Authorization: Bearer TOKEN`. By default everyone on this machine may do everything."""
    tls_certificate: Path | None = None
    """PEM file with the certificate to serve https with, and its chain."""
    tls_key: Path | None = None
    """PEM file with the key of the certificate. By default it is in the same file."""
    max_body_bytes: Count = 2**30
    """Maximum bytes of the body of a request, as sent and decompressed."""
    max_line_bytes: Count = 8 * 2**20
    """Maximum bytes of one line of seeds or of a batch. `seeds.max_line_bytes` holds too."""
    max_connections: Count = 4096
    """Maximum number of open connections. A further one is answered with 503 and closed."""
    requests_per_s: Positive = 1000.0
    """Requests per second of one client: a token, or an address where there are no tokens. Up to this many
    may come at once. A further one is answered with 429 and `Retry-After`."""
    idle_timeout_s: Seconds = 75.0
    """Seconds after which a connection without a request is closed."""
    body_timeout_s: Seconds = 30.0
    """Maximum seconds until a request's head is complete, and between two pieces of its body."""
    max_unread_seeds: Count = 10_000
    """Number of accepted seeds of a run that wait to be taken up, from which on the daemon reads no more."""
    allow_recipes: tuple[str, ...] = ()
    """Recipes of your own that clients may use, as in `recipe.use`, such as `my_package.recipes:Mine`."""
    allow_private_webhooks: bool = False
    """Whether webhooks may go to addresses of this machine and of private networks."""
    min_free_bytes: CountOrZero = 2**30
    """Free bytes on the disk below which runs are paused. They go on when there is twice as much."""
    retain_s: Seconds | None = None
    """Seconds after which mirrored shards that every consumer has acknowledged are deleted. By default
    they are kept."""
    retain_bytes: Count | None = None
    """Bytes of the shards of one run above which the oldest mirrored ones that every consumer has
    acknowledged are deleted. By default they are kept."""
