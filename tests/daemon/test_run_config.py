"""What a client may configure: what is written and how much; never a file, a module or a server."""

from typing import Any

import pytest

from streamsyn.config.loading import Config, known_keys, load
from streamsyn.daemon.problems import Problem
from streamsyn.daemon.run_config import ALLOWED, AT_MOST, check_given, run_config, shaping_tree
from tests.daemon.conftest import Served
from tests.examples import in_turn

OPERATORS = frozenset(
    {
        # files, directories and data sets, of this machine or elsewhere
        *("seeds.sources", "seeds.sources.*.path", "seeds.sources.*.weight", "seeds.sources.*.task"),
        *(
            "seeds.interleave",
            "seeds.partition",
            "seeds.task_losses",
            "seeds.task_window",
            "seeds.task_exponent",
        ),
        *("recipe.template", "recipe.tasks.*.template", "scoring.template", "checks.eval_sets"),
        *("checks.eval_ngram_words", "assembly.corpus", "assembly.corpus_field", "assembly.corpus_words"),
        *("assembly.tokenizer", "assembly.template", "assembly.tasks.*.template", "sink.mirror"),
        "sink.mirror_timeout_s",
        # servers, and what all runs share
        *("fleet.servers", "fleet.servers.*.url", "fleet.servers.*.weight", "fleet.servers.*.key_env"),
        *("fleet.servers_file", "fleet.servers_dns", "fleet.discover_interval_s", "fleet.tls_ca"),
        *("fleet.tls_cert", "fleet.concurrency", "fleet.max_in_flight", "fleet.load_interval_s"),
        *("fleet.slow_start_s", "fleet.balance_factor", "fleet.connect_timeout_s", "fleet.eject_after"),
        *("fleet.probe_interval_s", "fleet.give_up_s", "run.metrics_listen", "run.traces"),
        *(
            "scoring.servers",
            "scoring.servers.*.url",
            "scoring.servers.*.weight",
            "scoring.servers.*.key_env",
        ),
    }
)
"""Keys that name something of the machine or the network, or are shared by all runs."""
TABLES = {"recipe.tasks", "assembly.tasks"} | {
    f"assembly.target_tokens.{name}" for name in ("uniform", "log_uniform", "choices", "weights", "schedule")
}
"""Tables whose keys are listed one by one, and keys of a table that is a value."""


def nested(key: str, value: Any) -> dict[str, Any]:
    """The tree with one key."""
    *sections, name = key.split(".")
    tree: dict[str, Any] = {name: value}
    for section in reversed(sections):
        tree = {section: tree}
    return tree


def test_each_key_is_either_the_clients_or_the_operators() -> None:
    """A new key belongs to one of the lists: nothing is allowed, nor refused, by accident."""
    keys = {key for key in known_keys() if key.partition(".")[0] not in {"cluster", "serve", "train"}}
    fields = {key for key in keys if key.startswith("seeds.fields.")}
    clients = (ALLOWED - {"seeds.fields.*"}) | AT_MOST | fields

    assert keys == clients | OPERATORS | TABLES
    assert not clients & OPERATORS


@in_turn("key", [*sorted(OPERATORS), "cluster.command", "serve.tokens_file", "train.model"])
def test_the_operators_keys_are_refused_by_name(key: str) -> None:
    """The message names the key as the client wrote it, and says what to do."""
    key = key.replace("*", "qa")
    with pytest.raises(Problem, match=key.partition(".qa.")[0]) as raised:
        check_given(nested(key, "/etc/passwd"), Config())
    assert raised.value.status == 422


@in_turn(
    ("given", "what"),
    [
        ({"recipe": {"use": "os:system"}}, "serve.allow_recipes"),
        ({"recipe": {"sampling": {"top_p": 0.9, "lora_path": "/x"}}}, "recipe.sampling.lora_path cannot"),
        ({"recipe": {"sampling": {"bootstrap_host": "10.0.0.1"}}}, "recipe.sampling.bootstrap_host cannot"),
        ({"recipe": {"target_word": 5}}, "the nearest known one is recipe.target_words"),
        ({"recipe.template": {"x": 1}}, "unknown key recipe.template.x"),
        ({"seeds": {"max_line_bytes": 2**40}}, "seeds.max_line_bytes: expected at most 8388608"),
        ({"recipes": {}, "nonsense": {"a": 1}}, "unknown key nonsense.a"),
    ],
)
def test_mistakes_are_named(given: dict[str, Any], what: str) -> None:
    """Unknown keys, recipes that are not allowed, limits that are too high."""
    with pytest.raises(Problem, match=what):
        check_given(given, Config())


def test_the_operators_configuration_is_the_base() -> None:
    """A client's keys go on top; the daemon's own are left out; plug-ins need the operator's word."""
    base = load(
        None,
        [
            ("recipe.target_words", 70),
            ("recipe.sampling", {"top_p": 0.5}),
            ("serve.allow_recipes", ["mine:Recipe"]),
            ("assembly.tasks", {"qa": {"family": "general"}}),
        ],
    )
    given = {
        "recipe": {"use": "mine:Recipe", "sampling": {"top_k": 3}},
        "assembly": {"tasks": {"summary": {"family": "summary"}}},
    }

    check_given(given, base)
    config = run_config(base, given)

    assert (config.recipe.use, config.recipe.target_words) == ("mine:Recipe", 70)
    assert config.recipe.sampling == {"top_k": 3}
    assert set(config.assembly.tasks) == {"qa", "summary"}
    assert config.serve == Config().serve


def test_what_shapes_outputs_stays_as_it_was() -> None:
    """When the operator changes the configuration, a run keeps what shapes its rows."""
    before = load(None, [("recipe.target_words", 70), ("assembly.target_tokens", {"choices": [100, 200]})])
    shaping = shaping_tree(run_config(before, {}))
    after = load(None, [("recipe.target_words", 99), ("fleet.request_timeout_s", 5.0)])

    config = run_config(after, shaping)

    assert config.recipe == before.recipe
    assert config.assembly == before.assembly
    assert config.fleet.request_timeout_s == 5.0


async def test_refusals_over_http(daemon: Served) -> None:
    """A refused configuration creates nothing; values are checked as in a configuration file."""
    for config, what in (
        ({"recipe": {"template": "/etc/passwd"}}, "templates.recipe"),
        ({"recipe": {"target_words": "many"}}, "recipe.target_words: expected a whole number"),
        ({"recipe": {"use": "contxt"}}, "the nearest is 'context'"),
    ):
        problem = await daemon.refused("POST", "/v1/runs", {"id": "no", "config": config})
        assert problem["status"] == 422
        assert what in problem["detail"]
    assert (await daemon.ask("GET", "/v1/runs"))["data"] == []
