"""The sections of what lies at both ends: the run, its seeds, its log.

The sections of what is asked of the LLM.

The sections of what a context is examined for.

The sections of the servers.

The sections of how contexts become samples.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from streamsyn.config.fields import Count, Positive, Seconds, Section, Threshold, Unit, operational


class RunSection(Section):
    """The run as a whole."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seeds everything drawn at random: the order of interleaved sources, distractors, positions."""
    max_reject_fraction: Annotated[float, Field(ge=0, le=1), operational] = 1.0
    """Exit with 3 when more than this share of the outcomes are rejects."""
    drain_timeout_s: Annotated[Seconds, operational] = 60.0
    """After the first SIGTERM or SIGINT, how long requests in flight may take to finish."""
    max_consecutive_bugs: Annotated[Count, operational] = 16
    """So many internal errors in a row, with nothing done in between, end the run."""
    metrics_listen: Annotated[str | None, operational] = None
    """`HOST:PORT` to serve Prometheus metrics at while the run goes on."""
    queue_size: Annotated[Count, operational] = 256
    """Items the queue between two stages holds at most."""


class SourceSection(Section):
    """One place that seeds come from."""

    path: str
    """A file, a directory, a glob, or `-` for NDJSON on stdin."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of this source when sources are interleaved."""
    task: str | None = None
    """The task of seeds that name none; by default the file's stem."""


class FieldsSection(Section):
    """Where a seed's parts stand in a line: the names of its fields."""

    instruction: str = "instruction"
    """Field that holds the instruction."""
    answer: str = "answer"
    """Field that holds the gold answer."""
    id: str = "id"
    """Optional field that holds the id."""
    task: str = "task"
    """Optional field that holds the task."""
    messages: str = "messages"
    """Field that holds a chat-format pair, used where instruction and answer are absent."""
    context: str = "context"
    """Field that holds the document, for recipes that start from one."""


class SeedsSection(Section):
    """Where seeds come from."""

    sources: Annotated[tuple[SourceSection, ...], operational] = ()
    """The sources; `--seeds PATH` on the command line replaces them."""
    interleave: Annotated[bool, operational] = False
    """Mix the sources by weight, instead of reading them in turn."""
    fields: FieldsSection = FieldsSection()
    """Names of the fields."""
    max_line_bytes: Annotated[Count, operational] = 8 * 2**20
    """A longer line is rejected without being held in memory."""
    limit: Annotated[Count | None, operational] = None
    """Read at most so many seeds (`--limit`)."""
    group_window: Annotated[int, Field(ge=0), operational] = 1024
    """Of so many seeds read ahead, those that share a long text (the template's block `group`) are worked
    on together; 0 keeps the order. No seed is passed over by more than this many."""
    task_losses: Annotated[Path | None, operational] = None
    """A trainer's OUT/task_losses.json, which need not be there yet: tasks that it finds hard come first. It
    is read again when it changes."""
    task_window: Annotated[Count, operational] = 4096
    """With losses: so many seeds are read ahead, out of which the next is drawn, by task and then the oldest;
    none lets more than four times as many others pass. `seeds.limit` counts what is read."""
    task_exponent: Annotated[float, Field(ge=0), operational] = 1.0
    """A task is drawn in proportion to its loss to this power; the least of them a tenth as often as the
    heaviest."""


class SinkSection(Section):
    """The log on disk. All of it is operational but the compression."""

    sync_interval_s: Annotated[Seconds, operational] = 1.0
    """Outcomes are on disk (fsync) at most this long after they were written."""
    sync_rows: Annotated[Count, operational] = 1024
    """So many unsynced rows are synced at once, however early."""
    shard_bytes: Annotated[Count, operational] = 128 * 2**20
    """A shard is sealed when it has grown to this."""
    compression: Literal["none", "zstd"] = "none"
    """`zstd` writes `.jsonl.zst`."""
    mirror: Annotated[str | None, operational] = None
    """A URL, such as s3://bucket/runs/first, that sealed shards are copied to while the run goes on."""
    mirror_timeout_s: Annotated[Seconds, operational] = 300.0
    """How long a run waits at its end for copies that are under way; what is missing then is copied by the
    next run."""


class TaskRecipeSection(Section):
    """What differs for one task; what is left out is as for all."""

    target_words: Count | None = None
    """As `recipe.target_words`."""
    target_tokens: Count | None = None
    """As `recipe.target_tokens`."""
    template: Path | None = None
    """As `recipe.template`."""


