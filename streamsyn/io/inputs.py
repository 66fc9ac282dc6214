"""What a path, a directory, a glob, a URL or a name on the hub stands for: its files, and their rows.

`find_rows` finds the files, and `open_rows` picks the reader of each by its format. JSON lines come undecoded
(`Line`): a caller can count or skip them cheaply, and decides what a bad one means. `decode_all` is for
callers that refuse a file with a bad row. A new format gets a `Kind`, its suffixes and its reader here.
"""

import glob
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from enum import Enum
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any, Final, TypeGuard

import orjson
import structlog

from streamsyn.config.data_paths import hub_name, is_url, shown_url
from streamsyn.errors import ConfigError
from streamsyn.io.content import SUFFIXES
from streamsyn.io.json_rows import JsonReader, decode_json
from streamsyn.io.places import HubDataset, Place, RemoteFile, RemoteSaved, open_url, reason
from streamsyn.io.rows import ReadOptions, RowReader, TableRow, is_blank
from streamsyn.io.tables import DelimitedReader, HubReader, ParquetReader, SavedDatasetReader

log = structlog.get_logger()


class Kind(Enum):
    """The format of a file or a directory, as its name or its content says."""

    LINES = "JSON"
    CSV = "CSV"
    TSV = "TSV"
    TEXT = "plain text"
    PARQUET = "Parquet"
    SAVED = "saved dataset"
    """A directory written by `datasets.save_to_disk`."""


ROW_KINDS: Final = frozenset({Kind.LINES, Kind.CSV, Kind.TSV, Kind.PARQUET, Kind.SAVED})
TEXT_KINDS: Final = ROW_KINDS | {Kind.TEXT}
_SUFFIXES: Final = {
    ".jsonl": Kind.LINES,
    ".ndjson": Kind.LINES,
    ".json": Kind.LINES,
    ".csv": Kind.CSV,
    ".tsv": Kind.TSV,
    ".txt": Kind.TEXT,
}
"""Of files that may be compressed."""
_OTHER_SUFFIXES: Final = {".parquet": Kind.PARQUET}
_SAVED_MARKS: Final = ("dataset_dict.json", "state.json")
_RUN_MARKS: Final = ("run.json", "manifest.jsonl")
_NOTES: Final = ("readme", "license")
"""Beginnings of the names of files that nobody takes for data."""
_DESCRIPTIONS: Final = ("dataset_info.json", "dataset_infos.json")
"""Files that describe the data beside them, as datasets of the hub have."""
_NAMED: Final = 3
"""Files left out that a message names."""


@dataclass(slots=True)
class LeftOut:
    """What was left out of a directory or a glob."""

    counts: Counter[str] = field(default_factory=Counter)
    names: list[str] = field(default_factory=list)

    def add(self, why: str, name: str) -> None:
        """Count a file or directory, unless it is a note beside the data."""
        if why == _UNKNOWN and PurePosixPath(name).name.lower().startswith(_NOTES):
            return
        self.counts[why] += 1
        if why == _UNKNOWN and len(self.names) < _NAMED:
            self.names.append(name)

    def __str__(self) -> str:
        parts = []
        for why, count in sorted(self.counts.items()):
            named = ", ".join(self.names) + (", ..." if count > len(self.names) else "")
            parts.append(f"{count} {why}" + (f" ({named})" if why == _UNKNOWN else ""))
        return ", ".join(parts)


_UNKNOWN: Final = "of no known format"
_HIDDEN: Final = "hidden"
_RUNS: Final = "run directories"
_VISITED: Final = "linked directories that were visited before"


@dataclass(frozen=True, slots=True)
class Found:
    """What a pattern stands for.

    Attributes:
        places: The files and datasets to read, in order.
        left_out: What else lies there.
    """

    places: list[Place]
    left_out: LeftOut


def kind_of(place: Path | RemoteFile) -> Kind | None:
    """The format of a file by its name, in upper or lower case; None for a name of no known format."""
    return _kind_of_name(place.name)


def _kind_of_name(name: str) -> Kind | None:
    path = PurePosixPath(name.lower())
    if path.suffix in _OTHER_SUFFIXES:
        return _OTHER_SUFFIXES[path.suffix]
    bare = path.name.removesuffix(path.suffix) if path.suffix in SUFFIXES else path.name
    return next((kind for suffix, kind in _SUFFIXES.items() if bare.endswith(suffix)), None)


def is_text_file(place: Place) -> TypeGuard[Path | RemoteFile]:
    """Whether a file is plain text, which has no rows."""
    return isinstance(place, Path | RemoteFile) and kind_of(place) is Kind.TEXT


def suffixes_of(kinds: Collection[Kind]) -> str:
    """The suffixes of some formats, as messages list them."""
    compressible = ", ".join(suffix for suffix, kind in _SUFFIXES.items() if kind in kinds)
    others = ", ".join(suffix for suffix, kind in _OTHER_SUFFIXES.items() if kind in kinds)
    return f"{compressible} (each also {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}) and {others}"


