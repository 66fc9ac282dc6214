"""The inbox of a run: what is accepted is on disk, is found again when it is sent again, and is read once."""

import asyncio
import os
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from streamsyn.config.sections import SeedsSection
from streamsyn.errors import DirectoryInUse, InboxClosed, KeyInUse, KeyReused, SinkError, TakenOver
from streamsyn.records import BadSeed, Entry, Seed
from streamsyn.seeds.inbox import Inbox, InboxSource
from streamsyn.seeds.inbox_file import InboxIndex
from streamsyn.seeds.submission import RefusedLine, Submitted
from tests.builders import disk_full_beyond

pytestmark = pytest.mark.timeout(20)


def row(number: int, **more: Any) -> dict[str, Any]:
    return {"instruction": f"What is {number}?", "answer": f"{number}.", **more}


def line(number: int, **more: Any) -> bytes:
    return orjson.dumps(row(number, **more))


OPENED: list[Inbox] = []


@pytest.fixture
def inbox(tmp_path: Path) -> Iterator[Inbox]:
    """One in a run directory that is not there yet."""
    made = Inbox(tmp_path / "out", SeedsSection(max_line_bytes=1000))
    OPENED.append(made)
    yield made
    while OPENED:
        OPENED.pop().release()


def read(inbox: Inbox) -> list[Entry]:
    """What a run reads that does not wait for more."""
    return [entry for batch in InboxSource(inbox, waits=False).batches() for entry in batch]


def questions(entries: list[Entry]) -> list[str]:
    return [entry.instruction for entry in entries if isinstance(entry, Seed)]


def again(inbox: Inbox) -> Inbox:
    """As a later process opens it."""
    inbox.release()
    OPENED.append(Inbox(inbox.path.parent.parent, SeedsSection()))
    return OPENED[-1]


def test_seeds_are_read_in_the_order_of_their_lines(inbox: Inbox) -> None:
    """From lines as bytes or text, or decoded; with their origins, tasks and metadata."""
    submitted = inbox.submit([line(1), row(2, task="sums", level=3), line(3).decode()])

    seeds = read(inbox)
    assert Submitted(accepted=3) == submitted
    assert ["What is 1?", "What is 2?", "What is 3?"] == questions(seeds)
    assert ["submitted:1", "submitted:2", "submitted:3"] == [seed.origin for seed in seeds]
    assert ("sums", {"level": 3}) == (seeds[1].task, seeds[1].metadata)  # type: ignore[union-attr]
    assert (3, 0) == (inbox.accepted, inbox.unread)
    assert seeds == read(again(inbox))


def test_what_was_submitted_before_is_a_duplicate(inbox: Inbox) -> None:
    """Within a request or in a later one, by id and pair; an id that begins anew is a different seed."""
    first = inbox.submit([line(1), line(1), line(2, id="a")])
    later = again(inbox).submit([line(2, id="a"), line(3, id="a"), line(1), line(2)])

    assert Submitted(accepted=2, duplicate=1) == first
    assert Submitted(accepted=2, duplicate=2) == later


def test_bad_lines_are_refused_with_their_numbers(inbox: Inbox) -> None:
    """And not kept; blank lines are skipped. Only the first of many are described."""
    body = b"\n".join([line(1), b"", b"nix", b"[1]", b"{}", b"x" * 1001, line(2)])
    with inbox.submission() as submission:
        for start in range(0, len(body), 7):
            submission.feed(body[start : start + 7])
        found = submission.finish()
    many = inbox.submit([b"nix"] * 500)
    odd = inbox.submit([7, {"instruction": "Why?"}, {"instruction": "Why?", "answer": "\ud800"}])

    assert (2, 0, 4) == (found.accepted, found.duplicate, found.refused_total)
    assert [3, 4, 5, 6] == [refused.line for refused in found.refused]
    assert found.refused[0].detail.startswith("not valid JSON: ")
    assert RefusedLine(4, "not a JSON object but list: '[1]'") == found.refused[1]
    assert "1001 bytes, more than seeds.max_line_bytes = 1000" == found.refused[3].detail
    assert (500, 100) == (many.refused_total, len(many.refused))
    assert "not a JSON object but int" == odd.refused[0].detail
    assert 3 == odd.refused_total
    assert 2 == len(read(inbox))


