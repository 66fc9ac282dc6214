"""The main job on the real SGLang that deploy/sglang-cpu installs."""

import json
import os
import re
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from tests.system.conftest import assert_clean, rows, streamsyn

pytestmark = [pytest.mark.real_sglang, pytest.mark.timeout(600)]

SEEDS = Path(__file__).parent / "seeds.jsonl"
OPTIONS = {
    "recipe.target_words": 60,
    "recipe.max_tokens": 160,
    "recipe.on_truncated": "continue",
    "recipe.max_continuations": 1,
    "recipe.tries": 1,
    "checks.min_words": 20,
    "fleet.max_in_flight": 16,
    "assembly.contexts_per_sample": 3,
}


def test_main_job_on_a_launched_server(tmp_path: Path) -> None:
    """24 seeds end as contexts or rejects, prefixes are cached, `verify` is clean, and the server that
    was started for the run is gone after it."""
    from streamsyn.sglang.launch_command import find_packaged_model

    out = tmp_path / "out"
    settings = [part for key, value in OPTIONS.items() for part in ("--set", f"{key}={value}")]
    command = [
        "run",
        "--seeds",
        SEEDS,
        "--launch",
        find_packaged_model(),
        "--out",
        out,
        "--no-progress",
        *settings,
    ]

    done = streamsyn(*command, timeout_s=550)

    assert done.returncode == 0, done.stderr
    assert_clean(out)
    contexts, rejects = rows(out, "contexts"), rows(out, "rejects")
    assert 24 == len(contexts) + len(rejects)
    assert len(contexts) >= 12, [reject["detail"] for reject in rejects]
    assert sum(row["cached_tokens"] for row in contexts) > 0
    assert {"stop", "length"} >= {row["finish_reason"] for row in contexts}
    assert any(len(row["steps"]) == 2 for row in contexts), "no answer was continued"
    assert len(contexts) == len(rows(out, "samples"))
    assert {"SmolLM2-135M-Instruct"} == {row["model"] for row in contexts}
    assert [] == session_of(done.stderr)
    tokens = json.loads((out / "manifest.jsonl").read_text().splitlines()[0])["tokens"]
    assert tokens["cached"] > 0


SECTIONS = {
    "recipe.use": "sections",
    "recipe.target_tokens": 240,
    "recipe.section_tokens": 60,
    "checks.min_words": 20,
    "checks.max_repetition": 1,
    "fleet.concurrency": 4,
    "assembly.write": "false",
    "seeds.limit": 3,
}


def test_sections_on_a_launched_server(tmp_path: Path) -> None:
    """Each step finds its whole past in the server's cache, and the document grows to what was asked for."""
    from streamsyn.sglang.launch_command import find_packaged_model

    out = tmp_path / "out"
    settings = [part for key, value in SECTIONS.items() for part in ("--set", f"{key}={value}")]
    model = find_packaged_model()

    done = streamsyn(
        "run", "--seeds", SEEDS, "--launch", model, "--out", out, "--no-progress", *settings, timeout_s=550
    )

    assert done.returncode == 0, done.stderr
    assert_clean(out)
    contexts, rejects = rows(out, "contexts"), rows(out, "rejects")
    assert 3 == len(contexts) + len(rejects)
    assert contexts, [reject["detail"] for reject in rejects]
    for row in contexts:
        assert 180 < row["checks"]["tokens"] <= 240
        assert len(row["steps"]) >= 1 + row["checks"]["sections"] >= 5
        for before, step in pairwise(row["steps"]):
            past = before["prompt_tokens"] + before["completion_tokens"]
            assert step["cached_tokens"] >= 0.9 * past - 8, "the past was computed again"
    assert not (out / "journal.sqlite").exists()


def session_of(stderr: str) -> list[psutil.Process]:
    """Processes that live on in the session that the server was started in; the dead need a moment to go."""
    found = re.search(r"sglang.starting.* pid=(\d+)", stderr)
    assert found is not None
    session = [process for process in psutil.process_iter() if _session(process.pid) == int(found[1])]
    _, alive = psutil.wait_procs(session, timeout=5)
    return [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None