def is_row_file(path: Path) -> bool:
    """Whether a file's name is one of a format of rows."""
    return kind_of(path) in ROW_KINDS


def is_saved_dataset(path: Path) -> bool:
    """Whether a directory holds what `datasets.save_to_disk` writes."""
    return any((path / name).is_file() for name in _SAVED_MARKS)


def is_run_directory(path: Path) -> bool:
    """Whether a directory is one that `streamsyn run` writes to."""
    is_single = (path / "run.json").is_file() and (
        (path / "manifest.jsonl").is_file() or (path / "contexts").is_dir()
    )
    return is_single or (path / "partitions.json").is_file()


def find_rows(pattern: str, key: str, kinds: Collection[Kind] = ROW_KINDS) -> Found:
    """What a pattern stands for, as `find_files` finds it. What is left out is logged, in one line.

    Raises:
        ConfigError: There is nothing, or something of no known format.
    """
    found = find_files(pattern, key, kinds)
    if found.left_out.counts:
        log.warning("files.left_out", of=key, path=shown_url(pattern), files=str(found.left_out))
    return found


def find_files(pattern: str, key: str, kinds: Collection[Kind] = ROW_KINDS) -> Found:
    """What a pattern stands for, and what lies there but is left out.

    Left out are files of other formats, what is hidden, and run directories unless the pattern spells out the
    way into one. A directory that links lead to twice is visited once.

    Args:
        pattern: As the user gave it. What exists on this machine is never looked up elsewhere.
        key: The option or the configuration key that it was given as, for messages.
        kinds: The formats.

    Raises:
        ConfigError: There is nothing, or something of no known format, or a directory that cannot be listed.
    """
    if not pattern:
        raise ConfigError(f"{key}: a path is empty; give a file, a directory or a glob")
    left_out = LeftOut()
    if is_url(pattern):
        places = list(_find_remote(pattern, key, kinds, left_out))
    elif (name := hub_name(pattern)) is not None:
        return Found([HubDataset(name)], left_out)
    else:
        places = _find_local(pattern, key, kinds, left_out)
    if not places:
        there = f"; there are {left_out}" if left_out.counts else ""
        known = suffixes_of(kinds)
        raise ConfigError(
            f"{key}: there is no file to read in {shown_url(pattern)}; the formats are {known}{there}"
        )
    return Found(places, left_out)


def _find_local(pattern: str, key: str, kinds: Collection[Kind], left_out: LeftOut) -> list[Place]:
    try:
        visited: set[tuple[int, int]] = set()
        # `**` matches a directory and also what lies in it: each file is read once.
        return list(
            dict.fromkeys(
                path
                for match in _matches(pattern, key, kinds)
                for path in _below(match, key, kinds, left_out, visited)
            )
        )
    except OSError as error:
        raise ConfigError(f"{key}: {error.filename or pattern} cannot be used: {error.strerror}") from error


def _matches(pattern: str, key: str, kinds: Collection[Kind]) -> list[Path]:
    """What is named: the path itself, or what a glob matches outside of run directories."""
    path = Path(pattern)
    if not path.exists() and not path.is_symlink():
        found = sorted(map(Path, glob.glob(pattern, recursive=True)))  # noqa: PTH207 - Path.glob refuses absolute patterns
        if not found:
            raise ConfigError(f"{key}: {pattern} does not exist")
        fixed = len(list(takewhile(lambda part: not glob.has_magic(part), path.parts)))
        return [match for match in found if not _is_in_run_directory(match, fixed)]
    if is_run_directory(path):
        raise ConfigError(f"{key}: {pattern} is a run directory; give files of rows instead")
    if not path.is_dir():
        _check_regular(path, key)
        if kind_of(path) not in kinds:
            raise ConfigError(
                f"{key}: {pattern} is of no known format; there are {suffixes_of(kinds)}, and directories"
            )
    return [path]


def _is_in_run_directory(match: Path, fixed: int) -> bool:
    """Whether a wildcard, not the user, led into a run directory; `fixed` parts come before the first."""
    folders = (Path(*match.parts[:depth]) for depth in range(fixed, len(match.parts)))
    return any(map(is_run_directory, folders))


def _below(
    path: Path, key: str, kinds: Collection[Kind], left_out: LeftOut, visited: set[tuple[int, int]]
) -> Iterator[Path]:
    """`path` itself, or all files and saved datasets below it, sorted by name."""
    if not path.is_dir():
        if path.name in _DESCRIPTIONS:
            return
        if kind_of(path) in kinds:
            _check_regular(path, key)
            yield path
        else:
            left_out.add(_UNKNOWN, path.name)
        return
    if is_saved_dataset(path) and Kind.SAVED in kinds:
        yield path
        return
    if is_run_directory(path):  # OUT may lie among the seeds: what a run writes is not read by the next
        left_out.add(_RUNS, path.name)
        return
    status = path.stat()
    if (status.st_dev, status.st_ino) in visited:
        left_out.add(_VISITED, path.name)
        return
    visited.add((status.st_dev, status.st_ino))
    for child in sorted(path.iterdir()):
        if child.name.startswith("."):
            left_out.add(_HIDDEN, child.name)
        else:
            yield from _below(child, key, kinds, left_out, visited)


