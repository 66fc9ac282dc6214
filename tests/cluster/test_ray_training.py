"""Trainings whose ranks Ray places: a node dies, and the number of workers changes."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import orjson
import pytest
from structlog.testing import capture_logs

from streamsyn.trainer.supervisor import latest_checkpoint
from streamsyn.trainer.training_request import TrainRequest, resolve
from tests.cluster.conftest import Raylets

pytestmark = [
    pytest.mark.ray,
    pytest.mark.torture,  # half a minute each time that Ray Train starts its workers
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),  # its own
]

ROWS = 60
CHAT = '{{"id": "{0}", "messages": [{{"role": "user", "content": "what is {0} ' + "and so on " * 12
CHAT += '"}}, {{"role": "assistant", "content": "it is {0}"}}]}}\n'


def training(folder: Path, raylets: Raylets, workers: int) -> TrainRequest:
    """A training on `ROWS` samples into `folder`/out, on CPUs."""
    from tests.trainer.tiny import write_model

    rows, model = folder / "rows.jsonl", folder / "base"
    if not rows.exists():
        rows.write_text("".join(CHAT.format(n) for n in range(ROWS)))
        write_model(model)
    keys = {"rows_per_step": 2, "seq_len": 256, "save_every_steps": 2, "precision": "fp32"}
    settings = [f"train.{key}={value}" for key, value in keys.items()]
    request = resolve(None, str(rows), str(model), folder / "out", settings)
    return request.on_cluster(raylets.address, workers=workers, gpus_per_worker=0)


@contextmanager
def at_the_next_checkpoint(out: Path, act: Callable[[], None]) -> Iterator[None]:
    """Do something once within the block."""
    over, before = threading.Event(), latest_checkpoint(out)

    def watch() -> None:
        while latest_checkpoint(out) == before:  # polls: it is a different process
            if over.wait(0.1):
                return
        act()

    with ThreadPoolExecutor(1) as thread:
        watching = thread.submit(watch)
        try:
            yield
        finally:
            over.set()
        watching.result()


def check(out: Path) -> None:
    """Each sample was trained on once, and there is a model."""
    steps = [orjson.loads(line) for line in (out / "trained.jsonl").read_bytes().splitlines()]
    trained = [example[3] for step in steps for example in step["examples"]]
    assert sorted(map(str, range(ROWS))) == sorted(trained)
    assert (out / "model" / "model.safetensors").exists()


def test_a_node_dies_in_a_training(raylets: Raylets, tmp_path: Path) -> None:
    """The ranks start again from the last checkpoint."""
    from streamsyn.trainer.on_cluster import train_on_cluster

    raylets.at_least(3)
    request = training(tmp_path, raylets, workers=2)
    kill = partial(raylets.kill_node_without, "CPU")
    with capture_logs() as logs, at_the_next_checkpoint(request.out, kill):
        assert 0 == train_on_cluster(request, as_json=False)
    assert 1 == [entry["event"] for entry in logs].count("train.restarts")
    check(request.out)


def test_a_training_is_resumed_with_another_number_of_workers(raylets: Raylets, tmp_path: Path) -> None:
    """Two ranks until Ctrl-C, then one."""
    from streamsyn.trainer.on_cluster import train_on_cluster

    raylets.at_least(2)
    request = training(tmp_path, raylets, workers=2)
    with at_the_next_checkpoint(request.out, lambda: os.kill(os.getpid(), signal.SIGINT)):
        assert 75 == train_on_cluster(request, as_json=False)
    assert 0 == train_on_cluster(training(tmp_path, raylets, workers=1), as_json=False)
    check(request.out)
