"""What a training is asked to do, from its command line, and every check of it that does not need torch."""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from streamsyn.config.command_sections import TrainSection
from streamsyn.config.data_paths import absolute_path, is_url
from streamsyn.config.loading import Config, load, parse_override
from streamsyn.errors import ConfigError
from streamsyn.fleet.server_spec import base_url
from streamsyn.io.inputs import find_files
from streamsyn.io.process_files import temporary_files_near
from streamsyn.trainer.outdir import check_replaceable, check_shaping, recorded_sections
from streamsyn.trainer.sources.locate import folder_of_a_run, is_read_with, is_run, real_path
from streamsyn.trainer.sources.source import path_errors
from streamsyn.trainer.stream.render import read_template

_PACKAGES = ("torch", "transformers", "accelerate")
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")


@dataclass(frozen=True, slots=True)
class TrainRequest:
    """What to train on what.

    Attributes:
        config: The resolved configuration.
        source: `--from`: a run directory, files of chat rows, or `-` for stdin.
        model: A Hugging Face directory or a name on the hub.
        out: OUT, the directory of the training.
    """

    config: Config
    source: str
    model: str
    out: Path

    def on_cluster(self, ray: str | None, **given: int | None) -> Self:
        """The request with keys of `cluster` as the options of `train --ray` give them; None leaves one.

        Args:
            ray: `cluster.address`.
            given: Other keys.

        Raises:
            ConfigError: Some are given without `ray`.
        """
        found: dict[str, str | int] = {name: value for name, value in given.items() if value is not None}
        if ray is not None:
            found["address"] = ray
        elif found:
            option = next(iter(found)).replace("_", "-")
            raise ConfigError(f"--{option} is for a training on a Ray cluster: it needs --ray")
        cluster = self.config.cluster.model_copy(update=found)
        return replace(self, config=self.config.model_copy(update={"cluster": cluster}))


def resolve(
    path: Path | None,
    source: str,
    model: str | None,
    out: Path | None,
    settings: Iterable[str] = (),
    *,
    default_out: Path | None = None,
) -> TrainRequest:
    """The request of a command line.

    Args:
        path: The configuration file. Without one, the configuration recorded in OUT is used.
        source: `--from`.
        model: `--model`; None to use `train.model`.
        out: `--out`; None to use `train.out`.
        settings: `--set`, applied last.
        default_out: OUT if neither `out` nor `train.out` is given.

    Raises:
        ConfigError: A key is wrong, or the model or OUT is not given.
    """
    overrides = list(map(parse_override, settings))
    config = load(path, overrides)
    out = out or (Path(config.train.out) if config.train.out else default_out)
    if out is None:
        raise ConfigError("the directory of the training is missing: pass --out DIR, or set train.out")
    with path_errors("--out", out):
        if out.exists() and not out.is_dir():
            raise ConfigError(f"--out {out} is a file; give a directory")
    if path is None:
        config = load(None, [*recorded_sections(out), *overrides])
    model = model or config.train.model
    if model is None:
        raise ConfigError("the model to tune is missing: pass --model PATH, or set train.model")
    config = config.model_copy(update={"train": _with_absolute_paths(config.train)})
    return TrainRequest(config, source, model, out)


def check(request: TrainRequest) -> None:
    """Check that the training can start.

    Raises:
        ConfigError: It cannot; the message names the package, flag or key.
    """
    temporary_files_near(request.out)
    section = request.config.train
    check_packages(section)
    for name in section.trackers:  # accelerate silently skips a tracker that is not installed
        if find_spec(name) is None:
            raise ConfigError(f"train.trackers: {name} needs the package {name}: pip install {name}")
    source, out = request.source, request.out
    with path_errors("--from", source):
        _check_source(source, out)
    with path_errors("--model", request.model):
        _check_model(request.model)
    read_template(section.chat_template)
    _check_keys(section)
    with path_errors("--out", out):
        check_replaceable(out)
        _check_out(out, source, section)
        check_shaping(out, request.config, request.model)


