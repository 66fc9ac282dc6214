"""Named consumers: durable before the answer, never backwards, many acknowledgements in one write."""

import asyncio
import threading
from pathlib import Path

import pytest

from streamsyn.daemon import consumers as module
from streamsyn.daemon.consumers import MAX_CONSUMERS, Consumers
from streamsyn.daemon.problems import Problem
from streamsyn.errors import SinkError
from streamsyn.io.durable import write_whole


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "consumers.json"


async def test_what_was_answered_is_there_after_a_restart(path: Path) -> None:
    consumers = Consumers(path)
    made, is_new = await consumers.put("trainer", "samples", None, rows=0)
    assert is_new
    assert made.as_json("trainer", 10) == {"name": "trainer", "kind": "samples", "acked": None, "lag": 10}
    await consumers.ack("trainer", 6, rows=10)
    await consumers.put("audit", "rejects", 2, rows=5)
    await consumers.put("gone", "contexts", None, rows=0)
    await consumers.delete("gone")
    again = await Consumers(path).all()
    assert list(again) == ["trainer", "audit"]
    assert again["trainer"].as_json("trainer", 10) == {
        "name": "trainer",
        "kind": "samples",
        "acked": 6,
        "lag": 3,
    }
    assert again["audit"].acked == 2


async def test_an_acknowledgement_never_moves_back_or_beyond_the_last_row(path: Path) -> None:
    consumers = Consumers(path)
    await consumers.put("a", "samples", None, rows=0)
    with pytest.raises(Problem, match="there are no rows yet") as raised:
        await consumers.ack("a", 0, rows=0)
    assert raised.value.status == 409
    await consumers.ack("a", 4, rows=5)
    assert (await consumers.ack("a", 2, rows=5)).acked == 4
    with pytest.raises(Problem, match="seq 5 of samples does not exist: the last row is 4"):
        await consumers.ack("a", 5, rows=5)
    assert (await Consumers(path).get("a")).acked == 4


async def test_metrics_are_kept_until_the_next_ones(path: Path) -> None:
    """A training reports its loss, with the rows that it has trained on or once more with the same."""
    consumers = Consumers(path)
    await consumers.put("a", "samples", None, rows=0)
    await consumers.ack("a", 3, rows=9, metrics={"loss": 2.5, "step": 10})
    await consumers.ack("a", 5, rows=9)
    assert {"loss": 2.5, "step": 10} == (await Consumers(path).get("a")).as_json("a", 9)["metrics"]
    await consumers.ack("a", 5, rows=9, metrics={"loss": 2.25})
    assert {"loss": 2.25} == (await Consumers(path).get("a")).as_json("a", 9)["metrics"]


async def test_putting_a_consumer_again_changes_nothing(path: Path) -> None:
    consumers = Consumers(path)
    await consumers.put("a", "samples", 3, rows=9)
    again, is_new = await consumers.put("a", "samples", 1, rows=9)
    assert (again.acked, is_new) == (3, False)
    with pytest.raises(Problem, match="'a' reads samples, not contexts") as raised:
        await consumers.put("a", "contexts", None, rows=0)
    assert raised.value.status == 409


async def test_a_missing_consumer_is_named(path: Path) -> None:
    for use in (Consumers(path).get("b"), Consumers(path).delete("b"), Consumers(path).ack("b", 0, 1)):
        with pytest.raises(Problem, match="no consumer 'b'") as raised:
            await use
        assert raised.value.status == 404


async def test_the_number_of_consumers_is_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CONSUMERS", 2)
    assert MAX_CONSUMERS > 2
    consumers = Consumers(path)
    await consumers.put("a", "samples", None, rows=0)
    await consumers.put("b", "samples", None, rows=0)
    with pytest.raises(Problem, match="2 consumers, the most"):
        await consumers.put("c", "samples", None, rows=0)
    await consumers.put("a", "samples", None, rows=0)


async def test_acknowledgements_share_a_write(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    consumers = Consumers(path)
    for name in "abc":
        await consumers.put(name, "samples", None, rows=0)
    writes, go_on = [], threading.Event()

    def slowly(to: Path, data: bytes) -> None:
        assert go_on.wait(10)
        writes.append(data)
        write_whole(to, data)

    monkeypatch.setattr(module, "write_whole", slowly)
    async with asyncio.TaskGroup() as group:
        acks = [
            group.create_task(consumers.ack(name, seq, rows=100), name="ack")
            for seq in range(100)
            for name in "abc"
        ]
        await asyncio.sleep(0)
        assert not any(ack.done() for ack in acks)  # nothing is answered before it is on disk
        go_on.set()
    assert len(writes) <= 2
    assert {one.acked for one in (await Consumers(path).all()).values()} == {99}


async def test_a_request_that_is_cancelled_does_not_disturb_the_next_write(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumers = Consumers(path)
    await consumers.put("a", "samples", None, rows=0)
    begun, go_on = threading.Event(), threading.Event()

    def slowly(to: Path, data: bytes) -> None:
        begun.set()
        assert go_on.wait(10)
        write_whole(to, data)

    monkeypatch.setattr(module, "write_whole", slowly)
    async with asyncio.TaskGroup() as group:
        first = group.create_task(consumers.ack("a", 1, rows=9), name="first")
        await asyncio.to_thread(begun.wait, 10)
        first.cancel()
        second = group.create_task(consumers.ack("a", 2, rows=9), name="second")
        await asyncio.wait([first])
        go_on.set()
    assert second.result().acked == 2
    assert (await Consumers(path).get("a")).acked == 2


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b'{"format": 1, "consumers": {"a": 1}}', b'{"format": 2, "consumers": {}}']
)
def test_a_damaged_file_is_named_and_not_overwritten(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(SinkError, match=str(path)):
        asyncio.run(Consumers(path).put("a", "samples", None, rows=0))
    assert path.read_bytes() == content
