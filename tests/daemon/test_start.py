"""How the daemon starts: what it refuses, and what thousands of finished runs cost."""

import asyncio
import sys
import time
import tracemalloc
from pathlib import Path

import orjson
import pytest

from streamsyn.cli.main import main
from tests.daemon.conftest import StartDaemon


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--listen", "0.0.0.0:0"], "serve.tokens_file must be set"),
        (["--listen", "nonsense"], "expected HOST:PORT"),
        (["--set", "serve.tokens_file=missing"], "cannot read missing"),
        (["--set", "serve.tls_certificate=missing"], "serve.tls_certificate: cannot use missing"),
        (["--server", "ftp://gpu"], "ftp://gpu"),
        (["--set", "serve.lisen=x"], "the nearest known one is serve.listen"),
    ],
)
def test_it_refuses_to_start(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    what: str,
) -> None:
    """Exit code 2 and one line that says what is wrong."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["streamsyn", "serve", "root", "--listen", "127.0.0.1:0", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    output, errors = capfd.readouterr()
    assert output == ""
    assert len(errors.splitlines()) == 1
    assert what in errors


def record(number: int) -> bytes:
    """The record of a run that has finished."""
    return orjson.dumps(
        {
            "format_version": 1,
            "id": f"run-{number:05}",
            "created_at": 1e9 + number,
            "labels": {"text": "x" * 1000},
            "given": {"config": {"recipe": {"target_words": number}}},
            "state": "finished",
            "is_closed": True,
            "accepted": number,
            "figures": {"contexts": number, "rows": {"contexts": number}},
        }
    )


async def test_thousands_of_finished_runs_cost_nothing(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """They are not opened: a start takes little time and memory, and pages are quick."""

    def write() -> None:
        (tmp_path / "root").mkdir()
        (tmp_path / "root" / "daemon.json").write_text('{"format_version": 1}')
        for number in range(2000):
            run = tmp_path / "root" / "runs" / f"run-{number:05}"
            run.mkdir(parents=True)
            (run / "service.json").write_bytes(record(number))

    await asyncio.to_thread(write)
    began = time.process_time()
    async with start_daemon() as served:
        assert time.process_time() - began < 5
        tracemalloc.start()
        try:
            await served.daemon.runs.open()
            kept, _ = tracemalloc.get_traced_memory()
            assert kept < 2000 * 1000
            page = await served.ask("GET", "/v1/runs?limit=5&state=finished")
            assert [run["counts"]["contexts"] for run in page["data"]] == [1999, 1998, 1997, 1996, 1995]
            assert page["data"][0]["last"]["contexts"] == 1998
        finally:
            tracemalloc.stop()
        assert len(served.daemon.runs) == 2000
        assert served.daemon.runs.active == []