class RecipeSection(Section):
    """What is asked of the LLM for a seed."""

    use: str = "context"
    """The recipe: `context` asks for a document at once; `sections` for an outline, then for one section
    after the other, for documents of 4k to 128k tokens; `instruction` takes documents and asks for a question
    and its answer. `my_package.recipes:Mine` is a class of your own."""
    options: dict[str, Any] = {}
    """For a recipe of your own: whatever it needs."""
    window_words: Count | None = None
    """Of a longer document the recipe `instruction` takes so many words, from a place that is drawn."""
    target_words: Count = 2000
    """Length that the LLM is asked for by the recipe `context`."""
    contexts_per_seed: Count = 1
    """Drafts a seed: contexts written independently of each other."""
    max_tokens: Count = 4096
    """Longest answer of the recipes `context` and `instruction`, in tokens of the model that writes."""
    target_tokens: Count = 8000
    """Length that the recipe `sections` writes up to, as the servers count it: never beyond, and short of it
    by less than a quarter of a section. `checks.max_words` does not reject what is asked for here."""
    section_tokens: Count = 1024
    """Longest answer for one section, in tokens; there are about `target_tokens / section_tokens` of them."""
    facts: Literal["one", "spread"] = "one"
    """Where the facts that lead to the answer are placed: in `one` section, drawn evenly for each draft, or
    `spread` over up to four."""
    window_tokens: Count = 32768
    """No conversation of the recipe `sections` grows beyond so many tokens, prompt and answer together (so it
    should not exceed the model's context length): before it would, what has been written is summarised, and a
    new conversation goes on from the summary and the last section. Where the seed itself is too long for that
    the context has the flag `beyond_window`."""
    summary_tokens: Count = 512
    """Longest running summary, in tokens."""
    temperature: Annotated[float, Field(ge=0)] = 0.8
    """Sampling temperature."""
    sampling: dict[str, Any] = {}
    """Any other sampling parameter, passed through to the server, such as `top_p`."""
    template: Path | None = None
    """A Jinja2 file in place of the packaged prompt. For `context` and `instruction`: the blocks `user` and,
    where wanted, `system`. For `sections`: any of `system`, `outline`, `section`, `summary`, `resume`; the
    others stay as packaged. For all: `group`, text that several seeds share, such as a passage; it stands
    first in the user message, and its seeds are sent to one server, one after the other."""
    tasks: dict[str, TaskRecipeSection] = {}
    """Overrides for single tasks: `[recipe.tasks.NAME]`."""
    tries: Count = 3
    """Fresh answers asked for, in all, when one fails a check; in `sections`, for each step."""
    on_truncated: Literal["keep", "continue", "reject"] = "keep"
    """An answer cut at `max_tokens`: keep it with a flag, have it continued, or try afresh. In `sections` a
    cut section is continued by the next one anyway: only `reject` differs, and only for the last section."""
    max_continuations: Count = 4
    """How often one answer is continued at most."""


class ChecksSection(Section):
    """What a context must satisfy; the first failure names the reject."""

    min_words: Annotated[int, Field(ge=0)] = 50
    """Fewer words are `too_short`; for the recipe `instruction`, in the document."""
    max_words: Count = 20_000
    """More words are `too_long`; for the recipe `instruction`, in question or answer."""
    refusal: bool = True
    """Reject answers that decline (`refusal`)."""
    max_repetition: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Largest share of repeated five-word runs; above it is `repetition`. 1 switches it off."""
    prompt_echo: bool = True
    """Reject answers that repeat our prompt (`prompt_echo`)."""
    qa_pasted: bool = True
    """Reject answers that are the question and its answer rather than a document (`qa_pasted`)."""
    near_duplicate: Literal["off", "flag", "reject"] = "off"
    """What to do with a context that repeats one that was written before it: nothing, not even look; flag it
    (`near_duplicate`); or reject it."""
    similarity: Unit = 0.8
    """Two contexts repeat each other when so large a share of their runs of five words is the same (Jaccard
    similarity, estimated by MinHash)."""
    eval_sets: Annotated[tuple[str, ...], operational] = ()
    """Files, directories or globs of evaluation data: JSON lines as LongBench has them, Parquet or text. A
    context that shares a run of `checks.eval_ngram_words` words with any text in them is `contaminated`."""
    eval_ngram_words: Annotated[Count, Field(ge=4)] = 13
    """Length of such a run in words, without case and punctuation."""
    on_contaminated: Literal["flag", "reject"] = "reject"
    """What to do with such a context."""
    context_gain: bool = False
    """Have servers measure how much likelier the gold answer is with the context: its mean log-likelihood a
    token, in nats, given context and instruction, less that given the instruction alone."""
    flag_gain_below: Threshold = 0.0
    """A context with less gain gets the flag `low_context_gain`."""
    reject_gain_below: Threshold = None
    """A context with less gain is rejected (`low_context_gain`)."""
    answerable: bool = False
    """Have servers answer the instruction with and without the context, and compare with the gold answer: F1
    of words for questions, as LongBench does, ROUGE-L for summaries."""
    flag_answer_below: Unit | None = 0.1
    """A context whose answer scores less gets the flag `not_answerable`."""
    reject_answer_below: Unit | None = None
    """A context whose answer scores less is rejected (`not_answerable`)."""
    flag_known_above: Unit | None = 0.5
    """A context gets the flag `known_answer` when the answer given without it scores more: the model knows
    it anyway."""


class ServerSection(Section):
    """One server of the fleet, where more is to be said of it than its URL."""

    url: str
    """Base URL."""
    weight: Positive = 1.0
    """Its share of the work, beside the others'."""
    key_env: str | None = None
    """Environment variable that holds its key; by default STREAMSYN_API_KEY."""


