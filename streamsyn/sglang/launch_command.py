"""How a local SGLang server is started: which interpreter, which flags, which environment."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from streamsyn.errors import ConfigError

PYTHON_VARIABLE = "STREAMSYN_SGLANG_PYTHON"
HOME_VARIABLE = "STREAMSYN_SGLANG_HOME"
INSTALLER = "deploy/sglang-cpu/install.sh"
SOURCE_TREE = Path(__file__).parents[2]

CPU_FLAGS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--grammar-backend", "xgrammar", "--disable-overlap-schedule"),
    # 0.7 GB of KV cache for the packaged model, where a share of the memory would be 1.8 GB and 10 s.
    *("--mem-fraction-static", "0.1", "--max-total-tokens", "32768", "--max-running-requests", "32"),
    # Idle without spinning; /health generates a token anyway, so a warm-up would only delay it.
    *("--sleep-on-idle", "--skip-server-warmup"),
)


@dataclass(frozen=True, slots=True)
class LaunchCommand:
    """A program to run, and what its environment has beyond ours."""

    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


def has_gpu() -> bool:
    """Whether this machine has a GPU; asks the file system alone, which is quick and cannot hang."""
    devices = (Path("/dev/nvidia0"), Path("/dev/kfd"))
    return any(device.exists() for device in devices) or shutil.which("nvidia-smi") is not None


def is_cpu_install(python: Path) -> bool:
    """Whether this is the interpreter of `INSTALLER`, which cannot use a GPU even where there is one."""
    return any(python.parents[1].glob("lib/python*/site-packages/sglang_cpu_server.py"))


def served_name(model: str | Path) -> str:
    """The name to ask the server for: a directory's own (behind any link), or the name on the hub."""
    return Path(model).resolve().name if Path(model).is_dir() else str(model)


def server_command(
    python: Path, model: str | Path, port: int, *, gpu: bool, extra_args: Sequence[str] = ()
) -> LaunchCommand:
    """The command that serves `model` on 127.0.0.1; `extra_args` come last and so win over ours."""
    argv = (
        *(str(python), "-m", "sglang.launch_server" if gpu else "sglang_cpu_server"),
        *("--model-path", str(model), "--served-model-name", served_name(model)),
        *("--host", "127.0.0.1", "--port", str(port), "--enable-cache-report", "--enable-metrics"),
        *(() if gpu else CPU_FLAGS),
        *extra_args,
    )
    environment = {"PYTHONUNBUFFERED": "1"}
    if Path(model).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
    if not gpu:
        environment["SGLANG_USE_CPU_ENGINE"] = "1"
        # With more, OpenMP's spin waits take a pass from 0.1 s to 4 s as soon as anything else wants a core.
        environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    return LaunchCommand(argv, environment)


def find_python(explicit: Path | None = None) -> Path:
    """The interpreter that has SGLang: named by flag or variable, else ours, else the installed one."""
    named = os.environ.get(PYTHON_VARIABLE)
    if explicit is not None:
        return _existing(explicit, "--sglang-python")
    if named:
        return _existing(Path(named), PYTHON_VARIABLE)
    found = importlib.util.find_spec("sglang")
    if found is not None and found.has_location:  # a folder that is merely called sglang has none
        return Path(sys.executable)
    for home in _homes():
        if (home / "venv/bin/python").exists():
            return home / "venv/bin/python"
    raise ConfigError(
        f"no SGLang found: name its interpreter with --sglang-python or {PYTHON_VARIABLE}, "
        f"or run {INSTALLER} on a machine without a GPU"
    )


def find_packaged_model() -> Path:
    """The small model that `INSTALLER` puts beside its SGLang."""
    for home in _homes():
        if (home / "model/config.json").exists():
            return home / "model"
    raise ConfigError(f"the packaged model is not installed: run {INSTALLER}")


def _homes() -> list[Path]:
    """Where the installer may have put things; the variable, when set, is the only place."""
    if home := os.environ.get(HOME_VARIABLE):
        return [Path(home).absolute()]
    return [SOURCE_TREE / ".sglang-cpu", Path.cwd() / ".sglang-cpu"]


def _existing(python: Path, name: str) -> Path:
    """The path, absolute but not resolved: behind a venv's link stands the Python it was made from."""
    if not os.access(python, os.X_OK) or python.is_dir():
        raise ConfigError(f"{name}: {python} is not a program that can be run")
    return python.absolute()
