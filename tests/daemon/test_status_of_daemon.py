"""`streamsyn status URL`."""

import pytest

from streamsyn.errors import ConfigError, ServerUnavailable
from streamsyn.pipeline.status import daemon_status, daemon_status_lines
from tests.daemon.conftest import Served


async def test_a_daemon_and_its_runs_are_shown(daemon: Served) -> None:
    empty = await daemon_status(daemon.url)
    assert next(daemon_status_lines(empty)).startswith("no runs yet")
    await daemon.new_run("one")
    await daemon.new_run("two")
    await daemon.submit("one", 3)
    await daemon.ask("POST", "/v1/runs/one/close")
    await daemon.until_state("one", "finished")
    found = await daemon_status(f"{daemon.url}/")
    lines = list(daemon_status_lines(found))

    assert {"one": "finished", "two": "running"} == {run["id"]: run["state"] for run in found["runs"]}
    assert "run one: finished" in lines
    assert any(line.startswith("  outcomes   3 contexts, 0 rejects of 3 seeds") for line in lines)
    assert any(line.startswith("server ") and ": usable; " in line for line in lines)
    one = await daemon_status(f"{daemon.url}/v1/runs/one")
    assert ("one", 3) == (one["id"], one["counts"]["samples"])
    assert list(daemon_status_lines(one)) == lines[lines.index("run one: finished") :][:3]


async def test_what_cannot_be_shown_is_named(daemon: Served) -> None:
    with pytest.raises(ConfigError, match="/v1/runs/none does not exist"):
        await daemon_status(f"{daemon.url}/v1/runs/none")
    with pytest.raises(ConfigError, match="expected http://HOST:PORT"):
        await daemon_status(f"{daemon.url}/?a=b")
    with pytest.raises(ServerUnavailable, match="cannot connect"):
        await daemon_status("http://127.0.0.1:9")
