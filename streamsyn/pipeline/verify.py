"""`streamsyn verify`: a run directory against its guarantees, and what can be repaired of it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import structlog

from streamsyn.assembly.assembler import Arrangement, Assembler
from streamsyn.assembly.resources import AssemblyResources, ResourceMissing, with_templates
from streamsyn.assembly.window import Passage
from streamsyn.config.loading import Config
from streamsyn.errors import ConfigError
from streamsyn.sink.log import RunLog, encode_row
from streamsyn.sink.rundir import RunDirectory, read_run_json, saved_config
from streamsyn.sink.verification import Verification, drop_derived, drop_samples

log = structlog.get_logger()

_CALLED = {
    "assembly.prompts": "packaged templates",
    "assembly.tokenizer": "the tokenizer",
    "assembly.corpus": "the corpus",
}


def verify(root: Path) -> tuple[list[str], Verification]:
    """What is wrong with a run directory, and what was read of it.

    Raises:
        ConfigError: It is no run directory.
    """
    verification = Verification(root)
    config, shaping = _saved(root)
    problems: list[str] = []
    again = None
    if config.assembly.write:
        try:
            again = Reassembly(config, shaping)
        except ResourceMissing as error:
            verification.notes.append(f"samples are not compared with the log: {error}")
        except ConfigError as error:
            problems.append(f"samples cannot be compared with the log: {error}")
    if again is not None and again.changed:
        changed = ", ".join(again.changed)
        verification.notes.append(f"samples are not compared with the log: changed since: {changed}")
        again = None
    return [*problems, *verification.problems(again)], verification


def repair(root: Path) -> None:
    """Cut torn ends off, list sealed shards that the manifest was not told of, make the index anew.

    Samples are dropped from the first shard on that something is wrong with, when the log that they
    are made of is sound: the next run makes them again.

    Raises:
        DirectoryInUse: A run is writing to it.
        ConfigError: It is no run directory.
        SinkError: It cannot be read or written.
    """
    config, _ = _saved(root)
    directory = RunDirectory(root)
    try:
        _, found = verify(root)
        drop_derived(root)
        if found.log_is_sound and found.bad_samples is not None:
            drop_samples(root, found.manifest, found.bad_samples)
            log.warning("verify.samples_dropped", first=found.bad_samples, then="run again to make them anew")
        RunLog(root, config.sink).close()
    finally:
        directory.close()


class Reassembly:
    """Makes the lines of samples again from the contexts of a log.

    Args:
        config: That of the run.
        shaping: The run's fingerprint: it has the templates as they were, wherever they are now.

    Raises:
        ConfigError: A template cannot be used.
        MaterialGone: The tokenizer or the corpus cannot be had (any more).
    """

    def __init__(self, config: Config, shaping: Mapping[str, Any]) -> None:
        self._config = config
        with TemporaryDirectory() as folder:
            self._materials = AssemblyResources(with_templates(config.assembly, shaping, Path(folder)))
        now = self._materials.fingerprint()
        self.changed = [_CALLED[key] for key, value in now.items() if shaping.get(key, value) != value]
        """What samples are made with and is not as it was when the run used it."""
        if "assembly.max_similarity" not in shaping:
            self.changed.append("how samples are made, by a newer version")

    def __call__(self, contexts: Iterable[dict[str, Any]], flushes: Sequence[int]) -> Iterator[bytes]:
        """The lines, in order; `flushes` are the numbers of contexts at which streams ended."""
        assembler = self._materials.assembler(self._config.run.seed)
        made = (one.sample() for some in self._batches(assembler, contexts, flushes) for one in some)
        return (encode_row(seq, sample) for seq, sample in enumerate(made))

    def _batches(
        self, assembler: Assembler, contexts: Iterable[dict[str, Any]], flushes: Sequence[int]
    ) -> Iterator[list[Arrangement]]:
        for row in contexts:
            if assembler.consumed in flushes:
                yield assembler.flush()
            yield assembler.add(Passage.of_row(row))
        if assembler.consumed in flushes:
            yield assembler.flush()


def _saved(root: Path) -> tuple[Config, dict[str, Any]]:
    """The configuration and the fingerprint that a directory was made with."""
    config, saved = saved_config(root), read_run_json(root)
    if config is None or saved is None:
        raise ConfigError(f"{root} is no run directory: it has no run.json")
    return config, saved["fingerprint"]
