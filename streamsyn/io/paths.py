"""Which files a path, a directory or a glob names, and what format each has by its name.

A new format gets a `Kind` and its suffixes here, and a reader in `row_reader`.
"""

import glob
from collections.abc import Callable, Collection, Iterator
from enum import Enum
from itertools import takewhile
from pathlib import Path
from typing import Final

from streamsyn.errors import ConfigError
from streamsyn.io.decompression import COMPRESSIONS


class Kind(Enum):
    """The format of a file or a directory, as its name or its content says."""

    LINES = "JSON lines"
    TEXT = "plain text"
    PARQUET = "Parquet"
    SAVED = "saved dataset"
    """A directory written by `datasets.save_to_disk`."""


ROW_KINDS: Final = frozenset({Kind.LINES, Kind.PARQUET, Kind.SAVED})
TEXT_KINDS: Final = frozenset({Kind.LINES, Kind.PARQUET, Kind.TEXT})
_SUFFIXES: Final = {
    ".jsonl": Kind.LINES,
    ".ndjson": Kind.LINES,
    ".json": Kind.LINES,
    ".txt": Kind.TEXT,
}
"""Of files that may be compressed."""
_OTHER_SUFFIXES: Final = {".parquet": Kind.PARQUET}


def kind_of(path: Path) -> Kind | None:
    """The format of a file by its name; None for a name of no known format."""
    if path.suffix in _OTHER_SUFFIXES:
        return _OTHER_SUFFIXES[path.suffix]
    return _SUFFIXES.get(format_suffix(path))


def format_suffix(path: Path) -> str:
    """The suffix of a format that may be compressed: `.json` of `rows.json.gz`; empty for any other name."""
    name = path.name.removesuffix(path.suffix) if path.suffix in COMPRESSIONS else path.name
    return next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), "")


def suffixes_of(kinds: Collection[Kind]) -> str:
    """The suffixes of some formats, as messages list them."""
    compressible = ", ".join(suffix for suffix, kind in _SUFFIXES.items() if kind in kinds)
    others = ", ".join(suffix for suffix, kind in _OTHER_SUFFIXES.items() if kind in kinds)
    return f"{compressible} (each also {' or '.join(COMPRESSIONS)}) and {others}"


def is_row_file(path: Path) -> bool:
    """Whether a file's name is one of a format of rows."""
    return kind_of(path) in ROW_KINDS


def is_saved_dataset(path: Path) -> bool:
    """Whether a directory holds what `datasets.save_to_disk` writes."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def is_run_directory(path: Path) -> bool:
    """Whether a directory is one that `streamsyn run` writes to."""
    return (path / "run.json").is_file() and (
        (path / "manifest.jsonl").is_file() or (path / "contexts").is_dir()
    )


def matches(pattern: str) -> list[Path]:
    """What a glob matches, sorted; `**` matches any depth."""
    return sorted(map(Path, glob.glob(pattern, recursive=True)))  # noqa: PTH207 - Path.glob refuses absolute patterns


def paths_below(
    path: Path,
    kinds: Collection[Kind],
    *,
    enters: Callable[[Path], bool] = lambda _: True,
    strict: bool = True,
) -> Iterator[Path]:
    """`path` itself, or all files and saved datasets below it, that are of some formats; sorted by name.

    Args:
        path: A file or a directory. A saved dataset counts as one path where `kinds` has it.
        kinds: The formats.
        enters: Whether to look into a directory.
        strict: Follow links to directories, and raise for a directory that cannot be listed. Otherwise
            both are skipped, as by `Path.rglob`.

    Raises:
        OSError: A directory cannot be listed.
    """
    if not path.is_dir():
        if kind_of(path) in kinds:
            yield path
    elif Kind.SAVED in kinds and is_saved_dataset(path):
        yield path
    elif enters(path):
        for child in _children(path, strict=strict):
            if strict or not (child.is_symlink() and child.is_dir()):
                yield from paths_below(child, kinds, enters=enters, strict=strict)


def _children(folder: Path, *, strict: bool) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except PermissionError:
        if strict:
            raise
        return []


def find_rows(pattern: str, key: str) -> list[Path]:
    """The files of rows and the saved datasets that a path, a directory or a glob names, sorted.

    What lies in a run directory is skipped unless the pattern spells out the way into it.

    Args:
        pattern: As the user gave it.
        key: The option or the configuration key that it was given as, for messages.

    Raises:
        ConfigError: There is nothing, or something of no known format.
    """
    if not pattern:
        raise ConfigError(f"{key}: a path is empty; give a file, a directory or a glob")
    try:
        # `**` matches a directory and also what lies in it: each file is read once.
        found = list(
            dict.fromkeys(path for match in _row_matches(pattern, key) for path in _rows_below(match, key))
        )
    except OSError as error:
        raise ConfigError(f"{key}: {error.filename or pattern} cannot be used: {error.strerror}") from error
    if not found:
        raise ConfigError(
            f"{key}: there is no file to read in {pattern}; the formats are {suffixes_of(ROW_KINDS)}"
        )
    return found


def _row_matches(pattern: str, key: str) -> list[Path]:
    """What is named: the path itself, or what a glob matches outside of run directories."""
    path = Path(pattern)
    if not path.exists() and not path.is_symlink():
        found = matches(pattern)
        if not found:
            raise ConfigError(f"{key}: {pattern} does not exist")
        fixed = len(list(takewhile(lambda part: not glob.has_magic(part), path.parts)))
        return [match for match in found if not _is_in_run_directory(match, fixed)]
    if is_run_directory(path):
        raise ConfigError(f"{key}: {pattern} is a run directory; give files of rows instead")
    if not path.is_dir():
        _check_regular(path, key)
        if not is_row_file(path):
            raise ConfigError(
                f"{key}: {pattern} is of no known format; there are {suffixes_of(ROW_KINDS)}, and directories"
            )
    return [path]


def _is_in_run_directory(match: Path, fixed: int) -> bool:
    """Whether a wildcard, not the user, led into a run directory; `fixed` parts come before the first."""
    folders = (Path(*match.parts[:depth]) for depth in range(fixed, len(match.parts)))
    return any(map(is_run_directory, folders))


def _rows_below(path: Path, key: str) -> Iterator[Path]:
    # OUT may lie among the seeds: what a run writes is not read by the next.
    for found in paths_below(path, ROW_KINDS, enters=lambda folder: not is_run_directory(folder)):
        if not found.is_dir():
            _check_regular(found, key)
        yield found


def _check_regular(path: Path, key: str) -> None:
    """Refuse what is not a file: opening a named pipe would wait, and a device may have no end."""
    if path.is_fifo():
        raise ConfigError(f"{key}: {path} is a named pipe; pass its lines on stdin instead, with -")
    if not path.is_file():
        what = "is neither a file nor a directory" if path.exists() else "is a link to nothing"
        raise ConfigError(f"{key}: {path} {what}")
