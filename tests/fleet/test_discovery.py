"""Service discovery: the wanted servers while a file and a DNS name change, and routers among them.

The answers of routers were recorded from sglang-router 0.3.2.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from streamsyn.config.sections import FleetSection
from streamsyn.errors import ConfigError
from streamsyn.fleet.discovery import (
    Discovery,
    LookUp,
    RouterInfo,
    changes,
    identify_router,
    resolve,
    servers_at_addresses,
    warn_about_router,
)
from streamsyn.fleet.server_spec import MAX_FILE_BYTES, ServerSpec
from streamsyn.fleet.transport import Transport, http_transport
from streamsyn.simulator.app import running
from streamsyn.simulator.settings import SimulatorConfig

pytestmark = pytest.mark.usefixtures("no_task_left")

ONE, TWO, THREE = (ServerSpec(f"http://{name}:1") for name in ("one", "two", "three"))


class Names:
    """A name server with one name; no address is a name that does not exist."""

    def __init__(self, *addresses: str) -> None:
        self.addresses: Iterable[str] = addresses
        self.asked: list[tuple[str, int]] = []

    async def __call__(self, name: str, port: int) -> Iterable[str]:
        self.asked.append((name, port))
        if not self.addresses:
            raise OSError(-2, "Name or service not known")
        return self.addresses


def discovery(path: Path | None = None, names: Names | None = None, **given: object) -> Discovery:
    """A discovery that looks often, in an empty environment unless `environ` is given."""
    environ: dict[str, str] = given.pop("environ", {})  # type: ignore[assignment]
    fields: dict[str, object] = {"servers_file": path, "discover_interval_s": 0.01, **given}
    if names is not None:
        fields.setdefault("servers_dns", "http://pods:1")
    look_up: LookUp = names or resolve
    return Discovery(FleetSection.model_validate(fields), environ, look_up)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of one server."""
    path = tmp_path / "servers.txt"
    path.write_text("http://one:1\n")
    return path


def write(path: Path, text: str | bytes | None) -> None:
    """In place; None takes the file away."""
    if text is None:
        path.unlink()
    else:
        path.write_bytes(text.encode() if isinstance(text, str) else text)


