"""The configuration: one TOML file, one frozen section a stage, every key with its meaning.

Keys marked `operational` do not shape what is written; all others make up the fingerprint of a run.
"""

import difflib
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from streamsyn.errors import ConfigError

operational = Field(json_schema_extra={"operational": True})
Seconds = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A part of the configuration: frozen, closed, documented by the text below each field."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


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


class TaskRecipeSection(Section):
    """What differs for one task; what is left out is as for all."""

    target_words: Count | None = None
    """As `recipe.target_words`."""
    template: Path | None = None
    """As `recipe.template`."""


class RecipeSection(Section):
    """What is asked of the LLM for a seed."""

    use: str = "context"
    """The recipe: `context` writes one document a draft."""
    target_words: Count = 2000
    """Length that the LLM is asked for."""
    contexts_per_seed: Count = 1
    """Drafts a seed: contexts written independently of each other."""
    max_tokens: Count = 4096
    """Longest answer, in tokens of the model that writes."""
    temperature: Annotated[float, Field(ge=0)] = 0.8
    """Sampling temperature."""
    sampling: dict[str, Any] = {}
    """Any other sampling parameter, passed through to the server, such as `top_p`."""
    template: Path | None = None
    """A Jinja2 file with the blocks `system` and `user` in place of the packaged prompt."""
    tasks: dict[str, TaskRecipeSection] = {}
    """Overrides for single tasks: `[recipe.tasks.NAME]`."""
    tries: Count = 3
    """Fresh answers asked for, in all, when one fails a check."""
    on_truncated: Literal["keep", "continue", "reject"] = "keep"
    """An answer cut at `max_tokens`: keep it with a flag, have it continued, or try afresh."""
    max_continuations: Count = 4
    """How often one answer is continued at most."""


class ChecksSection(Section):
    """What a context must satisfy; the first failure names the reject."""

    min_words: Annotated[int, Field(ge=0)] = 50
    """Fewer words are `too_short`."""
    max_words: Count = 20_000
    """More words are `too_long`."""
    refusal: bool = True
    """Reject answers that decline (`refusal`)."""
    max_repetition: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Largest share of repeated five-word runs; above it is `repetition`. 1 switches it off."""
    prompt_echo: bool = True
    """Reject answers that repeat our prompt (`prompt_echo`)."""
    qa_pasted: bool = True
    """Reject answers that are the question and its answer rather than a document (`qa_pasted`)."""


class FleetSection(Section):
    """The servers and how they are asked. All of it is operational."""

    servers: Annotated[tuple[str, ...], operational] = ()
    """Base URLs; `--server URL` on the command line replaces them."""
    model: Annotated[str | None, operational] = None
    """Model to ask for; by default what the servers say they serve."""
    max_in_flight: Annotated[Count, operational] = 128
    """Requests at one server at a time."""
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


class TaskAssemblySection(Section):
    """What differs for one task."""

    family: str | None = None
    """Prompt family: single_doc_qa, multi_doc_qa, summary, meeting_query or general."""
    template: Path | None = None
    """As `assembly.template`."""


class AssemblySection(Section):
    """How contexts become samples."""

    write: bool = True
    """False: contexts only."""
    contexts_per_sample: Count = 10
    """One relevant context and so many less one distractors of the same task."""
    target_tokens: Count | None = None
    """In place of a number of contexts: add distractors until the contexts have so many tokens, as
    counted by the servers that wrote them."""
    min_answer_chars: Count = 5
    """A distractor must not contain the answer, when the answer is at least this long."""
    window_bytes: Count = 16 * 2**20
    """Distractors are drawn from this much of the most recent contexts: the memory that assembly uses."""
    template: Path | None = None
    """A Jinja2 file for the user message in place of the packaged ones."""
    tasks: dict[str, TaskAssemblySection] = {}
    """Overrides for single tasks: `[assembly.tasks.NAME]`."""


class Config(Section):
    """All sections."""

    run: RunSection = RunSection()
    seeds: SeedsSection = SeedsSection()
    recipe: RecipeSection = RecipeSection()
    checks: ChecksSection = ChecksSection()
    fleet: FleetSection = FleetSection()
    sink: SinkSection = SinkSection()
    assembly: AssemblySection = AssemblySection()


def load(path: Path | None, overrides: Iterable[tuple[str, Any]] = ()) -> Config:
    """The configuration in `path`, with `overrides` as (dotted key, value) laid over it.

    Raises:
        ConfigError: The file cannot be read, or a key or value is wrong; the message names it.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = tomllib.loads(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the configuration {path}: {error}") from error
        except ValueError as error:  # that of tomllib, or that of a number with too many digits
            raise ConfigError(f"{path} is no valid TOML: {error}") from error
    for key, value in overrides:
        _put(tree, key, value)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        where = f"{path}: " if path is not None else ""
        raise ConfigError(where + "; ".join(_explain(problem) for problem in error.errors())) from error


def parse_override(text: str) -> tuple[str, Any]:
    """`key=value` of `--set`: the value is TOML where it parses as such, else plain text.

    Raises:
        ConfigError: There is no `=`.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set takes key=value, as in run.seed=1, not {text!r}")
    try:
        parsed: Any = tomllib.loads(f"value = {value}")["value"]
    except ValueError:
        parsed = value
    return key.strip(), parsed


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{key}: {section} is a value, it has no keys below it")
    tree[name] = value


def _explain(problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] != "extra_forbidden":
        return f"{key}: {problem['msg']} (got {problem['input']!r})"
    *level, name = location
    known = [parts for parts in (key.split(".") for key in known_keys()) if len(parts) > len(level)]
    siblings = {
        parts[len(level)]
        for parts in known
        if all(part in ("*", above) for part, above in zip(parts, level, strict=False))
    }
    near = difflib.get_close_matches(name, sorted(siblings), n=1, cutoff=0.5)
    near = [".".join([*level, *near])] if near else difflib.get_close_matches(key, known_keys(), 1, 0)
    return f"unknown key {key}; the nearest known one is {near[0]}"


def known_keys() -> list[str]:
    """Every key there is, dotted; a `*` stands for a task's name or a source's number."""
    return list(_keys(Config, ""))


def _keys(section: type[Section], prefix: str) -> Iterable[str]:
    for name, field in section.model_fields.items():
        kind = field.annotation
        for below in (kind, *get_args(kind)):
            if isinstance(below, type) and issubclass(below, Section):
                yield from _keys(below, f"{prefix}{name}." if below is kind else f"{prefix}{name}.*.")
                break
        else:
            yield prefix + name


def fingerprint(config: Config) -> dict[str, Any]:
    """What shapes outputs, as dotted key -> value: all keys that are not operational.

    Raises:
        ConfigError: A template cannot be read.
    """
    return dict(_shaping(config, ""))


def _shaping(section: Section, prefix: str) -> Iterable[tuple[str, Any]]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if _is_operational(field):
            continue
        if isinstance(value, Section):
            yield from _shaping(value, f"{prefix}{name}.")
        elif isinstance(value, dict):
            for key, below in value.items():
                if isinstance(below, Section):
                    yield from _shaping(below, f"{prefix}{name}.{key}.")
                else:
                    yield f"{prefix}{name}.{key}", below
        elif isinstance(value, Path):
            # a template shapes outputs by its text, not by where it lies
            try:
                yield prefix + name, value.read_text("utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"{prefix}{name}: cannot read {value}: {error}") from error
        else:
            yield prefix + name, value


def _is_operational(field: Any) -> bool:
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("operational"))
