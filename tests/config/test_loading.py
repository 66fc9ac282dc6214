"""Loading the configuration: errors name the key, absent keys have documented defaults."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from streamsyn.config.fields import Section
from streamsyn.config.fingerprint import fingerprint, with_absolute_paths
from streamsyn.config.loading import Config, known_keys, load, parse_override
from streamsyn.config.toml_text import meanings
from streamsyn.errors import ConfigError
from tests.examples import in_turn

Written = Callable[[str], Path]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """Writes a configuration file and says where it is."""

    def write(text: str) -> Path:
        path = tmp_path / "run.toml"
        path.write_text(text, "utf-8")
        return path

    return write


def value_at(config: Config, key: str) -> Any:
    """What a dotted key stands for."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def sections(kind: type[BaseModel]) -> list[type[BaseModel]]:
    """A section and all below it, also those in lists and tables."""
    below = [
        part
        for field in kind.model_fields.values()
        for part in (field.annotation, *get_args(field.annotation))
        if isinstance(part, type) and issubclass(part, Section)
    ]
    return [kind, *(deeper for part in below for deeper in sections(part))]


@in_turn(
    ("key", "default"),
    [
        ("run.seed", 0),
        ("run.max_reject_fraction", 0.5),
        ("run.drain_timeout_s", 60.0),
        ("seeds.max_line_bytes", 8 * 1024 * 1024),
        ("recipe.use", "context"),
        ("recipe.target_words", 2000),
        ("recipe.contexts_per_seed", 1),
        ("recipe.max_tokens", 4096),
        ("recipe.temperature", 0.8),
        ("fleet.request_timeout_s", 600.0),
        ("fleet.give_up_s", 300.0),
        ("fleet.max_in_flight", 2048),
        ("checks.min_words", 50),
        ("sink.sync_interval_s", 1.0),
        ("sink.shard_bytes", 128 * 1024 * 1024),
        ("sink.compression", "none"),
        ("assembly.contexts_per_sample", 10),
        ("assembly.target_tokens", None),
        ("assembly.write", True),
    ],
)
def test_the_keys_that_others_rely_on(key: str, default: Any) -> None:
    """These names and defaults are promised: scripts and other programs set them."""
    assert key in known_keys()
    assert default == value_at(load(None), key)


@pytest.mark.parametrize("section", sections(Config), ids=lambda section: section.__name__)
def test_every_key_has_a_description(section: type[Section]) -> None:
    """`streamsyn config` prints the description of each key."""
    undescribed = [
        name
        for name in section.model_fields
        if section is not Config and not meanings(section).get(name, "").strip()
    ]

    assert [] == undescribed
    assert section.__doc__


def test_known_keys_reach_into_lists_and_tables() -> None:
    """Keys below a task's name or a source's number are known too."""
    assert {
        "seeds.sources.*.weight",
        "seeds.fields.answer",
        "recipe.tasks.*.target_words",
        "assembly.tasks.*.family",
    } <= set(known_keys())


def test_the_file_is_laid_over_the_defaults(written: Written) -> None:
    """What the file leaves out stays as it is."""
    config = load(written("[recipe]\ntarget_words = 300\n[recipe.tasks.qa]\ntarget_words = 50\n"))

    assert (300, 50, 4096) == (
        config.recipe.target_words,
        config.recipe.tasks["qa"].target_words,
        config.recipe.max_tokens,
    )


def test_overrides_are_laid_over_the_file(written: Written) -> None:
    """Flags win over the file, and a later flag over an earlier one; what they do not name stays."""
    path = written("[recipe]\ntarget_words = 300\ntemperature = 0.1\n")

    config = load(path, [("recipe.target_words", 400), ("recipe.target_words", 500), ("run.seed", 7)])

    assert (500, 0.1, 7) == (config.recipe.target_words, config.recipe.temperature, config.run.seed)


def test_overrides_reach_below_tables() -> None:
    """A dotted key makes the tables on its way."""
    config = load(None, [("recipe.tasks.qa.target_words", 10), ("recipe.sampling.top_p", 0.9)])

    assert (10, {"top_p": 0.9}) == (config.recipe.tasks["qa"].target_words, config.recipe.sampling)


def test_values_of_flags_may_be_text() -> None:
    """A number that comes as text, as from a shell, is a number."""
    assert 12 == load(None, [("recipe.target_words", "12")]).recipe.target_words