def write_unnoticed(path: Path, text: str) -> None:
    """In place, and with the old time."""
    times = path.stat()
    write(path, text)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def replace_file(path: Path, text: str) -> None:
    """As an editor does: a new file needs the name."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.rename(path)


specs = st.lists(
    st.builds(ServerSpec, st.sampled_from("abcdef"), st.sampled_from([1.0, 2.0]), draining=st.booleans()),
    unique_by=lambda spec: spec.url,
)


@given(specs, specs)
def test_changes_lead_from_one_set_to_the_other(before: list[ServerSpec], wanted: list[ServerSpec]) -> None:
    """Applying the changes gives the wanted set; unchanged servers are not listed."""
    found = changes(before, wanted)

    servers = {spec.url: spec for spec in before}
    for spec in found.removed:
        assert servers.pop(spec.url) == spec
    for spec in found.changed:
        assert servers[spec.url] != spec
        servers[spec.url] = spec
    for spec in found.added:
        assert servers.setdefault(spec.url, spec) is spec
    assert set(wanted) == set(servers.values())
    assert not set(before) & {*found.added, *found.changed}


async def test_only_what_is_configured() -> None:
    """Without a file or a DNS name, `watch` returns at once."""
    found = discovery(servers=("http://one:1",))

    assert [ONE] == await found.first()
    async with asyncio.timeout(5):
        await found.watch(_never)


async def _never(wanted: list[ServerSpec]) -> None:
    pytest.fail(f"told of {wanted}")


async def test_servers_come_go_and_drain(path: Path) -> None:
    """Each change reports the complete new set."""
    found = discovery(path, servers=("http://three:1",))
    told: asyncio.Queue[list[ServerSpec]] = asyncio.Queue()

    assert [THREE, ONE] == await found.first()
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        watching = group.create_task(found.watch(told.put), name="watch")
        write(path, "http://one:1 drain\nhttp://two:1 weight=2\n")
        assert [THREE, ServerSpec(ONE.url, draining=True), ServerSpec(TWO.url, 2.0)] == await told.get()
        replace_file(path, "http://two:1 weight=2\n")
        assert [THREE, ServerSpec(TWO.url, 2.0)] == await told.get()
        watching.cancel()
    assert told.empty()


async def test_a_change_is_reported_once(path: Path) -> None:
    """An unchanged file, or one with the same servers in other words, is not a change."""
    found = discovery(path)
    await found.first()

    assert await found.refresh() is None
    replace_file(path, "# the same\n\nhttp://one:1/v1 weight=1\nhttp://one:1\n")
    assert await found.refresh() is None
    replace_file(path, "http://two:1\n")
    assert [TWO] == await found.refresh()
    assert await found.refresh() is None


async def test_the_order_of_lines_does_not_matter(path: Path) -> None:
    """Reordered lines are not a change."""
    write(path, "http://one:1\nhttp://two:1\n")
    found = discovery(path)
    await found.first()
    replace_file(path, "http://two:1\nhttp://one:1\n")

    assert await found.refresh() is None


async def test_two_changes_in_the_same_instant(path: Path) -> None:
    """A second change of the same length may not show in the file's times and size; it is found anyway."""
    found = discovery(path)
    await found.first()
    write_unnoticed(path, "http://two:1\n")

    assert [TWO] == await found.refresh()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"http://two:1\nhttp://three:1 wieght=2\n", r"servers\.txt:2: invalid option 'wieght=2'"),
        (b"", r"fleet\.servers_file: .*servers\.txt lists no servers"),
        (b"# all gone\n", "lists no servers"),
        (b"http://\xff\n", "not UTF-8"),
        (b"#" * (MAX_FILE_BYTES + 1), "larger than 1048576 bytes"),
        (b"http://two:1 key_env=NOT_SET\n", "NOT_SET is not set"),
        (None, r"fleet\.servers_file: cannot read .*servers\.txt: No such file"),
    ],
)
async def test_a_file_that_goes_wrong(path: Path, content: bytes | None, said: str) -> None:
    """At the start it raises ConfigError; later it is logged once, and the last good set stays."""
    found = discovery(path)
    assert [ONE] == await found.first()
    write(path, content)

    with capture_logs() as logs:
        assert await found.refresh() is None
        assert await found.refresh() is None
    assert ["fleet.discovery_failed"] == [entry["event"] for entry in logs]
    assert "warning" == logs[0]["log_level"]
    with pytest.raises(ConfigError, match=said) as raised:
        await discovery(path).first()
    assert logs[0]["error"] == str(raised.value)

    write(path, "http://two:1\n")
    assert [TWO] == await found.refresh()


async def test_a_file_that_is_empty_at_the_start(path: Path) -> None:
    """The run starts with other servers; those of the file join later."""
    write(path, "")
    found = discovery(path, servers=("http://two:1",))
    with capture_logs() as logs:
        assert [TWO] == await found.first()
    assert ["warning"] == [entry["log_level"] for entry in logs]
    write(path, "http://one:1")

    assert [TWO, ONE] == await found.refresh()


