"""The contexts of a log, and the samples that are made of them, chosen in this process or in others.

With several processes, one chooses and others sign the contexts. The chosen samples arrive as the numbers of
their passages: the exporting process reads the same contexts, renders the samples and writes them. Every
process ends when the one that started it does, or closes its pipe.
"""

import multiprocessing
import signal
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle, islice
from multiprocessing.connection import Connection
from typing import Any, Final, TypeAlias

from streamsyn.assembly.assembler import Arrangement, Assembler
from streamsyn.assembly.corpus import CorpusPassage
from streamsyn.assembly.resources import AssemblyResources
from streamsyn.assembly.window import Passage, Piece, give_signatures
from streamsyn.config.sections import AssemblySection
from streamsyn.errors import SinkError, StreamsynError
from streamsyn.scoring.sidecar import with_scores
from streamsyn.shingles import sign_from
from streamsyn.sink.partitions import in_turn
from streamsyn.sink.snapshot import Part

Row: TypeAlias = dict[str, Any]

BATCH: Final = 64
"""Contexts that are read and signed together; samples sent together."""


@dataclass(frozen=True, slots=True)
class ContextLog:
    """The contexts of a run as of one moment; those of partitions in turn, numbered anew.

    Attributes:
        partitions: The shards of contexts of the run directory, or of each partition.
        ends: The rows of each partition at the end of each round, as `in_turn` needs them.
        flushes: Numbers of contexts at which the run's streams ended.
        is_flushed: Whether the contexts that still wait at the end get samples with what there is.
    """

    partitions: Sequence[Sequence[Part]]
    ends: Sequence[Sequence[int]]
    flushes: frozenset[int]
    is_flushed: bool

    def rows(self) -> Iterator[Row]:
        """Yield the rows in order.

        Raises:
            SinkError: A row is missing or damaged.
        """
        if len(self.partitions) == 1:
            yield from _rows(self.partitions[0])
            return
        for seq, (_, row) in enumerate(in_turn([*map(_rows, self.partitions)], self.ends)):
            yield {**row, "seq": seq}

    def arrangements(self, assembler: Assembler, passages: Iterable[Passage]) -> Iterator[Arrangement]:
        """Yield the samples as the run made them: `passages` are all contexts in order."""
        for passage in passages:
            if assembler.consumed in self.flushes:
                yield from assembler.flush()
            yield from assembler.add(passage)
        if assembler.consumed in self.flushes or self.is_flushed:
            yield from assembler.flush()

    @property
    def bytes(self) -> int:
        """Size of the shards."""
        return sum(part.bytes for parts in self.partitions for part in parts)


def _rows(parts: Sequence[Part]) -> Iterator[Row]:
    """Yield the rows of one run directory."""
    next_seq = 0
    for part in parts:
        for row in with_scores(part.root, part.rows()):
            if row.get("seq") != next_seq:
                raise _unreadable(part, next_seq)
            yield row
            next_seq += 1
        if part.sealed is not None and next_seq != part.sealed.last_seq + 1:
            raise _unreadable(part, next_seq)


def _unreadable(part: Part, seq: int) -> SinkError:
    return SinkError(f"{part.root / part.name}: row {seq} cannot be read; `streamsyn verify` says why")


