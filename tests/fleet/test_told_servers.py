"""Servers that another process tells of, in lines on a pipe."""

import asyncio
import os
from typing import IO

import pytest

from streamsyn.fleet.server_spec import ServerSpec
from streamsyn.fleet.told_servers import line_of, told_servers


def ends() -> tuple[IO[bytes], IO[bytes]]:
    """The two ends of a pipe, without buffers."""
    read, write = os.pipe()
    return os.fdopen(read, "rb", buffering=0), os.fdopen(write, "wb", buffering=0)


@pytest.mark.usefixtures("no_task_left")
async def test_each_line_replaces_the_servers() -> None:
    """The block begins with the first one; one that drains, and none at all, are passed on as well."""
    first = ServerSpec("http://gpu-1:1", incarnation="a")
    draining = ServerSpec("http://gpu-1:1", incarnation="a", draining=True)
    pipe, told = ends()
    with told:
        told.write(line_of([]) + line_of([first]))
        async with asyncio.timeout(5), told_servers(pipe) as servers:
            assert [first] == servers.specs()
            for specs in ([draining], []):
                servers.changed.clear()
                told.write(line_of(specs))
                await servers.changed.wait()
                assert specs == servers.specs()