def test_bad_lines_can_be_kept(inbox: Inbox) -> None:
    """They become rejects; the same one is not kept twice."""
    with inbox.submission(keeps_bad=True) as submission:
        for bad in (b"nix", b"nix", {"instruction": "Why?"}):
            submission.add(bad)
        found = submission.finish()

    kept = read(inbox)
    assert Submitted(accepted=2, duplicate=1) == found
    assert ["invalid_json", "not_a_seed"] == [entry.reason for entry in kept if isinstance(entry, BadSeed)]
    assert ["submitted:1", "submitted:2"] == [entry.origin for entry in kept]


def test_a_request_with_a_key_is_answered_as_before(inbox: Inbox) -> None:
    """By a later process too, also when the inbox is closed; nothing is taken a second time."""
    first = inbox.submit([line(1), b"nix"], key="k")
    later = again(inbox)
    later.close()
    second = later.submit([line(1), b"nix"], key="k")

    assert first == second
    assert (1, 1) == (second.accepted, second.refused_total)
    assert ["What is 1?"] == questions(read(later))
    with pytest.raises(KeyReused, match="'k' belongs to a request with a different content"):
        later.submit([line(1)], key="k")


def test_a_key_is_in_use_until_its_request_ends(inbox: Inbox) -> None:
    """Whether it ends well or not."""
    with inbox.submission("k"), pytest.raises(KeyInUse), inbox.submission("k"):
        pass
    with pytest.raises(ZeroDivisionError), inbox.submission("k"):
        raise ZeroDivisionError

    assert Submitted(accepted=1) == inbox.submit([line(1)], key="k")


def test_an_interrupted_request_leaves_what_was_flushed(inbox: Inbox) -> None:
    """And no answer: sent again with its key, those are duplicates."""
    with inbox.submission("k") as submission:
        submission.feed(line(1) + b"\n" + line(2)[:5])
        submission.flush()
        submission.feed(line(2)[5:] + b"\n")  # and then the client is gone

    later = again(inbox)
    assert ["What is 1?"] == questions(read(later))
    assert Submitted(accepted=1, duplicate=1) == later.submit([line(1), line(2)], key="k")


def test_a_closed_inbox_takes_nothing_until_it_is_reopened(inbox: Inbox) -> None:
    """Which is kept on disk."""
    inbox.submit([line(1)])
    inbox.close()
    later = again(inbox)
    with pytest.raises(InboxClosed, match="takes no more seeds"):
        later.submit([line(2)])
    was_closed = later.closed
    later.reopen()

    assert was_closed
    assert not later.closed
    assert Submitted(accepted=1) == again(later).submit([line(2)])


def test_a_reader_waits_for_more_until_the_inbox_is_closed(inbox: Inbox) -> None:
    """It gets what is submitted as it comes."""
    batches = InboxSource(inbox).batches()
    arrived = []
    with ThreadPoolExecutor(1) as thread:
        for number in range(3):
            reading = thread.submit(lambda: next(batches))
            inbox.submit([line(number)])
            arrived += questions(reading.result(10))
        ending = thread.submit(lambda: list(batches))
        inbox.close()
        end = ending.result(10)

    assert ["What is 0?", "What is 1?", "What is 2?"] == arrived
    assert [] == end


def test_a_reader_can_be_stopped(inbox: Inbox) -> None:
    """A later one begins with the first line."""
    inbox.submit([line(1)])
    source = InboxSource(inbox)
    batches = source.batches()
    next(batches)
    with ThreadPoolExecutor(1) as thread:
        reading = thread.submit(lambda: list(batches))
        source.stop()
        end = reading.result(10)

    assert [] == end
    assert None is source.fraction()
    assert ["What is 1?"] == questions(read(inbox))


async def test_who_submits_can_wait_for_room(inbox: Inbox) -> None:
    """Until few entries are unread; those read by an earlier run do not count again."""
    await asyncio.to_thread(inbox.submit, [line(number) for number in range(300)])
    batches = InboxSource(inbox).batches()
    await asyncio.to_thread(next, batches)  # 256 of them
    await inbox.room(50)
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(inbox.room(10), name="waits")
        other = group.create_task(inbox.room(0), name="waits too")
        await asyncio.sleep(0)
        was_waiting = not waiting.done()
        await asyncio.to_thread(next, batches)
    later = await asyncio.to_thread(again, inbox)
    await asyncio.to_thread(later.open)

    assert was_waiting
    assert other.done()
    assert (300, 0) == (later.accepted, later.unread)


