"""What `streamsyn train` can be told: where model and OUT stand, templates, adapters, the curve."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from streamsyn.config.command_sections import TrainSection
from streamsyn.errors import ConfigError
from streamsyn.trainer.outdir import OutDirectory, check_shaping
from streamsyn.trainer.sources.locate import open_sources
from streamsyn.trainer.sources.row_files import FileRows
from streamsyn.trainer.training_request import check, resolve
from tests.examples import one_in
from tests.system.conftest import fork_server, streamsyn  # noqa: F401 - a fixture of the session
from tests.trainer import tiny
from tests.trainer.conftest import Start, lines
from tests.trainer.test_command import result, same, write_run

pytestmark = pytest.mark.timeout(300)

LORA = "{rank = 4, alpha = 16}"


def asked(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command that ends before torch is needed."""
    return streamsyn("train", *arguments, **options)


def test_model_and_out_may_be_in_the_configuration(start: Start, tmp_path: Path) -> None:
    """Keys instead of flags; later, OUT alone is enough to resume."""
    keys = {"model": tmp_path / "base", "out": tmp_path / "out"}
    text = "".join(f"{key} = '{value}'\n" for key, value in keys.items())
    (tmp_path / "train.toml").write_text(f"[train]\n{text}")
    run = write_run(tmp_path / "run", range(20))
    training = start(run, None, str(tmp_path / "train.toml"), base=None, max_steps=2)

    assert 0 == training.wait(), training.stderr()
    again = start(run, tmp_path / "out", base=None)
    assert 0 == again.wait(), again.stderr()
    assert lines(tmp_path / "out")[-1]["step"] > 2


@pytest.mark.parametrize(
    ("given", "named"),
    one_in(
        3,
        [
            ([], "--from"),
            (["--from", "run", "--out", "out"], "pass --model PATH, or set train.model"),
            (["--from", "run", "--model", "base"], "pass --out DIR, or set train.out"),
            (["--from", "run", "--out", "o", "--model", "base/my-bsae"], "there is no such directory"),
            (
                ["--from", "nope", "--out", "o", "--model", "base"],
                "--from nope: there is no such directory; pass --wait",
            ),
            (["--plot"], "pass --out DIR, or set train.out"),
            (["--plot", "--out", "nowhere"], "nowhere"),
            (["nowhere.toml", "--from", "run"], "nowhere.toml"),
            (["--from", "run", "--out", "o", "--model", "base", "--set", "lora"], "KEY=VALUE"),
            (["--from", "run", "--out", "o", "--model", "base", "--tethered"], "run --train"),
        ],
    ),
)
def test_what_is_missing_is_named_with_flag_and_key(tmp_path: Path, given: list[str], named: str) -> None:
    """One line, exit 2, before anything heavy is imported."""
    tiny.write_model(tmp_path / "base")
    done = asked(*given, cwd=tmp_path, stdin=subprocess.DEVNULL)

    assert 2 == done.returncode, done.stderr
    assert 1 == len(done.stderr.splitlines()), done.stderr
    assert named in done.stderr


def test_a_custom_template_is_saved_with_the_model(start: Start, tmp_path: Path) -> None:
    """It is in the result. Its text counts, not its path: the same text elsewhere is the same
    training, a different text is not.
    """
    for path in (tmp_path / "base").glob("chat_template*"):
        path.unlink()
    text = tiny.TEMPLATE.replace("<|end|>", "!<|end|>")
    first, second = tmp_path / "first.jinja", tmp_path / "second.jinja"
    first.write_text(text)
    second.write_text(text)
    run, out = write_run(tmp_path / "run", range(12)), tmp_path / "out"
    assert 0 == start(run, out, chat_template=first, max_steps=2).wait()
    rest = start(run, out, chat_template=second)
    assert 0 == rest.wait(), rest.stderr()

    assert text == AutoTokenizer.from_pretrained(out / "model").chat_template
    second.write_text(tiny.TEMPLATE)
    other = start(run, out, chat_template=second)
    assert 2 == other.wait()
    assert "train.chat_template" in other.stderr().splitlines()[-1]


