"""What of a training can be seen to be wrong before torch is imported, and before a run begins beside it."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from streamsyn.errors import ConfigError
from streamsyn.trainer.training_request import TrainRequest, check, resolve


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with chat rows and something that looks like a model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).touch()
    return tmp_path


def asked(folder: Path, toml: str) -> TrainRequest:
    """The request of a configuration file."""
    (folder / "train.toml").write_text(toml)
    return resolve(folder / "train.toml", "rows.jsonl", "model", folder / "out")


def test_a_valid_request_passes(folder: Path) -> None:
    """With every key that the cases below get wrong."""
    (folder / "other.jsonl").write_text("{}\n")
    check(
        asked(
            folder,
            """
            [train]
            seq_len = 4096
            control = "other.jsonl"
            trackers = ["tensorboard"]
            needles.lengths = [4096]
            longbench.path = "other.jsonl"
            publish.servers = ["http://gpu-1:30000"]
            eval_servers = ["http://gpu-2:30000"]
            [[train.mix]]
            path = "other.jsonl"
            weight = 1
            """,
        )
    )


@pytest.mark.parametrize("name", ["model", "checkpoints", "metrics.jsonl", "LATEST"])
def test_foreign_files_in_out_are_not_replaced(folder: Path, name: str) -> None:
    """A folder that no training has written, for example `--out .` in a project with a package `model`."""
    (folder / "out").mkdir()
    (folder / "out" / name).touch()
    with pytest.raises(ConfigError, match=rf"^--out .*out holds {name}, but no train\.json"):
        check(asked(folder, ""))
    (folder / "out" / "train.json").write_text('{"format": 1, "shaping": {}, "config": {}}')
    if name in ("model", "metrics.jsonl"):
        check(asked(folder, ""))


def test_a_model_in_the_place_of_the_result_is_not_replaced(folder: Path) -> None:
    """The tuned model would overwrite it."""
    with pytest.raises(ConfigError, match=r"^--out \. holds model, but no train\.json"):
        check(resolve(None, "rows.jsonl", "model", Path()))


def test_an_empty_out_is_refused(folder: Path) -> None:
    """As a shell makes it of an unset variable; nothing is written to the working directory."""
    command = [
        sys.executable,
        "-m",
        "streamsyn",
        "train",
        "--from",
        "rows.jsonl",
        "--model",
        "model",
        "--out",
        "",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=60)

    assert 2 == done.returncode
    assert "streamsyn: --out: the path is empty" in done.stderr
    assert {"rows.jsonl", "model"} == {path.name for path in folder.iterdir()}


ASKED = """publish = {{servers = ["http://gpu-1:30000"]}}
needles = {{lengths = [512]}}
eval_servers = ["{}"]"""


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ('control = "none.jsonl"', r"train\.control: .*none\.jsonl"),
        ('control = ""', r"train\.control: a path is empty"),
        ('mix = [{path = "none/*.jsonl", weight = 1}]', r"train\.mix: .*none/\*\.jsonl"),
        ('longbench = {path = "none.jsonl"}', r"train\.longbench\.path: .*none\.jsonl"),
        ("seq_len = 4096\nneedles = {lengths = [512, 4097]}", r"train\.needles\.lengths: 4097 .* 4096"),
        ('publish = {servers = ["gpu-1:30000"]}', r"train\.publish\.servers: .*gpu-1:30000"),
        (ASKED.format("gpu-2:30000"), r"train\.eval_servers: gpu-2:30000 is not a valid URL"),
        (
            ASKED.format("http://gpu-1:30000/v1"),
            r"train\.eval_servers: http://gpu-1:30000 is in train\.publish",
        ),
        ('eval_servers = ["http://a"]\nneedles = {}', r"eval_servers needs publish: the weights"),
        ('eval_servers = ["http://a"]\npublish = {}', r"eval_servers needs needles or longbench"),
    ],
)
def test_missing_paths_are_named_at_once(folder: Path, toml: str, message: str) -> None:
    """By key, as the user gave it."""
    with pytest.raises(ConfigError, match=message):
        check(asked(folder, f"[train]\n{toml}"))


def test_a_tracker_that_is_not_installed_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what to install."""

    def without_wandb(name: str) -> Any:
        return None if name == "wandb" else find_spec(name)

    monkeypatch.setattr("streamsyn.trainer.training_request.find_spec", without_wandb)
    with pytest.raises(ConfigError, match=r"train\.trackers: wandb needs .* pip install wandb"):
        check(asked(folder, '[train]\ntrackers = ["wandb"]'))


def test_a_library_for_moments_of_8_bits_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what to install, and what works without."""
    monkeypatch.setattr(
        "streamsyn.trainer.training_request.find_spec",
        lambda name: None if name == "bitsandbytes" else find_spec(name),
    )
    with pytest.raises(ConfigError) as raised:
        check(asked(folder, '[train]\nmoments = "8bit"'))

    needs = "needs the package bitsandbytes: pip install 'streamsyn[8bit]', or use \"bf16\""
    assert f'train.moments = "8bit" {needs}' == str(raised.value)
