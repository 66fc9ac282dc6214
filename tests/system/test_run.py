"""`streamsyn run` from end to end on simulated servers."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from streamsyn.simulator.settings import Fault
from tests.system.conftest import Server, assert_clean, environment, rows, start, streamsyn, wait_for_line

Serve = Callable[..., Server]
Seeds = Callable[..., Path]

QUICK = ("--set", "fleet.backoff_base_s=0.02", "--set", "fleet.probe_interval_s=0.1", "--no-progress")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("compression", [pytest.param("none", marks=pytest.mark.torture), "zstd"])
def test_every_seed_has_one_outcome_whatever_the_servers_do(
    serve: Serve, seeds: Seeds, tmp_path: Path, compression: str
) -> None:
    """With all faults on at two servers, each seed ends once, `verify` is clean, samples load."""
    rates = dict.fromkeys(Fault, "0.03") | {Fault.STALL: "0.004", Fault.PAUSE: "0"}
    faults = [part for fault, rate in rates.items() for part in ("--fault", f"{fault}={rate}")]
    servers = [
        serve("--latency-ms", "10", "--seed", str(n), "--queue-limit", "20", "--slots", "24", *faults)
        for n in (1, 2)
    ]
    urls = [part for server in servers for part in ("--server", server.url)]
    out = tmp_path / "out"
    options = [*QUICK, "--set", "fleet.request_timeout_s=2", "--set", f"sink.compression={compression}"]
    options += ["--set", "sink.shard_bytes=200000", "--set", "fleet.max_in_flight=48"]

    done = streamsyn("run", "--seeds", seeds(300), *urls, "--out", out, *options, timeout_s=110)

    assert done.returncode == 0, done.stderr
    assert_clean(out)
    loaded = loaded_samples(out)
    final = json.loads((out / "manifest.jsonl").read_text().splitlines()[-1])
    assert final["final"] is True
    assert 300 == final["contexts"] + final["rejects"]
    assert final["samples"] == final["contexts"] == len(loaded)
    assert ["user", "assistant"] == [message["role"] for message in loaded[0]["messages"]]


def loaded_samples(out: Path) -> list[dict[str, list[dict[str, str]]]]:
    """Samples as the closing summary says to load them."""
    import datasets

    datasets.disable_progress_bars()
    samples = datasets.load_dataset(
        "json", data_files=f"{out}/samples/*.jsonl*", split="train", cache_dir=str(out.parent / "cache")
    )
    return list(samples)


def test_passwords_of_urls_are_not_written(serve: Serve, seeds: Seeds, tmp_path: Path) -> None:
    """Neither the log, nor any file of the run, nor the report, nor the configuration as shown has them."""
    server, out = serve("--fault", "http_500=0.3", "--fault", "refuse=0.1"), tmp_path / "out"
    url = server.url.replace("://", "://ada:hunter2@")
    mirror = ("--set", "sink.mirror=memory://ada:hunter2@store/run", "--set", "sink.mirror_timeout_s=1")
    options = ("--server", url, "--set", "run.max_reject_fraction=1.0", *mirror, *QUICK)

    done = streamsyn("run", "--seeds", seeds(30), "--out", out, *options)
    report = streamsyn("report", out, "--to", tmp_path / "report.html")
    shown = streamsyn("config", "--set", f'fleet.servers=["{url}"]')
    mistake = streamsyn("run", "--server", "http://ada:hunter 2@host", "--seeds", seeds(1), "--out", out)

    usage = streamsyn("run", f"--limit={url}")

    ended = (done, report, shown, mistake, usage)
    assert [0, 0, 0, 2, 2] == [one.returncode for one in ended], done.stderr
    contexts, rejects = rows(out, "contexts"), rows(out, "rejects")
    assert {server.url} == {row["server"] for row in contexts}
    assert any(attempt["error"] for row in contexts for attempt in row["attempts"])
    assert rejects
    written = [path.read_bytes() for path in [*out.rglob("*"), tmp_path / "report.html"] if path.is_file()]
    texts = [text.encode() for one in ended for text in (one.stdout, one.stderr)]
    assert not [text for text in written + texts if b"hunter" in text]
    again = streamsyn("run", "--out", out, "--server", url, *QUICK)
    assert 0 == again.returncode, again.stderr


def test_nothing_is_asked_again_when_a_finished_run_is_run_again(
    serve: Serve, seeds: Seeds, tmp_path: Path
) -> None:
    """A second run with the same directory sends no request and changes no sealed file."""
    server, out = serve(), tmp_path / "out"
    arguments = ["run", "--seeds", seeds(60), "--server", server.url, "--out", out, *QUICK]
    streamsyn(*arguments)
    before = {path: path.read_bytes() for path in out.rglob("*.jsonl")}

    again = streamsyn(*arguments)

    assert again.returncode == 0, again.stderr
    assert 60 == server.stats()["requests"]
    assert before == {path: path.read_bytes() for path in out.rglob("*.jsonl")}
    assert "60 finished before" in again.stderr


@pytest.mark.crash
def test_more_seeds_go_on_where_the_run_ended(serve: Serve, seeds: Seeds, tmp_path: Path) -> None:
    """`--limit` ends a run early and properly; without it, or with other seeds, the run grows."""
    server, out = serve(), tmp_path / "out"
    first = ["run", "--seeds", seeds(50), "--server", server.url, "--out", out, *QUICK]

    assert 0 == streamsyn(*first, "--limit", "20").returncode
    assert 20 == len(rows(out, "contexts"))
    assert 0 == streamsyn(*first).returncode
    assert 0 == streamsyn(*first, "--seeds", seeds(10, "others.jsonl")).returncode

    assert 60 == len(rows(out, "contexts")) == len(rows(out, "samples"))
    assert list(range(60)) == [row["seq"] for row in rows(out, "contexts")]
    assert_clean(out)


def test_several_contexts_a_seed(serve: Serve, seeds: Seeds, tmp_path: Path) -> None:
    """Each draft is a unit with an id of its own; a sample never has two contexts of one seed."""
    server, out = serve(), tmp_path / "out"
    options = ["--set", "recipe.contexts_per_seed=3", "--set", "assembly.contexts_per_sample=4"]

    done = streamsyn("run", "--seeds", seeds(30), "--server", server.url, "--out", out, *QUICK, *options)

    contexts = rows(out, "contexts")
    assert done.returncode == 0, done.stderr
    assert 90 == len({row["id"] for row in contexts})
    assert 30 == len({row["seed_id"] for row in contexts})
    of_seed = {row["seq"]: row["seed_id"] for row in contexts}
    for sample in rows(out, "samples"):
        assert len(sample["context_seqs"]) == len({of_seed[seq] for seq in sample["context_seqs"]})
    assert_clean(out)


def test_bad_lines_are_rejects_that_say_where(serve: Serve, tmp_path: Path) -> None:
    """A line that is no seed is a Reject with file and line; the others are done; resuming adds none."""
    path, out = tmp_path / "seeds.jsonl", tmp_path / "out"
    good = '{"instruction": "Who rang bell %d?", "answer": "The sexton, number %d."}'
    lines = [
        b"\xef\xbb\xbf" + (good % (1, 1)).encode() + b"\r",
        b"",
        b"{broken",
        b'{"instruction": "only"}',
        b"[1]",
    ]
    lines += [
        b'{"instruction": "caf\xe9", "answer": "x"}',
        b'{"instruction": "a", "answer": "' + b"y" * 50_000_000 + b'"}',
    ]
    lines += [(good % (2, 2)).encode(), (good % (2, 2)).encode(), b"{broken", (good % (3, 3)).encode()]
    path.write_bytes(b"\n".join(lines))
    accepted = ["--set", "run.max_reject_fraction=1"]
    arguments = ["run", "--seeds", path, "--server", serve().url, "--out", out, *QUICK, *accepted]

    done = streamsyn(*arguments)
    streamsyn(*arguments)

    assert done.returncode == 0, done.stderr
    wanted = {
        3: "invalid_json",
        4: "not_a_seed",
        5: "not_a_seed",
        6: "invalid_utf8",
        7: "line_too_long",
        10: "invalid_json",
    }
    assert {f"{path}:{line}": reason for line, reason in wanted.items()} == {
        row["origin"]: row["reason"] for row in rows(out, "rejects")
    }
    assert 6 == len(rows(out, "rejects"))
    assert 3 == len(rows(out, "contexts"))
    assert "1 repeated" in done.stderr
    assert_clean(out)


def test_too_many_rejects_exit_with_3(serve: Serve, seeds: Seeds, tmp_path: Path) -> None:
    """Above `run.max_reject_fraction` the exit code is 3, and all outcomes are there."""
    options = [
        "--set",
        "checks.min_words=100000",
        "--set",
        "run.max_reject_fraction=0.5",
        "--set",
        "recipe.tries=1",
    ]

    done = streamsyn(
        "run", "--seeds", seeds(5), "--server", serve().url, "--out", tmp_path / "out", *QUICK, *options
    )

    assert 3 == done.returncode
    assert "run.max_reject_fraction" in done.stderr
    assert ["too_short"] * 5 == [row["reason"] for row in rows(tmp_path / "out", "rejects")]


@pytest.mark.crash
def test_servers_gone_exits_with_75_and_resumes(serve: Serve, seeds: Seeds, tmp_path: Path) -> None:
    """When no server is left for `fleet.give_up_s` the run stops; with a server it goes on."""
    out, path = tmp_path / "out", seeds(400)
    first = serve("--latency-ms", "30")
    options = [*QUICK, "--set", "fleet.give_up_s=1", "--set", "fleet.max_in_flight=8"]
    process = start("run", "--seeds", path, "--server", first.url, "--out", out, *options)
    wait_for_line(process, "run.started")
    first.stop(signal.SIGKILL)

    _, stderr = process.communicate(timeout=30)
    assert 75 == process.returncode
    assert b"give_up_s" in stderr
    assert_clean(out)

    resumed = streamsyn("run", "--seeds", path, "--server", serve().url, "--out", out, *QUICK)
    assert resumed.returncode == 0, resumed.stderr
    assert 400 == len(rows(out, "contexts"))
    assert [] == rows(out, "rejects")
    assert_clean(out)


def test_log_lines_can_be_json(serve: Serve, seeds: Seeds, tmp_path: Path) -> None:
    """With --log-json each event on stderr is one JSON object."""
    done = streamsyn(
        "run", "--seeds", seeds(3), "--server", serve().url, "--out", tmp_path / "o", "--log-json"
    )

    events = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert "run.started" in [event["event"] for event in events]
    assert "" == done.stdout


def test_the_key_comes_from_the_environment(serve: Serve, seeds: Seeds, tmp_path: Path) -> None:
    """STREAMSYN_API_KEY is sent as a bearer token; without it the refusal says so, exit 2."""
    server = serve("--api-key", "open-sesame")
    arguments = ["run", "--seeds", seeds(3), "--server", server.url, "--out", tmp_path / "out", *QUICK]

    refused = streamsyn(*arguments)
    allowed = streamsyn(*arguments, env=environment(STREAMSYN_API_KEY="open-sesame"))

    assert 2 == refused.returncode
    assert "STREAMSYN_API_KEY" in refused.stderr
    assert 0 == allowed.returncode
    assert "open-sesame" not in (tmp_path / "out" / "run.json").read_text()


def test_preview_prints_what_would_be_sent(seeds: Seeds) -> None:
    """`preview` shows the prompts of the first seeds and needs no server and no directory."""
    shown = streamsyn("preview", "--seeds", seeds(9), "--limit", "2", "--set", "recipe.target_words=321")

    assert 0 == shown.returncode
    assert 2 == shown.stdout.count("--- system\n")
    assert "Who kept lighthouse 1 of riddles.jsonl?" in shown.stdout
    assert "lighthouse 2 of" not in shown.stdout
    assert "about 321 words" in shown.stdout


def test_help_is_quick_and_complete() -> None:
    """Every command has help; the packages that a run needs are not loaded for it."""
    for command in ("run", "preview", "verify", "config", "demo", "simulate"):
        assert 0 == streamsyn(command, "--help").returncode
    loaded = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "streamsyn", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    assert [] == [name for name in ("aiohttp", "pydantic", "jinja2", "rich") if f" {name}\n" in loaded]


def test_a_directory_remembers_its_configuration(serve: Serve, seeds: Seeds, tmp_path: Path) -> None:
    """Without CONFIG, seeds or servers a run goes on with what the directory was made with, from anywhere."""
    server, path = serve(), seeds(30)
    settings = ["--set", "recipe.target_words=123", "--set", "assembly.contexts_per_sample=2"]
    first = [
        "run",
        "--seeds",
        path.name,
        "--server",
        server.url,
        "--out",
        "out",
        "--limit",
        "10",
        *QUICK,
        *settings,
    ]
    assert 0 == streamsyn(*first, cwd=tmp_path).returncode

    resumed = streamsyn("run", "--out", tmp_path / "out", *QUICK)

    assert resumed.returncode == 0, resumed.stderr
    assert 30 == len(rows(tmp_path / "out", "contexts")) == server.stats()["requests"]
    assert {2} == {len(sample["context_seqs"]) for sample in rows(tmp_path / "out", "samples")[1:]}
