"""Which model a run uses, and which choices are left to the user."""

import re
from typing import Any

import pytest

from streamsyn.config.sections import FleetSection
from streamsyn.errors import ConfigError, FleetGone, ServerUnavailable, StreamsynError, WrongAddress
from streamsyn.fleet.fleet import open_fleet
from streamsyn.fleet.models import agreed_models, listed
from streamsyn.fleet.transport import Reply
from tests.examples import in_turn
from tests.fleet.scripted import ScriptedServers

ONE, TWO = "http://one:1", "http://two:1"


@in_turn(
    ("served", "wanted", "agreed"),
    [
        ({ONE: ["a"], TWO: ["a"]}, {}, ["a"]),
        ({ONE: ["a", "a"]}, {}, ["a"]),
        ({ONE: ["a", "b"], TWO: ["b"]}, {}, ["b"]),
        ({ONE: ["a", "b"]}, {"model": "b"}, ["b"]),
        ({ONE: ["a", "b"], TWO: ["b"]}, {"models": {"b": 1, "a": 2}}, ["b", "a"]),
    ],
)
def test_models_that_are_agreed_on(
    served: dict[str, list[str]], wanted: dict[str, Any], agreed: list[str]
) -> None:
    """The configured ones, or the only one that all servers serve."""
    assert agreed == agreed_models(served, FleetSection(**wanted))


@in_turn(
    ("served", "wanted", "said"),
    [
        ({ONE: ["a", "b", "c"]}, {}, "serve several models (a, b, c); set fleet.model to use one"),
        ({ONE: ["a", "b"], TWO: ["b", "a"]}, {}, "serve several models (a, b); set fleet.model"),
        ({ONE: ["a"], TWO: ["b"]}, {}, f"{ONE} serves a; {TWO} serves b. Set fleet.model"),
        ({ONE: []}, {}, f"{ONE} serves no model"),
        ({ONE: ["a", "b"]}, {"model": "c"}, f"fleet.model: {ONE} serves a, b, not c"),
        ({ONE: ["a"]}, {"models": {"c": 1}}, f"fleet.models: {ONE} serves a, none of c"),
    ],
)
def test_a_choice_is_asked_for(served: dict[str, list[str]], wanted: dict[str, Any], said: str) -> None:
    """The message lists what is served, and names the key."""
    with pytest.raises(ConfigError, match=re.escape(said)):
        agreed_models(served, FleetSection(**wanted))


def test_of_many_models_a_few_are_listed() -> None:
    """Those most like the wanted one first."""
    many = [f"model-{number:03}" for number in range(300)]
    assert listed(many).endswith("model-018, model-019 and 280 more")
    assert listed(many, "modell-250").startswith("model-250, ")


async def at_start(servers: ScriptedServers, *urls: str, **options: Any) -> list[str] | StreamsynError:
    """The models of a fleet that has just been opened, or why it cannot be used."""
    section = FleetSection(servers=urls, give_up_s=0.05, probe_interval_s=0.01, **options)
    async with open_fleet(section, lambda _: None, {}, connect=servers.connect) as fleet:
        try:
            await fleet.ask_models()
        except StreamsynError as error:
            return error
        return fleet.models


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"/health": Reply(200, b"")},
        {"/v1/models": WrongAddress("it redirects to /v1/models")},
        {"/v1/models": Reply(200, b"<!doctype html>")},
    ],
)
async def test_wrong_addresses_are_a_mistake(wrong: dict[str, Reply | Exception]) -> None:
    """No wait where every server says that there is no API: the run cannot begin."""
    error = await at_start(ScriptedServers({ONE: wrong, TWO: wrong}), ONE, TWO)
    assert isinstance(error, ConfigError)
    assert 2 == len(str(error).split("; "))


async def test_one_wrong_address_among_others_is_waited_for() -> None:
    """It is an outage where a server is down, and no matter where one answers."""
    good: dict[str, Reply | Exception] = {"/v1/models": Reply(200, b'{"data": [{"id": "a"}]}')}
    assert ["a"] == await at_start(ScriptedServers({TWO: good}), ONE, TWO)
    down: dict[str, Reply | Exception] = {"/health": ServerUnavailable("down")}
    assert isinstance(await at_start(ScriptedServers({TWO: down}), ONE, TWO), FleetGone)


async def test_the_query_of_a_url_goes_along() -> None:
    """The URL names the server without it; the transport gets it."""
    good: dict[str, Reply | Exception] = {"/v1/models": Reply(200, b'{"data": [{"id": "a"}]}')}
    servers = ScriptedServers({ONE: good})
    await at_start(servers, f"{ONE}/v1/chat/completions?api-version=2024-02-01")
    assert [(ONE, "api-version=2024-02-01")] == [(spec.url, spec.query) for spec in servers.opened]
