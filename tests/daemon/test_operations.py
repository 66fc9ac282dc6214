"""How a daemon is operated: low disk, signals, diagnostics, and a ROOT of an earlier version."""

import asyncio
import io
import os
import shutil
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from structlog.testing import capture_logs

from streamsyn.config.loading import load
from streamsyn.daemon import disk_space, serve
from streamsyn.daemon.daemon import open_daemon
from streamsyn.daemon.disk_space import FreeSpace
from streamsyn.daemon.serve import reload
from streamsyn.errors import ConfigError
from tests.daemon.conftest import QUICK, SERVER, StartDaemon, seed_lines
from tests.daemon.make_root import KEY

STORED_LINES = b"\n".join([*seed_lines(2), b"nix"])
TOKENS = "ann read {0}-read\nbob write {0}-write\neve admin {0}-admin\n"


def test_runs_wait_and_go_on_at_different_levels() -> None:
    """Space that hovers around the limit does not make them begin and wait in turn."""
    space = FreeSpace()

    assert [True, False, False, True, False, False] == [
        space.note(free, 100) for free in (99, 100, 199, 200, 100, 101)
    ]
    assert not FreeSpace().note(0, 0)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the free space of the disk, in bytes; it is looked at every hundredth of a second."""
    free = 1000

    def change(number: int) -> None:
        nonlocal free
        free = number

    monkeypatch.setattr(disk_space, "_INTERVAL_S", 0.01)
    monkeypatch.setattr(disk_space, "free_on_disk", lambda _: free)
    return change


async def test_runs_wait_while_the_disk_is_low(
    start_daemon: StartDaemon, disk: Callable[[int], None]
) -> None:
    """They say so, and go on by themselves; so does a daemon that starts meanwhile."""
    keys = {"serve.min_free_bytes": 500}
    async with start_daemon(keys) as daemon:
        await daemon.new_run("one")
        await daemon.submit("one", 2)
        await daemon.until("one", lambda run: run.rows["contexts"] + run.rows["rejects"] == 2)
        disk(499)
        run = await daemon.until("one", lambda run: not run.is_executed)
        low = run.as_json()
        ready = await daemon.refused("GET", "/readyz")
        refused = await daemon.refused("POST", "/v1/runs/one/seeds", data=b"")
        file = aiohttp.FormData({"purpose": "batch", "file": io.BytesIO(b"{}")})
        upload = await daemon.refused("POST", "/v1/files", data=file)
        assert 2 == await daemon.submit("one", 2, first=2)  # as a request that had begun
    async with start_daemon(keys) as daemon:
        run = await daemon.daemon.runs.get("one")
        was_executed = run.is_executed
        disk(1000)
        run = await daemon.until("one", lambda run: run.rows["contexts"] + run.rows["rejects"] == 4)
        enough = run.as_json()
        status = await daemon.ask("GET", "/readyz")

    assert ("running", None) == (enough["state"], enough["error"])
    assert "running" == low["state"]
    assert "low disk: 499 bytes are free" in low["error"]
    assert low["error"] == ready["detail"] == refused["detail"]
    assert (503, 507) == (ready["status"], refused["status"])
    assert low["error"] == upload["error"]["message"]
    assert not was_executed
    assert "ready" == status["status"]


async def test_a_body_is_refused_in_the_middle_when_the_disk_is_low(
    start_daemon: StartDaemon, disk: Callable[[int], None]
) -> None:
    """With what was accepted before."""
    async with start_daemon({"serve.min_free_bytes": 500}) as daemon:
        await daemon.new_run("one")
        begun, low = asyncio.Event(), asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            yield b"\n".join([*seed_lines(2), b""])
            begun.set()
            await low.wait()
            yield b"\n".join(seed_lines(2, first=2))

        async with asyncio.TaskGroup() as group:
            path = "/v1/runs/one/seeds"
            posting = group.create_task(daemon.refused("POST", path, data=slow()), name="posting")
            await begun.wait()
            run = await daemon.until("one", lambda run: run.as_json()["counts"]["accepted"] == 2)
            disk(499)
            await daemon.until("one", lambda run: run.as_json()["error"] is not None)
            low.set()

    assert (507, 2) == (posting.result()["status"], posting.result()["accepted"])
    assert 2 == run.as_json()["counts"]["accepted"]


async def test_tokens_and_limits_are_read_again(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """Keys that need a restart are named, without their values."""
    tokens = tmp_path / "tokens"
    tokens.write_text(TOKENS.format("first-secret"))
    first = {"serve.tokens_file": str(tokens), "serve.max_body_bytes": 1000}
    headers = {"Authorization": "Bearer first-secret-admin"}
    async with start_daemon(first, headers=headers) as daemon:
        await daemon.new_run("one")
        too_long = await daemon.refused("POST", "/v1/runs/one/seeds", data=b"x" * 1001)
        tokens.write_text(TOKENS.format("second-secret"))
        changed = {**QUICK, **first, "serve.max_body_bytes": 2000, "recipe.target_words": 7}
        changed["fleet.servers"] = ["http://user:hidden@gpu-9:30000"]
        with capture_logs() as logs:
            await reload(daemon.daemon, partial(load, None, changed.items()), serve.check_address)
        old = await daemon.refused("GET", "/v1/runs")
        daemon.session.headers["Authorization"] = "Bearer second-secret-write"
        async with daemon.session.post("/v1/runs/one/seeds", data=b"x" * 1001) as answer:
            status = answer.status

    assert (413, 401, 202) == (too_long["status"], old["status"], status)
    assert ["serve.max_body_bytes"] == logs[0]["changed"]
    assert ["fleet.servers", "recipe.target_words"] == logs[1]["keys"]
    assert "hidden" not in str(logs)
    assert 7 != daemon.daemon.config.recipe.target_words


async def test_the_file_of_servers_is_read_again(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """At once, however rarely it is looked at."""
    file = tmp_path / "servers"
    file.write_text(f"{SERVER}\n")
    keys = {"fleet.servers": [], "fleet.servers_file": str(file), "fleet.discover_interval_s": 3600}
    async with start_daemon(keys) as daemon:
        before = await daemon.ask("GET", "/v1/servers")
        file.write_text(f"{SERVER}\nhttp://gpu-2:30000\n")
        await reload(daemon.daemon, partial(load, None, (QUICK | keys).items()), serve.check_address)
        after = await daemon.ask("GET", "/v1/servers")

    assert [SERVER] == [server["url"] for server in before["data"]]
    assert [SERVER, "http://gpu-2:30000"] == [server["url"] for server in after["data"]]


async def test_a_renewed_certificate_is_used(tmp_path: Path) -> None:
    """For the next connection; one that cannot be used changes nothing."""
    file, pem = tmp_path / "cert.pem", Path(__file__).parents[1] / "fleet" / "pem"
    config = load(None, (QUICK | {"serve.tls_certificate": str(file), "fleet.servers": []}).items())
    served = []
    await asyncio.to_thread(shutil.copy, pem / "server.pem", file)
    address = await asyncio.to_thread(serve.bound, config.serve)
    port = address.socket.getsockname()[1]
    async with open_daemon(tmp_path / "root", config, {}) as daemon, serve.listening(daemon, address):
        for renewed in ("server.pem", "client.pem", "ca.pem"):
            await asyncio.to_thread(shutil.copy, pem / renewed, file)
            with capture_logs() as logs:
                await reload(daemon, lambda: config, partial(serve.check_reloaded, address))
            found = await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", port))
            served.append((found, logs[0]["event"]))

    (first, done), (second, also_done), (third, failed) = served
    assert first != second == third
    assert ("reload.done", "reload.done", "reload.failed") == (done, also_done, failed)


@pytest.mark.parametrize("mistake", ["no file", "no tokens", "no configuration"])
async def test_a_mistake_changes_nothing(start_daemon: StartDaemon, tmp_path: Path, mistake: str) -> None:
    """Neither tokens nor limits; it is logged."""
    tokens = tmp_path / "tokens"
    tokens.write_text(TOKENS.format("first-secret"))
    given: dict[str, Any] = {"serve.tokens_file": str(tokens)}
    async with start_daemon(given, headers={"Authorization": "Bearer first-secret-read"}) as daemon:
        changed = {**QUICK, **given, "serve.max_body_bytes": 2000}
        if mistake == "no file":
            changed["serve.tokens_file"] = str(tmp_path / "none")
        elif mistake == "no tokens":
            tokens.write_text("ann read short\n")
        else:
            changed["serve.listne"] = "127.0.0.1:0"
        with capture_logs() as logs:
            await reload(daemon.daemon, partial(load, None, changed.items()), serve.check_address)
        await daemon.ask("GET", "/v1/runs")

    assert ["reload.failed"] == [line["event"] for line in logs]
    assert 2000 != daemon.daemon.config.serve.max_body_bytes


async def test_a_reload_cannot_open_the_daemon_to_everybody(start_daemon: StartDaemon) -> None:
    """An address that others can reach needs tokens, also if a new one that does not would be used later."""
    async with start_daemon() as daemon:
        config = daemon.daemon.hosting.config
        wide = config.serve.model_copy(update={"listen": "0.0.0.0:0"})
        daemon.daemon.hosting.config = config.model_copy(update={"serve": wide})
        with capture_logs() as logs:
            await reload(daemon.daemon, partial(load, None, QUICK.items()), serve.check_address)

    assert "serve.tokens_file must be set" in logs[0]["error"]


async def test_diagnostics_have_no_secrets(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """For the scope admin alone."""
    tokens = tmp_path / "tokens"
    tokens.write_text(TOKENS.format("first-secret"))
    keys = {"serve.tokens_file": str(tokens), "sink.mirror": "s3://key:hidden@bucket/runs"}
    async with start_daemon(keys, headers={"Authorization": "Bearer first-secret-admin"}) as daemon:
        found = await daemon.ask("GET", "/v1/diagnostics")
        daemon.session.headers["Authorization"] = "Bearer first-secret-write"
        refused = await daemon.refused("GET", "/v1/diagnostics")

    text = str(found)
    assert {"aiohttp", "python", "streamsyn"} <= found["versions"].keys()
    assert found["process"]["rss_bytes"] > 1 << 20
    assert found["process"]["open_files"]["socket"] > 0
    assert "low disk" in [task["name"] for task in found["tasks"]]
    assert any("disk_space.py" in frame for task in found["tasks"] for frame in task["stack"])
    assert "hidden" not in text
    assert "first-secret" not in text
    assert 403 == refused["status"]


@pytest.mark.usefixtures("signals_are_caught")
async def test_signals_end_and_reload_a_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd learns of it: ready, alive, reloading, ready again, ending."""
    config, heard = tmp_path / "serve.toml", []
    keys = 'listen = "127.0.0.1:0"\nmin_free_bytes = 0'
    config.write_text(f'[serve]\n{keys}\n[fleet]\nservers = ["http://gpu-1"]\n')
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "3600000000")

        async def operate() -> None:
            while "STOPPING=1" not in heard:
                message = await asyncio.to_thread(manager.recv, 4096)
                heard.append(message.decode().split("\n")[0])
                if heard[-1] == "WATCHDOG=1":
                    os.kill(os.getpid(), signal.SIGHUP)
                elif heard.count("READY=1") == 2:
                    os.kill(os.getpid(), signal.SIGTERM)

        async with asyncio.TaskGroup() as group:
            group.create_task(serve._serve(tmp_path / "root", partial(load, config)), name="daemon")
            group.create_task(operate(), name="operator")

    assert ["READY=1", "WATCHDOG=1", "RELOADING=1", "READY=1", "STOPPING=1"] == heard


