"""`streamsyn verify`: a run directory against its guarantees, and what can be repaired of it."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from streamsyn.assembly.assembler import Arrangement, Assembler
from streamsyn.assembly.passages import Passage
from streamsyn.assembly.prompts import SamplePrompts
from streamsyn.config import Config, SinkSection
from streamsyn.errors import ConfigError
from streamsyn.sink.log import encode_row
from streamsyn.sink.rundir import RunDirectory, read_run_json
from streamsyn.sink.runlog import RunLog
from streamsyn.sink.verify import Verification, drop_derived


def verify(root: Path) -> tuple[list[str], Verification]:
    """What is wrong with a run directory, and what was read of it.

    Raises:
        ConfigError: It is no run directory.
    """
    verification = Verification(root)
    config = _saved_config(root)
    again = Reassembly(config) if config is not None and config.assembly.write else None
    return list(verification.problems(again)), verification


def repair(root: Path) -> None:
    """Cut torn ends off, list sealed shards that the manifest was not told of, make the index anew.

    Raises:
        DirectoryInUse: A run is writing to it.
        ConfigError: It is no run directory.
        SinkError: It cannot be read or written.
    """
    saved = read_run_json(root)
    if saved is None:
        raise ConfigError(f"{root} is no run directory: it has no run.json")
    directory = RunDirectory(root)
    try:
        drop_derived(root)
        RunLog(root, SinkSection.model_validate(saved["config"]["sink"])).close()
    finally:
        directory.close()


class Reassembly:
    """Makes the lines of samples again from the contexts of a log."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def __call__(self, contexts: Iterable[dict[str, Any]], flushes: Sequence[int]) -> Iterator[bytes]:
        """The lines, in order; `flushes` are the numbers of contexts at which streams ended."""
        section = self._config.assembly
        assembler = Assembler(section, self._config.run.seed, SamplePrompts(section))
        made = (one.sample() for some in self._batches(assembler, contexts, flushes) for one in some)
        return (encode_row(seq, sample) for seq, sample in enumerate(made))

    def _batches(
        self, assembler: Assembler, contexts: Iterable[dict[str, Any]], flushes: Sequence[int]
    ) -> Any:
        for row in contexts:
            if assembler.consumed in flushes:
                yield assembler.flush()
            yield assembler.add(Passage.of_row(row))
        if assembler.consumed in flushes:
            yield assembler.flush()


def _saved_config(root: Path) -> Config | None:
    saved = read_run_json(root)
    return None if saved is None else Config.model_validate(saved["config"])
