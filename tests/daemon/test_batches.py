"""`/v1/files` and `/v1/batches`, driven by the official `openai` client, unchanged."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import openai
import orjson
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types import Batch

from streamsyn.simulator.settings import SimulatorConfig
from tests.daemon.conftest import Served, StartDaemon

MODEL = "simulated"
ENDED = {"completed", "failed", "expired", "cancelled"}


def request_line(number: int, **body: Any) -> dict[str, Any]:
    """A request line."""
    asked = {"model": MODEL, "messages": [{"role": "user", "content": f"What is {number}?"}]}
    return {
        "custom_id": f"r-{number}",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {**asked, **body},
    }


def ndjson(*lines: dict[str, Any]) -> bytes:
    """Lines of JSON."""
    return b"".join(orjson.dumps(line) + b"\n" for line in lines)


def parsed(content: bytes) -> list[dict[str, Any]]:
    """The lines of a file."""
    return [orjson.loads(line) for line in content.splitlines()]


@asynccontextmanager
async def client_of(served: Served) -> AsyncIterator[AsyncOpenAI]:
    """An openai client of a daemon."""
    async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def batch_of(client: AsyncOpenAI, *lines: dict[str, Any], window: Any = "24h") -> Batch:
    """A batch with these requests."""
    file = await client.files.create(file=("in.jsonl", ndjson(*lines)), purpose="batch")
    return await client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window=window
    )


async def until(client: AsyncOpenAI, served: Served, batch_id: str, holds: Callable[[Batch], bool]) -> Batch:
    """Wait until something holds for a batch."""
    async with asyncio.timeout(20):
        while True:
            change = served.daemon.batches.change
            if holds(batch := await client.batches.retrieve(batch_id)):
                return batch
            await change.wait()


async def lines_of(client: AsyncOpenAI, file_id: str | None) -> list[dict[str, Any]]:
    """The lines of a file, as a client reads them."""
    assert file_id is not None
    return parsed((await client.files.content(file_id)).content)


async def test_a_batch_from_upload_to_output(daemon: Served) -> None:
    """Each request is answered once and whole; a refusal is in both files, and is not an answer."""
    async with client_of(daemon) as client:
        long = "x" * 1_000_000
        lines = [request_line(n, max_tokens=8) for n in range(20)]
        lines.append(request_line(20, messages=[{"role": "user", "content": long}], max_tokens=131_000))
        file = await client.files.create(file=("in.jsonl", ndjson(*lines)), purpose="batch")
        batch = await client.batches.create(
            input_file_id=file.id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata={"team": "lights"},
        )
        assert "validating" == batch.status
        await client.files.delete(file.id)  # which the batch does not need any more
        batch = await until(client, daemon, batch.id, lambda batch: batch.status in ENDED)

        assert ("completed", None) == (batch.status, batch.errors)
        assert (20, 1, 21) == tuple(batch.request_counts.model_dump().values())  # type: ignore[union-attr]
        assert ({"team": "lights"}, MODEL, None) == (batch.metadata, batch.model, batch.expires_at)
        assert None not in (batch.in_progress_at, batch.finalizing_at, batch.completed_at)
        rows = {row["custom_id"]: row for row in await lines_of(client, batch.output_file_id)}
        assert {line["custom_id"] for line in lines} == set(rows)
        for number in range(20):
            response = rows[f"r-{number}"]["response"]
            assert (200, None) == (response["status_code"], rows[f"r-{number}"]["error"])
            assert ("chat.completion", 8) == (
                response["body"]["object"],
                response["body"]["usage"]["completion_tokens"],
            )
        assert [rows["r-20"]] == await lines_of(client, batch.error_file_id)
        assert "request_refused" == rows["r-20"]["error"]["code"]
        assert 400 == rows["r-20"]["response"]["status_code"]
        assert "longer than the model's context" in rows["r-20"]["response"]["body"]["error"]["message"]
        assert 21 == daemon.simulation.stats.by_route["/v1/chat/completions"]
        output = await client.files.retrieve(batch.output_file_id or "")
        assert (f"{batch.id}_output.jsonl", "batch_output") == (output.filename, output.purpose)
        assert output.bytes == len((await client.files.content(output.id)).content)


async def test_the_synchronous_client(daemon: Served) -> None:
    """The same, as in OpenAI's guide."""

    def session() -> list[str]:
        with OpenAI(base_url=f"{daemon.url}/v1", api_key="none") as client:
            file = client.files.create(file=("in.jsonl", ndjson(request_line(1))), purpose="batch")
            batch = client.batches.create(
                input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
            )
            while batch.status not in ENDED:
                batch = client.batches.retrieve(batch.id)
            text = client.files.content(batch.output_file_id or "").text
            return [orjson.loads(line)["custom_id"] for line in text.splitlines()]

    assert ["r-1"] == await asyncio.to_thread(session)