@pytest.mark.parametrize(("text", "named"), [(None, "cannot read"), ("{% for m in %}", "template.jinja:1")])
def test_an_invalid_template_is_refused(tmp_path: Path, text: str | None, named: str) -> None:
    """With the key, the file and the line; exit 2."""
    tiny.write_model(tmp_path / "base")
    if text is not None:
        (tmp_path / "template.jinja").write_text(text)
    given = [
        "--from",
        "run",
        "--out",
        "out",
        "--model",
        "base",
        "--set",
        "train.chat_template=template.jinja",
    ]
    done = asked(*given, cwd=tmp_path)

    assert 2 == done.returncode
    assert "train.chat_template: " in done.stderr
    assert named in done.stderr


@pytest.mark.crash
def test_adapters_are_trained_stopped_and_merged(start: Start, tmp_path: Path) -> None:
    """A checkpoint holds adapters only. Stopped and resumed, the result is that of an undisturbed training;
    merged, it does not need the base model.
    """
    run, out = write_run(tmp_path / "run", range(60)), tmp_path / "out"
    whole = start(run, tmp_path / "whole", lora=LORA)
    assert 0 == whole.wait(), whole.stderr()
    training = start(run, out, lora=LORA, save_every_steps=1000)
    training.wait_for("train.step")
    training.kill(15)
    assert 75 == training.wait(), training.stderr()
    saved = tiny.saved(next((out / "checkpoints").iterdir()))
    rest = start(run, out, lora=LORA)
    assert 0 == rest.wait(), rest.stderr()

    assert all("lora_" in name for name in saved)
    assert same(result(tmp_path / "whole"), result(out))
    assert not (out / "model" / "adapter_config.json").exists()
    tuned = AutoModelForCausalLM.from_pretrained(out / "model").state_dict()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    assert tuned.keys() == base.keys()
    assert not torch.equal(
        tuned["model.layers.0.mlp.up_proj.weight"], base["model.layers.0.mlp.up_proj.weight"]
    )


