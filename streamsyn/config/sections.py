"""All sections of the configuration except `train`."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, Field, model_validator

from streamsyn.config.fields import Count, Positive, Seconds, Section, Threshold, Unit, operational

_OWN_FIELDS = frozenset({"messages", "model", "n", "rid", "stream", "stream_options"})
"""Fields of a chat request that streamsyn sets itself."""


def _refuse_own_fields(sampling: dict[str, Any]) -> dict[str, Any]:
    if own := sorted(_OWN_FIELDS & sampling.keys()):
        raise ValueError(f"streamsyn sets {', '.join(own)} itself; remove it")
    return sampling


class RunSection(Section):
    """The run as a whole."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of all random choices: interleaved sources, distractors, lengths, positions."""
    max_reject_fraction: Annotated[float, Field(ge=0, le=1), operational] = 0.5
    """Stop with exit code 3 when rejects are more than this fraction of the outcomes, from 0 to 1. It is
    judged during the run, from 200 outcomes on, and at its end. A run also stops when its first 32 outcomes
    are rejects for one reason; their seeds are asked again by the next run. 1 switches both off."""
    drain_timeout_s: Annotated[Seconds, operational] = 60.0
    """Seconds that requests in flight may take to finish after the first signal: SIGINT, SIGTERM,
    SIGHUP or SIGUSR1."""
    max_consecutive_bugs: Annotated[Count, operational] = 16
    """Stop the run after this many internal errors in a row, with no outcome in between."""
    metrics_listen: Annotated[str | None, operational] = None
    """`HOST:PORT` to serve Prometheus metrics on during the run. By default they are not served."""
    traces: Annotated[str | None, operational] = None
    """Base URL of an OpenTelemetry collector, such as `http://collector:4318`: each draft is a trace, with a
    span for each step and each request; servers get W3C `traceparent` headers. Off by default; needs
    `streamsyn[traces]`."""
    queue_size: Annotated[Count, operational] = 256
    """Maximum number of items in the queue between two stages."""


class SourceSection(Section):
    """One source of seeds."""

    path: str
    """A file, a directory, a glob, a URL of these, `org/name` or `org/name:split` of a dataset on the Hugging
    Face hub, or `-` for NDJSON on stdin."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Relative weight of this source when sources are interleaved."""
    task: str | None = None
    """Task of seeds that have none of their own. By default the file's stem."""


class FieldsSection(Section):
    """Names of the fields that hold the parts of a seed."""

    instruction: str = "instruction"
    """Field with the instruction."""
    answer: str = "answer"
    """Field with the gold answer."""
    id: str = "id"
    """Optional field with the id."""
    task: str = "task"
    """Optional field with the task."""
    messages: str = "messages"
    """Field with a chat, used where instruction and answer are absent."""
    context: str = "context"
    """Field with the document, for recipes that start from documents."""


SeedFormat = Literal[
    "auto", "pair", "alpaca", "messages", "sharegpt", "prompt_completion", "question_answer", "request"
]


def _check_partition(text: str | None) -> str | None:
    if text is None:
        return None
    at, slash, number = text.partition("/")
    if not (slash and at.isdecimal() and number.isdecimal() and int(at) < int(number)):
        raise ValueError("expected I/N with I from 0 to N - 1, such as 0/3")
    return text


