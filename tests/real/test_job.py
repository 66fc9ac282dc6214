"""The main job on the real SGLang that deploy/sglang-cpu installs."""

import json
import os
import re
from itertools import pairwise
from pathlib import Path

import aiohttp
import psutil
import pytest

from streamsyn.config.sections import FleetSection
from streamsyn.fleet.fleet import open_fleet
from streamsyn.scoring.measures import AnswerPrompt, Answers, Gain, Question, ScoringClient
from tests.real.conftest import RealServer
from tests.system.conftest import assert_clean, rows, streamsyn

pytestmark = [pytest.mark.real_sglang, pytest.mark.timeout(600)]

PROMPT = AnswerPrompt()
SEEDS = Path(__file__).parent / "seeds.jsonl"
OPTIONS = {
    "recipe.target_words": 60,
    "recipe.max_tokens": 32,
    "recipe.on_truncated": "continue",
    "recipe.max_continuations": 3,
    "recipe.tries": 1,
    "checks.min_words": 5,
    "fleet.max_in_flight": 16,
    "assembly.contexts_per_sample": 3,
    "seeds.limit": 10,
}


def test_main_job_on_a_launched_server(tmp_path: Path) -> None:
    """10 seeds end as contexts or rejects, prefixes are cached, `verify` is clean, and the server that
    was started for the run is gone after it."""
    from streamsyn.fleet.launch import find_packaged_model

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
    assert 10 == len(contexts) + len(rejects)
    assert len(contexts) >= 5, [reject["detail"] for reject in rejects]
    assert sum(row["cached_tokens"] for row in contexts) > 0
    assert {"stop", "length"} >= {row["finish_reason"] for row in contexts}
    assert any(len(row["steps"]) > 1 for row in contexts), "no answer was continued"
    assert len(contexts) == len(rows(out, "samples"))
    assert {"SmolLM2-135M-Instruct"} == {row["model"] for row in contexts}
    assert [] == session_of(done.stderr)
    tokens = json.loads((out / "manifest.jsonl").read_text().splitlines()[0])["tokens"]
    assert tokens["cached"] > 0


SECTIONS = {
    "recipe.use": "sections",
    "recipe.target_tokens": 120,
    "recipe.section_tokens": 30,
    "checks.min_words": 20,
    "checks.max_repetition": 1,
    "fleet.concurrency": 4,
    "assembly.write": "false",
    "run.max_reject_fraction": 1,
    "seeds.limit": 3,
}


def test_sections_on_a_real_server(real_server: RealServer, tmp_path: Path) -> None:
    """Each step finds its whole past in the server's cache, and the document grows to what was asked for."""
    out = tmp_path / "out"
    settings = [part for key, value in SECTIONS.items() for part in ("--set", f"{key}={value}")]
    command = ["run", "--seeds", SEEDS, "--server", real_server.url, "--out", out, "--no-progress"]

    done = streamsyn(*command, *settings, timeout_s=550)

    assert done.returncode == 0, done.stderr
    assert_clean(out)
    contexts, rejects = rows(out, "contexts"), rows(out, "rejects")
    assert 3 == len(contexts) + len(rejects)
    assert contexts, [reject["detail"] for reject in rejects]
    past = cached = 0
    for row in contexts:
        tokens = row["checks"]["tokens"]
        assert tokens <= 120
        assert tokens > 90 or "below_target" in row["checks"]["flags"]  # so small a model may stop early
        assert len(row["steps"]) > row["checks"]["sections"]
        for before, step in pairwise(row["steps"]):
            # Tokens that were sampled, but are not those of their own text, end the cached prefix there.
            assert step["cached_tokens"] >= before["prompt_tokens"] - 8, "the past was computed again"
            past += before["prompt_tokens"] + before["completion_tokens"]
            cached += step["cached_tokens"]
    assert cached >= 0.9 * past
    assert max(row["checks"]["sections"] for row in contexts) >= 4
    assert not (out / "journal.sqlite").exists()


HELPS = (
    "Nina Sayers grew up in New York. She is a professional ballet dancer, and has danced with a company at "
    "Lincoln Center since she was twenty. Her mother was a dancer too, and gave it up when Nina was born."
)
UNRELATED = (
    "Sourdough rises slowly. Bakers in the valley add salt on the second day, and bake before dawn, when the "
    "ovens are hottest. Rye flour takes up more water than wheat, so the dough is left to rest for longer."
)
QUESTION = Question(
    "What does Nina Sayers do for a living?", "She is a professional ballet dancer.", "narrativeqa"
)


async def test_scoring_on_a_real_server(real_server: RealServer) -> None:
    """One logprob a token of the answer, the context's prefix from the cache at the second look, and more
    gain from a context that holds the answer than from another.
    """
    section = FleetSection(servers=(real_server.url,), concurrency=4)
    async with open_fleet(section, lambda _: None) as fleet:
        await fleet.ask_models()
        await fleet.check_scores(real_server.model)
        gain, client = Gain(PROMPT, 256), ScoringClient(fleet, real_server.model)
        helps = await gain.measure(client, QUESTION, HELPS)
        first_cached, first_tokens = client.cached_tokens, client.prompt_tokens
        again = await Gain(PROMPT, 256).measure(client, QUESTION, HELPS)
        unrelated = await gain.measure(client, QUESTION, UNRELATED)
        few = await Gain(PROMPT, 3).measure(client, QUESTION, HELPS)
        answer = await Answers(PROMPT, 32).answer(client, QUESTION, HELPS)
        tokens = await server_tokens(real_server.url, QUESTION.answer)

    assert tokens == helps["scored_tokens"]
    assert 3 == few["scored_tokens"]
    assert helps["context_gain"] == pytest.approx(again["context_gain"], abs=0.02)
    assert client.cached_tokens - first_cached > 0.5 * first_tokens
    assert helps["context_gain"] > 0.3
    assert helps["context_gain"] > unrelated["context_gain"] + 0.3
    assert answer


async def server_tokens(url: str, text: str) -> int:
    """How many tokens the server makes of a text."""
    async with aiohttp.ClientSession() as session:
        body = {"prompt": text, "add_special_tokens": False}
        async with session.post(f"{url}/tokenize", json=body) as reply:
            count: int = (await reply.json())["count"]
    return count


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
