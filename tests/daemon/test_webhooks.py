"""Webhooks: signed as Standard Webhooks says, sent until they are received, and to public addresses alone."""

import asyncio
import base64
import hashlib
import hmac
import stat
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web
from openai import AsyncOpenAI, BadRequestError, OpenAI
from openai.types.webhooks import BatchCompletedWebhookEvent
from structlog.testing import capture_logs

from streamsyn.daemon import webhooks as outbox
from streamsyn.daemon.problems import Problem
from streamsyn.daemon.webhook_target import Webhook, is_private
from streamsyn.daemon.webhooks import Webhooks, open_webhooks
from tests.daemon.conftest import StartDaemon
from tests.examples import in_turn

KEY = bytes(range(32))
SECRET = f"whsec_{base64.b64encode(KEY).decode()}"
NO_PAUSE = (0.0,) * 9


def on_this_machine() -> bool:
    """The receivers of these tests are on this machine."""
    return True


class Receiver:
    """Receives webhooks on loopback, and answers with these statuses, then with 200.

    Attributes:
        url: Where it listens.
        received: The headers and the bodies that came.
    """

    def __init__(self, statuses: Sequence[int]) -> None:
        self.url = ""
        self._statuses = list(statuses)
        self.received: list[tuple[Mapping[str, str], bytes]] = []
        self._came = asyncio.Event()

    async def take(self, request: web.Request) -> web.Response:
        """Take a message."""
        self.received.append((dict(request.headers), await request.read()))
        self._came.set()
        status = self._statuses.pop(0) if self._statuses else 200
        return web.Response(status=status, headers={"Location": self.url} if status == 302 else {})

    async def until(self, number: int) -> None:
        """Wait until so many came."""
        async with asyncio.timeout(10):
            while len(self.received) < number:
                self._came.clear()
                await self._came.wait()

    def ids(self) -> list[str]:
        """The ids of what came."""
        return [headers["webhook-id"] for headers, _ in self.received]


@asynccontextmanager
async def receiving(*statuses: int) -> AsyncIterator[Receiver]:
    """A receiver."""
    receiver = Receiver(statuses)
    app = web.Application()
    app.router.add_post("/{path:.*}", receiver.take)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    receiver.url = f"http://{host}:{port}/hook?token=hidden"
    try:
        yield receiver
    finally:
        await runner.cleanup()


async def settled(webhooks: Webhooks) -> None:
    """Wait until nothing is pending."""
    async with asyncio.timeout(10):
        while webhooks.pending:
            await webhooks.changed()


def verified(headers: Mapping[str, str], body: bytes) -> dict[str, Any]:
    """What a receiver does, written from the specification alone."""
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    expected = base64.b64encode(hmac.new(KEY, signed, hashlib.sha256).digest()).decode()
    assert f"v1,{expected}" == headers["webhook-signature"]
    content: dict[str, Any] = orjson.loads(body)
    return content


@pytest.mark.usefixtures("no_task_left")
async def test_an_event_is_signed(tmp_path: Path) -> None:
    """OpenAI's client accepts the event of a batch as it stands; events that are not wanted are not sent."""
    async with receiving() as receiver, open_webhooks(tmp_path, allow_private=on_this_machine) as webhooks:
        webhook = Webhook(url=receiver.url, secret=SECRET, events=["batch.completed"])
        await webhooks.announce(webhook, "batch.failed", 0, {"id": "batch_0"})
        await webhooks.announce(None, "batch.completed", 0, {"id": "batch_0"})
        await webhooks.announce(webhook, "batch.completed", 1, {"id": "batch_1"})
        await settled(webhooks)
    ((headers, body),) = receiver.received
    content = verified(headers, body)
    assert ("batch.completed", {"id": "batch_1"}) == (content["type"], content["data"])
    assert headers["webhook-id"] == content["id"]
    client = await asyncio.to_thread(OpenAI, api_key="none", webhook_secret=SECRET)
    event = client.webhooks.unwrap(body, headers)
    assert isinstance(event, BatchCompletedWebhookEvent)
    assert "batch_1" == event.data.id


async def test_an_event_is_repeated_until_it_is_received(tmp_path: Path) -> None:
    """With the same id; a redirect is not followed, since it may lead anywhere."""
    async with receiving(500, 302, 404) as receiver:
        async with open_webhooks(tmp_path, allow_private=on_this_machine, delays_s=NO_PAUSE) as webhooks:
            with capture_logs() as logs:
                webhook = Webhook(url=receiver.url, secret=SECRET)
                await webhooks.announce(webhook, "run.finished", 3, {"id": "r"})
                await settled(webhooks)
        assert (4, 1) == (len(receiver.received), len(set(receiver.ids())))
        for headers, body in receiver.received:
            verified(headers, body)
    assert [500, 302, 404] == [entry["why"] for entry in logs]
    assert "hidden" not in str(logs)
    assert SECRET not in str(logs)
    assert [] == await asyncio.to_thread(lambda: list(tmp_path.iterdir()))


