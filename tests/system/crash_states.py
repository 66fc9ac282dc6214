"""Crash states: what a disk may hold after a kill or a loss of power at any moment of a run, all resumed.

    python -m tests.system.crash_states [--mode plain|zstd|pipe|drafts]... [--seed N] [--mixes N] [--deep N]

A small run is recorded call by call. Between any two calls, and within each write, the states of the disk
are enumerated: after a kill, all that was written; after a loss of power, what was synced and any part of the
rest (the four extremes, and `--mixes` drawn ones). Each state is resumed to the end of the run, and checked:

- each draft and each bad line has one outcome (G1), `verify` finds nothing (G2, G3);
- every row that could be read before is still there under its seq, every shard that was listed is unchanged;
- a reader of stdout that outlives the runs, skips lines that it cannot parse and knows ids has every sample,
  as the log has it, and twice only those that the log did not hold at the crash.

Then `--deep` of the states are drawn, and the runs that resume them are recorded and crash in the same ways.
All happens in this process and in virtual time.
"""

import argparse
import asyncio
import gc
import logging
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import orjson

from streamsyn.config.loading import Config, load
from streamsyn.pipeline.request import RunRequest
from streamsyn.pipeline.run import run
from streamsyn.pipeline.stdout import SampleStream
from streamsyn.pipeline.verify import verify
from streamsyn.records import RejectReason
from streamsyn.simulator.in_process import InProcessServers
from streamsyn.simulator.settings import SimulatorConfig
from streamsyn.simulator.simulation import Simulation
from streamsyn.sink.log import RunLog
from streamsyn.sink.manifest import Manifest
from streamsyn.sink.snapshot import Snapshot, holding_rejects
from streamsyn.telemetry import configure_logs
from tests.system.recorded_disk import Call, Content, Disk, recorded, some_of

URL = "http://gpu:30000"
KINDS = ("contexts", "rejects", "samples")


@dataclass(frozen=True, slots=True)
class Mode:
    """A kind of run.

    Attributes:
        seeds: Number of seeds; one more line is not valid.
        drafts: Drafts of each.
        compression: Of the shards.
        from_pipe: Whether seeds come through stdin.
        to_stdout: Whether samples go to stdout.
        sync_s: How long a sync takes in the run that is recorded, so that full shards wait for theirs. It
            runs in real time.
        is_retry: Whether what is recorded asks the rejects of an earlier run again.
    """

    seeds: int = 7
    drafts: int = 1
    compression: str = "none"
    from_pipe: bool = False
    to_stdout: bool = False
    sync_s: float = 0.0
    is_retry: bool = False

    def lines(self) -> bytes:
        """The seeds, with one bad line among them."""
        pairs = [
            {"id": f"s{n}", "instruction": f"Who kept light {n}?", "answer": f"Keeper {n * 7919}."}
            for n in range(self.seeds)
        ]
        lines = [orjson.dumps(pair) for pair in pairs]
        return b"\n".join([*lines[:2], b"not JSON", *lines[2:], b""])

    def outcomes(self) -> int:
        """Number of outcomes of a finished run."""
        return self.seeds * self.drafts + 1


MODES = {
    "plain": Mode(),
    "zstd": Mode(compression="zstd"),
    "pipe": Mode(from_pipe=True, to_stdout=True),
    "drafts": Mode(seeds=3, drafts=3, to_stdout=True),
    "slow": Mode(seeds=14, to_stdout=True, sync_s=0.1),
    "retry": Mode(is_retry=True),
}


@dataclass(frozen=True, slots=True)
class State:
    """What is left after a crash.

    Attributes:
        name: The moment, and what was lost.
        is_kill: Whether the machine went on, and with it the reader of stdout.
        files: What the disk holds.
        synced: What it holds for certain, if nothing but what was synced has reached it.
        stdout: What the reader has received.
    """

    name: str
    is_kill: bool
    files: Content
    synced: Content
    stdout: bytes


