"""`streamsyn status URL`: what a daemon, or one of its runs, is doing."""

from collections.abc import Iterator
from typing import Any, Final

from streamsyn.errors import ConfigError
from streamsyn.following.daemon_client import answers, is_run_url, run_url

_MAX_RUNS: Final = 100
"""Runs that are shown: those that have not ended come first."""


async def daemon_status(url: str) -> dict[str, Any]:
    """Ask a daemon for its state: of one run if the URL names one, else `runs` and `servers`.

    Raises:
        ConfigError: The URL is invalid, or the daemon has no such run, or it refuses access.
        ServerUnavailable: The daemon cannot be reached.
    """
    if is_run_url(url):
        return (await answers([run_url(url).url]))[0]
    if "?" in url or "#" in url:
        raise ConfigError(f"{url}: expected http://HOST:PORT, or http://HOST:PORT/v1/runs/ID")
    base = url.rstrip("/").removesuffix("/v1")
    runs, servers = await answers([f"{base}/v1/runs?limit={_MAX_RUNS}", f"{base}/v1/servers"])
    return {"runs": runs["data"], "has_more_runs": runs["has_more"], "servers": servers["data"]}


def daemon_status_lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield the answer of `daemon_status` as text."""
    if "runs" not in found:
        yield from _run_lines(found)
        return
    for run in found["runs"]:
        yield from _run_lines(run)
    if not found["runs"]:
        yield "no runs yet: POST /v1/runs creates one"
    if found["has_more_runs"]:
        yield f"  and more than these {len(found['runs'])} runs"
    for server in found["servers"]:
        load = f"{server['in_flight']} of {server['cap']} in flight, {server['queue']} waiting"
        why = f": {server['error']}" if server["error"] else ""
        yield f"server {server['name']}: {server['state']}{why}; {load}; {server['completions']:,} answers"
    if not found["servers"]:
        yield "no servers: POST /v1/servers adds one"


def _run_lines(run: dict[str, Any]) -> Iterator[str]:
    counts, why = run["counts"], f": {run['error']}" if run["error"] else ""
    yield f"run {run['id']}: {run['state']}{why}"
    yield (
        f"  outcomes   {counts['contexts']:,} contexts, {counts['rejects']:,} rejects of "
        f"{counts['accepted']:,} seeds; {counts['in_flight']:,} in flight, {counts['waiting']:,} waiting"
    )
    if run["rejects"]:
        yield "  rejects    " + ", ".join(f"{reason} {number:,}" for reason, number in run["rejects"].items())
    rates = run["rates"]
    yield (
        f"  samples    {counts['samples']:,}; {rates['outcomes_per_s']:,.1f} outcomes/s, "
        f"{rates['output_tokens_per_s']:,.0f} output tokens/s"
    )
