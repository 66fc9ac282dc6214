"""All seeds of a run as one stream: what was spooled, the sources in turn or interleaved, the inbox.

A source is a pipe, or the files and datasets that a path stands for.
"""

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, Protocol

from streamsyn.config.data_paths import shown_url
from streamsyn.config.sections import SeedsSection, SourceSection
from streamsyn.errors import ConfigError
from streamsyn.io.inputs import find_rows, open_rows
from streamsyn.io.places import Place, RemoteFile
from streamsyn.io.rows import BATCH_ROWS, Line, RawRow, ReadOptions
from streamsyn.records import Entry, Seed
from streamsyn.seeds.forms import FormsSeen
from streamsyn.seeds.id_owners import IdOwners
from streamsyn.seeds.inbox import Inbox, InboxSource
from streamsyn.seeds.inbox_lines import NAME as INBOX_NAME
from streamsyn.seeds.parse import SeedParser
from streamsyn.seeds.stdin import PIPE_NAME, SeedSpool, StdinSource

REPEATED: Final = "~again-"
"""What comes before the number of a repeat in the id of a seed that is read again."""
_BATCH_DOCUMENTS: Final = 16
"""Rows that are held at once where each is a document, which may be as long as a book."""
_ON_DISK: Final = (f"{PIPE_NAME}:", f"{INBOX_NAME}:")
_CHECKED_FILES: Final = 1000
"""Files whose beginnings are looked at before the first is read, so that one that is wrong costs nothing."""


class SeedSource(Protocol):
    """Yields batches of entries in a fixed order. Read it in a thread: it may block."""

    def batches(self) -> Iterator[list[Entry]]:
        """The entries, in batches of a bounded size.

        Raises:
            ConfigError: The source cannot be read (any further); the message names it.
        """
        ...

    def fraction(self) -> float | None:
        """The share of the source that has been read, 0..1; None while its size is not known."""
        ...


class FileSource:
    """The seeds of one file or dataset.

    Args:
        place: The file or dataset.
        task: The task of seeds that name none; by default the file's stem or the dataset's name.
        seeds: The section of the configuration.
        takes_documents: Whether a seed is a document instead of a pair.
        seen: Counts the forms of rows.
    """

    def __init__(
        self,
        place: Place,
        task: str | None,
        seeds: SeedsSection,
        *,
        takes_documents: bool = False,
        seen: FormsSeen | None = None,
    ) -> None:
        self._task = task or _default_task(place)
        self._max_line_bytes = seeds.max_line_bytes
        self._parser = SeedParser(seeds.fields, form=seeds.format, takes_documents=takes_documents, seen=seen)
        batch_rows = _BATCH_DOCUMENTS if takes_documents else BATCH_ROWS
        self._rows = open_rows(place, ReadOptions(seeds.max_line_bytes, batch_rows))

    def batches(self) -> Iterator[list[Entry]]:
        for batch in self._rows.batches():
            parsed = [self._entry(row, batch.source) for row in batch.rows]
            yield [entry for entry in parsed if entry is not None]

    def check(self) -> None:
        """Look at the beginning of a local file.

        Raises:
            ConfigError: It is wrong as a whole: of a different format or encoding.
        """
        self._rows.check()

    def fraction(self) -> float | None:
        return self._rows.fraction()

    def _entry(self, row: RawRow, source: str) -> Entry | None:
        source = _printable(source)
        if isinstance(row, Line):
            return self._parser.line(row, source, self._task, self._max_line_bytes)
        return self._parser.table_row(row, f"{source}:{row.number}", self._task)


def _default_task(place: Place) -> str:
    name = _printable(place.name)
    is_file = isinstance(place, RemoteFile) or (isinstance(place, Path) and not place.is_dir())
    return (name.split(".")[0] if is_file else name) or name


