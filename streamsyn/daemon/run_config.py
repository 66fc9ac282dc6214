"""The configuration of a hosted run: the operator's, with what a client may change on top.

A client may set keys that say what is written and how much work is done for it. What names a file, a
directory, a module or a server, or is shared by all runs, is set by the operator alone, in the CONFIG.toml of
the daemon.
"""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel

from streamsyn.config.fields import is_operational
from streamsyn.config.loading import Config, known_keys, load, suggestion
from streamsyn.daemon.problems import Problem

ALLOWED: Final = frozenset(
    {
        *("run.seed", "run.max_reject_fraction", "run.drain_timeout_s", "run.max_consecutive_bugs"),
        *("seeds.fields.*", "seeds.format", "seeds.limit"),
        *("recipe.use", "recipe.options", "recipe.window_words", "recipe.target_words", "recipe.sampling"),
        *("recipe.contexts_per_seed", "recipe.max_tokens", "recipe.target_tokens", "recipe.section_tokens"),
        *("recipe.facts", "recipe.window_tokens", "recipe.summary_tokens", "recipe.thinking"),
        *("recipe.thinking_tokens", "recipe.temperature", "recipe.tries", "recipe.on_truncated"),
        *("recipe.max_continuations", "recipe.tasks.*.target_words", "recipe.tasks.*.target_tokens"),
        *("checks.min_words", "checks.max_words", "checks.refusal", "checks.max_repetition"),
        *("checks.prompt_echo", "checks.qa_pasted", "checks.near_duplicate", "checks.similarity"),
        *("checks.on_contaminated", "checks.context_gain", "checks.flag_gain_below"),
        *("checks.reject_gain_below", "checks.answerable", "checks.flag_answer_below"),
        *("checks.reject_answer_below", "checks.flag_known_above"),
        *("scoring.model", "scoring.answer_tokens", "scoring.max_answer_tokens", "scoring.thinking"),
        "scoring.thinking_tokens",
        *("fleet.model", "fleet.models", "fleet.request_timeout_s", "fleet.total_timeout_s"),
        *("fleet.max_attempts", "fleet.backoff_base_s", "fleet.backoff_max_s", "fleet.hedge_tail"),
        *("fleet.leader_wait_s",),
        *("sink.sync_interval_s", "sink.shard_bytes", "sink.compression"),
        *("assembly.write", "assembly.contexts_per_sample", "assembly.target_tokens", "assembly.max_tokens"),
        *("assembly.distractors", "assembly.position", "assembly.epoch", "assembly.max_similarity"),
        *("assembly.exclude_flags", "assembly.min_context_gain", "assembly.min_answer_chars"),
        *("assembly.holdout", "assembly.tasks.*.family"),
    }
)
"""Keys that a client may set; `*` stands for one name."""

AT_MOST: Final = frozenset(
    {
        *("run.queue_size", "seeds.max_line_bytes", "seeds.group_window", "sink.sync_rows"),
        *("fleet.max_answer_bytes", "assembly.window_bytes"),
    }
)
"""Keys that bound the memory of a run: a client may set a lower value than the operator's."""