def test_the_curve_is_drawn_at_the_end_and_alone(start: Start, tmp_path: Path) -> None:
    """With --plot, at the end; for an existing OUT, its path goes to stdout and torch is not needed."""
    run, out = write_run(tmp_path / "run", range(20)), tmp_path / "out"
    training = start(run, out, "--plot")
    assert 0 == training.wait(), training.stderr()
    picture = out / "training.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in training.stderr()
    picture.unlink()
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    command = [sys.executable, "-m", "streamsyn", "train", "--plot", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    assert (0, f"{picture}\n") == (done.returncode, done.stdout), done.stderr
    assert picture.exists()


def test_a_training_remembers_where_its_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It can be resumed from a different folder, with the same configuration file or without one."""
    config, out = tmp_path / "train.toml", tmp_path / "out"
    config.write_text(
        "[train]\nmodel = 'somebody/some-model'\ncontrol = 'chat.jsonl'\nmix = [{path = 'mixed'}]\n"
        "longbench = {path = 'questions/*.jsonl'}\n"
        "[fleet]\ntls_ca = 'ca.pem'\nservers = [{url = 'https://gpu-1:30000', key_env = 'GPU_KEY'}]\n"
        "give_up_s = inf\nconnect_timeout_s = inf\n"
    )
    monkeypatch.chdir(tmp_path)
    first = resolve(config, "run", None, out)
    directory = OutDirectory(out)
    directory.claim(first.config, first.model)
    directory.close()
    monkeypatch.chdir("/")
    config_later = resolve(None, "run", None, out).config
    later, fleet = config_later.train, config_later.fleet

    assert str(tmp_path / "chat.jsonl") == later.control
    assert (str(tmp_path / "mixed"),) == tuple(one.path for one in later.mix)
    assert later.longbench is not None
    assert str(tmp_path / "questions/*.jsonl") == later.longbench.path
    assert tmp_path / "ca.pem" == fleet.tls_ca
    assert first.config.fleet.servers == fleet.servers
    check_shaping(out, config_later, first.model)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with something that looks like a model, chat rows, and a run."""
    (tmp_path / "base").mkdir()
    for name in ("base/config.json", "base/model.safetensors"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text("{}\n")
    write_run(tmp_path / "run", range(2))
    (tmp_path / "link").symlink_to("data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def checked(source: str, out: str, *settings: str, model: str = "base") -> None:
    """The checks of a training that do not need torch."""
    check(resolve(None, source, model, Path(out), settings))


MIX, QUESTIONS = "train.mix=[{path='%s'}]", "train.longbench={path='%s'}"


@pytest.mark.parametrize(
    ("source", "out", "setting", "named"),
    [
        ("data", "data/out", "", "--from data"),
        ("data", "data/deep/out", "", "--from data"),
        ("data", "link/out", "", "--from data"),
        ("data/*", "data/out", "", "--from data/"),
        ("data/*/*.jsonl", "data/out", "", "--from data/"),
        ("data/**/*.jsonl", "data/out", "", "--from data/"),
        ("*/*.jsonl", "data", "", "--from */"),
        ("run", "data/out", "train.control=data", "train.control"),
        ("run", "data/out", MIX % "data", "train.mix"),
        ("-", "data/out", QUESTIONS % "data/**", "train.longbench.path"),
        ("run", "run/samples", "", "for a run's own files"),
        ("run", "run/spool/out", "", "for a run's own files"),
        ("later", "later/contexts", "", "for a run's own files"),
        ("data", "run/index", "", "for a run's own files"),
    ],
)
def test_an_out_whose_files_would_be_read_is_refused(
    folder: Path, source: str, out: str, setting: str, named: str
) -> None:
    """The next start would read them as rows, or find foreign files in a run."""
    with pytest.raises(ConfigError, match=r"^--out .* lies ") as refused:
        checked(source, out, *filter(None, [setting]))

    assert named in str(refused.value)
    assert not (folder / out / "train.json").exists()


@pytest.mark.parametrize(
    ("source", "out"),
    [
        ("run", "run/training"),
        ("later", "later/training"),
        ("data/*.jsonl", "data/out"),
        ("data/*/rows.jsonl", "data"),
        ("data/rows.jsonl", "data"),
        ("data", "data-tuned"),
        ("-", "data/out"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_an_out_beside_what_is_read_is_allowed(source: str, out: str) -> None:
    """In a run directory under a different name, or where a glob does not match."""
    checked(source, out, "train.control=data/rows.jsonl")
    (Path(out)).mkdir(parents=True, exist_ok=True)
    checked(source, out)


@pytest.mark.parametrize("flag", ["--from", "--out", "--model"])
@pytest.mark.usefixtures("folder")
def test_a_path_that_the_system_refuses_is_named(flag: str) -> None:
    """Before anything is read from it."""
    given = {"--from": "run", "--out": "out", "--model": "base"} | {flag: "./" + "a" * 300}

    with pytest.raises(ConfigError, match=rf"^{flag} (\./)?a+: File name too long$"):
        checked(given["--from"], given["--out"], model=given["--model"])
    if flag == "--from":
        with pytest.raises(ConfigError, match=r"File name too long$"):
            open_sources(given[flag], TrainSection(), Path("out"))


@pytest.mark.usefixtures("folder")
def test_an_empty_path_is_not_the_working_directory() -> None:
    """It stays empty, and is refused."""
    section = resolve(None, "run", "base", Path("out"), ["train.control=", MIX % ""]).config.train

    assert ("", "") == (section.control, section.mix[0].path)
    with pytest.raises(ConfigError, match=r"^train.mix: a path is empty"):
        FileRows(section.mix[0].path, "mix", "train.mix", count=False)
    with pytest.raises(ConfigError, match=r"^--from: a path is empty"):
        checked("", "out")


def test_a_closed_stdout_is_not_a_failure() -> None:
    """The training has succeeded whether or not stdout is open."""
    ending = "import sys; from streamsyn.cli import train; assert sys.stdout is None; train._exit(0)"
    done = subprocess.run(  # only a shell can close it
        f'{sys.executable} -c "{ending}" >&-', shell=True, capture_output=True, check=False, timeout=60
    )

    assert (0, b"") == (done.returncode, done.stderr)
