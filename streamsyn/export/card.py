"""The dataset card, README.md: counted while rows are written, rendered at the end.

It holds no time and no path of a machine, so the same export gives the same card. Memory does not grow with
the number of rows.
"""

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import orjson
import pyarrow

from streamsyn.assembly.sample_prompts import KNOWN_TASKS
from streamsyn.config.fingerprint import fingerprint
from streamsyn.config.loading import Config
from streamsyn.export.export_request import ExportRequest, ExportSummary
from streamsyn.export.log_reader import SCHEMA, SCORES, Row
from streamsyn.templates import PromptTemplate, packaged

_MAX_TASKS = 50
"""Tasks with a line of their own in each table."""
_LENGTH_BITS = 7
"""Leading bits by which lengths are binned: to 1 %."""
_SCORE_BINS = 100
"""Bins per unit of a score."""
_CATEGORIES = {
    "single_doc_qa": "question-answering",
    "multi_doc_qa": "question-answering",
    "meeting_query": "summarization",
    "summary": "summarization",
}
_SIZES = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"),
)


@dataclass(slots=True)
class Distribution:
    """Counts of numbers in bins, with their mean and maximum."""

    counts: Counter[int] = field(default_factory=Counter)
    number: int = 0
    total: float = 0
    highest: float = 0

    @property
    def mean(self) -> float:
        """The mean; 0 if there are no numbers."""
        return self.total / self.number if self.number else 0.0

    def add(self, value: float, bin_start: int) -> None:
        """Count a number in its bin."""
        self.counts[bin_start] += 1
        self.number += 1
        self.total += value
        self.highest = max(self.highest, value)

    def quantile(self, share: float) -> int:
        """Return the bin at or below which this share of the numbers lies; 0 if there are none."""
        below, bin_start = 0, 0
        for bin_start in sorted(self.counts):
            below += self.counts[bin_start]
            if below >= share * self.number:
                break
        return bin_start


def length_bin(length: int) -> int:
    """Return the shortest length in the bin of this one."""
    shift = max(0, length.bit_length() - _LENGTH_BITS)
    return length >> shift << shift


@dataclass(slots=True)
class RowMetrics:
    """Metrics of some rows."""

    rows: int = 0
    tokens: Distribution = field(default_factory=Distribution)
    contexts: Distribution = field(default_factory=Distribution)
    """Contexts per sample."""
    scores: dict[str, Distribution] = field(default_factory=dict)
    """The distribution of each score."""
    flags: Counter[str] = field(default_factory=Counter)

    def add(self, row: Row) -> None:
        """Count a row."""
        self.rows += 1
        self.tokens.add(row["n_tokens"], length_bin(row["n_tokens"]))
        contexts = len(row["context_seqs"])
        self.contexts.add(contexts, length_bin(contexts))
        for name in SCORES:
            if (value := row[name]) is not None:
                score_bin = round(min(max(value, -_SCORE_BINS), _SCORE_BINS) * _SCORE_BINS)
                self.scores.setdefault(name, Distribution()).add(value, score_bin)
        self.flags.update(row["flags"])


class CardMetrics:
    """Metrics of all rows and of each task, and the number of rows per task and split."""

    def __init__(self) -> None:
        self.all = RowMetrics()
        self.tasks: dict[str, RowMetrics] = {}
        self.cells: Counter[tuple[str, str]] = Counter()
        """Rows by task and split."""

    def add(self, row: Row, split: str) -> None:
        """Count a row."""
        self.all.add(row)
        self.tasks.setdefault(row["task"], RowMetrics()).add(row)
        self.cells[row["task"], split] += 1

    def largest_first(self) -> Iterator[tuple[str, RowMetrics]]:
        """Yield the tasks, those with the most rows first."""
        yield from sorted(self.tasks.items(), key=lambda task: (-task[1].rows, task[0]))


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """The facts on the card.

    Attributes:
        configs: (name, [(split, pattern of its files)]) of each configuration for `datasets`.
        splits: Names of the splits.
        contexts_by_model: Number of contexts in the log, by model.
        run_config: The configuration of the run.
        config: The same with the settings of the export.
        version: The version of streamsyn that made the run.
    """

    request: ExportRequest
    summary: ExportSummary
    metrics: CardMetrics
    configs: Sequence[tuple[str, list[tuple[str, str]]]]
    splits: Sequence[str]
    contexts_by_model: dict[str, int]
    rejects: Counter[str]
    run_config: Config
    config: Config
    version: str