async def test_directories_and_pipes(tmp_path: Path) -> None:
    """A directory or a pipe is refused; opening a pipe could block for ever."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (tmp_path, pipe):
        with pytest.raises(ConfigError, match=f"fleet.servers_file: {path} is not a regular file"):
            async with asyncio.timeout(5):
                await discovery(path).first()


async def test_a_byte_order_mark(path: Path) -> None:
    """A byte order mark is skipped."""
    write(path, b"\xef\xbb\xbfhttp://one:1\r\n")

    assert [ONE] == await discovery(path).first()


async def test_one_server_per_address() -> None:
    """There is one server per address; the name is kept for certificates."""
    names = Names("10.0.0.2", "10.0.0.1", "10.0.0.2")
    found = discovery(names=names, servers_dns="https://Pods.svc:30000/v1/")

    assert await found.first() == [
        ServerSpec("https://10.0.0.1:30000", server_name="pods.svc"),
        ServerSpec("https://10.0.0.2:30000", server_name="pods.svc"),
    ]
    names.addresses = ["10.0.0.2", "10.0.0.3"]
    wanted = await found.refresh()
    assert wanted is not None
    assert ["https://10.0.0.2:30000", "https://10.0.0.3:30000"] == [spec.url for spec in wanted]
    assert {("pods.svc", 30000)} == set(names.asked)


@pytest.mark.parametrize(
    ("url", "address", "expected"),
    [
        ("http://pods:1", "::1", "http://[::1]:1"),
        ("http://pods", "10.0.0.1", "http://10.0.0.1"),
        ("https://pods/path", "fe80::1", "https://[fe80::1]/path"),
    ],
)
def test_addresses_in_urls(url: str, address: str, expected: str) -> None:
    """The address replaces the host name; the rest of the URL is unchanged."""
    assert [ServerSpec(expected, server_name="pods")] == servers_at_addresses(url, [address])


async def test_a_name_with_a_password() -> None:
    """Each address gets it, and no URL has it; a new one is a change."""
    found = discovery(names=Names("10.0.0.1"), servers_dns="http://ada:secret@pods:1")
    (spec,) = await found.first()
    assert ("http://10.0.0.1:1", "ada:secret", "pods") == (spec.url, spec.userinfo, spec.server_name)


def test_an_address_for_a_name() -> None:
    """With an address as host there is no server name."""
    assert [ServerSpec("http://[::1]:1")] == servers_at_addresses("http://[::1]:1", ["::1"])


@pytest.mark.parametrize(("url", "port"), [("http://pods", 80), ("https://pods", 443)])
async def test_the_port_of_the_scheme(url: str, port: int) -> None:
    """The default port of the scheme is resolved if the URL has none."""
    names = Names("10.0.0.1")
    await discovery(names=names, servers_dns=url).first()

    assert [("pods", port)] == names.asked


async def test_a_name_that_no_longer_resolves() -> None:
    """The last addresses stay in use; each failure is logged once."""
    names = Names("10.0.0.1")
    found = discovery(names=names)
    await found.first()
    with capture_logs() as logs:
        for addresses in ((), (), ("10.0.0.1",), ()):
            names.addresses = addresses
            assert await found.refresh() is None

    said = "fleet.servers_dns: cannot resolve pods: Name or service not known"
    assert [said, said] == [entry["error"] for entry in logs]
    assert {1} == {entry["kept"] for entry in logs}


async def test_a_name_without_addresses_at_the_start() -> None:
    """It is an error, unless there are other servers."""
    names = Names()
    with pytest.raises(ConfigError, match=r"fleet\.servers_dns: cannot resolve pods: Name or service"):
        await discovery(names=names).first()
    found = discovery(names=names, servers=("http://one:1",))

    assert [ONE] == await found.first()
    names.addresses = ["10.0.0.1"]
    assert [ONE, ServerSpec("http://10.0.0.1:1", server_name="pods")] == await found.refresh()


async def test_names_of_this_machine() -> None:
    """The system's resolver finds localhost, and not nowhere.invalid."""
    async with asyncio.timeout(20):
        servers = await Discovery(FleetSection(servers_dns="http://localhost:1"), {}).first()
        with pytest.raises(ConfigError, match=r"cannot resolve nowhere\.invalid"):
            await Discovery(FleetSection(servers_dns="http://nowhere.invalid:1"), {}).first()

    assert {spec.url for spec in servers} <= {"http://127.0.0.1:1", "http://[::1]:1"}
    assert {"localhost"} == {spec.server_name for spec in servers}


