"""Describe mistakes in a configuration in plain words: which key, what is expected, and the likely key."""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

_EXPECTED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "a table",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "frozenset_type": "a list",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller number",
    "int_type": "a whole number",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "mapping_type": "a table",
    "model_attributes_type": "a table",
    "model_type": "a table",
    "path_type": "a path",
    "set_type": "a list",
    "string_too_short": "text of {min_length} characters or more",
    "string_type": "text",
    "too_long": "a list of at most {max_length}",
    "too_short": "a list of at least {min_length}",
    "tuple_type": "a list",
}
"""What is expected, by pydantic's type of problem."""

_OTHER_NAMES = {
    "batch_size": "train.rows_per_step",
    "lr": "train.learning_rate",
    "max_length": "train.seq_len",
    "max_new_tokens": "recipe.max_tokens",
    "model_name": "fleet.model",
    "output": "seeds.fields.answer",
    "timeout": "fleet.request_timeout_s",
    "top_p": "recipe.sampling.top_p",
    "url": "fleet.servers",
}
"""What other software calls some keys."""


def describe(problems: Iterable[Any], known: Sequence[str]) -> Iterator[str]:
    """Describe pydantic's problems, one text per key.

    Where a value may have several types, pydantic reports a problem for each of them: they are joined.

    Args:
        problems: As `ValidationError.errors()` returns them.
        known: Every key, dotted, with `*` for a name or a number.
    """
    by_key: dict[str, list[Any]] = {}
    for problem in problems:
        key = ".".join(str(part) for part in problem["loc"] if not _is_type_name(str(part)))
        by_key.setdefault(key, []).append(problem)
    for key, found in by_key.items():
        if any(longer.startswith(f"{key}.") for longer in by_key):
            continue  # the problem of the longer key is more precise
        if found[0]["type"] == "extra_forbidden":
            yield f"unknown key {key}{suggestion(key, known)}"
        else:
            yield f"{key}: {_expected(found)}"


def suggestion(key: str, known: Sequence[str]) -> str:
    """Return what to add to "unknown key KEY": the likely key, else the keys beside it."""
    *level, name = key.split(".")
    siblings = sorted(
        {
            parts[len(level)]
            for parts in (key.split(".") for key in known)
            if len(parts) > len(level)
            and all(part in ("*", above) for part, above in zip(parts, level, strict=False))
        }
    )
    if _OTHER_NAMES.get(name, "").removesuffix(f".{name}") in known:
        return f"; the nearest known one is {_OTHER_NAMES[name]}"
    if near := difflib.get_close_matches(name, siblings, n=1, cutoff=0.6):
        return f"; the nearest known one is {'.'.join([*level, *near])}"
    if elsewhere := [other for other in known if other.rpartition(".")[2] == name]:
        return f"; the nearest known one is {' or '.join(elsewhere[:3])}"
    if siblings and level:
        return f"; the keys there are {', '.join(siblings)}"
    near = difflib.get_close_matches(key, known, 1, 0.6)
    sections = ", ".join(sorted({other.partition(".")[0] for other in known}))
    return f"; the nearest known one is {near[0]}" if near else f"; the sections are {sections}"


def keys_named(name: str, known: Iterable[str]) -> list[str]:
    """Return the keys that a person may mean by the name of an option that does not exist."""
    name = name.lstrip("-").replace("-", "_")
    found = [key for key in known if key.rpartition(".")[2] == name and "*" not in key]
    return found or [key for key in (_OTHER_NAMES.get(name),) if key is not None]


def _expected(problems: Sequence[Mapping[str, Any]]) -> str:
    """What is expected, in words, and the value; a close choice is suggested."""
    value = problems[0]["input"]
    sentences = [p["msg"].removeprefix("Value error, ") for p in problems if p["type"] == "value_error"]
    wanted = dict.fromkeys(
        _EXPECTED[problem["type"]].format(**problem.get("ctx", {}))
        for problem in problems
        if problem["type"] in _EXPECTED
    )
    unknown = [p["msg"] for p in problems if p["type"] not in {*_EXPECTED, "value_error"}]
    expected = [f"expected {' or '.join(wanted)}"] if wanted else []
    choices = [
        choice.strip("' ")
        for problem in problems
        if problem["type"] == "literal_error"
        for choice in problem["ctx"]["expected"].replace(" or ", ", ").split(",")
    ]
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{' or '.join([*expected, *sentences, *unknown])} (got {value!r}){hint}"


def _is_type_name(part: str) -> bool:
    """Whether a part of pydantic's location is one of the types of a value, not a key."""
    return part in ("str", "bool", "int", "float") or "[" in part or part.endswith(("-float", "Section"))