class SeedsSection(Section):
    """Where seeds come from, and in which order they are worked on."""

    sources: Annotated[tuple[SourceSection, ...], operational] = ()
    """The sources. `--seeds PATH` on the command line replaces them."""
    interleave: Annotated[bool, operational] = False
    """Mix the sources by weight instead of reading them one after the other."""
    fields: FieldsSection = FieldsSection()
    """Names of the fields of a seed."""
    format: SeedFormat = "auto"
    """The form of the rows. `auto` finds it for each row by its fields: `pair` (the names in `seeds.fields`),
    `alpaca` (instruction, input, output), `messages` (chats of role and content), `sharegpt` (chats of from
    and value), `prompt_completion`, `question_answer`. Another value takes rows of that form alone. `request`
    is for the recipe `chat`: lines of OpenAI's Batch API, with `custom_id`, `method`, `url` and `body`."""
    max_line_bytes: Annotated[Count, operational] = 8 * 2**20
    """Longest line in bytes. A longer line is rejected and never held in memory."""
    limit: Annotated[Count | None, operational] = None
    """Maximum number of seeds to read (`--limit`). By default all of them."""
    group_window: Annotated[int, Field(ge=0), operational] = 1024
    """Number of seeds read ahead to bring together those that share a long text (the template's block
    `group`). 0 keeps the order of the input. At most this many other seeds overtake a seed."""
    partition: Annotated[str | None, AfterValidator(_check_partition)] = None
    """`I/N`: take only the seeds of partition I of N, counted from 0, by a hash of the prefix group or of the
    id. `run --partitions N` sets it for each of its coordinators."""
    task_losses: Annotated[Path | None, operational] = None
    """A trainer's OUT/task_losses.json. Seeds of tasks with a high loss come first. The file may appear
    later, and is read again when it changes."""
    task_window: Annotated[Count, operational] = 4096
    """With `seeds.task_losses`: number of seeds read ahead. The next seed is the oldest of a task drawn by
    loss. At most four times this many other seeds overtake a seed. `seeds.limit` counts seeds read."""
    task_exponent: Annotated[float, Field(ge=0), operational] = 1.0
    """A task is drawn in proportion to its loss to the power of this number, but never less than a tenth as
    often as the most frequent task."""


class SinkSection(Section):
    """The durable log on disk: all keys are operational except the compression."""

    sync_interval_s: Annotated[Seconds, operational] = 1.0
    """Longest time in seconds from writing an outcome to its fsync."""
    sync_rows: Annotated[Count, operational] = 1024
    """Sync early when this many rows are unsynced."""
    shard_bytes: Annotated[Count, operational] = 128 * 2**20
    """Size in bytes at which a shard is sealed."""
    compression: Literal["none", "zstd"] = "none"
    """`none` writes `.jsonl`, `zstd` writes `.jsonl.zst`."""
    mirror: Annotated[str | None, operational] = None
    """A URL, such as s3://bucket/runs/first, that sealed shards are copied to during the run. By default they
    are not copied."""
    mirror_timeout_s: Annotated[Seconds, operational] = 300.0
    """Seconds that a run waits at its end for copies in progress. The next run copies what is missing."""


class TaskRecipeSection(Section):
    """Overrides of the recipe for one task; absent keys keep the value for all tasks."""

    target_words: Count | None = None
    """As `recipe.target_words`."""
    target_tokens: Count | None = None
    """As `recipe.target_tokens`."""
    template: Path | None = None
    """As `recipe.template`."""


