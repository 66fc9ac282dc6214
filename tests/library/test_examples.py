"""The examples work when pasted, against a simulated server at the port that they name."""

import re
from pathlib import Path

import nbclient
import nbformat
import orjson
import pytest

import streamsyn
from streamsyn.sink.shards import KINDS
from tests.builders import rows
from tests.library.conftest import Server, pairs

EXAMPLES = Path(__file__).parent / "examples"
SCRIPTS = {"script": 3, "stream": 12, "async_seeds": 20, "submit": 30}
"""Each script, and the number of its seeds."""
URL = "http://127.0.0.1:30000"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of an example; processes find this repository's streamsyn."""
    (tmp_path / "pairs.jsonl").write_bytes(b"\n".join(map(orjson.dumps, pairs(12))))
    monkeypatch.setenv("PYTHONPATH", str(Path(streamsyn.__file__).parents[1]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_example_is_run() -> None:
    assert sorted(EXAMPLES.iterdir()) == sorted(
        [*(EXAMPLES / f"{name}.py" for name in SCRIPTS), EXAMPLES / "notebook.ipynb"]
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script(name: str, folder: Path, server: Server) -> None:
    """Run again it has nothing left to do."""
    script = (EXAMPLES / f"{name}.py").read_text("utf-8")
    assert URL in script
    for _ in range(2):
        exec(compile(script.replace(URL, server.url), name, "exec"), {"__name__": "__main__"})
        (out,) = (folder / "runs").iterdir()
        assert [len(rows(out, kind)) for kind in KINDS] == [SCRIPTS[name], 0, SCRIPTS[name]]
    assert len(server.asked) == SCRIPTS[name] + 1  # and one before the run


def test_the_example_of_the_readme(folder: Path, server: Server) -> None:
    """Which is the first that a new user pastes."""
    readme = (Path(streamsyn.__file__).parents[1] / "README.md").read_text("utf-8")
    (script,) = re.findall(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    exec(compile(script.replace("http://gpu-1:30000", server.url), "README.md", "exec"), {})
    assert len(rows(folder / "runs" / "first", "samples")) == 12


def test_a_notebook(folder: Path, server: Server) -> None:
    """In a Jupyter kernel, whose event loop is running."""
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)  # type: ignore[no-untyped-call]
    for cell in notebook.cells:
        cell.source = cell.source.replace(URL, server.url)
    nbclient.execute(notebook, cwd=str(folder), timeout=50)
    printed = [
        "".join(output.text for output in cell.outputs) for cell in notebook.cells if cell.cell_type == "code"
    ]
    assert printed[1].startswith("0 ")
    assert printed[2] == "12 samples\n"
    assert printed[3].startswith("Keeper number ")
    assert len(server.asked) == 12 + 1
