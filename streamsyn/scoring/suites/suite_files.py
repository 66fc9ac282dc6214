"""Reads the questions of published suites from their own files. The fields of a row tell its suite."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import orjson

from streamsyn.errors import ConfigError
from streamsyn.io.inputs import decode_all, find_rows
from streamsyn.io.rows import ReadOptions
from streamsyn.scoring.suites.graphwalks_suite import graphwalks_question
from streamsyn.scoring.suites.longbench_suite import longbench_v1, longbench_v2
from streamsyn.scoring.suites.mrcr_suite import mrcr_question
from streamsyn.scoring.suites.recall_suite import recall_question
from streamsyn.scoring.suites.ruler_suite import ruler_question
from streamsyn.scoring.suites.suite_question import KEY, SuiteQuestion

_KNOWN: Final = (
    "LongBench (`dataset`), LongBench v2 (`choice_A`), RULER (`input`, `outputs`), HELMET's recall "
    "(`num_kvs` or `type_needle_v`), MRCR (`random_string_to_prepend`), GraphWalks (`answer_nodes`)"
)


def read_suites(
    paths: Sequence[str],
    prompts: Path | None = None,
    prompt_chars: int | None = None,
    limit: int | None = None,
    max_tokens: int | None = None,
) -> Iterator[SuiteQuestion]:
    """Read the questions of files, directories or globs, in their order.

    Args:
        paths: JSON lines, JSON, Parquet or a saved data set.
        prompts: A JSON file with a prompt for each data set of LongBench, as it publishes it, or task of
            HELMET.
        prompt_chars: Contexts of LongBench and HELMET are cut in the middle so that prompts have at most this
            many characters.
        limit: Maximum number of questions of a part.
        max_tokens: Maximum tokens of an answer; by default as published.

    Raises:
        ConfigError: A file cannot be read, or a row is not of a known format.
    """
    templates = _prompts_in(prompts) if prompts is not None else {}
    counts: dict[tuple[str, str], int] = {}
    for path in paths:
        for place in find_rows(path, KEY).places:
            for where, row in decode_all(place, ReadOptions(key=KEY)):
                made = _question(row, where, templates, prompt_chars)
                part = made.suite, made.part
                counts[part] = counts.get(part, 0) + 1
                if limit is None or counts[part] <= limit:
                    yield made if max_tokens is None else replace(made, max_tokens=max_tokens)


def _prompts_in(path: Path) -> dict[str, str]:
    try:
        found = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise ConfigError(f"--prompts: {path} cannot be read: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(one, str) for one in found.values()):
        raise ConfigError(f"--prompts: {path} is not a JSON object of a prompt for each data set")
    return found


def _question(
    row: object, where: str, templates: Mapping[str, str], prompt_chars: int | None
) -> SuiteQuestion:
    """The question of a row, by the first suite whose fields it has."""
    fields = row if isinstance(row, dict) else {}
    if "choice_A" in fields:
        return longbench_v2(fields, where, prompt_chars)
    if "random_string_to_prepend" in fields:
        return mrcr_question(fields, where)
    if "answer_nodes" in fields:
        return graphwalks_question(fields, where)
    if "num_kvs" in fields or ("type_needle_v" in fields and "context" in fields):
        return recall_question(fields, where, templates, prompt_chars)
    if "input" in fields and "outputs" in fields:
        return ruler_question(fields, where)
    if "dataset" in fields:
        return longbench_v1(fields, where, templates, prompt_chars)
    raise ConfigError(f"{KEY}: {where} is not a question of a known suite: {_KNOWN}")