async def test_lists_are_paged(daemon: Served) -> None:
    """The client follows the pages by itself; files may be listed oldest first."""
    async with client_of(daemon) as client:
        files = [
            await client.files.create(file=(f"{n}.jsonl", ndjson(request_line(n))), purpose="batch")
            for n in range(5)
        ]
        newest_first = [file.id for file in files[::-1]]
        assert newest_first == [file.id async for file in client.files.list(limit=2)]
        assert newest_first[::-1] == [file.id async for file in client.files.list(limit=2, order="asc")]
        assert [] == [file.id async for file in client.files.list(purpose="batch_output")]
        batches = [
            await client.batches.create(
                input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
            )
            for file in files
        ]
        assert [batch.id for batch in batches[::-1]] == [
            batch.id async for batch in client.batches.list(limit=2)
        ]
        page = await client.batches.list(limit=5)
        assert (5, False) == (len(page.data), page.has_more)
        for batch in batches:
            await until(client, daemon, batch.id, lambda batch: batch.status in ENDED)
        outputs = [file async for file in client.files.list(purpose="batch_output", limit=1)]
        assert 5 == len(outputs)
        deleted = await client.files.delete(outputs[0].id)
        assert (True, outputs[0].id) == (deleted.deleted, deleted.id)
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve(outputs[0].id)


async def test_an_input_that_is_wrong_fails_as_a_whole(daemon: Served) -> None:
    """Each bad line is named; nothing is sent, and there is no output."""
    async with client_of(daemon) as client:
        file = await client.files.create(
            file=("in.jsonl", ndjson(request_line(1)) + b"{\n" + ndjson(request_line(1))), purpose="batch"
        )
        batch = await client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        batch = await until(client, daemon, batch.id, lambda batch: batch.status in ENDED)
        assert ("failed", None) == (batch.status, batch.output_file_id)
        assert batch.errors is not None
        assert [("invalid_json_line", 2), ("duplicate_custom_id", 3)] == [
            (error.code, error.line) for error in batch.errors.data or ()
        ]
        assert batch.failed_at is not None
        async with daemon.session.get("/metrics") as answer:
            metrics = await answer.text()
        for line in (
            'batches{status="failed"} 1.0',
            'batches{status="completed"} 0.0',
            "webhooks_pending 0.0",
        ):
            assert f"streamsyn_{line}\n" in metrics
        with pytest.raises(openai.ConflictError):
            await client.batches.cancel(batch.id)
    assert 0 == daemon.simulation.stats.by_route["/v1/chat/completions"]


async def test_a_model_that_no_server_serves(daemon: Served) -> None:
    """The batch fails before anything is sent, and says which models there are."""
    async with client_of(daemon) as client:
        batch = await batch_of(client, request_line(1, model="other"))
        batch = await until(client, daemon, batch.id, lambda batch: batch.status in ENDED)
        assert ("failed", 0) == (batch.status, batch.request_counts and batch.request_counts.completed)
        assert batch.errors is not None
        (error,) = batch.errors.data or []
        assert ("model_not_found", "body.model") == (error.code, error.param)
        assert "no server serves other; they serve simulated" in (error.message or "")
    assert 0 == daemon.simulation.stats.by_route["/v1/chat/completions"]


