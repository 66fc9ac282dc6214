"""Files as people have them go from file to sample, with nothing but their path."""

import bz2
import gzip
import lzma
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import fsspec
import orjson
import pytest

from streamsyn.config.loading import load
from streamsyn.errors import ConfigError
from streamsyn.pipeline.preview import preview
from streamsyn.pipeline.request import RunRequest
from streamsyn.pipeline.run import run
from streamsyn.pipeline.summary import RunSummary, closing_lines
from streamsyn.simulator.in_process import InProcessServers
from streamsyn.simulator.settings import SimulatorConfig
from streamsyn.simulator.simulation import Simulation
from tests.builders import rows

URL = "http://gpu-1:30000"
PAIRS = [(f"Who kept light {n} at Velmora?", f"Keeper {n} Tarn.") for n in range(4)]


def said(names: tuple[str, str], *turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [dict(zip(names, turn, strict=True)) for turn in turns]


def alpaca(path: Path) -> list[str]:
    found = [{"instruction": "Answer.", "input": q, "output": a} for q, a in PAIRS]
    (path / "alpaca_data.json").write_bytes(orjson.dumps(found, option=orjson.OPT_INDENT_2))
    return [f"Answer.\n\n{q}" for q, _ in PAIRS]


def sharegpt(path: Path) -> list[str]:
    names = ("from", "value")
    found = [
        {"id": f"c_{n}", "conversations": said(names, ("human", q), ("gpt", a))}
        for n, (q, a) in enumerate(PAIRS)
    ]
    (path / "sharegpt.json").write_bytes(orjson.dumps(found))
    return [q for q, _ in PAIRS]


def messages(path: Path) -> list[str]:
    names = ("role", "content")
    first = (("system", "Be brief."), ("user", "Hello."), ("assistant", "Hello!"))
    found = [{"messages": said(names, *first, ("user", q), ("assistant", a))} for q, a in PAIRS]
    (path / "train.JSONL.GZ").write_bytes(gzip.compress(b"\n".join(map(orjson.dumps, found))))
    return [f"Be brief.\n\nUser: Hello.\n\nAssistant: Hello!\n\nUser: {q}" for q, _ in PAIRS]


def parts(path: Path) -> list[str]:
    found = [
        {"messages": said(("role", "content"), ("user", [{"type": "text", "text": q}]), ("assistant", a))}
        for q, a in PAIRS
    ]
    (path / "openai.jsonl.xz").write_bytes(lzma.compress(b"\n".join(map(orjson.dumps, found))))
    return [q for q, _ in PAIRS]


def prompts(path: Path) -> list[str]:
    found = [{"prompt": q, "completion": a} for q, a in PAIRS]
    scores = [b"NaN", b"-Infinity", b"%d" % 2**70, b"1e999"]
    lines = [
        orjson.dumps(row)[:-1] + b', "score": %b}' % score for row, score in zip(found, scores, strict=True)
    ]
    (path / "prompts.jsonl.bz2").write_bytes(bz2.compress(b"\n".join(lines)))
    return [q for q, _ in PAIRS]


def squad(path: Path) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    found = [
        {
            "id": f"56be{n}",
            "title": "Velmora",
            "question": q,
            "answers": {"text": [a, "Tarn"], "answer_start": [3, 4]},
        }
        for n, (q, a) in enumerate(PAIRS)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(found), path / "squad.parquet")
    return [q for q, _ in PAIRS]


def table(path: Path) -> list[str]:
    lines = [f'"{q}","{a}",{n}' for n, (q, a) in enumerate(PAIRS)]
    (path / "Export.CSV").write_text("\ufeffquestion,answer,row\r\n" + "\r\n".join(lines))
    return [q for q, _ in PAIRS]


def longbench(path: Path) -> list[str]:
    found = [
        {"input": q, "answers": [a, 7], "context": "", "length": 3, "_id": f"{n:x}", "dataset": "qasper"}
        for n, (q, a) in enumerate(PAIRS)
    ]
    (path / "longbench.jsonl").write_bytes(gzip.compress(b"\n".join(map(orjson.dumps, found))))
    return [q for q, _ in PAIRS]


def union(path: Path) -> list[str]:
    import datasets

    datasets.disable_progress_bars()
    found: list[dict[str, Any]] = [{"instruction": q, "answer": a, "messages": None} for q, a in PAIRS[:2]]
    turns = [said(("role", "content"), ("user", q), ("assistant", a)) for q, a in PAIRS[2:]]
    found += [{"instruction": None, "answer": None, "messages": one} for one in turns]
    datasets.Dataset.from_list(found).save_to_disk(path / "union")
    return [q for q, _ in PAIRS]


def anew(path: Path) -> list[str]:
    for name, some in (("ash", PAIRS[:2]), ("birch", PAIRS[2:])):
        lines = [orjson.dumps({"id": n, "query": q, "response": a}) for n, (q, a) in enumerate(some)]
        (path / f"{name}.ndjson").write_bytes(b"\n".join(lines))
    (path / ".ipynb_checkpoints").mkdir()
    (path / ".ipynb_checkpoints" / "ash-checkpoint.ndjson").write_bytes(b"nix")
    (path / "notes.docx").write_bytes(b"PK")
    return [q for q, _ in PAIRS]


FILES = [alpaca, sharegpt, messages, parts, prompts, squad, table, longbench, union, anew]


def played(seeds: str, out: Path, **settings: Any) -> RunSummary:
    """A run on a simulated server."""
    servers = InProcessServers({URL: Simulation(SimulatorConfig(cost_model="h100"))}, {})
    base = [
        ("fleet.servers", [URL]),
        ("assembly.contexts_per_sample", 2),
        ("seeds.sources", [{"path": seeds}]),
    ]
    config = load(None, [*base, *settings.items()])
    rng = Random(0)
    return run(
        RunRequest(
            config=config, out=out, connect=servers.connect, runner=servers.run, rng=rng, show_progress=False
        )
    )


@pytest.mark.parametrize("write", FILES)
def test_a_file_goes_to_samples(write: Callable[[Path], list[str]], tmp_path: Path) -> None:
    """Every row becomes a sample with its question and its answer; none is a reject."""
    folder = tmp_path / "data"
    folder.mkdir()
    asked = write(folder)

    summary = played(str(folder), tmp_path / "out")

    samples = rows(tmp_path / "out", "samples")
    assert (4, 0) == (summary.contexts, summary.rejects)
    assert sorted(asked) == sorted(sample["instruction"] for sample in samples)
    assert {a for _, a in PAIRS} == {sample["messages"][-1]["content"] for sample in samples}
    assert all(sample["instruction"] in sample["messages"][0]["content"] for sample in samples)


def test_what_happened_to_a_folder_is_in_the_summary(tmp_path: Path) -> None:
    """The files that were left out, and the ids that began anew."""
    folder = tmp_path / "data"
    folder.mkdir()
    anew(folder)

    lines = [line for line in closing_lines(played(str(folder), tmp_path / "out")) if "  seeds " in line]

    assert f"  seeds      left out of {folder}: 1 hidden, 1 of no known format (notes.docx)" == lines[0]
    assert "  seeds      2 with the id of a different pair, kept as ID@FILE-HASH" == lines[1]
    assert 4 == played(str(folder), tmp_path / "out").contexts, "a resumed run does nothing again"


def test_seeds_behind_a_url_go_to_samples(tmp_path: Path) -> None:
    """And can be resumed from the saved configuration."""
    with fsspec.open("memory://own-data/pairs.csv", "wb") as file:
        file.write(b"question,answer\n" + b"\n".join(f"{q},{a}".encode() for q, a in PAIRS))

    first = played("memory://own-data", tmp_path / "out")

    assert (4, 0) == (first.contexts, first.rejects)
    saved = orjson.loads((tmp_path / "out" / "run.json").read_bytes())["config"]["seeds"]["sources"]
    assert ["memory://own-data"] == [source["path"] for source in saved]
    origins = [row["origin"] for row in rows(tmp_path / "out", "contexts")]
    assert all(re.fullmatch(r"memory:/+own-data/pairs\.csv:[2-5]", origin) for origin in origins)


def test_a_file_that_is_wrong_as_a_whole_is_one_error(tmp_path: Path) -> None:
    """Before anything is done, also where files before it are right."""
    prompts(tmp_path)
    (tmp_path / "z.jsonl").write_bytes('{"instruction": "caf\u00e9"}\n'.encode("utf-16"))

    with pytest.raises(ConfigError, match=r"z\.jsonl is UTF-16, not UTF-8; convert it: iconv"):
        played(str(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_preview_says_how_fields_were_used(tmp_path: Path) -> None:
    """The form, the mapping, and the text that no prompt uses."""
    path = tmp_path / "pairs.jsonl"
    page = "A page of text that no prompt uses."
    path.write_bytes(orjson.dumps({"question": PAIRS[0][0], "answer": [PAIRS[0][1], "Tarn"], "page": page}))

    form, seed = preview(load(None, [("seeds.sources", [{"path": str(path)}])]), 3)

    assert f"{path}: form question_answer (1): instruction = question; answer = answer\n" == form
    assert seed.endswith("--- not in the prompt: the text in page\n")
