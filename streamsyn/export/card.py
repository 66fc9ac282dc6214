"""The dataset card: README.md, from what has been counted. It holds no time and no path of a machine."""

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import orjson
import pyarrow

from streamsyn.assembly.sample_prompts import KNOWN_TASKS
from streamsyn.config.fingerprint import fingerprint
from streamsyn.config.loading import Config
from streamsyn.export.export_request import ExportRequest, ExportSummary
from streamsyn.export.rows import SCHEMA, Distribution, RowMetrics, Tally
from streamsyn.templates import PromptTemplate, packaged

MOST_TASKS = 50
"""So many have a line of their own in each table."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """What the card tells.

    Attributes:
        configs: (name, [(split, pattern of its files)]) of each configuration that `datasets` is to know.
        splits: Names of splits, as columns.
        contexts_by_model: Contexts in the log.
        run_config: What the run was made with.
        config: The same, with the settings of the export.
        version: Of streamsyn, when the run was made.
    """

    request: ExportRequest
    summary: ExportSummary
    tally: Tally
    configs: Sequence[tuple[str, list[tuple[str, str]]]]
    splits: Sequence[str]
    contexts_by_model: dict[str, int]
    rejects: Counter[str]
    run_config: Config
    config: Config
    version: str


def card(facts: CardFacts) -> str:
    """The text of README.md."""
    tally, summary = facts.tally, facts.summary
    tasks = [*tally.by_rows()][:MOST_TASKS]
    models = sorted(facts.contexts_by_model)
    variables = {
        "license": facts.request.license,
        "title": "Long-context instruction samples by context synthesis",
        "categories": _categories(tally),
        "size": next((name for most, name in _SIZES if tally.all.rows < most), "n>100M"),
        "configs": [{"name": name, "files": files} for name, files in facts.configs],
        "features": [*_features(SCHEMA)],
        "rows": f"{tally.all.rows:,}",
        "rows_number": tally.all.rows,
        "mean_tokens": f"{tally.all.tokens.mean:,.0f}",
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
        "lengths": [{"task": task, "numbers": _lengths(figures)} for task, figures in _lines(tally, tasks)],
        "scores": [*_scores(tally, tasks)],
        "flags": [(_cell(flag), f"{number:,}") for flag, number in sorted(tally.all.flags.items())],
        "totals": [*_totals(facts)],
        "rejects": [(reason, f"{number:,}") for reason, number in sorted(facts.rejects.items())],
        "version": facts.version,
        "settings": "\n".join(_settings(facts)),
        "command": command(facts.request),
    }
    template = PromptTemplate("card.md", packaged("export", "card.md"), variables)
    return re.sub(r"\n{3,}", "\n\n", template.render(**variables)) + "\n"


def command(request: ExportRequest) -> str:
    """The command line that makes the same again; places are left to whoever gives it."""
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
    by_number = ("assembly.target_tokens", None) in request.settings  # as the option has it
    for key, value in request.settings:
        if key == "assembly.contexts_per_sample" and by_number:
            words += ["--contexts-per-sample", str(value)]
        elif value is not None:
            words += ["--set", f"{key}={_toml(_without_folder(value))}"]
    return shlex.join(words)


def _features(fields: Iterable[Any]) -> Iterator[str]:
    """Columns as the header of a card names them: types that are guessed from lines may differ by file."""
    for field in fields:
        yield f"- name: {field.name}"
        if not pyarrow.types.is_list(field.type):
            yield f"  dtype: {field.type if field.type != pyarrow.float64() else 'float64'}"
        elif pyarrow.types.is_struct(field.type.value_type):
            yield "  list:"
            yield from (f"  {line}" for line in _features(field.type.value_type))
        else:
            yield f"  list: {field.type.value_type}"


def _categories(tally: Tally) -> list[str]:
    families = (KNOWN_TASKS.get(task.lower(), "general") for task in tally.tasks)
    found = {_CATEGORIES[family] for family in families if family in _CATEGORIES}
    return [*sorted(found), "text-generation"]


def _counts(facts: CardFacts, tasks: Sequence[tuple[str, RowMetrics]]) -> Iterator[dict[str, Any]]:
    cells = facts.tally.cells
    for task, figures in tasks:
        yield {
            "task": _cell(task),
            "numbers": [f"{cells[task, split]:,}" for split in facts.splits],
            "all": f"{figures.rows:,}",
        }
    more = len(facts.tally.tasks) - len(tasks)
    sums = Counter[str]()
    for (_, split), rows in cells.items():
        sums[split] += rows
    if len(facts.tally.tasks) > 1:
        yield {
            "task": "all" + (f", {more} further tasks among them" if more else ""),
            "numbers": [f"{sums[split]:,}" for split in facts.splits],
            "all": f"{facts.tally.all.rows:,}",
        }


def _lines(tally: Tally, tasks: Sequence[tuple[str, RowMetrics]]) -> Iterator[tuple[str, RowMetrics]]:
    """Lines of a table: of tasks, and of all when these are several."""
    yield from ((_cell(task), figures) for task, figures in tasks)
    if len(tally.tasks) > 1:
        yield "all", tally.all


def _lengths(figures: RowMetrics) -> list[str]:
    tokens = figures.tokens
    quantiles = [f"{tokens.quantile(share):,}" for share in (0.05, 0.5, 0.95)]
    return [f"{tokens.mean:,.0f}", *quantiles, f"{tokens.most:,}", f"{figures.contexts.mean:.1f}"]


def _scores(tally: Tally, tasks: Sequence[tuple[str, RowMetrics]]) -> Iterator[dict[str, Any]]:
    for task, figures in _lines(tally, tasks):
        for name, scores in sorted(figures.scores.items()):
            yield {"task": task, "figure": name, "numbers": _score(scores)}


def _score(scores: Distribution) -> list[str]:
    quantiles = [f"{scores.quantile(share) / 100:.2f}" for share in (0.05, 0.5, 0.95)]
    return [f"{scores.number:,}", f"{scores.mean:.2f}", *quantiles]


def _totals(facts: CardFacts) -> Iterator[tuple[str, str]]:
    for model, number in sorted(facts.contexts_by_model.items()):
        yield f"contexts written by {_cell(_name(model))}", f"{number:,}"
    yield "samples made of them", f"{facts.tally.all.rows:,}"
    for why, number in sorted(facts.summary.left_out.items()):
        yield f"contexts left out: {_cell(why)}", f"{number:,}"
    yield "seeds without a context", f"{facts.rejects.total():,}"


def _settings(facts: CardFacts) -> Iterator[str]:
    """Keys that shape samples and differ from the defaults; of templates only the names."""
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
    """As the fingerprint has it; a template by its file's name, a tokenizer's folder by its own."""
    shaping = fingerprint(_without_templates(config))
    templates = [("assembly.template", config.assembly.template), ("recipe.template", config.recipe.template)]
    shaping |= {key: path.name for key, path in templates if path is not None}
    return {key: _without_folder(value) for key, value in shaping.items() if value is not None}


def _without_templates(config: Config) -> Config:
    """Templates need not be there any more."""

    def bare(section: Any) -> Any:
        tasks = {name: task.model_copy(update={"template": None}) for name, task in section.tasks.items()}
        return section.model_copy(update={"template": None, "tasks": tasks})

    return config.model_copy(update={"recipe": bare(config.recipe), "assembly": bare(config.assembly)})


def _without_folder(value: Any) -> Any:
    """A path on some machine, by its name alone."""
    if isinstance(value, PurePath) or (isinstance(value, str) and value.startswith(("/", "~", "."))):
        return PurePath(value).name
    return value


def _name(model: str) -> str:
    return str(_without_folder(model))


def _toml(value: Any) -> str:
    """A value as TOML has it; strings are those of JSON."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_toml(key)} = {_toml(one)}' for key, one in value.items())}}}"
    return orjson.dumps(value, default=str).decode()


def _cell(text: str) -> str:
    """Text as it may stand in a table."""
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").split()) or "-"