SAMPLING: Final = frozenset(
    {
        *("top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "min_tokens", "ignore_eos"),
        *("frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias", "no_stop_trim"),
        *("skip_special_tokens", "spaces_between_special_tokens", "response_format", "regex", "ebnf"),
        *("json_schema", "reasoning_effort", "chat_template_kwargs"),
    }
)
"""Keys of `recipe.sampling` that a client may set. Servers have others that name files, servers or code, such
as `lora_path`, `bootstrap_host` and `custom_logit_processor`."""

_INSTEAD: Final = {
    "recipe.template": "send the text of a template as templates.recipe",
    "assembly.template": "send the text of a template as templates.assembly",
    "seeds.sources": "send seeds with POST /v1/runs/ID/seeds",
}
"""What to do in place of setting a key."""


def operators_tree(config: Config) -> dict[str, Any]:
    """The operator's configuration as the base of all runs, without what belongs to the daemon itself."""
    tree = config.model_dump(exclude_none=True, exclude={"cluster", "serve", "train"})
    tree["seeds"].pop("sources", None)
    tree["run"].pop("metrics_listen", None)
    return tree


def run_config(base: Config, *layers: Mapping[str, Any]) -> Config:
    """The configuration of a run: the operator's, and each of the trees on top of those before it.

    Raises:
        ConfigError: A key is unknown or a value is invalid.
    """
    tree = operators_tree(base)
    for layer in layers:
        _merge(tree, layer)
    return load(None, tree.items())


def check_given(given: Mapping[str, Any], base: Config) -> None:
    """Refuse what a client must not configure.

    Args:
        given: The client's configuration: tables of keys.
        base: The operator's.

    Raises:
        Problem: 422: a key is unknown, or is the operator's to set; or 403 for a recipe that is not allowed.
    """
    known = known_keys()
    for key, value in _leaves(given, ""):
        if any(fnmatchcase(key, pattern) for pattern in ALLOWED):
            continue
        if key in AT_MOST:
            _check_at_most(key, value, base)
        elif not _is_known(key, known):
            raise Problem(422, f"unknown key {key}{suggestion(key, known)}", key=key)
        else:
            instead = _INSTEAD.get(key, "the operator sets it, in the CONFIG.toml of `streamsyn serve`")
            raise Problem(422, f"{key} cannot be set by a client: {instead}", key=key)
    sampling = _section(_section(given, "recipe"), "sampling")
    if others := sorted(set(sampling) - SAMPLING):
        key = f"recipe.sampling.{others[0]}"
        raise Problem(422, f"{key} cannot be set by a client: the operator sets it", key=key)
    use = _section(given, "recipe").get("use")
    if isinstance(use, str) and ":" in use and use not in base.serve.allow_recipes and use != base.recipe.use:
        raise Problem(
            403,
            f"recipe.use: {use!r} is not allowed; the operator adds it to serve.allow_recipes",
            key="recipe.use",
        )


def shaping_tree(section: BaseModel) -> dict[str, Any]:
    """The keys of a configuration that shape outputs, as a tree of JSON values.

    A run keeps them for its life, while operational keys follow the operator's configuration.
    """
    tree: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if is_operational(field) or value is None:
            continue
        if isinstance(value, BaseModel):
            tree[name] = shaping_tree(value)
        else:
            tree[name] = section.model_dump(mode="json", include={name}, exclude_none=True)[name]
    return tree


def template_layer(root: Path, names: Mapping[str, str]) -> dict[str, Any]:
    """The keys that point a run to its own templates; `names` are those that a client sent."""
    return {name: {"template": str(template_path(root, name))} for name in names}


def template_path(root: Path, name: str) -> Path:
    """Where the text of a run's template is kept."""
    return root / "templates" / f"{name}.j2"


def _merge(tree: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for name, value in layer.items():
        below = tree.get(name)
        if isinstance(below, dict) and isinstance(value, Mapping) and name not in _WHOLE:
            _merge(below, value)
        else:
            tree[name] = value


_WHOLE: Final = frozenset({"options", "sampling", "models", "distractors", "target_tokens"})
"""Keys whose value is a table: a client's replaces the operator's."""


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """The keys of a tree, dotted. A table that is the value of a key is not looked into."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and name not in _WHOLE:
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _is_known(key: str, known: list[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in known)


def _check_at_most(key: str, value: Any, base: Config) -> None:
    section, _, name = key.partition(".")
    most = getattr(getattr(base, section), name)
    if isinstance(value, int) and value > most:
        raise Problem(422, f"{key}: expected at most {most}, which the operator set (got {value})", key=key)


def _section(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = tree.get(name)
    return section if isinstance(section, Mapping) else {}
