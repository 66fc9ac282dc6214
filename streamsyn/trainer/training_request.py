"""What a training is asked to do, and whether that can be done: all that can be said without torch."""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from streamsyn.config.loading import Config, load, parse_override
from streamsyn.config.train_section import TrainSection
from streamsyn.errors import ConfigError
from streamsyn.fleet.server_spec import base_url
from streamsyn.io.paths import find_rows
from streamsyn.trainer.outdir import check_ours, check_shaping, remembered
from streamsyn.trainer.sources.locate import folder_of_a_run, is_read_with, is_run, real_path
from streamsyn.trainer.sources.source import path_errors
from streamsyn.trainer.stream.render import read_template

_NEEDED = ("torch", "transformers", "accelerate")
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")


@dataclass(frozen=True, slots=True)
class TrainRequest:
    """A training.

    Attributes:
        config: The resolved configuration.
        source: What is followed: a run directory, files of chat rows, or `-`.
        model: A Hugging Face directory, or a name on the hub.
        out: Where the training keeps its files.
    """

    config: Config
    source: str
    model: str
    out: Path


def resolve(
    path: Path | None,
    source: str,
    model: str | None,
    out: Path | None,
    settings: Iterable[str] = (),
    *,
    default_out: Path | None = None,
) -> TrainRequest:
    """The training of a command line: the file, or what OUT was begun with; flags and --set over it.

    Raises:
        ConfigError: A key is wrong, or model or OUT stands nowhere.
    """
    overrides = list(map(parse_override, settings))
    config = load(path, overrides)
    out = out or (Path(config.train.out) if config.train.out else default_out)
    if out is None:
        raise ConfigError("there is no directory for the training: pass --out DIR, or set train.out")
    with path_errors("--out", out):
        if out.exists() and not out.is_dir():
            raise ConfigError(f"--out {out} is a file; give the directory that the training is to have")
    if path is None:
        config = load(None, [*remembered(out), *overrides])
    model = model or config.train.model
    if model is None:
        raise ConfigError("there is no model to tune: pass --model PATH, or set train.model")
    config = config.model_copy(update={"train": _with_whole_paths(config.train)})
    return TrainRequest(config, source, model, out)


def check(request: TrainRequest) -> None:
    """See whether the training can begin.

    Raises:
        ConfigError: It cannot; the message names the package, the flag or the key.
    """
    section = request.config.train
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if section.lora is not None and find_spec("peft") is None:
        missing.append("peft (for train.lora)")
    if missing:
        raise ConfigError(f"training needs {', '.join(missing)}: pip install 'streamsyn[train]'")
    for name in section.trackers:  # accelerate leaves a missing one out without a word
        if find_spec(name) is None:
            raise ConfigError(f"train.trackers: {name} needs the package {name}: pip install {name}")
    source, out = request.source, request.out
    if "://" in source:
        raise ConfigError(f"--from {source}: nothing is read from URLs yet; give a directory, files or -")
    with path_errors("--from", source):
        _check_source(source, out)
    with path_errors("--model", request.model):
        _check_model(request.model)
    read_template(section.chat_template)
    _check_keys(section)
    with path_errors("--out", out):
        check_ours(out)
        _check_out(out, source, section)
        check_shaping(out, request.config, request.model)


def check_launcher(section: TrainSection) -> None:
    """See whether what starts the trainer is there.

    Raises:
        ConfigError: It is not.
    """
    if section.launcher and shutil.which(section.launcher[0]) is None:
        raise ConfigError(f"train.launcher: there is no program {section.launcher[0]!r}")


def _with_whole_paths(section: TrainSection) -> TrainSection:
    """So that a training that is taken up from another folder is still the same."""
    whole: dict[str, Any] = {
        "mix": tuple(one.model_copy(update={"path": _whole(one.path)}) for one in section.mix)
    }
    for key in ("chat_template", "control"):
        if (path := getattr(section, key)) is not None:
            whole[key] = _whole(path)
    if section.longbench is not None:
        whole["longbench"] = section.longbench.model_copy(update={"path": _whole(section.longbench.path)})
    return section.model_copy(update=whole)


def _whole(path: str) -> str:
    return str(Path(path).absolute()) if path else path  # an empty one is refused where it is read


def _check_source(source: str, out: Path) -> None:
    """OUT may lie in a run's directory, but nowhere where its files would be read as rows."""
    if source == "-":
        return
    if not source:
        raise ConfigError("--from: a path is empty; give a run directory, files of chat rows, or -")
    if real_path(source) == real_path(out):
        raise ConfigError("--from and --out are the same directory")
    if not is_run(source, out):
        _check_apart(out, f"--from {source}", source)


def _check_out(out: Path, source: str, section: TrainSection) -> None:
    """What is mixed in or evaluated on is read again by the next start: OUT's files must not be among it."""
    if (folder := folder_of_a_run(out, source)) is not None:
        raise ConfigError(f"--out {out} lies in {folder}, which is for a run's own files; use another --out")
    paths = [("train.control", section.control), *(("train.mix", one.path) for one in section.mix)]
    if section.longbench is not None:
        paths.append(("train.longbench.path", section.longbench.path))
    for key, path in paths:
        if path is not None:
            find_rows(path, key)
            _check_apart(out, f"{key}: {path}", path)


def _check_keys(section: TrainSection) -> None:
    """What a key cannot tell by itself."""
    for length in section.needles.lengths if section.needles is not None else ():
        if length > section.seq_len:
            raise ConfigError(
                f"train.needles.lengths: {length} is more than train.seq_len, {section.seq_len}"
            )
    for url in section.publish.servers if section.publish is not None else ():
        base_url(url, "train.publish.servers")


def _check_apart(out: Path, named: str, pattern: str) -> None:
    if is_read_with(out, pattern):
        raise ConfigError(f"--out {out} lies among the files of {named}, and would be read with them")


def _check_model(path: str) -> None:
    """A mistyped path must not be looked for on the hub; a directory must have a model in it."""
    given = Path(path)
    if not given.exists():
        is_path = given.is_absolute() or path.startswith(".") or path.count("/") != 1
        if is_path or given.parent.is_dir():
            raise ConfigError(f"--model {path}: there is no such directory")
        return
    if not given.is_dir():
        raise ConfigError(f"--model {path} is a file; give the directory that it lies in")
    if not (given / "config.json").exists():
        raise ConfigError(f"--model {path} is no model: there is no config.json in it")
    if not any(next(given.glob(pattern), None) for pattern in _WEIGHTS):
        raise ConfigError(f"--model {path}: there are no weights in it")
