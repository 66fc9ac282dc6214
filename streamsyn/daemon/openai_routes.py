"""`/v1/files` and `/v1/batches`, as OpenAI's Files API and Batch API have them, for their unchanged clients.

Source: https://platform.openai.com/docs/api-reference/batch and .../files
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Annotated, Any, Final, Literal, TypeVar

from aiohttp import BodyPartReader, ClientPayloadError, web
from aiohttp.http_exceptions import HttpProcessingError
from pydantic import BaseModel, Field

from streamsyn.background import finished_in_thread
from streamsyn.daemon.batch_record import BatchRecord, new_id, window_seconds
from streamsyn.daemon.bodies import LIMITS, JsonBody, json_body
from streamsyn.daemon.daemon import DAEMON
from streamsyn.daemon.problems import Problem
from streamsyn.daemon.route import Route, integer, json_response, one_of
from streamsyn.daemon.run_record import Priority
from streamsyn.daemon.stored_files import FileRecord, Upload
from streamsyn.daemon.webhook_target import Webhook
from streamsyn.plain_text import visible
from streamsyn.seeds.request_lines import ENDPOINT

_FILES_PAGE: Final = 10_000
_BATCHES_PAGE: Final = 100
_DEFAULT_BATCHES: Final = 20
_CHUNK_BYTES: Final = 2**16
_WRITE_BYTES: Final = 2**20
_MAX_FIELD_BYTES: Final = 1024
_MAX_NAME: Final = 255
_MULTIPART: Final = "multipart/form-data"
_JSONL: Final = "application/octet-stream"

R = TypeVar("R", FileRecord, BatchRecord)
Key = Annotated[str, Field(max_length=64)]
Value = Annotated[str, Field(max_length=512)]


class NewBatch(JsonBody):
    """What a batch is created from; `priority` and `webhook` are not OpenAI's."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: Annotated[dict[Key, Value], Field(max_length=16)] | None = None
    priority: Priority = "low"
    webhook: Webhook | None = None


