"""SIGKILL of a daemon while batches are checked, in progress, cancelled: nothing is lost or asked twice."""

import json
import os
import random
import re
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from openai import OpenAI

from tests.system.conftest import Server, assert_clean, start, wait_for_line

pytestmark = pytest.mark.crash

KILLS = int(os.environ.get("STREAMSYN_KILLS", "4"))
REQUESTS = 30 * KILLS
IN_FLIGHT = 8
CANCELLED = 2
"""The batch that is cancelled: a long one, so that it is still in progress on a busy machine."""


def lines(batch: int) -> bytes:
    """The requests of a batch."""
    return b"".join(
        json.dumps(
            {
                "custom_id": f"{batch}-{number}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {
                    "model": "simulated",
                    "messages": [{"role": "user", "content": f"Who kept lighthouse {number} of {batch}?"}],
                    "max_tokens": 8,
                },
            }
        ).encode()
        + b"\n"
        for number in range(REQUESTS * (10 if batch == CANCELLED else 1))
    )


class DaemonProcess:
    """A daemon as a process, with a client of it."""

    def __init__(self, root: Path, server: Server) -> None:
        settings = (f"fleet.max_in_flight={IN_FLIGHT}", "sink.sync_interval_s=0.05", "fleet.hedge_tail=false")
        given = [part for setting in settings for part in ("--set", setting)]
        self.process = start("serve", root, "--server", server.url, "--listen", "127.0.0.1:0", *given)
        found = re.search(r"serving .* at (http://[0-9.:]+)", wait_for_line(self.process, "serving "))
        assert found is not None
        self.client = OpenAI(base_url=f"{found[1]}/v1", api_key="none", max_retries=0, timeout=30)

    def kill(self) -> None:
        """End it as the kernel does."""
        self.client.close()
        self.process.kill()
        self.process.communicate()

    def output(self, batch_id: str) -> list[str]:
        """The ids in the output of a batch, which agree with its counts."""
        batch = self.client.batches.retrieve(batch_id)
        counts = batch.request_counts
        if batch.output_file_id is None or counts is None:
            return []
        found = [json.loads(line) for line in self.client.files.content(batch.output_file_id).iter_lines()]
        assert counts.completed + counts.failed <= len(found)
        assert all(row["response"]["status_code"] == 200 for row in found)
        return [row["custom_id"] for row in found]

    def new_batch(self, number: int) -> str:
        """Upload requests and create a batch of them."""
        file = self.client.files.create(file=("in.jsonl", lines(number)), purpose="batch")
        batch = self.client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        return batch.id


@pytest.mark.timeout(300)
def test_kill_at_random_moments(serve: Callable[..., Server], tmp_path: Path) -> None:
    """A batch is created before each of the first kills; all of them complete, the last one is cancelled."""
    server, root = serve("--latency-ms", "60", "--jitter-ms", "30"), tmp_path / "root"
    moments = random.Random(int(os.environ.get("STREAMSYN_KILLS_SEED", "7")))
    batches: list[str] = []
    seen: dict[str, list[str]] = {}
    for kill in range(KILLS):
        daemon = DaemonProcess(root, server)
        if kill in {0, 1, KILLS - 2}:
            batches.append(daemon.new_batch(len(batches)))
        with suppress(subprocess.TimeoutExpired):  # it still runs, as it should
            daemon.process.wait(moments.uniform(0, 0.4))
        for batch_id in batches:
            seen[batch_id] = daemon.output(batch_id)
        if kill == KILLS - 1:
            assert "cancelling" == daemon.client.batches.cancel(batches[-1]).status
        daemon.kill()

    daemon = DaemonProcess(root, server)
    ended = {"completed", "failed", "expired", "cancelled"}
    while not all(one.status in ended for one in daemon.client.batches.list()):
        with suppress(subprocess.TimeoutExpired):
            daemon.process.wait(0.1)
    states = {one.id: one for one in daemon.client.batches.list()}
    assert ["completed", "completed", "cancelled"] == [states[batch_id].status for batch_id in batches]
    answered = 0
    for number, batch_id in enumerate(batches):
        ids = daemon.output(batch_id)
        assert set(seen[batch_id]) <= set(ids)  # what was read once stays
        assert len(ids) == len(set(ids))
        answered += len(ids)
        if states[batch_id].status == "completed":
            assert {f"{number}-{line}" for line in range(REQUESTS)} == set(ids)
    daemon.process.terminate()
    daemon.client.close()
    assert 0 == daemon.process.wait(20)
    daemon.process.communicate()
    assert 0 < answered
    # In flight at each kill, and answers that had come and were being written while the machine was busy.
    assert server.stats()["requests"] - answered <= 2 * IN_FLIGHT * KILLS
    for batch_id in batches:
        assert_clean(root / "batches" / batch_id)