async def test_bad_requests_have_openais_form(daemon: Served) -> None:
    """The client raises its own errors, with the parameter that is wrong."""
    async with client_of(daemon) as client:
        file = await client.files.create(file=("in.jsonl", b""), purpose="batch")
        good: dict[str, Any] = {
            "input_file_id": file.id,
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
        }
        wrong: list[tuple[dict[str, Any], str | None]] = [
            ({"input_file_id": "file-none"}, "input_file_id"),
            ({"endpoint": "/v1/embeddings"}, "endpoint"),
            ({"completion_window": "soon"}, "completion_window"),
            ({"metadata": {"a": "x" * 513}}, None),
            ({"metadata": {str(n): "" for n in range(17)}}, None),
            ({"extra_body": {"output_expires_after": {"anchor": "created_at", "seconds": 3600}}}, None),
        ]
        for change, param in wrong:
            with pytest.raises(openai.BadRequestError) as refused:
                await client.batches.create(**{**good, **change})
            assert (param, "invalid_request_error") == (refused.value.param, refused.value.type)
        for missing in (
            client.files.retrieve("file-none"),
            client.files.content("file-none"),
            client.files.delete("file-none"),
            client.batches.retrieve("batch_none"),
            client.batches.cancel("batch_none"),
        ):
            with pytest.raises(openai.NotFoundError):
                await missing
        for listed in (client.files.list(after="file-none"), client.batches.list(limit=0)):
            with pytest.raises(openai.BadRequestError):
                await listed
        for given in ({"purpose": "fine-tune"}, {"purpose": "batch", "extra_body": {"more": "fields"}}):
            with pytest.raises(openai.BadRequestError):
                await client.files.create(file=("in.jsonl", b""), **given)
        assert [file.id] == [one.id async for one in client.files.list()]


@pytest.mark.parametrize(
    ("content_type", "body", "status"),
    [
        ("application/json", b"{}", 415),
        ("multipart/form-data", b"", 400),
        ("multipart/form-data; boundary=b", b"no parts", 400),
        ("multipart/form-data; boundary=b", b"--b\r\n\r\nx\r\n--b--\r\n", 400),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nx',
            400,
        ),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="../../f"\r\n\r\n'
            + b"x" * 5000
            + b"\r\n--b--\r\n",
            413,
        ),
    ],
)
async def test_uploads_that_are_refused(
    start_daemon: StartDaemon, content_type: str, body: bytes, status: int
) -> None:
    """Whatever is sent, the answer is an error of OpenAI's form, and nothing stays on disk."""
    async with (
        start_daemon({"serve.max_body_bytes": 4096}) as served,
        served.session.post("/v1/files", data=body, headers={"Content-Type": content_type}) as answer,
    ):
        assert (status, "invalid_request_error") == (answer.status, (await answer.json())["error"]["type"])
        assert [] == await asyncio.to_thread(lambda: list((served.daemon.root / "files").iterdir()))


async def test_the_output_grows_while_the_batch_is_in_progress(start_daemon: StartDaemon) -> None:
    """It can be read from the first row on; cancelling keeps what is done, and the rest is named."""
    slow = SimulatorConfig(slots=4, latency_ms=10)
    async with start_daemon({"fleet.concurrency": 4}, simulator=slow) as served, client_of(served) as client:
        batch = await batch_of(client, *(request_line(n, max_tokens=4) for n in range(1000)))
        counts: list[int] = []
        while len(counts) < 3:
            batch = await until(
                client,
                served,
                batch.id,
                lambda batch: bool(
                    batch.request_counts and batch.request_counts.completed > max(counts, default=0)
                ),
            )
            assert "in_progress" == batch.status
            assert batch.request_counts is not None
            counts.append(batch.request_counts.completed)
            assert counts[-1] <= len(await lines_of(client, batch.output_file_id)) < 1000
        with pytest.raises(openai.ConflictError):
            await client.files.delete(batch.output_file_id or "")
        batch = await client.batches.cancel(batch.id)
        assert "cancelling" == batch.status
        batch = await until(client, served, batch.id, lambda batch: batch.status in ENDED)
        assert "cancelled" == batch.status == (await client.batches.cancel(batch.id)).status
        done = await lines_of(client, batch.output_file_id)
        assert counts[-1] <= len(done) == batch.request_counts.completed < 1000  # type: ignore[union-attr]
        unsent = await lines_of(client, batch.error_file_id)
        assert {"batch_cancelled"} == {row["error"]["code"] for row in unsent}
        ids = [row["custom_id"] for row in [*done, *unsent]]
        assert (1000, 1000) == (len(ids), len(set(ids)))
        assert len(done) == served.simulation.stats.by_route["/v1/chat/completions"]