class File(BaseModel):
    """A file."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: str
    status_details: str | None


class FilePage(BaseModel):
    """Some of the files."""

    object: Literal["list"]
    data: list[File]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(BaseModel):
    """That a file is deleted."""

    id: str
    object: Literal["file"]
    deleted: bool


class BatchError(BaseModel):
    """What is wrong with a line of the input, or with the batch."""

    code: str
    line: int | None
    message: str
    param: str | None


class BatchErrors(BaseModel):
    """Why a batch failed."""

    object: Literal["list"]
    data: list[BatchError]


class RequestCounts(BaseModel):
    """Requests: all, with an answer in the output file, with a failure in the output file."""

    total: int
    completed: int
    failed: int


class BatchObject(BaseModel):
    """A batch."""

    id: str
    object: Literal["batch"]
    endpoint: str
    model: str | None
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: str
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    expires_at: int | None
    in_progress_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None


class DeletedBatch(BaseModel):
    """That a batch is deleted."""

    id: str
    object: Literal["batch"]
    deleted: bool


class BatchPage(BaseModel):
    """Some of the batches, newest first."""

    object: Literal["list"]
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


async def upload_file(request: web.Request) -> web.Response:
    """Take a file."""
    if request.content_type != _MULTIPART:
        raise Problem(415, f"expected Content-Type: {_MULTIPART} (got {request.content_type[:100]!r})")
    request.app[DAEMON].check_room()
    files = request.app[DAEMON].files
    async with files.upload() as upload:
        filename = await _receive(request, upload)
        record = await files.keep(upload, filename)
    return json_response(record.as_json())


async def list_files(request: web.Request) -> web.Response:
    """List files."""
    with _as_bad_request("order"):
        order = one_of(request, "order", ("asc", "desc")) or "desc"
    records = request.app[DAEMON].files.newest_first(request.query.get("purpose"))
    if order == "asc":
        records.reverse()
    return _page(request, records, default=_FILES_PAGE, most=_FILES_PAGE)


async def show_file(request: web.Request) -> web.Response:
    """Return what is known of a file."""
    return json_response(_file(request).as_json())


async def read_file(request: web.Request) -> web.StreamResponse:
    """Return the content of a file; of one that grows, the whole lines so far."""
    record = _file(request)
    response = web.StreamResponse()
    response.content_type = _JSONL
    response.content_length = record.bytes
    await response.prepare(request)
    if request.method != "HEAD":
        async with aclosing(request.app[DAEMON].files.chunks(record)) as chunks:
            async for chunk in chunks:
                await response.write(chunk)
    await response.write_eof()
    return response


async def delete_file(request: web.Request) -> web.Response:
    """Delete a file; batches that were created from it are not affected."""
    daemon, record = request.app[DAEMON], _file(request)
    if daemon.batches.is_using(record.id):
        raise Problem(409, f"a batch is writing {record.id}; cancel the batch, or wait for its end")
    await daemon.files.delete(record.id)
    return json_response({"id": record.id, "object": "file", "deleted": True})


async def create_batch(request: web.Request) -> web.Response:
    """Create a batch."""
    daemon = request.app[DAEMON]
    with _as_bad_request():
        new = await json_body(request, NewBatch)
        if new.webhook is not None:
            allow_private = daemon.config.serve.allow_private_webhooks
            new.webhook.check(daemon.hosting.environ, allow_private=allow_private)
    file = daemon.files.get(new.input_file_id)
    if file is None:
        raise Problem(400, f"there is no file {new.input_file_id[:100]!r}", param="input_file_id")
    if file.purpose != "batch":
        raise Problem(
            400, f"{file.id} has the purpose {file.purpose!r}; expected 'batch'", param="input_file_id"
        )
    if new.endpoint != ENDPOINT:
        raise Problem(400, f"endpoint: expected {ENDPOINT} (got {new.endpoint[:100]!r})", param="endpoint")
    if window_seconds(new.completion_window) is None:
        window = repr(new.completion_window[:100])
        text = f"completion_window: expected 24h, or a number with s, m, h or d (got {window})"
        raise Problem(400, text, param="completion_window")
    given = new.model_dump(exclude={"webhook"})
    record = BatchRecord(id=new_id(), created_at=time.time(), **given)
    await daemon.batches.create(record, new.webhook)
    return json_response(record.as_json())


async def list_batches(request: web.Request) -> web.Response:
    """List batches, newest first."""
    records = request.app[DAEMON].batches.newest_first()
    return _page(request, records, default=_DEFAULT_BATCHES, most=_BATCHES_PAGE)


async def show_batch(request: web.Request) -> web.Response:
    """Return a batch."""
    return json_response(_batch(request).as_json())


async def cancel_batch(request: web.Request) -> web.Response:
    """Cancel a batch: what is in flight is finished, and what is done is kept."""
    record = _batch(request)
    if record.status in {"finalizing", "completed", "failed", "expired"}:
        raise Problem(409, f"a batch that is {record.status} cannot be cancelled")
    await request.app[DAEMON].batches.cancel(record.id)
    return json_response(record.as_json())


@contextmanager
def _as_bad_request(param: str | None = None) -> Iterator[None]:
    """Answer 422 of the block as 400, as OpenAI does."""
    try:
        yield
    except Problem as problem:
        if problem.status != 422:
            raise
        raise Problem(400, str(problem), param=param) from None


async def delete_batch(request: web.Request) -> web.Response:
    """Delete a batch that has ended, with its run; its files stay."""
    record = _batch(request)
    if not record.has_ended:
        raise Problem(409, f"a batch that is {record.status} cannot be deleted; cancel it first")
    await request.app[DAEMON].batches.delete(record.id)
    return json_response({"id": record.id, "object": "batch", "deleted": True})


def _file(request: web.Request) -> FileRecord:
    file_id = request.match_info["id"]
    record = request.app[DAEMON].files.get(file_id)
    if record is None:
        raise Problem(404, f"there is no file {file_id[:100]!r}", param="id")
    return record


def _batch(request: web.Request) -> BatchRecord:
    batch_id = request.match_info["id"]
    record = request.app[DAEMON].batches.get(batch_id)
    if record is None:
        raise Problem(404, f"there is no batch {batch_id[:100]!r}", param="id")
    return record


def _page(request: web.Request, records: Sequence[R], *, default: int, most: int) -> web.Response:
    """The page of `records` that the query asks for."""
    with _as_bad_request("limit"):
        limit = integer(request, "limit", default, least=1, most=most)
    after = request.query.get("after")
    start = 0
    if after is not None:
        start = next((number for number, one in enumerate(records, 1) if one.id == after), 0)
        if not start:
            raise Problem(400, f"after: there is no {after[:100]!r}", param="after")
    found = records[start : start + limit]
    content: dict[str, Any] = {
        "object": "list",
        "data": [one.as_json() for one in found],
        "first_id": found[0].id if found else None,
        "last_id": found[-1].id if found else None,
        "has_more": start + limit < len(records),
    }
    return json_response(content)


async def _receive(request: web.Request, upload: Upload) -> str:
    """Write the file in a multipart body to disk as it arrives, and return its name.

    Raises:
        Problem: The body is not a file with the purpose `batch`, is too long, or stops coming.
        SinkError: The disk failed.
    """
    timeout_s = request.app[LIMITS]().body_timeout_s
    filename, purpose = None, None
    try:
        parts = await request.multipart()
        while True:
            async with asyncio.timeout(timeout_s):
                part = await parts.next()
            if part is None:
                break
            if not isinstance(part, BodyPartReader):
                raise Problem(400, "a part of the body has parts of its own")
            if part.name == "file" and filename is None:
                filename = visible(part.filename or "file")[:_MAX_NAME]
                await _write(part, upload, request)
            elif part.name == "purpose" and purpose is None:
                purpose = await _text(part, timeout_s)
            else:
                raise Problem(400, f"unexpected field {str(part.name)[:100]!r}")
    except TimeoutError:
        raise Problem(408, f"no further piece of the body came within {timeout_s:g} s") from None
    except (ValueError, RuntimeError, OSError, ClientPayloadError, HttpProcessingError) as error:
        raise Problem(400, f"the body is not valid {_MULTIPART}: {error}") from error
    if filename is None:
        raise Problem(400, "the field `file` is missing", param="file")
    if purpose != "batch":
        raise Problem(400, f"purpose: expected 'batch' (got {purpose!r})", param="purpose")
    return filename


async def _write(part: BodyPartReader, upload: Upload, request: web.Request) -> None:
    timeout_s, most = request.app[LIMITS]().body_timeout_s, request.app[DAEMON].config.serve.max_body_bytes
    held: list[bytes] = []
    size = 0
    while not part.at_eof():
        async with asyncio.timeout(timeout_s):
            chunk = await part.read_chunk(_CHUNK_BYTES)
        held.append(chunk)
        size += len(chunk)
        if upload.bytes + size > most:
            raise Problem(413, f"the file is longer than serve.max_body_bytes = {most:,}", param="file")
        if size >= _WRITE_BYTES:
            request.app[DAEMON].check_room()
            await finished_in_thread(upload.write, b"".join(held))
            held, size = [], 0
    await finished_in_thread(upload.write, b"".join(held))


async def _text(part: BodyPartReader, timeout_s: float) -> str:
    data = b""
    while not part.at_eof():
        async with asyncio.timeout(timeout_s):
            data += await part.read_chunk(_CHUNK_BYTES)
        if len(data) > _MAX_FIELD_BYTES:
            raise Problem(400, f"the field {str(part.name)[:100]!r} is too long")
    return data.decode("utf-8", "replace")


ROUTES: Final = (
    Route(
        method="POST",
        path="/v1/files",
        handler=upload_file,
        scope="write",
        summary="Upload the input of a batch: `file` with lines of requests, and the `purpose` batch.",
        body=_MULTIPART,
        answers={200: File},
        problems=(507,),
    ),
    Route(
        method="GET",
        path="/v1/files",
        handler=list_files,
        scope="read",
        summary="List files, newest first unless order=asc.",
        answers={200: FilePage},
        problems=(400,),
        query={"purpose": str, "limit": int, "after": str, "order": str},
    ),
    Route(
        method="GET",
        path="/v1/files/{id}",
        handler=show_file,
        scope="read",
        summary="Return what is known of a file.",
        answers={200: File},
        problems=(404,),
    ),
    Route(
        method="GET",
        path="/v1/files/{id}/content",
        handler=read_file,
        scope="read",
        summary="Return the content of a file. The output of a batch grows while the batch is in progress.",
        answers={200: _JSONL},
        problems=(404, 507),
    ),
    Route(
        method="DELETE",
        path="/v1/files/{id}",
        handler=delete_file,
        scope="write",
        summary="Delete a file. Batches that were created from it are not affected.",
        answers={200: DeletedFile},
        problems=(404, 409, 507),
    ),
    Route(
        method="POST",
        path="/v1/batches",
        handler=create_batch,
        scope="write",
        summary="Create a batch from a file of requests for /v1/chat/completions.",
        body=NewBatch,
        answers={200: BatchObject},
        problems=(507,),
    ),
    Route(
        method="GET",
        path="/v1/batches",
        handler=list_batches,
        scope="read",
        summary="List batches, newest first.",
        answers={200: BatchPage},
        problems=(400,),
        query={"limit": int, "after": str},
    ),
    Route(
        method="GET",
        path="/v1/batches/{id}",
        handler=show_batch,
        scope="read",
        summary="Return a batch.",
        answers={200: BatchObject},
        problems=(404,),
    ),
    Route(
        method="DELETE",
        path="/v1/batches/{id}",
        handler=delete_batch,
        scope="write",
        summary="Delete a batch that has ended, with its run; its files stay until they are deleted.",
        answers={200: DeletedBatch},
        problems=(404, 409, 507),
    ),
    Route(
        method="POST",
        path="/v1/batches/{id}/cancel",
        handler=cancel_batch,
        scope="write",
        summary="Cancel a batch: what is in flight is finished, and what is done is kept.",
        answers={200: BatchObject},
        problems=(404, 409, 507),
    ),
)