def card(facts: CardFacts) -> str:
    """Return the text of README.md."""
    metrics, summary = facts.metrics, facts.summary
    tasks = [*metrics.largest_first()][:_MAX_TASKS]
    models = sorted(facts.contexts_by_model)
    variables = {
        "license": facts.request.license,
        "title": "Long-context instruction samples by context synthesis",
        "categories": _categories(metrics),
        "size": next((name for most, name in _SIZES if metrics.all.rows < most), "n>100M"),
        "configs": [{"name": name, "files": files} for name, files in facts.configs],
        "features": [*_features(SCHEMA)],
        "rows": f"{metrics.all.rows:,}",
        "rows_number": metrics.all.rows,
        "mean_tokens": f"{metrics.all.tokens.mean:,.0f}",
        "is_saved": facts.request.format == "datasets",
        "is_final": summary.is_final,
        "waiting": f"{summary.waiting:,}" if summary.waiting else "",
        "written_by": _cell(" and ".join(map(_name, models)) or "a language model"),
        "writes_pairs": facts.config.recipe.use == "instruction",
        "counted_by": "the whole of it, by the tokenizer of the settings below"
        if facts.config.assembly.tokenizer
        else "its contexts, as the servers that wrote them counted",
        "splits": [_cell(split) for split in facts.splits],
        "counts": [*_counts(facts, tasks)],
        "lengths": [
            {"task": task, "numbers": _lengths(row_metrics)}
            for task, row_metrics in _table_rows(metrics, tasks)
        ],
        "scores": [*_scores(metrics, tasks)],
        "flags": [(_cell(flag), f"{number:,}") for flag, number in sorted(metrics.all.flags.items())],
        "totals": [*_totals(facts)],
        "rejects": [(reason, f"{number:,}") for reason, number in sorted(facts.rejects.items())],
        "version": facts.version,
        "settings": "\n".join(_settings(facts)),
        "command": command(facts.request),
    }
    template = PromptTemplate("card.md", packaged("export", "card.md"), variables)
    return re.sub(r"\n{3,}", "\n\n", template.render(**variables)) + "\n"


def command(request: ExportRequest) -> str:
    """Return the command line of the same export, with placeholders for the two directories."""
    words = ["streamsyn", "export", "RUN_DIRECTORY", "--to", "FOLDER", "--format", request.format]
    words += ["--compression", request.codec]
    words += [word for split in request.splits for word in ("--split", split)]
    words += ["--split-seed", str(request.split_seed)] if request.splits else []
    words += ["--shard-bytes", str(request.shard_bytes)]
    words += ["--shard-rows", str(request.shard_rows)] if request.shard_rows else []
    words += ["--epochs", str(request.epochs)] if request.epochs > 1 else []
    words += ["--limit", str(request.limit)] if request.limit else []
    words += ["--flush"] if request.flush else []
    words += ["--license", request.license] if request.license else []
    words += ["--config", request.config.name] if request.config else []
    by_number = ("assembly.target_tokens", None) in request.settings  # set by --contexts-per-sample
    for key, value in request.settings:
        if key == "assembly.contexts_per_sample" and by_number:
            words += ["--contexts-per-sample", str(value)]
        elif value is not None:
            words += ["--set", f"{key}={_toml(_without_folder(value))}"]
    return shlex.join(words)


def _features(columns: Iterable[Any]) -> Iterator[str]:
    """Yield the columns for the card's header, as types that are inferred from lines may differ by file."""
    for column in columns:
        yield f"- name: {column.name}"
        if not pyarrow.types.is_list(column.type):
            yield f"  dtype: {column.type if column.type != pyarrow.float64() else 'float64'}"
        elif pyarrow.types.is_struct(column.type.value_type):
            yield "  list:"
            yield from (f"  {line}" for line in _features(column.type.value_type))
        else:
            yield f"  list: {column.type.value_type}"


def _categories(metrics: CardMetrics) -> list[str]:
    families = (KNOWN_TASKS.get(task.lower(), "general") for task in metrics.tasks)
    found = {_CATEGORIES[family] for family in families if family in _CATEGORIES}
    return [*sorted(found), "text-generation"]