async def test_a_batch_expires_if_it_is_asked_to(start_daemon: StartDaemon) -> None:
    """After a completion window other than the only one that the client knows."""
    slow = SimulatorConfig(slots=1, latency_ms=50)
    async with start_daemon({"fleet.concurrency": 1}, simulator=slow) as served, client_of(served) as client:
        batch = await batch_of(client, *(request_line(n, max_tokens=4) for n in range(200)), window="1s")
        assert batch.expires_at is not None
        assert batch.expires_at <= time.time() + 1
        batch = await until(client, served, batch.id, lambda batch: batch.status in ENDED)
        assert "expired" == batch.status
        unsent = await lines_of(client, batch.error_file_id)
        assert {"batch_expired"} == {row["error"]["code"] for row in unsent}
        assert 200 == len(unsent) + len(await lines_of(client, batch.output_file_id))


async def test_batches_go_on_after_a_restart(start_daemon: StartDaemon) -> None:
    """Files and batches are there again, and nothing is asked twice that was answered."""
    slow = SimulatorConfig(slots=4, latency_ms=10)
    keys = {"fleet.concurrency": 4}
    async with start_daemon(keys, simulator=slow) as served, client_of(served) as client:
        first = await batch_of(client, *(request_line(n, max_tokens=4) for n in range(60)))
        second = await batch_of(client, *(request_line(n, max_tokens=4) for n in range(3)))
        await until(client, served, second.id, lambda batch: batch.status in ENDED)
        await until(client, served, first.id, lambda batch: batch.request_counts.completed > 4)  # type: ignore[union-attr]
    asked = served.simulation.stats.by_route["/v1/chat/completions"]
    async with start_daemon(keys) as served, client_of(served) as client:
        batch = await until(client, served, first.id, lambda batch: batch.status in ENDED)
        assert ("completed", 60) == (batch.status, batch.request_counts.completed)  # type: ignore[union-attr]
        rows = await lines_of(client, batch.output_file_id)
        assert {f"r-{n}" for n in range(60)} == {row["custom_id"] for row in rows}
        assert 60 == len(rows)
        assert "completed" == (await client.batches.retrieve(second.id)).status
        assert [second.id, first.id] == [one.id async for one in client.batches.list()]
        asked += served.simulation.stats.by_route["/v1/chat/completions"]
    assert 63 == asked


async def test_any_file_name_can_be_shown(daemon: Served) -> None:
    """Names are only shown, never used as paths; what is not text is escaped, and long ones are cut."""
    for sent, shown in (
        (b"../../f", "../../f"),
        (b"\xff", "\\udcff"),
        (b"n" * 300, "n" * 255),
    ):
        body = (
            b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="'
            + sent
            + b'"\r\n\r\nx\r\n--b--\r\n'
        )
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        async with daemon.session.post("/v1/files", data=body, headers=headers) as answer:
            assert 200 == answer.status, await answer.text()
            file = await answer.json()
        assert shown == file["filename"]
    root = daemon.daemon.root / "files"
    assert {"content", "meta.json"} == await asyncio.to_thread(
        lambda: {path.name for path in root.rglob("*") if path.is_file()}
    )


