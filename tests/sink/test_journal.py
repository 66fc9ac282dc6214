"""The journal: finished steps survive a kill, and damage to its file costs steps only."""

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from streamsyn.records import Attempt, Completion, Draft, Request, Seed
from streamsyn.sink.journal import FinishedStep, Journal, request_digest
from tests.builders import context, disk_full_beyond, opened, sink
from tests.examples import examples

KEYS = [b"%016d" % number for number in range(4)]
SHORT = settings(max_examples=60, stateful_step_count=25, deadline=None)


def step(number: int, text: str = "some text") -> FinishedStep:
    """A finished step."""
    completion = Completion(f"{text} \u2028 {number}", "length", number, 2, 3, "m", "http://one", None)
    attempts = [Attempt("http://one", 1.5, 0.25, "ServerBusy: full", 0), Attempt("http://one", 2.5, 0.5)]
    return FinishedStep(b"%016d" % number, completion, attempts)


def add(journal: Journal, key: bytes, number: int, given_step: FinishedStep) -> bool:
    """Add a step."""
    return journal.add(key, number, given_step.request_digest, given_step.completion, given_step.attempts)


@contextmanager
def journal_at(path: Path) -> Iterator[Journal]:
    """A journal, closed at the end."""
    with closing(Journal(path)) as journal:
        yield journal


class JournalMachine(RuleBasedStateMachine):
    """A journal against a dictionary, closed and opened again now and then."""

    @initialize()
    def begin(self) -> None:
        self.folder = TemporaryDirectory()
        self.path = Path(self.folder.name) / "journal.sqlite"
        self.journal = Journal(self.path)
        self.model: dict[bytes, list[FinishedStep]] = {}

    @rule(key=st.sampled_from(KEYS), back=st.integers(0, 3), text=st.text(max_size=5000))
    def add(self, key: bytes, back: int, text: str) -> None:
        steps = self.model.setdefault(key, [])
        del steps[max(0, len(steps) - back) :]
        steps.append(step(len(steps), text.encode(errors="replace").decode()))
        assert add(self.journal, key, len(steps) - 1, steps[-1])

    @rule(keys=st.sets(st.sampled_from(KEYS)))
    def drop(self, keys: set[bytes]) -> None:
        self.journal.drop(keys)
        for key in keys:
            self.model.pop(key, None)

    @rule(at_the_end=st.booleans())
    def reopen(self, *, at_the_end: bool) -> None:
        self.journal.close(remove_empty=at_the_end)
        if at_the_end and not self.model:
            assert [] == list(self.path.parent.iterdir())
        self.journal = Journal(self.path)

    @invariant()
    def holds_what_was_added(self) -> None:
        assert set(self.model) == set(self.journal.keys())
        for key in KEYS:
            assert self.model.get(key, []) == self.journal.steps(key)
            assert self.journal.holds(key) is (key in self.model)

    def teardown(self) -> None:
        if hasattr(self, "journal"):
            self.journal.close()
            self.folder.cleanup()


TestJournalMachine = JournalMachine.TestCase
TestJournalMachine.settings = SHORT