def check_packages(section: TrainSection) -> None:
    """Check that what the training imports is installed.

    Raises:
        ConfigError: A package is missing.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if section.lora is not None and find_spec("peft") is None:
        missing.append("peft (for train.lora)")
    if missing:
        raise ConfigError(f"training needs {', '.join(missing)}: pip install 'streamsyn[train]'")
    if section.moments == "8bit" and find_spec("bitsandbytes") is None:
        raise ConfigError(
            "train.moments = \"8bit\" needs the package bitsandbytes: pip install 'streamsyn[8bit]', or use "
            '"bf16"'
        )


def check_launcher(section: TrainSection) -> None:
    """Check that the program in `train.launcher` exists.

    Raises:
        ConfigError: It does not.
    """
    if section.launcher and shutil.which(section.launcher[0]) is None:
        raise ConfigError(f"train.launcher: there is no program {section.launcher[0]!r} on the path")


def _with_absolute_paths(section: TrainSection) -> TrainSection:
    """Make paths absolute, so that a training can be resumed from any working directory."""
    absolute: dict[str, Any] = {
        "mix": tuple(one.model_copy(update={"path": absolute_path(one.path)}) for one in section.mix)
    }
    if section.chat_template is not None:
        absolute["chat_template"] = str(Path(section.chat_template).absolute())
    if section.control is not None:
        absolute["control"] = absolute_path(section.control)
    if section.longbench is not None:
        absolute["longbench"] = section.longbench.model_copy(
            update={"path": absolute_path(section.longbench.path)}
        )
    return section.model_copy(update=absolute)


def _check_source(source: str, out: Path) -> None:
    """Check `--from`. OUT may lie in a run directory, but not among files that are read as rows."""
    if source == "-":
        return
    if not source:
        raise ConfigError("--from: a path is empty; give a run directory, files of chat rows, or -")
    if real_path(source) == real_path(out):
        raise ConfigError("--from and --out are the same directory")
    if not is_run(source, out):
        _check_apart(out, f"--from {source}", source)


def _check_out(out: Path, source: str, section: TrainSection) -> None:
    """Check OUT. It must not lie among files that are mixed in or evaluated on: the next start reads them
    again.
    """
    if (folder := folder_of_a_run(out, source)) is not None:
        raise ConfigError(f"--out {out} lies in {folder}, which is for a run's own files; use another --out")
    paths = [("train.control", section.control), *(("train.mix", one.path) for one in section.mix)]
    if section.longbench is not None:
        paths.append(("train.longbench.path", section.longbench.path))
    for key, path in paths:
        if path is not None:
            find_files(path, key)
            _check_apart(out, f"{key}: {path}", path)


def _check_keys(section: TrainSection) -> None:
    """Check keys against each other, and URLs."""
    for length in section.needles.lengths if section.needles is not None else ():
        if length > section.seq_len:
            raise ConfigError(
                f"train.needles.lengths: {length} is more than train.seq_len = {section.seq_len}"
            )
    for url in section.publish.servers if section.publish is not None else ():
        base_url(url, "train.publish.servers")
    _check_eval_servers(section)


def _check_eval_servers(section: TrainSection) -> None:
    writers = section.publish.servers if section.publish is not None else ()
    others = {base_url(url, "train.publish.servers") for url in writers}
    for given in section.eval_servers:
        if (url := base_url(given, "train.eval_servers")) in others:
            raise ConfigError(
                f"train.eval_servers: {url} is in train.publish.servers, too: its weights would change while "
                "it is asked; give it in one of the two"
            )


def _check_apart(out: Path, named: str, pattern: str) -> None:
    if not is_url(pattern) and is_read_with(out, pattern):
        raise ConfigError(
            f"--out {out} lies among the files of {named}, and would be read as rows; use another --out"
        )


def _check_model(path: str) -> None:
    """Check that a directory holds a model. A mistyped path must not be looked up on the hub."""
    given = Path(path)
    if not given.exists():
        is_path = given.is_absolute() or path.startswith(".") or path.count("/") != 1
        if is_path or given.parent.is_dir():
            raise ConfigError(f"--model {path}: there is no such directory")
        return
    if not given.is_dir():
        raise ConfigError(f"--model {path} is a file; give the directory that it lies in")
    if not (given / "config.json").exists():
        raise ConfigError(f"--model {path} is not a model: there is no config.json in it")
    if not any(next(given.glob(pattern), None) for pattern in _WEIGHTS):
        raise ConfigError(f"--model {path}: there are no weights in it")
