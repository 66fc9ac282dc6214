"""The `sh` blocks of the guides work when pasted: they run in order, in an empty folder."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import streamsyn

ROOT = Path(streamsyn.__file__).parents[1]
GUIDES = sorted((ROOT / "deploy" / "guides").glob("*.md"))
PORTS = ("30000", "8200")
"""The ports that the guides use; each test has free ones in their place."""


def test_there_are_guides() -> None:
    """The folder is where the tests look for it."""
    assert GUIDES


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_guide_works_when_pasted(guide: Path, tmp_path: Path) -> None:
    """Each guide begins with a command, and all of its commands succeed against the simulated server."""
    text = guide.read_text("utf-8")
    assert re.match(r"# [^\n]+\n\n```sh\n", text), f"{guide.name} begins with a command"
    script = "\n".join(re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))

    for port in PORTS:
        script = script.replace(port, str(free_port()))
    done = paste(script, tmp_path)

    assert done.returncode == 0, done.stdout
    assert "reasoning found" not in done.stdout
    for out in re.findall(r"--out (runs/\w+)", script):
        assert any((tmp_path / out / "samples").iterdir()), f"{out} has no samples:\n{done.stdout}"


def paste(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `script` in `folder` with this repository's `streamsyn`; servers that it starts end with it."""
    commands = folder.parent / f"{folder.name}-bin"
    commands.mkdir()
    for name, means in (("streamsyn", f'"{sys.executable}" -m streamsyn'), ("python", f'"{sys.executable}"')):
        (commands / name).write_text(f'#!/bin/sh\nexec {means} "$@"\n')
        (commands / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    output = (
        folder.parent / f"{folder.name}-output"
    )  # a file: a server in the background would keep a pipe open
    with output.open("w") as log:
        shell = subprocess.Popen(
            ["bash", "-eu", "-o", "pipefail", "-c", script],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = shell.wait(50)
        finally:
            try:
                os.killpg(shell.pid, signal.SIGKILL)
            except ProcessLookupError:
                shell.poll()  # the guide started no server
            shell.wait()
    return subprocess.CompletedProcess(script, code, output.read_text("utf-8", "replace"))


def free_port() -> int:
    """A port that nothing listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port