def _check_regular(path: Path, key: str) -> None:
    """Refuse what is not a file: opening a named pipe would wait, and a device may have no end."""
    if path.is_fifo():
        raise ConfigError(f"{key}: {path} is a named pipe; pass its lines on stdin instead, with -")
    if not path.is_file():
        what = "is neither a file nor a directory" if path.exists() else "is a link to nothing"
        raise ConfigError(f"{key}: {path} {what}")


def _find_remote(url: str, key: str, kinds: Collection[Kind], left_out: LeftOut) -> Iterator[Place]:
    """The files and saved datasets that a URL stands for: a file, a directory, or a glob with `*`."""
    shown = shown_url(url)
    unknown = f"{key}: {shown} is of no known format; there are {suffixes_of(kinds)}, and directories"
    is_known = _kind_of_name(PurePosixPath(shown).name) in kinds
    if not is_known and shown.startswith(("http://", "https://")):  # which has no directories
        raise ConfigError(unknown)
    try:
        filesystem, path = open_url(url, key)
        if "*" in path:
            names = [name for name in filesystem.glob(path) if not filesystem.isdir(name)]
            root = path.partition("*")[0].rpartition("/")[0]
        elif filesystem.isdir(path):
            names, root = filesystem.find(path), path
        else:
            names, root = [path] if filesystem.exists(path) else [], path
    except ConfigError:
        raise
    except Exception as error:  # each file system has exceptions of its own
        raise ConfigError(f"{key}: {shown} cannot be read: {reason(error)}") from error
    if names == [path] and not is_known:
        raise ConfigError(unknown)
    if not names and "*" not in path:
        raise ConfigError(f"{key}: {shown} does not exist")
    names = sorted(names)
    yield from _remote_places(filesystem, names, root, kinds, left_out)


def _remote_places(
    filesystem: Any, names: list[str], root: str, kinds: Collection[Kind], left_out: LeftOut
) -> Iterator[Place]:
    marked = {
        mark: {_folder(name) for name in names if name.endswith(f"/{mark}")}
        for mark in _SAVED_MARKS + _RUN_MARKS
    }
    runs = marked["run.json"] & marked["manifest.jsonl"]
    saved = marked["dataset_dict.json"] | marked["state.json"]
    yielded: set[str] = set()
    for name in names:
        below = name[len(root) :].strip("/")
        folders = [name[: len(name) - len(below)].rstrip("/")]
        for part in below.split("/")[:-1]:
            folders.append(f"{folders[-1]}/{part}")
        url = shown_url(filesystem.unstrip_protocol(name))
        if any(part.startswith(".") for part in below.split("/")):
            left_out.add(_HIDDEN, below)
        elif (folder := next((one for one in folders if one in saved), None)) is not None:
            if folder not in yielded:
                yielded.add(folder)
                location = filesystem.unstrip_protocol(folder)
                yield RemoteSaved(location, shown_url(location))
        elif any(one in runs for one in folders):
            left_out.add(_RUNS, below)
        elif PurePosixPath(url).name in _DESCRIPTIONS:
            continue
        elif _kind_of_name(PurePosixPath(url).name) in kinds:
            yield RemoteFile(filesystem, name, url)
        else:
            left_out.add(_UNKNOWN, below)


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def open_rows(place: Place, options: ReadOptions) -> RowReader:
    """The reader of a file, by its name, or of a dataset. Plain text has no rows: see `io.content`.

    Raises:
        ConfigError: The file is missing.
    """
    if isinstance(place, HubDataset):
        return HubReader(place, options)
    if isinstance(place, RemoteSaved) or (isinstance(place, Path) and place.is_dir()):
        return SavedDatasetReader(place, options)
    match kind_of(place):
        case Kind.PARQUET:
            return ParquetReader(place, options)
        case Kind.CSV:
            return DelimitedReader(place, options, None)
        case Kind.TSV:
            return DelimitedReader(place, options, "\t")
        case _:
            return JsonReader(place, options)


def decode_all(place: Place, options: ReadOptions) -> Iterator[tuple[str, Any]]:
    """Every row of a file or dataset decoded, with its place as `file:number`.

    Raises:
        ConfigError: A row is longer than the limit or cannot be decoded, or the file cannot be read.
    """
    for batch in open_rows(place, options).batches():
        for row in batch.rows:
            if is_blank(row):
                continue
            where = f"{batch.source}:{row.number}"
            if isinstance(row, TableRow):
                for error in (row.error, *row.unreadable.values()):
                    if isinstance(error, UnicodeDecodeError) or row.error is not None:
                        raise options.error(where, f"cannot be read: {error}")
                yield where, row.value
                continue
            if row.text is None:
                raise options.error(where, f"is longer than {options.max_line_bytes} bytes")
            try:
                yield where, decode_json(row.text)
            except orjson.JSONDecodeError as error:
                raise options.error(where, f"is not valid JSON: {error}") from error