@dataclass(frozen=True, slots=True)
class Chosen:
    """A sample by the numbers of its passages.

    Attributes:
        pieces: The `seq` of each context; -1 minus the index of a passage of the corpus.
        relevant_index: Index of the relevant one.
        target_tokens: As in a sample.
        n_tokens: As in a sample.
        read: Contexts that were read before it was chosen.
        window_start: No later sample has a context below it.
    """

    pieces: list[int]
    relevant_index: int
    target_tokens: int | None
    n_tokens: int
    read: int
    window_start: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of the samples.

    Attributes:
        left_out: Contexts without a sample, by reason.
        waiting: Contexts that still wait for distractors.
        read: Contexts that were read.
        window_start: The same number: no sample is left.
    """

    left_out: dict[str, int]
    waiting: int
    read: int
    window_start: int


@dataclass(frozen=True, slots=True)
class Choosing:
    """What the process that chooses needs.

    Attributes:
        log: The contexts.
        section: How to assemble them.
        run_seed: `run.seed`.
        signers: Processes that sign contexts.
    """

    log: ContextLog
    section: AssemblySection
    run_seed: int
    signers: int


def chosen_elsewhere(choosing: Choosing) -> Generator[Chosen | Ended]:
    """Choose in other processes; yield the samples in order, and the end.

    Raises:
        SinkError: One of the processes was killed.
        StreamsynError: What the one that chooses raised.
    """
    with _process(_send_chosen, choosing) as connection:
        while True:
            try:
                message = connection.recv()
            except EOFError:
                raise SinkError(
                    "a process that chose samples was killed; if memory ran out, use --workers 1"
                ) from None
            if isinstance(message, BaseException):
                raise message
            yield from message
            if isinstance(message[-1], Ended):
                return


def passage_batches(rows: Iterator[Row]) -> Iterator[list[Passage]]:
    """Yield the passages of contexts, several at a time."""
    while batch := [Passage.of_row(row) for row in islice(rows, BATCH)]:
        yield batch


def waiting(assembler: Assembler) -> int:
    """Return the number of contexts that wait for distractors."""
    state = assembler.state()
    return len(dict([*state.pending, *state.pending_any]))


@contextmanager
def _process(target: Any, *args: Any) -> Iterator[Connection]:
    """Run `target` with one end of a pipe and `args` in a process that ends with the block."""
    spawn = multiprocessing.get_context("spawn")
    connection, other = spawn.Pipe()
    process = spawn.Process(target=target, args=(other, *args))
    process.start()
    other.close()
    try:
        yield connection
    finally:
        connection.close()
        process.join()


def _send_chosen(connection: Connection, choosing: Choosing) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the exporting process closes the pipe
    with suppress(BrokenPipeError, ConnectionResetError, EOFError):  # one of the processes has ended
        try:
            messages = _choose(choosing)
            while batch := list(islice(messages, BATCH)):
                connection.send(batch)
        except (StreamsynError, ValueError) as error:
            connection.send(error)


def _choose(choosing: Choosing) -> Iterator[Chosen | Ended]:
    assembler = AssemblyResources(choosing.section).assembler(choosing.run_seed)
    read = window_start = 0

    def counted(passages: Iterable[Passage]) -> Iterator[Passage]:
        nonlocal read, window_start
        for passage in passages:
            read, window_start = read + 1, assembler.window_start
            yield passage

    with ExitStack() as processes:
        signers = [processes.enter_context(_process(sign_from)) for _ in range(choosing.signers)]
        passages = counted(_prepared(choosing.log, assembler, signers))
        for one in choosing.log.arrangements(assembler, passages):
            numbers = [_number(piece) for piece in one.passages]
            yield Chosen(numbers, one.relevant_index, one.target_tokens, one.count(), read, window_start)
    yield Ended(dict(assembler.left_out), waiting(assembler), read, read)


def _number(piece: Piece) -> int:
    if isinstance(piece, Passage):
        return piece.seq
    assert isinstance(piece, CorpusPassage), "the other kind of piece"
    return -1 - piece.index


def _prepared(log: ContextLog, assembler: Assembler, signers: Sequence[Connection]) -> Iterator[Passage]:
    """Yield the contexts. Each signer signs one batch, while this process chooses for those before it."""
    batches = passage_batches(log.rows())
    if not signers or not assembler.needs_signatures:
        for batch in batches:
            assembler.prepare(batch)
            yield from batch
        return
    signing: deque[tuple[Connection, list[Passage]]] = deque()
    for signer, batch in zip(cycle(signers), batches, strict=False):
        # A signer takes the next batch once it could deliver the last one.
        done = _signed(*signing.popleft(), assembler) if len(signing) == len(signers) else []
        signer.send([passage.text for passage in batch])
        signing.append((signer, batch))
        yield from done
    for signer, batch in signing:
        yield from _signed(signer, batch, assembler)


def _signed(signer: Connection, passages: list[Passage], assembler: Assembler) -> list[Passage]:
    give_signatures(passages, signer.recv())
    assembler.prepare(passages)
    return passages