async def test_one_server_in_several_places(path: Path) -> None:
    """It is one server; a line of the file can drain it and keeps its other settings."""
    configured = {"url": "http://one:1", "weight": 3, "key_env": "ONE_KEY"}
    write(path, "http://one:1 drain\nhttp://10.0.0.1:1 weight=2\n")
    found = discovery(path, Names("10.0.0.1"), servers=(configured,), environ={"ONE_KEY": "geese"})

    assert await found.first() == [
        ServerSpec("http://one:1", 3.0, "ONE_KEY", draining=True),
        ServerSpec("http://10.0.0.1:1", 2.0, server_name="pods"),
    ]
    write(path, "http://one:1\nhttp://10.0.0.1:1 drain\n")
    assert await found.refresh() == [
        ServerSpec("http://one:1", 3.0, "ONE_KEY"),
        ServerSpec("http://10.0.0.1:1", draining=True, server_name="pods"),
    ]


async def test_keys_that_are_not_set() -> None:
    """A missing key raises ConfigError before anything is sent."""
    configured = {"url": "http://one:1", "key_env": "ONE_KEY"}
    with pytest.raises(ConfigError, match=r"key_env of http://one:1: .* ONE_KEY is not set"):
        await discovery(servers=(configured,)).first()


SERVERS = ("http://127.0.0.1:30001", "http://127.0.0.1:30002")
UNKNOWN = (404, "", b"")
"""What the router answers to paths that it does not have: `/v1/loads`, `/server_info`, `/abort_request`."""
SERVER_INFO = (
    200,
    "text/plain; charset=utf-8",
    b'{"router_manager":true,"routers_count":1,"workers_count":2}',
)

Answer = tuple[int, str, bytes]


def worker(url: str, **labels: str) -> dict[str, Any]:
    """One entry of GET /workers, as recorded."""
    return {
        "id": "9e4e909d-9d9a-4d60-8069-15ead7012175",
        "url": url,
        "model_id": "simulated",
        "priority": 50,
        "cost": 1.0,
        "worker_type": "regular",
        "is_healthy": True,
        "load": 0,
        "connection_mode": "HTTP",
        "metadata": {
            "served_model_name": "simulated",
            "model_type": "llama",
            "architectures": '["LlamaForCausalLM"]',
            "tp_size": "1",
            "dp_size": "1",
            "model_path": "simulated",
            **labels,
        },
        "disable_health_check": False,
    }


def workers(*entries: dict[str, Any]) -> Answer:
    """GET /workers, as recorded."""
    stats = {"prefill_count": 0, "decode_count": 0, "regular_count": len(entries)}
    body = {"workers": list(entries), "total": len(entries), "stats": stats}
    return 200, "application/json", json.dumps(body).encode()


class Answering:
    """A server that answers by path, and remembers what it was asked."""

    def __init__(self, answers: Mapping[str, Answer]) -> None:
        self.asked: list[str] = []
        self._answers = answers

    async def answer(self, request: web.Request) -> web.Response:
        """Answer as recorded."""
        self.asked.append(f"{request.method} {request.path}")
        status, kind, body = self._answers.get(request.path, UNKNOWN)
        return web.Response(status=status, body=body, headers={"Content-Type": kind} if kind else {})


@asynccontextmanager
async def answering(answers: Mapping[str, Answer]) -> AsyncIterator[tuple[Transport, Answering]]:
    """A transport to a server that answers so."""
    handler = Answering(answers)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        async with http_transport(url, {}, connect_timeout_s=2.0) as transport:
            yield transport, handler
    finally:
        await runner.cleanup()


async def test_a_router_without_a_reported_policy() -> None:
    """A router as started from the command line lists its workers, not its policy."""
    async with answering({"/workers": workers(*map(worker, SERVERS))}) as (transport, handler):
        facts = await identify_router(transport)
    assert RouterInfo(2, SERVERS, None) == facts
    assert ["GET /workers"] == handler.asked


@pytest.mark.parametrize("place", ["metadata", "labels"])
async def test_a_policy_that_workers_are_labelled_with(place: str) -> None:
    """By POST /workers with the label `policy`: 0.3.2 shows it as metadata, the newer gateway as a label."""
    entries = [worker(url) | {place: {"policy": "manual"}} for url in SERVERS]
    async with answering({"/workers": workers(*entries)}) as (transport, _):
        assert RouterInfo(2, SERVERS, "manual") == await identify_router(transport)