async def test_an_ended_batch_can_be_deleted(daemon: Served) -> None:
    """With its run; its files stay until they are deleted. OpenAI has no such call."""
    async with client_of(daemon) as client:
        batch = await batch_of(client, request_line(1))
        failed = await batch_of(client, {})
        problem = await daemon.refused("DELETE", f"/v1/batches/{batch.id}")
        assert "cancel it first" in problem["error"]["message"]
        for one in (batch, failed):
            batch = await until(client, daemon, one.id, lambda batch: batch.status in ENDED)
            await daemon.ask("DELETE", f"/v1/batches/{one.id}")
            with pytest.raises(openai.NotFoundError):
                await client.batches.retrieve(one.id)
        assert [] == await asyncio.to_thread(lambda: list(daemon.daemon.batches.folder.iterdir()))
        (output,) = [file.id async for file in client.files.list(purpose="batch_output")]
        assert ["r-1"] == [row["custom_id"] for row in await lines_of(client, output)]


async def test_request_lines_as_seeds_of_a_run(daemon: Served) -> None:
    """The recipe of batches can be used by any run, which is open for more requests and read live."""
    config = {"recipe": {"use": "chat"}, "seeds": {"format": "request"}, "assembly": {"write": False}}
    await daemon.new_run("lines", config=config)
    headers = {"Content-Type": "application/x-ndjson"}
    data = ndjson(request_line(1), {"custom_id": "r-2"}, request_line(3))
    async with daemon.session.post("/v1/runs/lines/seeds", data=data, headers=headers) as answer:
        taken = await answer.json()
    assert (2, [{"line": 2, "detail": "Missing required parameter: 'method'."}]) == (
        taken["accepted"],
        taken["refused_lines"],
    )
    await daemon.ask("POST", "/v1/runs/lines/close")
    async with daemon.session.get("/v1/runs/lines/contexts?follow=1") as answer:
        rows = parsed(await answer.read())
    assert {"r-1", "r-3"} == {row["id"] for row in rows}
    assert all("choices" in row["steps"][0]["body"] for row in rows)


async def test_a_cancel_that_a_kill_interrupted(start_daemon: StartDaemon) -> None:
    """The batch was saved as cancelling, but its run did not learn of it: the next daemon drains it."""
    slow = SimulatorConfig(slots=4, latency_ms=10)
    keys = {"fleet.concurrency": 4}
    async with start_daemon(keys, simulator=slow) as served, client_of(served) as client:
        batch = await batch_of(client, *(request_line(n, max_tokens=4) for n in range(500)))
        await until(client, served, batch.id, lambda batch: batch.status == "in_progress")
        record = served.daemon.batches.get(batch.id)
        assert record is not None
        record.reached("cancelling")
        await asyncio.to_thread(record.save, served.daemon.batches.folder / batch.id)
    async with start_daemon(keys, simulator=slow) as served, client_of(served) as client:
        batch = await until(client, served, batch.id, lambda batch: batch.status in ENDED)
        assert "cancelled" == batch.status
        ids = [row["custom_id"] for row in await lines_of(client, batch.error_file_id)]
        ids += [row["custom_id"] for row in await lines_of(client, batch.output_file_id)]
        assert (500, 500) == (len(ids), len(set(ids)))


async def test_an_upload_that_stops_coming_leaves_nothing(start_daemon: StartDaemon) -> None:
    """It is answered with 408 after `serve.body_timeout_s`."""
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'

    async def body() -> AsyncIterator[bytes]:
        yield head + b"x" * 100_000
        await asyncio.Event().wait()

    async with start_daemon({"serve.body_timeout_s": 0.2}) as served:
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        try:
            async with served.session.post("/v1/files", data=body(), headers=headers) as answer:
                assert 408 == answer.status
        except aiohttp.ClientError:
            pass  # the daemon closed the connection before its answer was read
        assert [] == served.daemon.files.newest_first()
        assert [] == await asyncio.to_thread(lambda: list((served.daemon.root / "files").iterdir()))
