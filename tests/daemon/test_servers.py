"""`/v1/servers`: servers are added, drained and removed while the daemon runs, and kept across restarts."""

import asyncio
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import orjson
import pytest

from streamsyn.config.loading import load
from streamsyn.daemon.daemon import open_daemon
from streamsyn.daemon.root import SERVERS_FILE, read_edits, save_edits
from streamsyn.errors import ConfigError
from streamsyn.fleet.server_spec import ServerSpec
from streamsyn.fleet.shared_servers import ServerEdits
from tests.daemon.conftest import QUICK, SERVER, Served, StartDaemon

OTHER = "http://gpu-2:30000"


async def names(served: Served) -> dict[str, str]:
    """The servers that are listed, with their states."""
    listed = await served.ask("GET", "/v1/servers")
    return {server["url"]: server["state"] for server in listed["data"]}


async def usable(served: Served, url: str = SERVER) -> dict[str, Any]:
    """A server once it is usable."""
    async with asyncio.timeout(20):
        while True:
            listed = await served.ask("GET", "/v1/servers")
            for server in listed["data"]:
                if (server["url"], server["state"]) == (url, "usable"):
                    return dict(server)


async def test_what_each_server_does(daemon: Served) -> None:
    await usable(daemon)
    await daemon.new_run("a")
    await daemon.submit("a", 12)
    await daemon.until("a", lambda run: run.as_json()["counts"]["contexts"] == 12)
    [server] = (await daemon.ask("GET", "/v1/servers"))["data"]
    assert {
        "name": "gpu-1:30000",
        "url": SERVER,
        "state": "usable",
        "model": "simulated",
        "weight": 1.0,
        "completions": 12,
        "failures": 0,
        "error": None,
    } == {
        key: server[key]
        for key in ("name", "url", "state", "model", "weight", "completions", "failures", "error")
    }
    assert server["cap"] > 0
    assert 0 <= server["cached_share"] <= 1
    prefix = (await daemon.ask("GET", "/v1/runs/a"))["prefix"]
    assert prefix["achieved"] == pytest.approx(server["cached_share"])


async def test_a_server_that_dies_shows_no_load(daemon: Served) -> None:
    """It is shown with the models that it serves, before any run wants one, and with why it was ejected."""
    assert "simulated" == (await usable(daemon))["model"]
    await daemon.new_run("a")
    daemon.simulation.go_down()
    await daemon.submit("a", 2)
    async with asyncio.timeout(20):
        while (server := (await daemon.ask("GET", "/v1/servers"))["data"][0])["state"] != "ejected":
            pass
    assert server["tokens_per_s"] is None
    assert server["failures"] > 0
    assert "connection" in server["error"]
    assert 503 == (await daemon.refused("GET", "/readyz"))["status"]
    daemon.simulation.come_up()
    await daemon.until("a", lambda run: run.as_json()["counts"]["contexts"] == 2)
    assert (await usable(daemon))["error"] is None


async def test_a_run_waits_for_its_first_server(start_daemon: StartDaemon) -> None:
    """The daemon starts without servers; what is added is used, and is there after a restart."""
    async with start_daemon({"fleet.servers": []}) as served:
        assert {} == await names(served)
        problem = await served.refused("GET", "/readyz")
        assert (503, True) == (problem["status"], "POST /v1/servers" in problem["detail"])
        await served.new_run("a")
        await served.submit("a", 4)
        added = await served.ask("POST", "/v1/servers", {"url": f"{SERVER}/v1"})
        assert (SERVER, "gpu-1:30000") == (added["url"], added["name"])
        await served.until("a", lambda run: run.as_json()["counts"]["contexts"] == 4)
        assert {"status": "ready"} == await served.ask("GET", "/readyz")
    async with start_daemon({"fleet.servers": []}) as served:
        await usable(served)


async def test_drained_and_removed_across_restarts(start_daemon: StartDaemon) -> None:
    """By name or percent-encoded URL; added again, a server is used again."""
    async with start_daemon() as served:
        await usable(served)
        await served.ask("POST", "/v1/servers", {"url": OTHER, "weight": 2.0})
        assert "draining" == (await served.ask("POST", "/v1/servers/gpu-1:30000/drain"))["state"]
        await served.ask("DELETE", f"/v1/servers/{quote(OTHER, safe='')}")
        assert {SERVER: "draining"} == await names(served)
    async with start_daemon() as served:
        assert {SERVER: "draining"} == await names(served)
        async with served.session.post("/v1/servers", json={"url": SERVER}) as answer:
            assert 200 == answer.status
        await usable(served)
        await served.ask("DELETE", "/v1/servers/gpu-1:30000")
        assert {} == await names(served)
    async with start_daemon() as served:
        assert {} == await names(served)


