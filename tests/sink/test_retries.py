"""Which rejects hold, in the log, its manifest, its journal and its mirror."""

import shutil
import threading
from contextlib import suppress
from pathlib import Path

import orjson

from streamsyn.config.fingerprint import fingerprint
from streamsyn.config.loading import Config
from streamsyn.pipeline.verify import Verification
from streamsyn.records import Completion, Reject, RejectReason
from streamsyn.sink.log import RunLog
from streamsyn.sink.manifest import Manifest
from streamsyn.sink.mirror_plan import MirrorPlan
from streamsyn.sink.rundir import RunDirectory
from streamsyn.sink.snapshot import SeqSet, Snapshot, holding_rejects
from tests.builders import context, opened, sink

TIMEOUT, EMPTY = RejectReason.TIMEOUT, RejectReason.EMPTY


def reject(number: int, reason: RejectReason = TIMEOUT, supersedes: int | None = None) -> Reject:
    """The reject of seed `number`."""
    seed_id, key = f"seed-{number}", context(number).key
    return Reject(
        supersedes=supersedes,
        key=key,
        reason=reason,
        detail="no answer",
        origin=f"seeds.jsonl:{number}",
        id=seed_id,
        seed_id=seed_id,
        draft=0,
        task="qa",
        instruction="?",
        answer="!",
    )


def holding(root: Path) -> list[int]:
    """The rejects that hold, by seq."""
    return [row["seq"] for row in holding_rejects(Snapshot(root))]


def open_seqs(log: RunLog) -> list[int]:
    """The rejects that are to be asked again, by seq."""
    return [row["seq"] for row in log.open_rejects()]


def test_a_retry_is_open_until_the_run_is_finished(tmp_path: Path) -> None:
    """Rejects that it reopened and that were not found stay as they are after that; later ones never were."""
    with opened(tmp_path, sink()) as log:
        log.append([reject(0), reject(1, EMPTY), reject(2)])
        assert [] == open_seqs(log)
        log.add_retry([TIMEOUT])
        log.append([context(2, supersedes=2), reject(3)])
        assert ([0], 3, 1) == (open_seqs(log), log.holding_rejects, log.superseded)
    with opened(tmp_path, sink()) as log:
        assert ([0], 3, 1) == (open_seqs(log), log.holding_rejects, log.superseded)
        log.add_retry([EMPTY])
        assert [0, 1] == open_seqs(log)
        log.append([reject(1, supersedes=1)])
        log.seal_outcomes()
        log.finish()
        assert ([], 3, 2) == (open_seqs(log), log.holding_rejects, log.superseded)
    with opened(tmp_path, sink()) as log:
        assert ([], 3, 2) == (open_seqs(log), log.holding_rejects, log.superseded)
        log.append([reject(9)])
        assert (4, 2) == (log.holding_rejects, log.superseded)
    assert [0, 3, 4, 5] == holding(tmp_path)


def test_a_retry_knows_whether_all_seeds_were_read(tmp_path: Path) -> None:
    """They were if the run was finished before the first retry that is open."""
    with opened(tmp_path, sink()) as log:
        log.append([reject(0), reject(1)])
        log.seal_outcomes()
        log.finish()
        log.add_retry([TIMEOUT])
        log.add_retry([TIMEOUT])
        log.append([context(0, supersedes=0)])
        assert [True, True] == [retry.seeds_read for retry in log.manifest.retries]
    manifest = Manifest(tmp_path / "manifest.jsonl")
    assert (True, None, 2) == (manifest.seeds_read, manifest.final, len(manifest.open_retries))


def test_steps_of_a_reopened_draft_stay_in_the_journal(tmp_path: Path) -> None:
    """A kill in the middle of a long document costs one step, in a retry too."""
    answer = Completion("text", "stop", 1, 0, 1, "model", "http://server")
    reopened, finished = context(0).key, context(1).key
    with opened(tmp_path, sink()) as log:
        log.append([reject(0), reject(1, EMPTY)])
        log.add_retry([TIMEOUT])
        for key in (reopened, finished):
            assert log.journal.add(key, 0, b"asked", answer, [])
    with opened(tmp_path, sink()) as log:
        log.claims().close()
        assert log.journal.holds(reopened)
        assert not log.journal.holds(finished)


def test_a_mirror_has_each_reject_before_what_supersedes_it(tmp_path: Path) -> None:
    """Whichever sealed shards are copied, `verify` finds the outcomes of the mirror sound."""
    root, config = tmp_path / "out", Config()
    directory = RunDirectory(root)
    directory.save(config.model_dump(mode="json"), fingerprint(config))
    directory.close()
    with opened(root, sink(shard_bytes=900)) as log:
        log.append([context(8), reject(0)])
        log.add_retry([TIMEOUT])
        log.append([context(number, supersedes=0 if number == 0 else None) for number in range(8)])
        log.sync()
    kinds = [
        line.get("kind", "retry")
        for line in map(orjson.loads, (root / "manifest.jsonl").read_bytes().splitlines())
    ]
    assert kinds.index("rejects") < kinds.index("retry") < len(kinds) - 1
    shards = [shard.path for shard in Manifest(root / "manifest.jsonl").shards]
    for number in range(len(shards) + 1):
        mirror = tmp_path / f"mirror-{number}"
        plan = MirrorPlan(root, str(mirror), threading.Event())
        for path in shards[number:]:  # these cannot be copied: they are folders there
            (mirror / path).mkdir(parents=True)
        plan.begin()
        with suppress(OSError):
            plan.copy({})
        for path in shards[number:]:
            shutil.rmtree(mirror / path)
        assert number == len(Manifest(mirror / "manifest.jsonl").shards)
        assert [] == [one for one in Verification(mirror).problems(None) if "final" not in one]


def test_a_set_of_row_numbers() -> None:
    """What is added is in it, and nothing else."""
    found = SeqSet()
    for seq in (0, 7, 8, 1000, 8):
        found.add(seq)
    assert 4 == len(found)
    assert [0, 7, 8, 1000] == [seq for seq in range(-9, 2000) if seq in found]
    assert None not in found