def _counts(facts: CardFacts, tasks: Sequence[tuple[str, RowMetrics]]) -> Iterator[dict[str, Any]]:
    cells = facts.metrics.cells
    for task, row_metrics in tasks:
        yield {
            "task": _cell(task),
            "numbers": [f"{cells[task, split]:,}" for split in facts.splits],
            "all": f"{row_metrics.rows:,}",
        }
    more = len(facts.metrics.tasks) - len(tasks)
    sums = Counter[str]()
    for (_, split), rows in cells.items():
        sums[split] += rows
    if len(facts.metrics.tasks) > 1:
        yield {
            "task": "all" + (f", {more} further tasks among them" if more else ""),
            "numbers": [f"{sums[split]:,}" for split in facts.splits],
            "all": f"{facts.metrics.all.rows:,}",
        }


def _table_rows(
    metrics: CardMetrics, tasks: Sequence[tuple[str, RowMetrics]]
) -> Iterator[tuple[str, RowMetrics]]:
    """Yield the rows of a table: each task, and all tasks if there are several."""
    yield from ((_cell(task), row_metrics) for task, row_metrics in tasks)
    if len(metrics.tasks) > 1:
        yield "all", metrics.all


def _lengths(row_metrics: RowMetrics) -> list[str]:
    tokens = row_metrics.tokens
    quantiles = [f"{tokens.quantile(share):,}" for share in (0.05, 0.5, 0.95)]
    return [f"{tokens.mean:,.0f}", *quantiles, f"{tokens.highest:,}", f"{row_metrics.contexts.mean:.1f}"]


def _scores(metrics: CardMetrics, tasks: Sequence[tuple[str, RowMetrics]]) -> Iterator[dict[str, Any]]:
    for task, row_metrics in _table_rows(metrics, tasks):
        for name, scores in sorted(row_metrics.scores.items()):
            yield {"task": task, "score": name, "numbers": _score(scores)}


def _score(scores: Distribution) -> list[str]:
    quantiles = [f"{scores.quantile(share) / 100:.2f}" for share in (0.05, 0.5, 0.95)]
    return [f"{scores.number:,}", f"{scores.mean:.2f}", *quantiles]


def _totals(facts: CardFacts) -> Iterator[tuple[str, str]]:
    for model, number in sorted(facts.contexts_by_model.items()):
        yield f"contexts written by {_cell(_name(model))}", f"{number:,}"
    yield "samples made of them", f"{facts.metrics.all.rows:,}"
    for reason, number in sorted(facts.summary.left_out.items()):
        yield f"contexts left out: {_cell(reason)}", f"{number:,}"
    yield "seeds without a context", f"{facts.rejects.total():,}"


def _settings(facts: CardFacts) -> Iterator[str]:
    """Yield the keys that shape samples and differ from the defaults."""
    defaults = _shaping(Config())
    yield f"run.seed = {facts.run_config.run.seed}"
    yield f"recipe.use = {_toml(facts.run_config.recipe.use)}"
    for key, value in _shaping(facts.config).items():
        shapes = key.startswith(("recipe.", "checks.", "assembly.")) and key not in (
            "recipe.use",
            "assembly.write",
        )
        if shapes and value != defaults.get(key):
            yield f"{key} = {_toml(value)}"


def _shaping(config: Config) -> dict[str, Any]:
    """Return the fingerprint, with names of templates and tokenizers in place of texts and paths."""
    shaping = fingerprint(_without_templates(config))
    templates = [("assembly.template", config.assembly.template), ("recipe.template", config.recipe.template)]
    shaping |= {key: path.name for key, path in templates if path is not None}
    return {key: _without_folder(value) for key, value in shaping.items() if value is not None}


def _without_templates(config: Config) -> Config:
    """Return the configuration without templates, as their files may be gone."""

    def bare(section: Any) -> Any:
        tasks = {name: task.model_copy(update={"template": None}) for name, task in section.tasks.items()}
        return section.model_copy(update={"template": None, "tasks": tasks})

    return config.model_copy(update={"recipe": bare(config.recipe), "assembly": bare(config.assembly)})


def _without_folder(value: Any) -> Any:
    """Return only the name of a path on some machine."""
    if isinstance(value, PurePath) or (isinstance(value, str) and value.startswith(("/", "~", "."))):
        return PurePath(value).name
    return value


def _name(model: str) -> str:
    return str(_without_folder(model))


def _toml(value: Any) -> str:
    """Return a value in TOML; its strings are written as in JSON."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_toml(key)} = {_toml(one)}' for key, one in value.items())}}}"
    return orjson.dumps(value, default=str).decode()


def _cell(text: str) -> str:
    """Return a text escaped for a table cell."""
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").split()) or "-"