async def test_a_server_that_cannot_be_used(daemon: Served) -> None:
    """It is listed with the reason, and nothing else changes."""
    await usable(daemon)
    await daemon.ask("POST", "/v1/servers", {"url": OTHER})
    async with asyncio.timeout(10):
        while True:
            servers = {server["url"]: server for server in (await daemon.ask("GET", "/v1/servers"))["data"]}
            if servers[OTHER]["error"]:
                break
    assert ("starting", "usable") == (servers[OTHER]["state"], servers[SERVER]["state"])
    assert "connection refused" in servers[OTHER]["error"]


CANNOT_BE_ADDED: list[tuple[Any, int, str]] = [
    ({"url": "ftp://x"}, 422, "not a valid URL"),
    ({"url": "http://user:geheim@gpu-2:1"}, 422, "set key_env"),
    ({"url": f"{OTHER}/v1?api_key=geheim"}, 422, "set key_env"),
    ({"url": OTHER, "weight": 0}, 422, "weight"),
    ({"url": OTHER, "key_env": "AWS_SECRET"}, 403, "must begin with STREAMSYN_"),
    ({"url": OTHER, "key_env": "STREAMSYN_NOT_SET"}, 422, "STREAMSYN_NOT_SET is not set"),
    ({"url": OTHER, "colour": 1}, 422, "colour"),
    ({}, 422, "url"),
]


async def test_what_cannot_be_added(daemon: Served) -> None:
    """The problem says why; no secret is in it; nothing has changed."""
    for body, status, said in CANNOT_BE_ADDED:
        problem = await daemon.refused("POST", "/v1/servers", body)
        assert status == problem["status"], body
        assert said in problem["detail"]
        assert "geheim" not in str(problem)
    assert [SERVER] == list(await names(daemon))


async def test_servers_that_do_not_exist(daemon: Served) -> None:
    for method, path in (("DELETE", "/v1/servers/gpu-9:1"), ("POST", "/v1/servers/gpu-9:1/drain")):
        problem = await daemon.refused(method, path)
        assert (404, True) == (problem["status"], "there are: gpu-1:30000" in problem["detail"])


async def test_a_password_of_the_configuration_is_never_shown(start_daemon: StartDaemon) -> None:
    async with start_daemon({"fleet.servers": ["http://user:geheim@gpu-1:30000"]}) as served:
        server = await usable(served)
        assert "geheim" not in str(server)
        assert SERVER == server["url"]


def test_edits_are_kept_whole(tmp_path: Path) -> None:
    """Without a file there are none; a damaged one is a mistake that names it."""
    assert ServerEdits() == read_edits(tmp_path)
    spec = ServerSpec(OTHER, 2.0, "STREAMSYN_KEY", query="api-version=1")
    edits = ServerEdits({OTHER: spec}, {SERVER}, {OTHER})
    save_edits(tmp_path, edits)
    assert edits == read_edits(tmp_path)
    assert 1 == orjson.loads((tmp_path / SERVERS_FILE).read_bytes())["format_version"]
    (tmp_path / SERVERS_FILE).write_bytes(b"{")
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / SERVERS_FILE))):
        read_edits(tmp_path)


async def test_a_key_that_has_gone_keeps_no_other_server_away(tmp_path: Path) -> None:
    """A server that was added with a key is left out, and logged, if the daemon starts without the key."""
    root = tmp_path / "root"
    await asyncio.to_thread(root.mkdir)
    edits = ServerEdits({OTHER: ServerSpec(OTHER, key_env="STREAMSYN_GONE")})
    async with open_daemon(root, load(None, QUICK.items()), {}):
        pass  # it has made its files
    await asyncio.to_thread(save_edits, root, edits)
    async with open_daemon(root, load(None, QUICK.items()), {}) as daemon:
        assert [SERVER] == [server["server"] for server in daemon.hosting.servers.describe()]