async def test_waits_for_room_can_be_ended(inbox: Inbox) -> None:
    """When the inbox is closed, or by `wake`."""
    await asyncio.to_thread(inbox.submit, [line(1), line(2)])
    for end in (inbox.wake, inbox.close):
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            waiting = group.create_task(inbox.room(1), name="waits")
            await asyncio.sleep(0)
            assert not waiting.done()
            await asyncio.to_thread(end)


def test_a_thread_can_wait_for_room(inbox: Inbox) -> None:
    """Until the run has read on, the inbox is closed, or it is woken for a reason of its own."""
    inbox.submit([line(1), line(2)])
    over, read_on = threading.Event(), InboxSource(inbox).batches()
    with ThreadPoolExecutor(2) as threads:
        for number, end in enumerate((lambda: next(read_on), over.set, inbox.close)):
            waits = [threads.submit(inbox.wait_for_room, 1, over.is_set) for _ in range(2)]
            end()
            inbox.wake()
            assert [None, None] == [wait.result(10) for wait in waits]
            over.clear()
            if not inbox.closed:
                inbox.submit([line(10 * number), line(10 * number + 1)])


def test_a_released_inbox_refuses_who_is_late(inbox: Inbox) -> None:
    """Its files stay closed, so that they can be opened anew; a run that waits for seeds is not ended."""
    with inbox.submission() as late:
        late.feed(line(1) + b"\n")
        inbox.release()
        with pytest.raises(InboxClosed, match="it has ended"):
            late.flush()
    with pytest.raises(InboxClosed):
        inbox.submit([line(1)])
    later = again(inbox)

    assert Submitted(accepted=1) == later.submit([line(1)])


