"""`GET /v1/diagnostics`: what to look at when the daemon behaves strangely, without secrets or seeds."""

import asyncio
import gc
import os
import platform
import sys
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from aiohttp import web

import streamsyn
from streamsyn.daemon.bodies import JsonBody
from streamsyn.daemon.daemon import DAEMON, Daemon
from streamsyn.daemon.low_disk import free_on_disk
from streamsyn.daemon.route import Route, json_response
from streamsyn.plain_text import without_userinfo_within

_PACKAGES: Final = ("aiohttp", "orjson", "pydantic", "jinja2", "structlog", "zstandard", "prometheus-client")
_MAX_TASKS: Final = 1000
_MAX_FRAMES: Final = 8
_MAX_RUNS: Final = 1000


class Diagnostics(JsonBody):
    """The state of the process.

    `versions` of Python and packages; `process`: memory, threads, open files; `config` without passwords;
    `tasks`: asyncio tasks with their stacks, innermost last; `runs`: those that have not ended.
    """

    versions: dict[str, str]
    process: dict[str, Any]
    config: dict[str, Any]
    tasks: list[dict[str, Any]]
    runs: list[dict[str, Any]]


async def diagnostics(request: web.Request) -> web.Response:
    """Describe the process."""
    daemon = request.app[DAEMON]
    return json_response(
        {
            "versions": await asyncio.to_thread(_versions),
            "process": await asyncio.to_thread(_process, daemon),
            "config": without_userinfo_within(daemon.config.model_dump(mode="json")),
            "tasks": _tasks(),
            "runs": [_run(run) for run in daemon.hosted()[:_MAX_RUNS]],
        }
    )


def _versions() -> dict[str, str]:
    found = {"streamsyn": streamsyn.__version__, "python": sys.version, "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _process(daemon: Daemon) -> dict[str, Any]:
    memory = dict(
        line.split(":", 1)
        for line in Path("/proc/self/status").read_text("utf-8").splitlines()
        if ":" in line
    )
    return {
        "pid": os.getpid(),
        "uptime_s": round(time.time() - daemon.started_at, 1),
        "held": daemon.hosting.held,
        "rss_bytes": _kib(memory, "VmRSS"),
        "max_rss_bytes": _kib(memory, "VmHWM"),
        "free_disk_bytes": free_on_disk(daemon.root),
        "open_files": _open_files(),
        "threads": [thread.name for thread in threading.enumerate()],
        "gc_objects": gc.get_count(),
    }


def _kib(memory: dict[str, str], name: str) -> int:
    return int(memory[name].split()[0]) * 1024


def _open_files() -> dict[str, int]:
    """Number of open files, by kind; their names are not shown."""
    kinds: dict[str, int] = {}
    for entry in os.scandir("/proc/self/fd"):
        try:
            target = os.readlink(entry.path)  # noqa: PTH115 - most targets are not paths
        except FileNotFoundError:
            continue  # closed meanwhile: the folder itself, for example
        kind = "file" if target.startswith("/") else target.split(":")[0]
        kinds[kind] = kinds.get(kind, 0) + 1
    return kinds


def _tasks() -> list[dict[str, Any]]:
    tasks = sorted(asyncio.all_tasks(), key=lambda task: task.get_name())
    return [
        {
            "name": task.get_name(),
            "stack": [
                f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_qualname}"
                for frame in task.get_stack(limit=_MAX_FRAMES)
            ],
        }
        for task in tasks[:_MAX_TASKS]
    ]


def _run(run: Any) -> dict[str, Any]:
    return {
        "id": run.id,
        "state": run.state,
        "is_executed": run.is_executed,
        "unread_seeds": run.unread_seeds,
        "progress": run.summary.progress() if run.summary is not None else {},
    }


ROUTES: Final = (
    Route(
        method="GET",
        path="/v1/diagnostics",
        handler=diagnostics,
        scope="admin",
        summary="The state of the process, for a report of a problem: without secrets and without seeds.",
        answers={200: Diagnostics},
    ),
)