async def test_workers_with_different_policies() -> None:
    """With different policies the router's policy is unknown."""
    entries = [worker(SERVERS[0], policy="manual"), worker(SERVERS[1])]
    async with answering({"/workers": workers(*entries)}) as (transport, _):
        assert RouterInfo(2, SERVERS, None) == await identify_router(transport)


@pytest.mark.parametrize("refusal", [(401, "", b""), (401, "text/plain", b"Invalid authentication token")])
async def test_a_router_that_lists_its_workers_for_its_administrator(refusal: Answer) -> None:
    """With control-plane keys, the router's info is open to all."""
    async with answering({"/workers": refusal, "/get_server_info": SERVER_INFO}) as (transport, handler):
        assert RouterInfo(2) == await identify_router(transport)
    assert ["GET /workers", "GET /get_server_info"] == handler.asked


async def test_a_router_without_workers() -> None:
    """A router that was just started has no workers."""
    async with answering({"/workers": workers()}) as (transport, _):
        assert RouterInfo(0) == await identify_router(transport)


@pytest.mark.parametrize(
    "answers",
    [
        {},
        {"/workers": (404, "application/json", b'{"detail":"Not Found"}')},
        {"/workers": (200, "text/html", b"<html>all paths lead here</html>")},
        {"/workers": (200, "application/json", b"[]")},
        {"/workers": (200, "application/json", b'{"workers": 4}')},
        {"/workers": (200, "application/json", b'{"workers": ["idle"]}')},
        {"/workers": (500, "text/plain", b"no")},
        {"/workers": (401, "", b"")},
        {"/workers": (403, "", b""), "/get_server_info": (200, "", b'{"model_path": "m"}')},
        {"/workers": (401, "", b""), "/get_server_info": (200, "", b"[]")},
    ],
)
async def test_other_servers_are_not_routers(answers: Mapping[str, Answer]) -> None:
    """Other servers with an answer at that path are not routers, and nothing is logged."""
    async with answering(answers) as (transport, _):
        with capture_logs() as logs:
            assert await warn_about_router("http://s", transport) is None
    assert [] == [entry for entry in logs if entry["event"] == "fleet.router"]


async def test_sglang_is_not_a_router() -> None:
    """SGLang has no such route; an unreachable URL is not a router either."""
    async with running(SimulatorConfig()) as server, http_transport(server.url, {}) as transport:
        assert await identify_router(transport) is None
    async with http_transport(server.url, {}, connect_timeout_s=2.0) as transport:
        assert await identify_router(transport) is None


@pytest.mark.parametrize(
    ("policy", "level", "says"),
    [
        (
            "cache_aware",
            "warning",
            "its policy cache_aware sends most requests to one worker; pass its workers",
        ),
        ("round_robin", "warning", "its policy round_robin splits prefix groups; pass its workers"),
        ("manual", "info", None),
        ("consistent_hashing", "info", None),
    ],
)
async def test_the_advice_for_each_policy(policy: str, level: str, says: str | None) -> None:
    """A policy that splits groups is a warning with advice; others are an info line."""
    entries = [worker(url, policy=policy) for url in SERVERS]
    async with answering({"/workers": workers(*entries)}) as (transport, _):
        with capture_logs() as logs:
            await warn_about_router("http://r", transport)
    (entry,) = logs
    assert ("fleet.router", level, "http://r", 2, policy) == tuple(
        entry[name] for name in ("event", "log_level", "server", "workers", "policy")
    )
    assert says is None or entry["advice"].startswith(says)
    assert says is None or "--policy manual" in entry["advice"]


async def test_an_unknown_policy_is_a_warning() -> None:
    """An unknown policy may be cache_aware, the default; with one worker it does not matter."""
    async with answering({"/workers": workers(*map(worker, SERVERS))}) as (transport, _):
        with capture_logs() as logs:
            await warn_about_router("http://r", transport)
    assert [("warning", "unknown")] == [(entry["log_level"], entry["policy"]) for entry in logs]
    assert "if it is cache_aware" in logs[0]["advice"]
    assert RouterInfo(1, SERVERS[:1]).advice is None
