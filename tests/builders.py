"""Records and logs for the tests of what lies behind the workers."""

import hashlib
import resource
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from streamsyn.assembly.assembler import Arrangement
from streamsyn.config.sections import SinkSection
from streamsyn.fleet.client import ServerClient
from streamsyn.fleet.health import Health
from streamsyn.fleet.limiter import Limiter
from streamsyn.fleet.server import Server
from streamsyn.fleet.server_spec import ServerSpec
from streamsyn.records import BadSeed, Context, Outcome, Reject, RejectReason, Sample
from streamsyn.sink import shards
from streamsyn.sink.log import RunLog, encode_row
from streamsyn.sink.manifest import Manifest
from streamsyn.sink.rundir import RunDirectory
from streamsyn.sink.shards import KINDS
from streamsyn.sink.snapshot import shard_paths

COMPRESSIONS = ("none", "zstd")


def context(number: int, **given: Any) -> Context:
    """The context of seed `number`; what is not given follows from the number."""
    seed_id, draft = given.pop("seed_id", f"seed-{number}"), given.pop("draft", 0)
    fields: dict[str, Any] = {
        "id": f"{seed_id}#{draft}" if draft else seed_id,
        "seed_id": seed_id,
        "draft": draft,
        "task": "qa",
        "instruction": f"What is {number}?",
        "answer": f"answer {number}",
        "context": f"text {number} with a line\nbreak, a \u2028 and a \r, \x85 and é",
        "model": "model",
        "server": "http://server",
        "weight_version": None,
        "finish_reason": "stop",
        "prompt_tokens": 3,
        "cached_tokens": 1,
        "completion_tokens": 10,
        "wasted_tokens": 0,
        "attempts": [],
        "steps": [],
        "checks": {},
        "origin": f"seeds.jsonl:{number}",
        "metadata": {},
        "written_at": 1.0,
    }
    return Context(**{**fields, **given})


def reject(number: int) -> Reject:
    """The reject of a line that is no seed."""
    bad = BadSeed(f"bad.jsonl:{number}", RejectReason.NOT_A_SEED, "no answer", b"%016d" % number)
    return Reject(key=bad.key, reason=bad.reason, detail=bad.detail, origin=bad.origin)


def sample(number: int, **given: Any) -> Sample:
    """A sample of context `number` alone."""
    fields: dict[str, Any] = {
        "id": f"seed-{number}",
        "seed_id": f"seed-{number}",
        "task": "qa",
        "instruction": "?",
        "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}],
        "context_seqs": [number],
        "relevant_index": 0,
        "n_tokens": 10,
    }
    return Sample(**{**fields, **given})


def outcome(number: int) -> Outcome:
    """Every fourth is a reject."""
    return reject(number) if number % 4 == 3 else context(number)


def sink(**given: Any) -> SinkSection:
    """A section with shards of a few rows."""
    return SinkSection.model_validate({"shard_bytes": 2000, **given})


def new_run(root: Path) -> Path:
    """The folders of a run directory, let go of again."""
    RunDirectory(root).close()
    return root


@contextmanager
def opened(root: Path, section: SinkSection) -> Iterator[RunLog]:
    """The log of a run, closed at the end."""
    log = RunLog(new_run(root), section)
    try:
        yield log
    finally:
        log.close()


def rows(root: Path, kind: str) -> list[dict[str, Any]]:
    """All rows of a kind, as any reader of the directory finds them."""
    manifest = Manifest(root / "manifest.jsonl")
    return [row for path in shard_paths(root, manifest, kind) for row in shards.rows(path)]


def as_rows(records: Iterable[Outcome | Sample]) -> list[dict[str, Any]]:
    """What the log says of records, when they are all there is."""
    plain = (orjson.loads(encode_row(0, record)) for record in records)
    return [row | {"seq": seq} for seq, row in enumerate(plain)]


def sealed_bytes(root: Path) -> dict[str, str]:
    """The digest of each shard that has its final name."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for kind in KINDS
        for path in (root / kind).glob("part-*")
        if path.suffix != ".open"
    }


@contextmanager
def disk_full_beyond(file_bytes: int) -> Iterator[None]:
    """Within, no file of this process can grow beyond `file_bytes`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def samples_of(arranged: Iterable[Arrangement]) -> list[Sample]:
    """The samples of what an assembler has arranged."""
    return [one.sample() for one in arranged]


def server_at(url: str, limiter: Limiter, weight: float = 1.0) -> Server:
    """A server that is never asked."""
    transport: Any = None
    client = ServerClient(url, transport, 1.0)
    return Server(ServerSpec(url, weight), client, limiter, Health(3), models=("",))