class ScoringSection(Section):
    """Who scores contexts, and how: for `checks.context_gain` and `checks.answerable`."""

    servers: Annotated[tuple[str | ServerSection, ...], operational] = ()
    """Servers that score, as in `fleet.servers`; by default those that write."""
    model: str | None = None
    """The model that scores; by default the one served, or of several the first by name."""
    answer_tokens: Count = 256
    """Of a longer gold answer only so many first tokens are scored."""
    max_answer_tokens: Count = 256
    """Longest answer that `checks.answerable` asks for, in tokens."""
    template: Path | None = None
    """A Jinja2 file for the question, in place of the packaged one; `context` is empty when it is asked
    without one."""


class FleetSection(Section):
    """The servers and how they are asked. All of it is operational but the models."""

    servers: Annotated[tuple[str | ServerSection, ...], operational] = ()
    """Base URLs, or tables with `url`, `weight`, `key_env`; `--server URL` on the command line replaces
    them."""
    servers_file: Annotated[Path | None, operational] = None
    """A file of servers, one a line: `URL [weight=W] [key_env=NAME] [drain]`. It is read again when it
    changes: servers come, go, and are drained."""
    servers_dns: Annotated[str | None, operational] = None
    """A URL whose host name stands for all addresses it has, as a headless Kubernetes service does; it is
    looked up again now and then."""
    discover_interval_s: Annotated[Seconds, operational] = 5.0
    """Pause between looks at the file and the name."""
    model: Annotated[str | None, operational] = None
    """Model to ask for; by default what the servers say they serve."""
    models: dict[str, Positive] = {}
    """Several models, each with its share of the drafts, such as 3 of one and 1 of another."""
    concurrency: Annotated[Literal["auto"] | Count, operational] = "auto"
    """Requests in flight at one server: `auto` finds what keeps its batch full, or a number."""
    max_in_flight: Annotated[Count, operational] = 2048
    """Requests at one server at a time, at most, whatever `fleet.concurrency` says."""
    load_interval_s: Annotated[Seconds, operational] = 1.0
    """Pause between looks at a server's load."""
    slow_start_s: Annotated[Seconds, operational] = 10.0
    """A server that was ejected gets its full share of requests only so long after it is back."""
    balance_factor: Annotated[float, Field(ge=1), operational] = 1.25
    """A prefix group leaves its server when that one has more than this many times its share of the load."""
    leader_wait_s: Annotated[Seconds, operational] = 5.0
    """Requests wait at most so long for the first token of the one that brings their prefix into a cache."""
    hedge_tail: Annotated[bool | Annotated[float, Field(ge=0, le=1)], operational] = False
    """At the end of a run, when at most this share of the workers is left at work (true: 0.05), ask again
    elsewhere; the first answer counts."""
    tls_ca: Annotated[Path | None, operational] = None
    """PEM file of the authorities that https servers are checked against; by default the system's."""
    tls_cert: Annotated[Path | None, operational] = None
    """PEM file with our certificate and its key, for servers that ask for one."""
    request_timeout_s: Annotated[Seconds, operational] = 600.0
    """Bound on one try."""
    total_timeout_s: Annotated[Seconds, operational] = 3600.0
    """Bound on all tries of one request; time spent waiting for a free server does not count."""
    connect_timeout_s: Annotated[Seconds, operational] = 10.0
    """Bound on opening a connection."""
    max_attempts: Annotated[Count, operational] = 6
    """Tries of one request. A full queue is no try, nor is a server that cannot be reached."""
    backoff_base_s: Annotated[Seconds, operational] = 0.5
    """First pause between tries is drawn from zero to this; it doubles each time."""
    backoff_max_s: Annotated[Seconds, operational] = 30.0
    """Longest pause between tries."""
    eject_after: Annotated[Count, operational] = 3
    """Failures in a row after which a server gets no more requests until it answers a probe. One that
    cannot be reached gets none at once."""
    probe_interval_s: Annotated[Seconds, operational] = 2.0
    """Pause between the probes of an ejected server; it grows to ten times this."""
    give_up_s: Annotated[Seconds, operational] = 300.0
    """When no server was usable for so long, the run stops with 75, resumable."""


Source = Literal["same_task", "any_task", "corpus"]