@examples(100)
@given(
    torn=st.none() | st.floats(0, 1),
    garbage=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=40))),
)
def test_a_damaged_file_costs_steps_and_nothing_else(
    torn: float | None, garbage: list[tuple[float, bytes]]
) -> None:
    """The steps that are returned are correct, from the first on; nothing is raised; new ones are kept."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "journal.sqlite"
        steps = {key: [step(number, "long text " * 300) for number in range(4)] for key in KEYS}
        with journal_at(path) as journal:
            for key, of_key in steps.items():
                for number, one in enumerate(of_key):
                    add(journal, key, number, one)
        data = bytearray(path.read_bytes())
        for place, bytes_ in garbage:
            at = int(place * len(data))
            data[at : at + len(bytes_)] = bytes_
        path.write_bytes(data if torn is None else data[: int(torn * len(data))])
        with journal_at(path) as journal:
            for key in KEYS:
                found = journal.steps(key)
                assert steps[key][: len(found)] == found
            assert torn is not None or garbage or steps == {key: journal.steps(key) for key in KEYS}
        with journal_at(path) as journal:
            journal.drop(journal.keys())
            add(journal, b"n" * 16, 0, step(7))  # the first one may find more damage
            assert add(journal, b"m" * 16, 0, step(8)) is (journal.steps(b"m" * 16) == [step(8)])


@pytest.mark.parametrize(
    "content", [b"no database at all " * 100, b"", b"SQLite format 3\0" + b"\xff" * 4096]
)
def test_a_file_that_is_not_a_journal_is_replaced(tmp_path: Path, content: bytes) -> None:
    """The run goes on, and its steps are kept."""
    path = tmp_path / "journal.sqlite"
    path.write_bytes(content)
    with journal_at(path) as journal:
        assert [] == journal.keys()
        assert add(journal, KEYS[0], 0, step(0))
    with journal_at(path) as journal:
        assert [step(0)] == journal.steps(KEYS[0])


def test_a_schema_that_is_not_text_is_damage(tmp_path: Path) -> None:
    """SQLite quotes it in its error."""
    path = tmp_path / "journal.sqlite"
    with journal_at(path) as journal:
        add(journal, KEYS[0], 0, step(0))
    path.write_bytes(path.read_bytes().replace(b"CREATE TABLE", b"CREATE \xff\xff\xff\xff\xff"))
    with journal_at(path) as journal:
        assert [] == journal.keys()
        assert add(journal, KEYS[0], 0, step(0))
        assert [step(0)] == journal.steps(KEYS[0])


def test_a_table_of_another_shape_is_damage(tmp_path: Path) -> None:
    """As a different version might leave it."""
    path = tmp_path / "journal.sqlite"
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE steps (key TEXT)")
    with journal_at(path) as journal:
        add(journal, KEYS[0], 0, step(0))
        assert add(journal, KEYS[0], 0, step(0))
        assert [step(0)] == journal.steps(KEYS[0])


def test_a_full_disk_ends_the_journal_and_not_the_run(tmp_path: Path) -> None:
    """Nothing is raised; no more steps are kept."""
    with journal_at(tmp_path / "journal.sqlite") as journal:
        assert add(journal, KEYS[0], 0, step(0))
        with disk_full_beyond(1000):
            assert not add(journal, KEYS[1], 0, step(1, "x" * 100_000))
        assert not add(journal, KEYS[1], 0, step(1))
        assert [] == journal.steps(KEYS[0])


def test_the_file_shrinks(tmp_path: Path) -> None:
    """Dropped steps free their room: 300 drafts one after the other need the room of one."""
    path = tmp_path / "journal.sqlite"
    with journal_at(path) as journal:
        for number in range(300):
            key = b"%016d" % number
            add(journal, key, 0, step(0, "x" * 20_000))
            journal.drop([key])
    assert path.stat().st_size < 100_000


def test_a_single_step_makes_no_file(tmp_path: Path) -> None:
    """A journal without steps is never opened."""
    with journal_at(tmp_path / "journal.sqlite") as journal:
        journal.drop(KEYS)
        assert [] == journal.steps(KEYS[0])
    assert [] == list(tmp_path.iterdir())


WRITER = """
import sys
from pathlib import Path
from streamsyn.sink.journal import Journal
from tests.sink.test_journal import KEYS, add, step
journal = Journal(Path(sys.argv[1]))
number = 0
while True:
    assert add(journal, KEYS[0], number, step(number, "x" * 3000))
    print(number, flush=True)
    number += 1
"""


def test_what_was_added_survives_a_kill(tmp_path: Path) -> None:
    """SIGKILL in the middle of adding."""
    path = tmp_path / "journal.sqlite"
    with subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        for _ in range(40):
            writer.stdout.readline()
        writer.kill()
        said = 40 + writer.stdout.read().count(b"\n")
    with journal_at(path) as journal:
        found = journal.steps(KEYS[0])
    assert said <= len(found) <= said + 1
    assert [step(number, "x" * 3000) for number in range(len(found))] == found


def test_a_digest_identifies_a_request() -> None:
    """By messages and sampling; the server does not count."""
    messages = [{"role": "user", "content": "Who?"}]
    same = [
        request_digest(Request(messages, {"a": 1, "b": 2}, "group", ("key",))),
        request_digest(Request(messages, {"b": 2, "a": 1})),
    ]
    others = [
        request_digest(Request(messages, {"a": 1})),
        request_digest(Request([{"role": "user", "content": "Who!"}], {"a": 1, "b": 2})),
    ]
    assert same[0] == same[1]
    assert 3 == len({*same, *others})


def draft_of(number: int) -> Draft:
    """The draft that `context(number)` finishes."""
    return Draft(Seed(f"seed-{number}", "qa", "i", "a", "f"))


def test_a_draft_is_dropped_once_its_outcome_is_on_disk(tmp_path: Path) -> None:
    """Not before: a loss of power may still lose the outcome."""
    with opened(tmp_path, sink()) as log:
        for number in range(3):
            add(log.journal, draft_of(number).key, 0, step(0))
        log.append([context(0), context(1)])
        assert 3 == len(log.journal.keys())
        log.sync()
        assert [draft_of(2).key] == log.journal.keys()


def killed_before_the_drop(root: Path) -> None:
    """A directory with an outcome whose steps are still in the journal."""
    with opened(root, sink()) as log:
        for number in range(2):
            add(log.journal, draft_of(number).key, 0, step(0))
        log.append([context(0)])


def test_a_run_drops_what_is_finished(tmp_path: Path) -> None:
    """It was killed between the sync and the drop."""
    killed_before_the_drop(tmp_path)
    with opened(tmp_path, sink()) as log:
        assert 2 == len(log.journal.keys())
        log.claims().close()
        assert [draft_of(1).key] == log.journal.keys()


@pytest.mark.parametrize("left", [True, False])
def test_the_file_goes_with_the_end_of_a_run(tmp_path: Path, left: bool) -> None:
    """When nothing is in it."""
    killed_before_the_drop(tmp_path)
    with opened(tmp_path, sink()) as log:
        log.claims().close()
        if not left:
            log.append([context(1)])
            log.sync()
        log.seal_outcomes()
        log.finish()
    assert left is (tmp_path / "journal.sqlite").exists()