class RecipeSection(Section):
    """What the LLM is asked for a seed."""

    use: str = "context"
    """The recipe. `context` asks for one document in one request. `sections` asks for an outline and then
    section by section, for documents of 4k to 128k tokens. `instruction` takes documents and asks for a
    question and its answer. `chat` sends request lines of OpenAI's Batch API as they are and keeps the whole
    answers; it needs `seeds.format = "request"` and `assembly.write = false`. `my_package.recipes:Mine` is a
    class of your own."""
    options: dict[str, Any] = {}
    """Options of a recipe of your own. streamsyn does not read them."""
    window_words: Count | None = None
    """Recipe `instruction`: number of words in the window that is taken at a random place of a longer
    document. By default the whole document."""
    target_words: Count = 2000
    """Recipe `context`: length to ask for, in words."""
    contexts_per_seed: Count = 1
    """Drafts per seed: contexts written independently of each other."""
    max_tokens: Count = 4096
    """Recipes `context` and `instruction`: maximum tokens of an answer, by the tokenizer of the model that
    writes."""
    target_tokens: Count = 8000
    """Recipe `sections`: length of a document in tokens, as the servers count them. It is never exceeded, and
    missed by less than a quarter of a section. `checks.max_words` does not reject documents of this
    length."""
    section_tokens: Count = 1024
    """Recipe `sections`: maximum tokens of one section. A document has about `target_tokens / section_tokens`
    sections."""
    facts: Literal["one", "spread"] = "one"
    """Recipe `sections`: where the facts that lead to the answer stand. `one`: in one section, drawn
    uniformly for each draft. `spread`: over up to four sections."""
    window_tokens: Count = 32768
    """Recipe `sections`: maximum tokens of a conversation, prompt and answer together; at most the model's
    context length. Before it is exceeded, the text so far is summarised, and a new conversation continues
    from the summary and the last section. A context whose seed alone is too long for it gets the flag
    `beyond_window`."""
    summary_tokens: Count = 512
    """Recipe `sections`: maximum tokens of the running summary."""
    thinking: Literal["off", "on", "auto"] = "auto"
    """Whether models that think before they answer should: `off` and `on` send what switches it for the
    model, by its name, and `auto` sends nothing. Thoughts are removed from answers in any case."""
    thinking_tokens: Count = 4096
    """With `thinking = "on"`: tokens added to the maximum of each answer, as room for the thought. With
    `auto`, thoughts count towards that maximum."""
    temperature: Annotated[float, Field(ge=0)] = 0.8
    """Sampling temperature."""
    sampling: Annotated[dict[str, Any], AfterValidator(_refuse_own_fields)] = {}
    """Other sampling parameters, passed to the server unchanged, such as `top_p`. Not those that streamsyn
    sets itself: messages, model, n, rid, stream, stream_options."""
    template: Path | None = None
    """A Jinja2 file that replaces the packaged prompt. Blocks for `context` and `instruction`: `user`, and
    optionally `system`. For `sections`: any of `system`, `outline`, `section`, `summary`, `resume`; the
    others stay as packaged. For all: `group`, a text that several seeds share, such as a passage. It comes
    first in the user message, and its seeds go to one server, one after the other."""
    tasks: dict[str, TaskRecipeSection] = {}
    """Overrides for single tasks: `[recipe.tasks.NAME]`."""
    tries: Count = 3
    """Maximum number of fresh answers when answers fail a check; in `sections`, for each step."""
    on_truncated: Literal["keep", "continue", "reject"] = "keep"
    """What to do with an answer cut at `max_tokens`: `keep` it with the flag `truncated`, `continue` it, or
    `reject` it and try again. In `sections` the next section continues a cut one anyway: only `reject`
    makes a difference, for the last section."""
    max_continuations: Count = 4
    """Maximum number of continuations of one answer."""


class ChecksSection(Section):
    """What a context must satisfy; the first failed check gives the reject its reason."""

    min_words: Annotated[int, Field(ge=0)] = 50
    """Minimum number of words; fewer is `too_short`. Recipe `instruction`: of the document."""
    max_words: Count = 20_000
    """Maximum number of words; more is `too_long`. Recipe `instruction`: of the question and of the
    answer."""
    refusal: bool = True
    """Reject answers in which the model declines (`refusal`)."""
    max_repetition: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Maximum fraction of repeated five-word runs; more is `repetition`. 1 switches the check off."""
    prompt_echo: bool = True
    """Reject answers that repeat the prompt (`prompt_echo`)."""
    qa_pasted: bool = True
    """Reject answers that are the question and its answer instead of a document (`qa_pasted`)."""
    near_duplicate: Literal["off", "flag", "reject"] = "off"
    """What to do with a context that is nearly the same as an earlier one (`near_duplicate`): `flag` or
    `reject` it. `off` does not compare."""
    similarity: Unit = 0.8
    """Two contexts are near-duplicates from this Jaccard similarity of their five-word runs on, from 0 to 1.
    It is estimated by MinHash."""
    eval_sets: Annotated[tuple[str, ...], operational] = ()
    """Evaluation data, as paths of seeds are given: rows in LongBench's or any other format, or text. A
    context that shares a run of `checks.eval_ngram_words` words with them is `contaminated`."""
    eval_ngram_words: Annotated[Count, Field(ge=4)] = 13
    """Length of such a run in words, ignoring case and punctuation."""
    on_contaminated: Literal["flag", "reject"] = "reject"
    """What to do with a contaminated context: `flag` or `reject` it."""
    context_gain: bool = False
    """Have the servers measure the context gain: the mean log-likelihood per token of the gold answer given
    context and instruction, minus that given the instruction alone, in nats."""
    flag_gain_below: Threshold = 0.0
    """A context with a gain below this gets the flag `low_context_gain`."""
    reject_gain_below: Threshold = None
    """A context with a gain below this is rejected (`low_context_gain`). By default none is."""
    answerable: bool = False
    """Have the servers answer the instruction with and without the context, and score both against the gold
    answer from 0 to 1: word F1 for questions, as in LongBench, ROUGE-L for summaries."""
    flag_answer_below: Unit | None = 0.1
    """A context whose answer scores below this gets the flag `not_answerable`."""
    reject_answer_below: Unit | None = None
    """A context whose answer scores below this is rejected (`not_answerable`). By default none is."""
    flag_known_above: Unit | None = 0.5
    """A context gets the flag `known_answer` when the answer without it scores above this: the model knows
    the answer anyway."""


class ServerSection(Section):
    """One server, when it needs more than a URL."""

    url: str
    """Base URL."""
    weight: Positive = 1.0
    """Relative share of the work."""
    key_env: str | None = None
    """Environment variable that holds the server's API key. By default STREAMSYN_API_KEY."""