ROOTS = sorted((Path(__file__).parent / "roots").iterdir())


@pytest.mark.parametrize("stored", ROOTS, ids=lambda path: f"format {path.name}")
async def test_a_stored_root_is_read(start_daemon: StartDaemon, tmp_path: Path, stored: Path) -> None:
    """As the version of its format left it: runs in each state, seeds, keys, consumers, files and batches."""
    await asyncio.to_thread(shutil.copytree, stored, tmp_path / "root")
    async with start_daemon() as daemon:
        runs = {run["id"]: run for run in (await daemon.ask("GET", "/v1/runs"))["data"]}
        again = await daemon.session.post("/v1/runs/finished/seeds", data=STORED_LINES, headers=KEY)
        answer = await again.json()
        async with daemon.session.get("/v1/runs/finished/samples") as samples:
            rows = (await samples.text()).splitlines()
        consumer = await daemon.ask("GET", "/v1/runs/finished/consumers/trainer")
        batches = (await daemon.ask("GET", "/v1/batches"))["data"]
        async with daemon.session.get(f"/v1/files/{batches[0]['output_file_id']}/content") as content:
            output = await content.text()
        servers = (await daemon.ask("GET", "/v1/servers"))["data"]
        await daemon.ask("POST", "/v1/runs/paused/resume")
        await daemon.ask("POST", "/v1/runs/running/close")
        await daemon.until("paused", lambda run: run.rows["contexts"] == 2)
        await daemon.until_state("running", "finished")

    assert {"finished": "finished", "paused": "paused", "running": "running"} == {
        name: run["state"] for name, run in runs.items()
    }
    assert {"team": "a"} == runs["finished"]["labels"]
    assert (2.0, "high", 2) == tuple(
        (runs["paused"] | runs["paused"]["counts"])[key] for key in ("weight", "priority", "accepted")
    )
    assert (2, 0, 1) == (answer["accepted"], answer["duplicate"], answer["refused"])
    assert 2 == len(rows)
    assert 0 == consumer["acked"]
    assert "completed" == batches[0]["status"]
    assert '"custom_id":"a"' in output
    assert [SERVER, "http://gpu-2:30000"] == [server["url"] for server in servers]


async def test_a_root_of_a_later_version_is_refused(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """Before anything in it is touched."""
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "daemon.json").write_text('{"format_version": 2}')

    with pytest.raises(ConfigError, match=r"has format version 2; this streamsyn reads versions up to 1"):
        async with start_daemon():
            pass