def states(start: State | None, calls: list[Call], rng: Random, mixes: int) -> Iterator[State]:
    """The states of a crash between any two of `calls`, and within each write; each of them once.

    Args:
        start: The state before the first call; None is an empty folder.
        calls: What a run did to the disk.
        rng: Draws what a loss of power leaves.
        mixes: How many drawn losses of power to add to the four extremes of each moment.
    """
    disk = Disk({} if start is None else start.files)
    received = b"" if start is None else start.stdout
    seen: set[tuple[bool, bytes, Any]] = set()
    for number, call in enumerate(calls):
        moment = f"{number} {call.kind} {call.path}"
        for torn in _torn(call):
            part = disk.copy()
            part.apply(torn)
            name = f"kill within {moment}, after {len(torn.data)} bytes"
            yield from _new(State(name, True, part.after_kill(), {}, received + part.stdout), seen)
        disk.apply(call)
        now = received + disk.stdout
        yield from _new(State(f"kill after {moment}", True, disk.after_kill(), {}, now), seen)
        synced = disk.after_power_loss(lambda _: 0, lambda old, _: old) | disk.derived
        for what, left in _losses(disk, rng, mixes):
            yield from _new(State(f"power after {moment}: {what}", False, left, synced, now), seen)


def _torn(call: Call) -> Iterator[Call]:
    """A write of which only a part was made."""
    if call.kind in ("write", "stdout"):
        for size in sorted({1, len(call.data) // 2, len(call.data) - 1} - {0, len(call.data)}):
            yield replace(call, data=call.data[:size])


def _losses(disk: Disk, rng: Random, mixes: int) -> Iterator[tuple[str, Content]]:
    """What a loss of power may leave, each with its name."""
    yield "all that was not synced", disk.after_power_loss(lambda _: 0, lambda old, _: old) | disk.derived
    yield "names only", disk.after_power_loss(lambda n: n, lambda old, _: old) | disk.some_derived(rng)
    yield "data only", disk.after_power_loss(lambda _: 0, lambda _, new: new) | disk.some_derived(rng)
    sizes = disk.after_power_loss(
        lambda n: n, lambda old, new: old if len(new) < len(old) else old.ljust(len(new), b"\0")
    )
    yield "data but not sizes", sizes | disk.some_derived(rng)
    for number in range(mixes):
        left = disk.after_power_loss(lambda n: rng.randint(0, n), lambda old, new: some_of(old, new, rng))
        yield f"mix {number}", left | disk.some_derived(rng)


def _new(state: State, seen: set[Any]) -> Iterator[State]:
    key = hash((state.is_kill, state.stdout, frozenset(state.files.items())))
    if key not in seen:
        seen.add(key)
        yield state


class Bench:
    """Runs of one mode, in a folder of their own; stdout is one pipe, whose reader outlives them."""

    def __init__(self, mode: Mode, folder: Path) -> None:
        self._mode = mode
        self._out = folder / "out"
        self._seeds = folder / "seeds.jsonl"
        self._seeds.write_bytes(mode.lines())
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)

    def close(self) -> None:
        """Close the pipe."""
        os.close(self._read)
        os.close(self._write)

    def first(self) -> State | None:
        """The state from which the first run is recorded; None is an empty folder."""
        if not self._mode.is_retry:
            return None
        self._run(min_words=10_000)  # all are rejected
        files = {
            str(path.relative_to(self._out)): path.read_bytes()
            for path in self._out.rglob("*")
            if path.is_file()
        }
        return State("the first run", True, files, files, b"")

    def record(self, start: State | None) -> list[Call]:
        """Run from a state to the end; returns what the run did to the disk and to stdout."""
        self._put({} if start is None else start.files)
        sync, slow = RunLog.sync, self._mode.sync_s

        def synced(log: RunLog) -> None:
            time.sleep(slow)
            sync(log)

        with mock.patch.object(RunLog, "sync", synced), recorded(self._out, self._write) as calls:
            self._run(is_slow=slow > 0, retry=self._mode.is_retry)
        return calls

    def check(self, state: State) -> None:
        """Resume a state.

        Raises:
            AssertionError: A guarantee does not hold.
        """
        self._put(state.synced)
        certain = self._rows()
        self._put(state.files)
        before, listed = self._rows(), self._listed()
        received = b""
        # Without seeds, a run finishes what an earlier one has read from the pipe.
        if (
            (self._out / "spool" / "stdin.jsonl").exists()
            and (self._out / "run.json").exists()
            and len(state.name) % 2
        ):
            received += self._run(with_seeds=False)
        received += self._run(retry=self._mode.is_retry)
        after = self._rows()
        problems, _ = verify(self._out)
        assert [] == problems
        rejects = list(holding_rejects(Snapshot(self._out)))
        ids = Counter(row.get("id") or row["key"] for row in [*after["contexts"], *rejects])
        assert self._mode.outcomes() == len(ids) == ids.total(), ids
        assert 1 == len(rejects)
        assert len(after["contexts"]) == len(after["samples"])
        for kind in KINDS:
            assert before[kind] == after[kind][: len(before[kind])], f"{kind} have changed"
            if kind != "samples":
                assert certain[kind] == after[kind][: len(certain[kind])], f"synced {kind} are lost"
        relisted = self._listed()
        assert all(shard in relisted for shard in listed), "a sealed shard has changed"
        if self._mode.to_stdout:
            _check_reader(state, received, before["samples"], after["samples"])

    def _run(
        self, *, with_seeds: bool = True, is_slow: bool = False, retry: bool = False, min_words: int = 1
    ) -> bytes:
        """Run to the end; returns what went to stdout."""
        latency_ms, jitter_ms = (10.0, 0.0) if is_slow else (200.0, 150.0)
        simulation = Simulation(SimulatorConfig(latency_ms=latency_ms, jitter_ms=jitter_ms, words=30))
        servers = InProcessServers({URL: simulation})
        pipe = self._seeds if self._mode.from_pipe and with_seeds else Path(os.devnull)
        with _standard_streams(pipe, self._write) as stream:
            request = RunRequest(
                config=self._config(min_words, with_seeds=with_seeds),
                out=self._out,
                connect=servers.connect,
                runner=asyncio.run if is_slow else servers.run,
                rng=Random(0),
                show_progress=False,
                stream=stream if self._mode.to_stdout else None,
                retry=tuple(RejectReason) if retry else (),
                preflight=False,
            )
            summary = run(request)
        gc.unfreeze()  # there are thousands of runs in this process
        gc.collect()
        assert summary.stopped is None, summary.stopped
        return _read_all(self._read)

    def _config(self, min_words: int, *, with_seeds: bool) -> Config:
        """Small shards and frequent syncs, so that much happens in few rows."""
        source = {"path": "-" if self._mode.from_pipe else str(self._seeds), "task": "qa"}
        is_plain = self._mode.compression == "none"
        return load(
            None,
            [
                ("seeds.sources", [source] if with_seeds else []),
                ("fleet.servers", [URL]),
                ("fleet.max_in_flight", 3),
                ("recipe.contexts_per_seed", self._mode.drafts),
                ("checks.min_words", min_words),
                ("assembly.contexts_per_sample", 2),
                ("sink.compression", self._mode.compression),
                ("sink.shard_bytes", 3500 if is_plain else 1200),
                ("sink.sync_interval_s", 0.25),
            ],
        )

    def _put(self, files: Content) -> None:
        """Make the run directory hold `files` and nothing else."""
        shutil.rmtree(self._out, ignore_errors=True)
        for path, data in files.items():
            (self._out / path).parent.mkdir(parents=True, exist_ok=True)
            (self._out / path).write_bytes(data)

    def _rows(self) -> dict[str, list[Any]]:
        """All rows that a reader finds, by kind."""
        parts = Snapshot(self._out).parts if self._out.exists() else {}
        return {kind: [row for part in parts.get(kind, ()) for row in part.rows()] for kind in KINDS}

    def _listed(self) -> list[Any]:
        return [shard for kind in KINDS for shard in Manifest(self._out / "manifest.jsonl").of_kind(kind)]


def _check_reader(state: State, received: bytes, before: list[Any], after: list[Any]) -> None:
    """Check what a reader has that skips lines that it cannot parse, and knows ids."""
    lines = {row["id"]: row for row in after}
    earlier, later = _samples(state.stdout), _samples(received)
    assert all(lines.get(row["id"]) == row for row in earlier), "a sample that was read is not in the log"
    again = {row["id"] for row in before}
    assert len(later) == len({row["id"] for row in later}), "a sample comes twice in one run"
    assert not again & {row["id"] for row in later}, "a sample comes again that the log held"
    if state.is_kill:  # the reader went on, and has found all samples on its pipe
        read = {row["id"] for row in _samples(state.stdout + received)}
        assert lines.keys() == read, f"the reader of stdout misses {sorted(lines.keys() - read)}"


def _samples(received: bytes) -> list[Any]:
    found = []
    for line in received.split(b"\n"):
        with suppress(orjson.JSONDecodeError):
            found.append(orjson.loads(line))
    return found


def _read_all(fd: int) -> bytes:
    found = b""
    with suppress(BlockingIOError):
        while part := os.read(fd, 1 << 20):
            found += part
    return found


@contextmanager
def _standard_streams(stdin: Path, stdout: int) -> Iterator[SampleStream]:
    """Stdin from a file, stdout to a pipe, as the run finds them."""
    before = [os.dup(fd) for fd in (0, 1)]
    opened = os.open(stdin, os.O_RDONLY)
    os.dup2(opened, 0)
    os.dup2(stdout, 1)
    stream = SampleStream()
    try:
        yield stream
    finally:
        stream.close()
        for fd, kept in enumerate(before):
            os.dup2(kept, fd)
        for fd in (*before, opened):
            os.close(fd)


@dataclass(slots=True)
class Result:
    """How many states were resumed, and what failed."""

    checked: int = 0
    failures: list[str] = field(default_factory=list)


def check_all(
    name: str, *, seed: int, mixes: int, deep: int, sample: int | None = None, keep: Path | None = None
) -> Result:
    """Record a run of a mode, and check its crash states.

    Args:
        name: The mode.
        seed: Of what is drawn.
        mixes: See `states`.
        deep: How many states are drawn whose resuming run is recorded as well.
        sample: How many states to draw of each run; None checks all.
        keep: A folder for the files of states that fail.
    """
    rng, result = Random(f"{name} {seed}"), Result()
    with tempfile.TemporaryDirectory() as folder, closing(Bench(MODES[name], Path(folder))) as bench:
        first = bench.first()
        found = _drawn(list(states(first, bench.record(first), rng, mixes)), sample, rng)
        for state in found:
            _check(bench, state, name, result, keep)
        for start in rng.sample(found, min(deep, len(found))):
            for state in _drawn(list(states(start, bench.record(start), rng, mixes)), sample, rng):
                deeper = replace(state, name=f"{start.name} | {state.name}")
                _check(bench, deeper, name, result, keep)
    return result


def _drawn(found: list[State], sample: int | None, rng: Random) -> list[State]:
    return found if sample is None else rng.sample(found, min(sample, len(found)))


def _check(bench: Bench, state: State, mode: str, result: Result, keep: Path | None) -> None:
    result.checked += 1
    try:
        bench.check(state)
    except (Exception, BaseExceptionGroup) as error:  # noqa: BLE001 - any of them is a finding
        result.failures.append(f"{mode}: {state.name}: {type(error).__name__}: {error}")
        if keep is not None:
            for path, data in state.files.items():
                kept = keep / f"{mode}-{len(result.failures)}" / path
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_bytes(data)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mode", action="append", choices=MODES, help="by default all")
    parser.add_argument("--seed", type=int, default=0, help="seed of what is drawn")
    parser.add_argument("--mixes", type=int, default=2, help="drawn losses of power at each moment")
    parser.add_argument("--deep", type=int, default=2, help="states whose resuming run crashes as well")
    parser.add_argument("--sample", type=int, help="states to draw of each run")
    parser.add_argument("--keep", type=Path, help="a folder for the files of states that fail")
    args = parser.parse_args()
    configure_logs(as_json=False, level=logging.CRITICAL)
    failures = 0
    for name in args.mode or MODES:
        started = time.monotonic()
        options = {"seed": args.seed, "mixes": args.mixes, "deep": args.deep, "sample": args.sample}
        result = check_all(name, keep=args.keep, **options)
        failures += len(result.failures)
        took = time.monotonic() - started
        print(f"{name}: {result.checked} states, {len(result.failures)} failed, {took:.0f} s", flush=True)
        for failure in result.failures:
            print("  " + failure[:1000].replace("\n", " "), flush=True)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