class ScoringSection(Section):
    """The servers and the prompt for `checks.context_gain` and `checks.answerable`."""

    servers: Annotated[tuple[str | ServerSection, ...], operational] = ()
    """Servers that score, written as in `fleet.servers`. By default those that write."""
    model: str | None = None
    """The model that scores. By default the one that is served, or the first by name of several."""
    answer_tokens: Count = 256
    """Maximum tokens of a gold answer that are scored: the first ones."""
    max_answer_tokens: Count = 256
    """Maximum tokens of an answer that `checks.answerable` asks for, without a thought before it."""
    thinking: Literal["off", "on", "auto"] = "off"
    """As `recipe.thinking`, for `checks.answerable`. `checks.context_gain` is measured without a thought."""
    thinking_tokens: Count = 4096
    """Tokens added to `scoring.max_answer_tokens` for a model that thinks."""
    template: Path | None = None
    """A Jinja2 file for the question, in place of the packaged one. Its variable `context` is empty for the
    question without context."""


class FleetSection(Section):
    """The servers and how they are asked: all keys are operational except the models."""

    servers: Annotated[tuple[str | ServerSection, ...], operational] = ()
    """Base URLs, or tables with `url`, `weight`, `key_env`. `--server URL` on the command line replaces
    them. A user and password in a URL are sent as Basic authorization, and are never saved or shown."""
    servers_file: Annotated[Path | None, operational] = None
    """A file with one server a line: `URL [weight=W] [key_env=NAME] [drain]`. It is read again when it
    changes, to add, remove and drain servers."""
    servers_dns: Annotated[str | None, operational] = None
    """A URL whose host name resolves to the addresses of all servers, as a headless Kubernetes service does.
    It is resolved again regularly."""
    discover_interval_s: Annotated[Seconds, operational] = 5.0
    """Seconds between readings of `fleet.servers_file` and resolutions of `fleet.servers_dns`."""
    model: Annotated[str | None, operational] = None
    """Model to ask for. By default the one that the servers report."""
    models: dict[str, Positive] = {}
    """Several models, each with its relative share of the drafts, such as {a = 3, b = 1}."""
    concurrency: Annotated[Literal["auto"] | Count, operational] = "auto"
    """Requests in flight per server: a number, or `auto` to find what keeps the server's batch full."""
    max_in_flight: Annotated[Count, operational] = 2048
    """Maximum number of requests in flight per server, whatever `fleet.concurrency` is. The limit of open
    files (`ulimit -n`) may lower it."""
    load_interval_s: Annotated[Seconds, operational] = 1.0
    """Seconds between readings of a server's load."""
    slow_start_s: Annotated[Seconds, operational] = 10.0
    """Seconds until a readmitted server gets its full share of requests again."""
    balance_factor: Annotated[float, Field(ge=1), operational] = 1.25
    """A prefix group leaves its server, or its data-parallel rank there, when that has more than this many
    times its share of the load."""
    leader_wait_s: Annotated[Seconds, operational] = 5.0
    """Maximum seconds that requests wait for the first token of the request that brings their prefix into a
    cache."""
    hedge_tail: Annotated[bool | Annotated[float, Field(ge=0, le=1)], operational] = True
    """At the end of a run, when at most this fraction of the workers is still at work, send their requests to
    a second server and take the first answer. `true` is 0.05, `false` is off."""
    tls_ca: Annotated[Path | None, operational] = None
    """PEM file with the authorities that https servers are verified against. By default the system's."""
    tls_cert: Annotated[Path | None, operational] = None
    """PEM file with the client certificate and its key, for servers that require one."""
    request_timeout_s: Annotated[Seconds, operational] = 600.0
    """Maximum seconds of one attempt."""
    total_timeout_s: Annotated[Seconds, operational] = 3600.0
    """Maximum seconds of all attempts of one request, without the time spent waiting for a free server."""
    connect_timeout_s: Annotated[Seconds, operational] = 10.0
    """Maximum seconds to open a connection."""
    max_answer_bytes: Annotated[Count, operational] = 2**25
    """Maximum bytes of an answer, decompressed. A longer one is not read on and counts as a broken response.
    A streamed answer has about 300 bytes per token."""
    max_attempts: Annotated[Count, operational] = 6
    """Maximum number of attempts of one request. A full queue, a rate limit or an unreachable server does not
    count."""
    backoff_base_s: Annotated[Seconds, operational] = 0.5
    """Upper bound in seconds of the first pause between attempts, which is drawn from zero to it. It doubles
    with each attempt."""
    backoff_max_s: Annotated[Seconds, operational] = 30.0
    """Longest pause between attempts, in seconds."""
    eject_after: Annotated[Count, operational] = 3
    """Failures in a row after which a server is ejected until it answers a probe. An unreachable server is
    ejected at once."""
    probe_interval_s: Annotated[Seconds, operational] = 2.0
    """Seconds between probes of an ejected server. The interval grows to ten times this."""
    give_up_s: Annotated[Seconds, operational] = 300.0
    """Stop the run with exit code 75, resumable, when no server was usable, or servers refused every request,
    for this many seconds. A request that only rate limits refused for this long, while others were answered,
    is rejected."""