class TaskAssemblySection(Section):
    """What differs for one task."""

    family: str | None = None
    """Prompt family: single_doc_qa, multi_doc_qa, summary, meeting_query or general."""
    template: Path | None = None
    """As `assembly.template`."""


class LengthsSection(Section):
    """A distribution of lengths in tokens: one of its keys."""

    uniform: tuple[Count, Count] | None = None
    """Lowest and highest; all between are as likely."""
    log_uniform: tuple[Count, Count] | None = None
    """Lowest and highest; each doubling is as likely."""
    choices: tuple[Count, ...] | None = None
    """One of these."""
    weights: tuple[Positive, ...] | None = None
    """How likely each of `choices` is, beside the others."""
    schedule: tuple[tuple[Annotated[int, Field(ge=0)], Count], ...] | None = None
    """Pairs of a number of contexts and the length from there on: the stream's samples grow."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        ways = [name for name in ("uniform", "log_uniform", "choices", "schedule") if getattr(self, name)]
        if len(ways) != 1:
            raise ValueError("one of uniform, log_uniform, choices and schedule is wanted")
        for bounds in (self.uniform, self.log_uniform):
            if bounds is not None and bounds[0] > bounds[1]:
                raise ValueError(f"the lowest length, {bounds[0]}, is above the highest, {bounds[1]}")
        if self.weights is not None and len(self.weights) != len(self.choices or ()):
            raise ValueError("weights are as many as choices")
        if self.schedule is not None:
            starts = [start for start, _ in self.schedule]
            if starts[0] != 0 or starts != sorted(set(starts)):
                raise ValueError("a schedule begins at 0 contexts and rises")
        return self


class AssemblySection(Section):
    """How contexts become samples."""

    write: bool = True
    """False: contexts only."""
    contexts_per_sample: Count = 10
    """One relevant context and so many less one distractors."""
    target_tokens: Count | LengthsSection | None = None
    """In place of a number of contexts: add distractors until the sample has so many tokens. A number, or a
    distribution: {uniform = [8000, 32000]}, {log_uniform = [8000, 128000]}, {choices = [8000, 32000],
    weights = [3, 1]}, or {schedule = [[0, 8000], [1000, 32000]]}, which grows with the stream."""
    max_tokens: Count | None = None
    """No sample is longer: a distractor that would make it so is left out, and so is a sample whose relevant
    context alone is too long."""
    tokenizer: str | None = None
    """The tokenizer of the model to be tuned, by which tokens are counted: a folder, or a name on the Hugging
    Face hub. Samples are counted whole, under its chat template. Without one the counts are those of the
    servers that wrote the contexts."""
    distractors: Source | Literal["none"] | dict[Source, Positive] = "same_task"
    """Where distractors come from: contexts of the `same_task` or of `any_task`, passages of a `corpus`,
    or `none`; or a mix, such as {same_task = 3, corpus = 1}, drawn for each distractor."""
    corpus: Annotated[tuple[str, ...], operational] = ()
    """Files, directories or globs of documents to take distractors from: text, JSON lines or Parquet."""
    corpus_field: str = "text"
    """Field that holds the text, in JSON lines and Parquet."""
    corpus_words: Count = 1500
    """Longer documents are cut into passages of so many words."""
    position: Literal["uniform"] | Unit | Annotated[tuple[Unit, ...], Field(min_length=1)] = "uniform"
    """Where the relevant context stands: anywhere, at a depth from 0 (first) to 1 (last), or at each depth
    of a list in turn."""
    epoch: Annotated[int, Field(ge=0)] = 0
    """Another number draws other distractors, lengths and positions for the same contexts."""
    max_similarity: Unit = 0.8
    """No sample holds two passages that are so similar, as `checks.similarity` has it. 1 switches it off."""
    exclude_flags: tuple[str, ...] = ()
    """A context with one of these flags gets no sample of its own, such as `low_context_gain`."""
    min_context_gain: Threshold = None
    """Nor does one that was measured to have less gain."""
    min_answer_chars: Count = 5
    """A distractor must not contain the answer, when the answer is at least this long."""
    window_bytes: Count = 16 * 2**20
    """Distractors are drawn from this much of the most recent contexts: the memory that assembly uses."""
    template: Path | None = None
    """A Jinja2 file for the user message in place of the packaged ones."""
    tasks: dict[str, TaskAssemblySection] = {}
    """Overrides for single tasks: `[assembly.tasks.NAME]`."""

    @property
    def source_weights(self) -> dict[Source, float]:
        """How often each source is drawn from, beside the others; none where no distractors are wanted."""
        if self.distractors == "none" or (self.contexts_per_sample == 1 and self.target_tokens is None):
            return {}
        if isinstance(self.distractors, dict):
            return dict(self.distractors)
        return {self.distractors: 1.0}