@pytest.mark.parametrize(("statuses", "sent"), [((410,), 1), ((500,) * 9, 3)])
async def test_an_event_is_given_up(tmp_path: Path, statuses: tuple[int, ...], sent: int) -> None:
    """When the receiver says that it is gone, or after the last repetition."""
    async with receiving(*statuses) as receiver:
        async with open_webhooks(tmp_path, allow_private=on_this_machine, delays_s=(0.0, 0.0)) as webhooks:
            await webhooks.announce(Webhook(url=receiver.url, secret=SECRET), "run.failed", 0, {"id": "r"})
            await settled(webhooks)
        assert sent == len(receiver.received)


async def test_events_survive_a_restart(tmp_path: Path) -> None:
    """What was not received is private on disk, and sent by the next process with the same id."""
    async with receiving(500) as receiver:
        webhook = Webhook(url=receiver.url, secret=SECRET)
        async with open_webhooks(tmp_path, allow_private=on_this_machine, delays_s=(0.0,)) as webhooks:
            await webhooks.announce(webhook, "run.paused", 7, {"id": "r"})
            modes = await asyncio.to_thread(
                lambda: [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path, *tmp_path.iterdir())]
            )
            assert {0o700, 0o600} >= set(modes)
            await receiver.until(1)
        async with open_webhooks(tmp_path, allow_private=on_this_machine) as webhooks:
            await webhooks.announce(webhook, "run.paused", 7, {"id": "r"})  # the daemon repeats the change
            await webhooks.announce(webhook, "run.paused", 8, {"id": "r"})
            await receiver.until(3)
            await settled(webhooks)
    assert 2 == len(set(receiver.ids()))


async def test_a_secret_from_the_environment_is_not_stored(tmp_path: Path) -> None:
    """It is read when it is used; if it has gone, the event waits."""
    webhook = Webhook(url="http://127.0.0.1:1/", secret_env="HOOK")
    webhook.check({"HOOK": SECRET}, allow_private=True)
    with capture_logs() as logs:
        async with open_webhooks(tmp_path, {}, allow_private=on_this_machine) as webhooks:
            await webhooks.announce(webhook, "run.failed", 0, {"id": "r"})
            (path,) = await asyncio.to_thread(lambda: list(tmp_path.glob("msg_*.json")))
            assert b"whsec_" not in await asyncio.to_thread(path.read_bytes)
            async with asyncio.timeout(10):
                while not logs:
                    await webhooks.changed()
            assert 1 == webhooks.pending
    assert "the environment variable HOOK is not a secret any more" == logs[0]["why"]


@in_turn(
    ("given", "why"),
    [
        ({"url": "ftp://example.com"}, "webhook.url: expected a URL"),
        ({"url": "https://"}, "webhook.url: expected a URL"),
        ({"url": "http://[::1"}, "webhook.url: expected a URL"),
        ({"url": "https://u:p@example.com"}, "webhook.url: a user or a password"),
        ({"url": "http://127.0.0.1/"}, "webhook.url: 127.0.0.1 is not a public address"),
        ({"secret": None}, "webhook: give one of secret and secret_env"),
        ({"secret_env": "HOOK"}, "webhook: give one of secret and secret_env"),
        ({"secret": "whsec_short"}, "webhook.secret: expected whsec_"),
        ({"secret": None, "secret_env": "KEY"}, "webhook.secret_env: the daemon has no environment variable"),
    ],
)
def test_what_cannot_work_is_refused(given: dict[str, Any], why: str) -> None:
    """A variable that is not a secret for webhooks, such as a key of a server, is never used as one."""
    webhook = Webhook(**({"url": "https://example.com/hook", "secret": SECRET} | given))
    with pytest.raises(Problem) as raised:
        webhook.check({"KEY": "sk-of-a-server"}, allow_private=False)
    assert str(raised.value).startswith(why)


@in_turn(
    "host",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1"),
        *("224.0.0.1", "::1", "::", "fe80::1%eth0", "fc00::1", "::ffff:10.0.0.1", "64:ff9b::a00:1"),
        *("2002:7f00:1::", "localhost", "LOCALHOST.", "a.localhost"),
    ],
)
def test_private_addresses(host: str) -> None:
    """In every form in which they can be written."""
    assert is_private(host)


def test_public_addresses() -> None:
    """A name is judged when it is connected to."""
    assert not any(map(is_private, ("8.8.8.8", "2606:4700::1111", "64:ff9b::808:808", "example.com")))


class Rebinding(aiohttp.abc.AbstractResolver):
    """A name server that names an address of this machine."""

    async def resolve(self, host: str, port: int = 0, family: int = 0) -> list[Any]:
        """See AbstractResolver."""
        return [{"hostname": host, "host": "127.0.0.1", "port": port, "family": 2, "proto": 6, "flags": 0}]

    async def close(self) -> None:
        """Nothing is open."""