Source = Literal["same_task", "any_task", "corpus"]


class TaskAssemblySection(Section):
    """Overrides of assembly for one task."""

    family: str | None = None
    """Prompt family: single_doc_qa, multi_doc_qa, summary, meeting_query or general."""
    template: Path | None = None
    """As `assembly.template`."""


class LengthsSection(Section):
    """A distribution of sample lengths in tokens; exactly one of uniform, log_uniform, choices and
    schedule.
    """

    uniform: tuple[Count, Count] | None = None
    """Lowest and highest length, drawn uniformly."""
    log_uniform: tuple[Count, Count] | None = None
    """Lowest and highest length, drawn uniformly on a logarithmic scale."""
    choices: tuple[Count, ...] | None = None
    """Lengths to choose from."""
    weights: tuple[Positive, ...] | None = None
    """Relative weights of `choices`. By default all are equal."""
    schedule: tuple[tuple[Annotated[int, Field(ge=0)], Count], ...] | None = None
    """Pairs of a number of contexts and the length from there on, so that samples grow with the stream."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        ways = [name for name in ("uniform", "log_uniform", "choices", "schedule") if getattr(self, name)]
        if len(ways) != 1:
            raise ValueError("needs exactly one of uniform, log_uniform, choices and schedule")
        for bounds in (self.uniform, self.log_uniform):
            if bounds is not None and bounds[0] > bounds[1]:
                raise ValueError(f"the lowest length, {bounds[0]}, is above the highest, {bounds[1]}")
        if self.weights is not None and len(self.weights) != len(self.choices or ()):
            raise ValueError("weights and choices must have the same length")
        if self.schedule is not None:
            starts = [start for start, _ in self.schedule]
            if starts[0] != 0 or starts != sorted(set(starts)):
                raise ValueError("a schedule must start at 0 contexts and rise")
        return self


class AssemblySection(Section):
    """How contexts become samples."""

    write: bool = True
    """Write samples. With `false` the run writes contexts only."""
    contexts_per_sample: Count = 10
    """Contexts in a sample: the relevant one and distractors."""
    target_tokens: Count | LengthsSection | None = None
    """Length of a sample in tokens, in place of a number of contexts: distractors are added up to it. A
    number, or a distribution: {uniform = [8000, 32000]}, {log_uniform = [8000, 128000]}, {choices = [8000,
    32000], weights = [3, 1]}, or {schedule = [[0, 8000], [1000, 32000]]}, which grows with the stream."""
    max_tokens: Count | None = None
    """Maximum tokens per sample. Distractors that would exceed it are left out, and so is a sample whose
    relevant context alone exceeds it. By default there is no maximum."""
    tokenizer: str | None = None
    """Tokenizer of the model to be tuned, used to count tokens: a directory, or a name on the Hugging Face
    hub. Samples are counted whole, with its chat template. By default the counts of the servers that wrote
    the contexts are used."""
    distractors: Source | Literal["none"] | dict[Source, Positive] = "same_task"
    """Where distractors come from: contexts of the `same_task` or of `any_task`, passages of a `corpus`, or
    `none`. A mix, such as {same_task = 3, corpus = 1}, is drawn from for each distractor."""
    corpus: Annotated[tuple[str, ...], operational] = ()
    """Documents to take distractors from, as paths of seeds are given: rows of every format, or text."""
    corpus_field: str = "text"
    """Field with the text, in files of rows."""
    corpus_words: Count = 1500
    """Maximum words of a passage. Longer documents are split."""
    position: Literal["uniform"] | Unit | Annotated[tuple[Unit, ...], Field(min_length=1)] = "uniform"
    """Position of the relevant context: `uniform` for a random one, a depth from 0 (first) to 1 (last), or a
    list of depths used in turn."""
    epoch: Annotated[int, Field(ge=0)] = 0
    """A different number gives the same contexts different distractors, lengths and positions."""
    holdout: Annotated[Unit, Field(lt=1)] = 0.0
    """Fraction of the seeds, chosen by id, whose contexts are never distractors in samples of other seeds.
    Set it to the `train.holdout` of the training, which then holds out the same seeds. Samples of held-out
    seeds can have any distractors."""
    max_similarity: Unit = 0.8
    """Maximum similarity of two passages in a sample, measured as for `checks.similarity`. 1 switches the
    check off."""
    exclude_flags: tuple[str, ...] = ()
    """Contexts with one of these flags, such as `low_context_gain`, get no sample of their own."""
    min_context_gain: Threshold = None
    """Contexts with a measured gain below this get no sample of their own. By default all do."""
    min_answer_chars: Count = 5
    """A distractor must not contain the answer if the answer has at least this many characters."""
    window_bytes: Count = 16 * 2**20
    """Bytes of the most recent contexts that distractors are drawn from. This bounds the memory of
    assembly."""
    template: Path | None = None
    """A Jinja2 file for the user message, in place of the packaged ones."""
    tasks: dict[str, TaskAssemblySection] = {}
    """Overrides for single tasks: `[assembly.tasks.NAME]`."""

    @property
    def source_weights(self) -> dict[Source, float]:
        """Relative weight of each source of distractors; empty where no distractors are wanted."""
        if self.distractors == "none" or (self.contexts_per_sample == 1 and self.target_tokens is None):
            return {}
        if isinstance(self.distractors, dict):
            # Sources are drawn by their places: those must not depend on how the table is written.
            return {name: self.distractors[name] for name in get_args(Source) if name in self.distractors}
        return {self.distractors: 1.0}
