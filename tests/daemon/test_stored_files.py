"""The files of OpenAI's Files API on disk: kept, found again, read while they grow, deleted."""

import asyncio
from pathlib import Path

import pytest

from streamsyn.daemon.stored_files import FileRecord, Files
from streamsyn.errors import SinkError


async def opened(root: Path) -> Files:
    """The files of a directory, as a new process finds them."""
    files = Files(root)
    await asyncio.to_thread(files.load)
    return files


async def uploaded(files: Files, *pieces: bytes, name: str = "in.jsonl") -> FileRecord:
    """A file that was received in pieces."""
    async with files.upload() as upload:
        for piece in pieces:
            await asyncio.to_thread(upload.write, piece)
        return await files.keep(upload, name)


async def content(files: Files, record: FileRecord) -> bytes:
    """What a client reads."""
    return b"".join([chunk async for chunk in files.chunks(record)])


async def test_files_survive_a_restart(tmp_path: Path, synced: list[Path]) -> None:
    """Content and what is known of them, newest first; they are synced before they are answered for."""
    files = await opened(tmp_path / "files")
    first = await uploaded(files, b"a\n", b"b\n")
    assert {"content", "meta.json.new", "files"} <= {path.name for path in synced}
    second = await uploaded(files, b"", name="empty")
    output = await files.make_output("file-1-output", "batch_1_output.jsonl")
    assert output is await files.make_output("file-1-output", "again")

    again = await opened(tmp_path / "files")
    assert [output, second, first] == again.newest_first()
    assert [second, first] == again.newest_first("batch")
    assert (b"a\nb\n", b"") == (await content(again, first), await content(again, second))
    shown = {"object": "file", "bytes": 4, "filename": "in.jsonl", "purpose": "batch", "status": "processed"}
    assert shown.items() <= first.as_json().items()


async def test_an_upload_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """Neither when its client goes away, nor when the daemon is killed meanwhile."""
    files = await opened(tmp_path)

    async def interrupted() -> None:
        async with files.upload() as upload:
            await asyncio.to_thread(upload.write, b"half")
            raise ConnectionError

    with pytest.raises(ConnectionError):
        await interrupted()
    assert [] == await asyncio.to_thread(lambda: list(tmp_path.iterdir()))

    await asyncio.to_thread((tmp_path / ".upload-1").mkdir)
    files = await opened(tmp_path)
    assert ([], []) == (files.newest_first(), await asyncio.to_thread(lambda: list(tmp_path.iterdir())))


async def test_a_file_is_read_as_far_as_it_is_known(tmp_path: Path) -> None:
    """An output that grows meanwhile is read up to the size that was announced."""
    files = await opened(tmp_path)
    output = await files.make_output("file-1-output", "o")
    path = files.content_path(output.id)
    await asyncio.to_thread(path.write_bytes, b"one\ntwo\n")
    output.bytes = 4
    assert b"one\n" == await content(files, output)
    output.bytes = 20
    with pytest.raises(SinkError, match="is shorter than it was"):
        await content(files, output)


async def test_deleted_files_are_gone(tmp_path: Path) -> None:
    """Also for the next process; a folder that is damaged is not listed, and left alone."""
    files = await opened(tmp_path)
    kept, deleted = await uploaded(files, b"a"), await uploaded(files, b"b")
    await files.delete(deleted.id)
    assert files.get(deleted.id) is None
    meta = tmp_path / kept.id / "meta.json"
    assert [kept] == (await opened(tmp_path)).newest_first()
    await asyncio.to_thread(meta.write_bytes, b"{")
    assert [] == (await opened(tmp_path)).newest_first()
    assert await asyncio.to_thread(meta.exists)