async def test_a_name_that_resolves_to_a_private_address_is_not_connected_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it resolved to before; nor is a private address that was allowed once."""
    monkeypatch.setattr(aiohttp.connector, "DefaultResolver", lambda *_, **__: Rebinding())
    async with receiving() as receiver:
        port = receiver.url.split(":")[2]
        urls = (f"http://example.com:{port}", receiver.url)
        with capture_logs() as logs:
            async with open_webhooks(tmp_path, delays_s=()) as webhooks:
                for number, url in enumerate(urls):
                    await webhooks.announce(
                        Webhook(url=url, secret=SECRET), "run.failed", number, {"id": "r"}
                    )
                await settled(webhooks)
    assert [] == receiver.received
    assert [True, True] == ["127.0.0.1 is not a public address" in entry["why"] for entry in logs]


async def test_the_number_of_events_that_wait_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Further ones are dropped, and logged."""
    monkeypatch.setattr(outbox, "MAX_PENDING", 1)
    webhook = Webhook(url="http://127.0.0.1:1/", secret=SECRET)
    with capture_logs() as logs:
        async with open_webhooks(tmp_path, allow_private=on_this_machine) as webhooks:
            for number in range(3):
                await webhooks.announce(webhook, "run.failed", number, {"id": "r"})
            assert 1 == webhooks.pending
    assert ["webhook.dropped"] * 2 == [entry["event"] for entry in logs if "dropped" in entry["event"]]


async def test_runs_and_batches_announce_their_ends(start_daemon: StartDaemon) -> None:
    """A run tells of each state, a batch of its end; the secret is shown nowhere, and stored in private."""
    async with (
        receiving() as receiver,
        start_daemon({"serve.allow_private_webhooks": True}) as served,
        AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client,
    ):
        webhook = {"url": receiver.url, "secret": SECRET}
        run = await served.new_run("first", labels={"a": "b"}, webhook=webhook)
        again = await served.new_run("first", labels={"a": "b"}, webhook=webhook)
        assert run["created_at"] == again["created_at"]
        other = {**webhook, "secret": f"whsec_{base64.b64encode(bytes(32)).decode()}"}
        assert 409 == (await served.refused("POST", "/v1/runs", {"id": "first", "webhook": other}))["status"]
        await served.ask("POST", "/v1/runs/first/pause")
        await served.ask("POST", "/v1/runs/first/resume")
        await served.submit("first", 3)
        await served.ask("POST", "/v1/runs/first/close")
        await served.until_state("first", "finished")
        await receiver.until(3)

        line = {"custom_id": "r", "method": "POST", "url": "/v1/chat/completions"}
        body = {"model": "simulated", "messages": [{"role": "user", "content": "?"}]}
        file = await client.files.create(file=("in", orjson.dumps(line | {"body": body})), purpose="batch")
        batch = await client.batches.create(
            input_file_id=file.id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            extra_body={"webhook": webhook},
        )
        await receiver.until(4)
        files = await asyncio.to_thread(lambda: tmp_files(served.daemon.root))
    events = [verified(headers, content) for headers, content in receiver.received]
    told = {event["type"]: event["data"] for event in events}
    assert {"run.paused", "run.running", "run.finished", "batch.completed"} == set(told)
    assert ("first", "finished", {"a": "b"}, 3) == (
        told["run.finished"]["id"],
        told["run.finished"]["state"],
        told["run.finished"]["labels"],
        told["run.finished"]["counts"]["contexts"],
    )
    assert (batch.id, "completed", 1) == (
        told["batch.completed"]["id"],
        told["batch.completed"]["status"],
        told["batch.completed"]["request_counts"]["completed"],
    )
    with_secret = {
        path.name: stat.S_IMODE(mode) for path, mode, content in files if SECRET.encode() in content
    }
    assert {0o600} == set(with_secret.values())
    pending = {name for name in with_secret if name.startswith("msg_")}
    assert {"run_webhook.json", "batch_webhook.json"} == set(with_secret) - pending
    assert SECRET not in orjson.dumps([run, batch.model_dump()]).decode()


def tmp_files(root: Path) -> list[tuple[Path, int, bytes]]:
    """All files below a directory, with their modes and contents."""
    return [(path, path.stat().st_mode, path.read_bytes()) for path in root.rglob("*") if path.is_file()]


async def test_webhooks_that_are_refused(start_daemon: StartDaemon) -> None:
    """With the error form of the route, and nothing is created."""
    webhook = {"url": "http://169.254.169.254/", "secret": SECRET}
    async with start_daemon() as served, AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        problem = await served.refused("POST", "/v1/runs", {"webhook": webhook})
        assert (422, True) == (problem["status"], "is not a public address" in problem["detail"])
        file = await client.files.create(file=("in", b"{}"), purpose="batch")
        with pytest.raises(BadRequestError, match="is not a public address"):
            await client.batches.create(
                input_file_id=file.id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
                extra_body={"webhook": webhook},
            )
        assert (0, []) == (len(served.daemon.runs), served.daemon.batches.newest_first())