def test_a_configuration_cannot_be_edited() -> None:
    """Sections are frozen: what run.json says is what ran."""
    config = load(None)

    with pytest.raises(ValidationError, match="frozen"):
        config.run.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "unknown", "nearest"),
    [
        ("[recpie]\nuse = 'x'", "recpie", "recipe"),
        ("[recipe]\ntarget_wrods = 5", "recipe.target_wrods", "recipe.target_words"),
        ("[seeds.feilds]\nanswer = 'x'", "seeds.feilds", "seeds.fields"),
        ("[seeds.fields]\nanswr = 'x'", "seeds.fields.answr", "seeds.fields.answer"),
        ("[[seeds.sources]]\npath = 'a'\nwieght = 1", "seeds.sources.0.wieght", "seeds.sources.0.weight"),
        ("[recipe.tasks.qa]\ntarget_word = 5", "recipe.tasks.qa.target_word", "recipe.tasks.qa.target_words"),
        ("[assembly.tasks.qa]\nfamliy = 'x'", "assembly.tasks.qa.famliy", "assembly.tasks.qa.family"),
        ("temperature = 0.5", "temperature", "recipe.temperature"),
        ("[fleet]\ntemperature = 0.5", "fleet.temperature", "recipe.temperature"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(
    written: Written, text: str, unknown: str, nearest: str
) -> None:
    """At every level a typo is refused, and the message suggests the nearest key."""
    path = written(text)

    with pytest.raises(ConfigError) as raised:
        load(path)

    assert f"{path}: unknown key {unknown}; the nearest known one is {nearest}" == str(raised.value)


def test_an_unknown_key_in_an_override_is_named() -> None:
    """`--set` is checked as the file is; the message blames no file."""
    with pytest.raises(ConfigError) as raised:
        load(None, [("fleet.max_inflight", 3)])

    expected = "unknown key fleet.max_inflight; the nearest known one is fleet.max_in_flight"
    assert expected == str(raised.value)


@in_turn(
    ("key", "value"),
    [
        ("run.seed", 1.5),
        ("run.seed", "many"),
        ("run.max_reject_fraction", 1.1),
        ("run.drain_timeout_s", 0),
        ("recipe.target_words", 0),
        ("recipe.temperature", float("nan")),
        ("recipe.temperature", -0.1),
        ("recipe.on_truncated", "perhaps"),
        ("recipe", 3),
        ("recipe.tasks.qa", 3),
        ("recipe.tasks.qa.target_words", "long"),
        ("fleet.servers", "http://localhost:30000"),
        ("fleet.max_in_flight", -1),
        ("sink.compression", "gzip"),
        ("seeds.limit", 0),
    ],
)
def test_a_wrong_value_is_named_by_its_key(key: str, value: Any) -> None:
    """The message is one line that starts with the key and shows what was got."""
    with pytest.raises(ConfigError) as raised:
        load(None, [(key, value)])

    message = str(raised.value)
    assert message.startswith(f"{key}: ")
    assert message.endswith(f"(got {value!r})")
    assert "\n" not in message


def test_all_mistakes_are_reported_at_once(written: Written) -> None:
    """One start is enough to find three mistakes."""
    path = written("[run]\nseed = 'x'\n[recipe]\ntarget_words = -1\nuze = 'context'\n")

    with pytest.raises(ConfigError) as raised:
        load(path)

    message = str(raised.value)
    assert [True] * 3 == [key in message for key in ("run.seed: ", "recipe.target_words: ", "recipe.use")]


@in_turn("name", ["messages", "model", "n", "rid", "stream", "stream_options"])
def test_fields_of_our_own_are_no_sampling_parameters(name: str) -> None:
    """`recipe.sampling` must not change what is asked for and how it is answered."""
    with pytest.raises(ConfigError, match=f"recipe.sampling: streamsyn sets {name} itself; remove it"):
        load(None, [(f"recipe.sampling.{name}", 1)])


def test_a_key_below_a_value_is_refused() -> None:
    """`run.seed.x` is unknown because `run.seed` is a number."""
    with pytest.raises(ConfigError) as raised:
        load(None, [("run.seed", 1), ("run.seed.x", 2)])

    assert str(raised.value).startswith("unknown key run.seed.x: ")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"[run\nseed = 1", id="syntax"),
        pytest.param(b"seed = \xff", id="encoding"),
        pytest.param(b"[run]\nseed = " + b"1" * 5000, id="huge number"),
        pytest.param(b"[run]\nseed = 1\nseed = 2", id="key twice"),
    ],
)
def test_an_invalid_file_is_named(tmp_path: Path, content: bytes) -> None:
    """The error for invalid TOML names the file."""
    path = tmp_path / "run.toml"
    path.write_bytes(content)

    with pytest.raises(ConfigError, match=r"run\.toml"):
        load(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """A missing file, or a directory in its place, is a configuration error."""
    for path in (tmp_path / "missing.toml", tmp_path):
        with pytest.raises(ConfigError) as raised:
            load(path)

        assert str(raised.value).startswith(f"cannot read the configuration {path}: ")


@in_turn(
    ("text", "expected"),
    [
        ("run.seed=3", ("run.seed", 3)),
        (" run.seed = 3", ("run.seed", 3)),
        ("recipe.temperature=0.5", ("recipe.temperature", 0.5)),
        ("assembly.write=false", ("assembly.write", False)),
        ('recipe.use="context"', ("recipe.use", "context")),
        ("recipe.use=context", ("recipe.use", "context")),
        ("fleet.servers=['http://a', 'http://b']", ("fleet.servers", ["http://a", "http://b"])),
        ("recipe.sampling={top_p = 0.9}", ("recipe.sampling", {"top_p": 0.9})),
        ("recipe.template=/a/b=c.j2", ("recipe.template", "/a/b=c.j2")),
        ("recipe.use=", ("recipe.use", "")),
        ("run.seed=" + "1" * 5000, ("run.seed", "1" * 5000)),
    ],
)
def test_an_override_is_toml_or_else_text(text: str, expected: tuple[str, Any]) -> None:
    """The first `=` parts key and value; quotes are not needed round plain words."""
    assert expected == parse_override(text)


@pytest.mark.parametrize("text", ["run.seed", "", "=3", "  =3"])
def test_an_override_without_key_or_value_is_refused(text: str) -> None:
    """The message says what an override looks like."""
    with pytest.raises(ConfigError) as raised:
        parse_override(text)

    assert str(raised.value).startswith(f"--set {text!r}: ")


@settings(deadline=None)
@given(text=st.text())
def test_whatever_is_set_is_taken_or_refused_by_name(text: str) -> None:
    """No text on the command line ends in anything but a configuration or a ConfigError."""
    message = "recipe.target_words: taken"
    try:
        load(None, [parse_override("recipe.target_words=" + text)])
    except ConfigError as error:
        message = str(error)

    assert message.startswith("recipe.target_words: ")


@in_turn(
    ("key", "value"),
    [
        ("run.max_reject_fraction", 0.5),
        ("run.drain_timeout_s", 1.0),
        ("run.queue_size", 3),
        ("seeds.sources", [{"path": "x.jsonl"}]),
        ("seeds.interleave", True),
        ("seeds.limit", 3),
        ("fleet.servers", ["http://a"]),
        ("fleet.model", "m"),
        ("fleet.max_in_flight", 1),
        ("fleet.request_timeout_s", 1.0),
        ("fleet.give_up_s", 1.0),
        ("sink.sync_interval_s", 9.0),
        ("sink.shard_bytes", 9),
    ],
)
def test_operational_keys_stay_out_of_the_fingerprint(key: str, value: Any) -> None:
    """A run may be resumed with other servers, limits and timeouts."""
    assert fingerprint(load(None)) == fingerprint(load(None, [(key, value)]))


@in_turn(
    ("key", "value"),
    [
        ("run.seed", 1),
        ("seeds.fields.answer", "gold"),
        ("recipe.use", "other"),
        ("recipe.target_words", 1),
        ("recipe.contexts_per_seed", 2),
        ("recipe.max_tokens", 1),
        ("recipe.temperature", 0.1),
        ("recipe.sampling.top_p", 0.9),
        ("recipe.tasks.qa.target_words", 1),
        ("recipe.tries", 1),
        ("checks.min_words", 1),
        ("checks.refusal", False),
        ("assembly.contexts_per_sample", 2),
        ("assembly.target_tokens", 1000),
        ("assembly.tasks.qa.family", "summary"),
        ("assembly.write", False),
    ],
)
def test_shaping_keys_are_in_the_fingerprint(key: str, value: Any) -> None:
    """What shapes outputs is compared when a run is resumed, and named by its key."""
    default, changed = fingerprint(load(None)), fingerprint(load(None, [(key, value)]))

    assert value == changed[key]
    assert [key] == [at for at in changed if changed[at] != default.get(at)]


def test_a_template_counts_by_its_text(tmp_path: Path) -> None:
    """The same template elsewhere is the same; another text at the same place is not."""
    here, there = tmp_path / "a.j2", tmp_path / "b.j2"
    here.write_text("Write é.", "utf-8")
    there.write_text("Write é.", "utf-8")
    before = fingerprint(load(None, [("recipe.template", str(here))]))
    moved = fingerprint(load(None, [("recipe.template", str(there))]))
    here.write_text("Write more.", "utf-8")
    edited = fingerprint(load(None, [("recipe.template", str(here))]))

    assert before == moved
    assert ("Write é.", "Write more.") == (before["recipe.template"], edited["recipe.template"])


@pytest.mark.parametrize("key", ["recipe.template", "recipe.tasks.qa.template", "assembly.template"])
def test_a_template_that_cannot_be_read_is_named_by_its_key(tmp_path: Path, key: str) -> None:
    """A missing template is a configuration error, not a crash."""
    with pytest.raises(ConfigError) as raised:
        fingerprint(load(None, [(key, str(tmp_path / "missing.j2"))]))

    assert str(raised.value).startswith(f"{key}: cannot read {tmp_path / 'missing.j2'}: ")


@in_turn(
    ("key", "value", "expected"),
    [
        ("fleet.concurrency", 0, "fleet.concurrency: expected 'auto' or at least 1 (got 0)"),
        ("fleet.concurrency", True, "fleet.concurrency: expected 'auto' or expected a number, not true"),
        ("fleet.hedge_tail", 5, "fleet.hedge_tail: "),
        ("fleet.models", {"m": True}, "fleet.models.m: "),
        ("fleet.servers", [{"url": "u", "keyenv": "K"}], "the nearest known one is fleet.servers.0.key_env"),
        ("fleet.servers", [{"url": "u", "weight": 0}], "fleet.servers.0.weight: expected more than 0"),
        ("fleet.servers", [3], "fleet.servers.0: expected text or a table (got 3)"),
    ],
)
def test_values_of_several_kinds(key: str, value: Any, expected: str) -> None:
    """Where a value may have several types, one problem is reported once, at its key."""
    with pytest.raises(ConfigError) as raised:
        load(None, [(key, value)])
    assert expected in str(raised.value)
    assert "constrained" not in str(raised.value)
    assert ";" not in str(raised.value).replace("; the nearest", "")


def test_paths_are_kept_so_that_they_hold_from_anywhere() -> None:
    """A run resumed from a different working directory finds the same files."""
    saved = with_absolute_paths(load(None, [("seeds.task_losses", "tuned/task_losses.json")]))

    assert str(Path("tuned/task_losses.json").absolute()) == saved["seeds"]["task_losses"]
    assert with_absolute_paths(Config())["seeds"]["task_losses"] is None


@in_turn(
    ("key", "value", "expected"),
    [
        ("fleet.servers", "http://x:1", "fleet.servers: expected a list (got 'http://x:1')"),
        ("recipe.tasks", 3, "recipe.tasks: expected a table (got 3)"),
        ("recipe.target_words", "many", "recipe.target_words: expected a whole number (got 'many')"),
        ("sink.compression", "zst", "expected 'none' or 'zstd' (got 'zst'); did you mean 'zstd'?"),
        ("recipe.lr", 1, "unknown key recipe.lr; the nearest known one is train.learning_rate"),
        ("train.lr", 1, "unknown key train.lr; the nearest known one is train.learning_rate"),
        ("recipe.max_in_flight", 1, "the nearest known one is fleet.max_in_flight"),
        ("sink.qqqqq", 1, "unknown key sink.qqqqq; the keys there are "),
    ],
)
def test_mistakes_are_in_plain_words(key: str, value: Any, expected: str) -> None:
    """What is expected, what was given, and the likely key, whatever other software calls it."""
    with pytest.raises(ConfigError) as raised:
        load(None, [(key, value)])
    assert expected in str(raised.value)


def test_no_words_of_a_library_reach_a_person() -> None:
    """For every key, with values of every kind."""
    refused: list[str] = []
    for key in known_keys():
        for value in ("q?", -1, 10**30, 1.5, True, [], ["q?"], {}, {"q?": "q?"}, [[1]], float("nan")):
            try:
                load(None, [(key.replace("*", "0"), value)])
            except ConfigError as error:
                refused.append(str(error).partition(" (got ")[0])
    assert len(refused) > 500
    assert [] == [text for text in refused if "Input should" in text or " valid " in text]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("seeds.jsonl", "seeds are given with --seeds seeds.jsonl"),
        ("http://127.0.0.1:30000", "servers are given with --server URL"),
    ],
)
def test_what_is_in_the_place_of_the_configuration(
    name: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of seeds or a URL given as the configuration: the message says where it belongs."""
    monkeypatch.chdir(tmp_path)
    Path("seeds.jsonl").write_text('{"instruction": "i", "answer": "a"}\n')
    with pytest.raises(ConfigError, match=expected):
        load(Path(name))
