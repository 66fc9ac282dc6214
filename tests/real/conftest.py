"""One real SGLang for the whole session: starting it takes longer than most of what is asked of it."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

import pytest

from streamsyn.errors import ConfigError
from streamsyn.fleet.launch import LaunchedServer, find_packaged_model, find_python, launched


@dataclass
class RealServer:
    """The server, and what its start reported: (seconds, last line of its log)."""

    server: LaunchedServer
    waits: list[tuple[float, str]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def model(self) -> str:
        return self.server.model


@pytest.fixture(scope="session")
def real_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    """Start the packaged server on an event loop in a thread; end it with the session."""
    try:
        python, model = find_python(), find_packaged_model()
    except ConfigError as error:
        pytest.fail(f"these tests need the server that deploy/sglang-cpu/install.sh installs: {error}")
    log_path = tmp_path_factory.mktemp("sglang") / "sglang.log"
    waits: list[tuple[float, str]] = []
    started: Future[LaunchedServer] = Future()
    ended = threading.Event()

    async def serve() -> None:
        async with launched(
            model,
            python=python,
            log_path=log_path,
            extra_args=["--trust-request-chat-template"],  # tests of thinking models bring their own
            on_wait=lambda *told: waits.append(told),
        ) as server:
            started.set_result(server)
            await asyncio.to_thread(ended.wait)

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            if not started.done():
                started.set_exception(error)
            raise

    thread = threading.Thread(target=run, name="real-sglang")
    thread.start()
    try:
        yield RealServer(started.result(), waits)
    finally:
        ended.set()
        thread.join()