def test_many_threads_share_few_syncs(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one sync runs, what the others submit is gathered for the next; each gets its own counts."""
    inbox.submit([line(0)])
    syncs, fsync, gathered = 0, os.fsync, threading.Event()

    def slow(fd: int) -> None:
        nonlocal syncs
        syncs += 1
        if syncs == 1:
            gathered.wait(10)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", slow)
    with ThreadPoolExecutor(20) as threads:
        first = threads.submit(inbox.submit, [line(1)])
        others = [threads.submit(inbox.submit, [line(number % 7), b"nix"]) for number in range(2, 20)]
        while len(inbox._file._waiting) < 18:  # they have been parsed, and wait
            threading.Event().wait(0.001)
        gathered.set()
        found = [future.result(10) for future in (first, *others)]

    assert 2 == syncs
    assert 6 == sum(one.accepted for one in found)  # 1 to 6
    assert 18 == sum(one.refused_total for one in found)
    assert 7 == len(read(inbox))


def test_a_full_disk_refuses_and_spoils_nothing(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written in part is cut off by the next call."""
    inbox.submit([line(1)])
    write = inbox._file._spool.append

    def torn(data: bytes) -> None:
        write(data[: len(data) // 2])
        raise SinkError("cannot write: no space left")

    with monkeypatch.context() as full:
        full.setattr(inbox._file._spool, "append", torn)
        with pytest.raises(SinkError, match="no space left"):
            inbox.submit([line(2), line(3), line(4)])
    found = inbox.submit([line(4), line(5)])

    assert Submitted(accepted=2) == found
    assert ["What is 1?", "What is 4?", "What is 5?"] == questions(read(inbox))
    assert ["What is 1?", "What is 4?", "What is 5?"] == questions(read(again(inbox)))


def test_the_index_holds_few_keys_in_memory(inbox: Inbox) -> None:
    """The others are in its file, and are found there."""
    index = inbox._file._index = InboxIndex(inbox._file._index.path, in_memory=10)
    for first in range(0, 40, 4):
        inbox.submit([line(number) for number in range(first, first + 4)])
        assert len(index._keys) < 10

    assert Submitted(accepted=1, duplicate=40) == inbox.submit([line(number) for number in range(41)])


def test_an_index_that_cannot_be_written_is_behind_and_catches_up(
    inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in the file was accepted."""
    inbox.submit([line(1)])

    def failing(_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(inbox._file._index, "keep", failing)
        accepted = inbox.submit([line(2)])

    assert Submitted(accepted=1) == accepted
    assert Submitted(accepted=1, duplicate=2) == inbox.submit([line(1), line(2), line(3)])


@pytest.mark.parametrize("spoil", ["delete", "damage", "shorten"])
def test_the_index_is_made_again_from_the_file(inbox: Inbox, spoil: str) -> None:
    """Lost or damaged, or of a longer file: keys, answers and whether it is closed are found again."""
    inbox.submit([line(1)], key="k")
    inbox.submit([line(2)])
    inbox.close()
    inbox.release()
    index = inbox.path.parent.parent / "index" / "inbox.sqlite"
    if spoil == "delete":
        index.unlink()
    elif spoil == "damage":
        index.write_bytes(b"SQLite format 3\0" + b"\xff" * 4096)
    else:
        whole = inbox.path.read_bytes().splitlines(keepends=True)
        inbox.path.write_bytes(b"".join(whole[:2]))
    later = again(inbox)
    later.open()

    assert later.closed == (spoil != "shorten")
    later.reopen()
    assert Submitted(accepted=1) == later.submit([line(1)], key="k")
    assert Submitted(duplicate=1) == later.submit([line(1)])
    assert Submitted(duplicate=spoil != "shorten", accepted=spoil == "shorten") == later.submit([line(2)])


@pytest.mark.parametrize("damage", [b"NO\n", b'{"new": 1}\n', b"\n"])
def test_a_damaged_line_among_others_is_named(inbox: Inbox, damage: bytes) -> None:
    """By whoever meets it: a run, or the index when it is made again."""
    inbox.submit([line(1)])
    inbox.submit([line(2)])
    one, two = inbox.path.read_bytes().splitlines(keepends=True)
    inbox.path.write_bytes(damage.rjust(len(one)) + two)

    with pytest.raises(SinkError, match=r"seeds\.jsonl:1 is damaged; repair or delete that line"):
        read(inbox)
    inbox.release()
    (inbox.path.parent.parent / "index" / "inbox.sqlite").unlink()
    with pytest.raises(SinkError, match=r"seeds\.jsonl:1 is damaged; repair or delete that line"):
        inbox.open()


def test_one_process_at_a_time(inbox: Inbox) -> None:
    """The second is refused, and cuts nothing."""
    inbox.submit([line(1)])
    other = Inbox(inbox.path.parent.parent, SeedsSection())

    with pytest.raises(DirectoryInUse, match=r"seeds\.jsonl is in use by another process"):
        other.submit([line(2)])
    inbox.release()
    assert Submitted(accepted=1) == other.submit([line(2)])
    other.release()


def test_an_index_without_room_is_named(inbox: Inbox) -> None:
    """Nothing is accepted."""
    inbox.open()
    with disk_full_beyond(200), pytest.raises(SinkError):
        inbox.submit([line(number) for number in range(2000)])

    assert Submitted(accepted=1) == inbox.submit([line(1)])


class Inboxes(RuleBasedStateMachine):
    """Submits, kills at any byte, runs and closes: each accepted seed is read, once by each run."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.out = Path(self.folder.name) / "out"
        self.inbox = self.opened()
        self.accepted: list[str] = []
        self.answers: dict[str, tuple[list[int], Submitted]] = {}
        self.is_closed = False

    def opened(self) -> Inbox:
        """As a process opens it: its index writes what is in memory now and then."""
        inbox = Inbox(self.out, SeedsSection())
        inbox._file._index = InboxIndex(inbox._file._index.path, in_memory=4)
        return inbox

    def teardown(self) -> None:
        self.inbox.release()
        self.folder.cleanup()

    @rule(numbers=st.lists(st.integers(0, 12), max_size=5), key=st.sampled_from([None, None, "a", "b"]))
    def submit(self, numbers: list[int], key: str | None) -> None:
        rows = [line(number) for number in numbers]
        new = [f"What is {number}?" for number in dict.fromkeys(numbers)]
        new = [question for question in new if question not in self.accepted]
        if key in self.answers:
            before, answer = self.answers[key]
            if before == numbers:
                assert answer == self.inbox.submit(rows, key)
            else:
                with pytest.raises(KeyReused):
                    self.inbox.submit(rows, key)
        elif self.is_closed and rows:
            with pytest.raises(InboxClosed):
                self.inbox.submit(rows, key)
        else:
            found = self.inbox.submit(rows, key)
            assert Submitted(accepted=len(new), duplicate=len(rows) - len(new)) == found
            self.accepted += new
            if key is not None:
                self.answers[key] = (numbers, found)

    @rule(closed=st.booleans())
    def close(self, closed: bool) -> None:
        (self.inbox.close if closed else self.inbox.reopen)()
        self.is_closed = closed

    @rule(torn=st.binary(max_size=30).filter(lambda tail: b"\n" not in tail), lost=st.booleans())
    def kill(self, torn: bytes, lost: bool) -> None:
        """In the middle of writing a line; what is in memory is gone, and maybe the index."""
        self.inbox._file._is_stale = True  # nothing is written
        self.inbox.release()
        if self.inbox.path.exists():
            with self.inbox.path.open("ab") as file:
                file.write(torn)
        if lost:
            (self.out / "index" / "inbox.sqlite").unlink(missing_ok=True)
        self.inbox = self.opened()

    @precondition(lambda self: self.accepted)
    @rule(kept=st.integers(0, 3))
    def kill_before_the_answer(self, kept: int) -> None:
        """The seeds of a request are on disk, and its answer and the index are not."""
        self.inbox.release()
        numbers = [20 + kept, 30 + kept]
        index = (self.out / "index" / "inbox.sqlite").read_bytes()
        size = self.inbox.path.stat().st_size
        if not self.is_closed:
            self.inbox.open()
            self.inbox.submit([line(number) for number in numbers], key="c")
            self.inbox.release()
            lines = self.inbox.path.read_bytes()[size:].splitlines(keepends=True)
            seeds = [one for one in lines if one.startswith(b'{"seed"')]
            with self.inbox.path.open("r+b") as file:
                file.truncate(size + sum(map(len, seeds)))
            (self.out / "index" / "inbox.sqlite").write_bytes(index)
            new = [f"What is {number}?" for number in numbers]
            self.accepted += [question for question in new if question not in self.accepted]
        self.inbox = self.opened()

    @invariant()
    def every_run_reads_each_accepted_seed_once(self) -> None:
        assert self.accepted == questions(read(self.inbox))
        assert (len(self.accepted), 0, self.is_closed) == (
            self.inbox.accepted,
            self.inbox.unread,
            self.inbox.closed,
        )


TestInbox = Inboxes.TestCase
TestInbox.settings = settings(max_examples=10, stateful_step_count=10, deadline=None)


# Two processes, where locks keep nobody out


class Fence:
    """At its next check, an older process lets a newer one open the inbox; all later ones are refused."""

    def __init__(self, *, took_over: bool = False) -> None:
        self.took_over = took_over
        self.newer: Inbox | None = None
        self.is_lost = False

    def check(self) -> None:
        if self.is_lost:
            raise TakenOver("taken over")
        if self.newer is not None:
            self.newer.open()
            self.is_lost = True


def test_what_an_older_process_acknowledges_is_in_the_copy(tmp_path: Path) -> None:
    """A newer one opens the inbox between the write and the check. What is written later is refused."""
    fence = Fence()
    older = Inbox(tmp_path, SeedsSection(), fence=fence)
    newer = Inbox(tmp_path, SeedsSection(), fence=Fence(took_over=True))
    older.submit([row(0)])
    with older.submission() as late:
        fence.newer = newer
        assert 1 == older.submit([row(1)]).accepted
        assert 2 == newer.accepted
        late.add(line(2))
        with pytest.raises(TakenOver):
            late.finish()
    newer.submit([row(3)])
    older.release()
    with pytest.raises(TakenOver):
        older.open()
    newer.close()

    assert [f"What is {number}?" for number in (0, 1, 3)] == questions(read(newer))
    newer.release()
    fresh = Inbox(tmp_path, SeedsSection())
    fresh.open()
    assert 3 == fresh.accepted
    fresh.release()