def _printable(name: str) -> str:
    """A file's name as the log can hold it: bytes that are not UTF-8 are written as escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


class SeedReader:
    """Reads what an earlier run spooled, then the sources, then what is submitted.

    `batches` blocks: read it in a thread.

    Args:
        seeds: The section of the configuration.
        run_seed: The random seed of the order of interleaved sources.
        spool_folder: The folder for what is read from stdin; None keeps nothing (`preview`).
        takes_documents: Whether the recipe takes documents instead of pairs.
        ids: The SQLite file with the owners of ids; None changes no id (`preview`).
        inbox: Takes seeds while the run goes on; its end is that of the run's seeds. None reads what was
            submitted to earlier runs.
        repeats: Read the sources again whenever they end, for a benchmark: the ids of the seeds then end in
            `REPEATED` and the number of the repeat. Invalid lines come once.
        skip: Leave out this many entries at the beginning: an earlier measurement had them.

    Raises:
        ConfigError: A source does not exist, or is of no known format or wrong as a whole.
    """

    def __init__(
        self,
        seeds: SeedsSection,
        run_seed: int,
        spool_folder: Path | None,
        *,
        takes_documents: bool = False,
        ids: Path | None = None,
        inbox: Inbox | None = None,
        repeats: bool = False,
        skip: int = 0,
    ) -> None:
        self._seeds = seeds
        self._skip = skip
        self._repeats = repeats
        self._documents = takes_documents
        self._random = random.Random(run_seed)
        self._spool = SeedSpool(spool_folder) if spool_folder is not None else None
        self._stdin: StdinSource | None = None
        self._owners = None if ids is None else IdOwners(ids)
        self._is_taken: Callable[[str], bool] = lambda _: False
        self._seen: list[FormsSeen] = []
        self._left_out: list[str] = []
        self._sources = [(source.weight, self._open(source)) for source in seeds.sources]
        self._left_inbox: Inbox | None = None
        if inbox is None and spool_folder is not None:
            left = Inbox(spool_folder.parent, seeds, takes_documents=takes_documents)
            inbox = self._left_inbox = left if left.exists() else None
        self._submitted = None if inbox is None else InboxSource(inbox, waits=self._left_inbox is None)

    @property
    def has_sources(self) -> bool:
        """Whether there is anything to read: a source, an inbox, or what an earlier run spooled."""
        is_spooled = self._spool is not None and self._spool.exists()
        return bool(self._sources) or is_spooled or self._submitted is not None

    def move_ids(self, path: Path) -> None:
        """Keep the owners of ids in a different file, before the first seed is read."""
        self._owners = IdOwners(path)

    def batches(
        self, is_known: Callable[[Entry], bool], is_taken: Callable[[str], bool] = lambda _: False
    ) -> Iterator[list[Entry]]:
        """The entries of all sources, in batches.

        Args:
            is_known: Whether an entry of a pipe is spooled or finished already.
            is_taken: Whether a seed with this id was read before.

        Raises:
            ConfigError: A source cannot be read to its end.
            SinkError: The spool cannot be written, or is damaged.
        """
        self._is_taken = is_taken
        try:
            for batch in self._batches(is_known):
                skipped = min(self._skip, len(batch))
                self._skip -= skipped
                yield batch[skipped:]
        finally:
            if self._owners is not None:
                self._owners.close()
            if self._left_inbox is not None:
                self._left_inbox.release()

    def _batches(self, is_known: Callable[[Entry], bool]) -> Iterator[list[Entry]]:
        if self._spool is not None:
            yield from map(self._owned, self._spool.replay())
        yield from self._of_sources(is_known)
        number = 0
        while self._repeats:
            number += 1
            has_seeds = False
            for batch in self._of_sources(is_known):
                again: list[Entry] = [_repeated(entry, number) for entry in batch if isinstance(entry, Seed)]
                has_seeds = has_seeds or bool(again)
                yield again
            if not has_seeds:
                return
        if self._submitted is not None:
            yield from map(self._owned, self._submitted.batches())

    def _of_sources(self, is_known: Callable[[Entry], bool]) -> Iterator[list[Entry]]:
        streams = [(weight, self._stream(parts, is_known)) for weight, parts in self._sources]
        if self._seeds.interleave and len(streams) > 1:
            yield from _interleaved(streams, self._random)
        else:
            for _, stream in streams:
                yield from stream

    def fraction(self) -> float | None:
        """The share of all sources that has been read, 0..1; None if the size of one is not known."""
        parts = [part.fraction() for _, parts in self._sources for part in parts]
        if self._submitted is not None:
            parts.append(self._submitted.fraction())
        known = [part for part in parts if part is not None]
        return sum(known) / len(parts) if parts and len(known) == len(parts) else None

    def forms(self) -> Iterator[str]:
        """The forms of the rows read so far and how their fields were used, one line each."""
        for seen in self._seen:
            yield from seen.lines()

    def notes(self) -> Iterator[str]:
        """What a person should know about the seeds at the end of a run, one line each."""
        for left_out in self._left_out:
            yield f"left out of {left_out}"
        if self._owners is not None and (count := self._owners.renamed):
            yield f"{count:,} with the id of a different pair, kept as ID@FILE-HASH"

    def stop(self) -> None:
        """End a read that waits for stdin or the inbox, from any thread."""
        if self._stdin is not None:
            self._stdin.stop()
        if self._submitted is not None:
            self._submitted.stop()

    def _open(self, source: SourceSection) -> Sequence[SeedSource]:
        name = "stdin" if source.path == "-" else shown_url(source.path)
        seen = FormsSeen(name, logs=self._owners is not None)  # `preview` shows the forms itself
        self._seen.append(seen)
        if source.path == "-":
            if self._stdin is not None:
                raise ConfigError("seeds: stdin (`-`) is given twice; it can only be read once")
            if sys.stdin is None:  # closed when Python started; the number 0 may be a different file by now
                raise ConfigError("seeds: stdin (`-`) is closed; pipe seeds in, or give --seeds a path")
            self._stdin = StdinSource(0, source.task, self._seeds, takes_documents=self._documents, seen=seen)
            return [self._stdin]
        found = find_rows(source.path, "seeds")
        files = [
            FileSource(place, source.task, self._seeds, takes_documents=self._documents, seen=seen)
            for place in found.places
        ]
        for file in files[:_CHECKED_FILES]:
            file.check()
        if found.left_out.counts:
            self._left_out.append(f"{shown_url(source.path)}: {found.left_out}")
        return files

    def _stream(
        self, parts: Sequence[SeedSource], is_known: Callable[[Entry], bool]
    ) -> Iterator[list[Entry]]:
        for part in parts:
            batches = map(self._owned, part.batches())
            if part is self._stdin and self._spool is not None:
                yield from self._spool.follow(batches, is_known)
            else:
                yield from batches

    def _owned(self, batch: list[Entry]) -> list[Entry]:
        return batch if self._owners is None else self._owners.own(batch, self._is_taken)


def _repeated(seed: Seed, number: int) -> Seed:
    return replace(seed, id=f"{seed.id}{REPEATED}{number}")


def is_spooled(entry: Entry) -> bool:
    """Whether the run directory holds an entry: it was read from a pipe, or submitted."""
    return entry.origin.startswith(_ON_DISK)


def _interleaved(
    streams: list[tuple[float, Iterator[list[Entry]]]], rng: random.Random
) -> Iterator[list[Entry]]:
    """Draw a source by its weight for each entry, until all sources are at their ends."""
    live = [(weight, (entry for batch in stream for entry in batch)) for weight, stream in streams]
    batch: list[Entry] = []
    while live:
        index = rng.choices(range(len(live)), [weight for weight, _ in live])[0]
        entry = next(live[index][1], None)
        if entry is None:
            del live[index]
        else:
            batch.append(entry)
        if len(batch) == 16 or (batch and not live):
            yield batch
            batch = []
