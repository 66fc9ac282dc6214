"""Where the CPU time goes, as a picture: until the first request of a run, and in each request after it.

    python -m benchmarks.cpu_profile OUT.svg NAME=CHECKOUT [NAME=CHECKOUT ...] [--requests 2000]

Each NAME is a checkout of this repository, such as `before=../streamsyn-before after=.`. A run of each is
profiled (cProfile, CPU time of the main thread) on a simulated server: to the first request, and, with
`--requests`, over that many. Functions are added up by package; built-in functions count for their callers.
The profiler makes small functions look expensive: compare the parts, not the sums.
"""

import argparse
import os
import pstats
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any, Final

from benchmarks.common import Simulator, seeds_file

_PROFILED: Final = """
import cProfile, os, socket, sys, time
profile, path, to_first = cProfile.Profile(time.thread_time), sys.argv[1], sys.argv[2] == "first"
send = socket.socket.send
def noted(self, data, *flags):
    if to_first and bytes(data[:13]) == b"POST /v1/chat":
        profile.disable()
        profile.dump_stats(path)
        os._exit(0)
    return send(self, data, *flags)
socket.socket.send = noted
sys.argv[:] = ["streamsyn", *sys.argv[3:]]
profile.enable()
from streamsyn.cli.main import main
try:
    main()
finally:
    profile.disable()
    profile.dump_stats(path)
"""
_WIDTH, _BAR, _LEFT, _LEGEND = 900, 34, 120, 190
_COLOURS: Final = (
    *("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#edc948", "#b07aa1", "#9c755f", "#ff9da7"),
    *("#1f77b4", "#8cd17d", "#b6992d", "#499894", "#d37295"),
)
_OTHER: Final = "other"


def profiled(checkout: str, url: str, folder: Path, requests: int) -> Path:
    """Profile a run of `requests` requests, or one up to its first request if that is 0."""
    out = Path(tempfile.mkdtemp(dir=folder))
    options = ["--seeds", str(seeds_file(folder, requests or 20)), "--out", str(out / "run"), "--server", url]
    kind = "all" if requests else "first"
    command = [sys.executable, "-c", _PROFILED, str(out / "stats"), kind, "run", *options, "--no-progress"]
    environment = os.environ | {"PYTHONPATH": str(Path(checkout).absolute())}
    subprocess.run(command, check=True, env=environment, cwd=folder, capture_output=True)
    return out / "stats"


def by_package(path: Path) -> Counter[str]:
    """Return the CPU seconds of each package in a profile."""
    stats: dict[Any, Any] = pstats.Stats(str(path)).stats  # type: ignore[attr-defined]
    found: Counter[str] = Counter()
    for (file, _, _), (_, _, seconds, _, callers) in stats.items():
        if file != "~":
            found[package_of(file)] += seconds
        for (caller, _, _), figures in callers.items() if file == "~" else ():
            found[package_of(caller)] += figures[2]
    return found


def package_of(file: str) -> str:
    """Return the package of a file, for a reader: of streamsyn one level more."""
    parts = Path(file).parts
    if "site-packages" in parts:
        return parts[parts.index("site-packages") + 1].removesuffix(".py")
    if "streamsyn" in parts:
        below = parts[len(parts) - parts[::-1].index("streamsyn") :]
        return f"streamsyn.{below[0].removesuffix('.py')}"
    if "importlib" in file:
        return "loading of modules"
    return "asyncio" if "asyncio" in parts else "standard library"


def picture(bars: Mapping[str, Counter[str]]) -> Iterator[str]:
    """Yield the lines of an SVG with one bar a profile, divided by package, all to one scale."""
    total: Counter[str] = sum(bars.values(), Counter())
    names = [name for name, _ in total.most_common(len(_COLOURS))]
    colours = dict(zip(names, _COLOURS, strict=False))
    longest = max(bar.total() for bar in bars.values())
    rows = (len(names) + 4) // 4
    height = len(bars) * (_BAR + 12) + rows * 20 + 16
    yield f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif">'
    yield f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>'
    scale = (_WIDTH - _LEFT - 70) / longest
    for row, (label, bar) in enumerate(bars.items()):
        top, left = 8 + row * (_BAR + 12), float(_LEFT)
        yield f'<text x="4" y="{top + 22}" font-size="13">{escape(label)}</text>'
        parts = [(name, bar[name]) for name in names if bar[name] > 0]
        for name, seconds in [*parts, (_OTHER, bar.total() - sum(part for _, part in parts))]:
            width, colour = max(0.0, seconds * scale), colours.get(name, "#bbb")
            yield (
                f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{_BAR}" fill="{colour}">'
                f"<title>{escape(name)}: {seconds * 1000:.1f} ms</title></rect>"
            )
            left += width
        yield f'<text x="{left + 4:.1f}" y="{top + 22}" font-size="12">{bar.total() * 1000:,.0f} ms</text>'
    top = 14 + len(bars) * (_BAR + 12)
    for number, name in enumerate([*names, _OTHER]):
        x, y = 8 + number % 4 * (_LEGEND + 32), top + number // 4 * 20
        yield f'<rect x="{x}" y="{y}" width="12" height="12" fill="{colours.get(name, "#bbb")}"/>'
        yield f'<text x="{x + 17}" y="{y + 11}" font-size="12">{escape(name)}</text>'
    yield "</svg>"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT.svg")
    parser.add_argument("checkouts", nargs="+", metavar="NAME=CHECKOUT")
    parser.add_argument("--requests", type=int, default=0, help="0 stops at the first request")
    parser.add_argument("--rounds", type=int, default=3, help="of each the cheapest counts")
    args = parser.parse_args()
    bars: dict[str, Counter[str]] = {}
    simulator = Simulator("--latency-ms", "20", "--words", "150", "--slots", "4096")
    with tempfile.TemporaryDirectory() as folder, simulator as url:
        for _ in range(args.rounds):
            for name, _, checkout in (one.partition("=") for one in args.checkouts):
                found = by_package(profiled(checkout, url, Path(folder), args.requests))
                if name not in bars or found.total() < bars[name].total():
                    bars[name] = found
    args.out.write_text("\n".join(picture(bars)) + "\n", "utf-8")
    for name, bar in bars.items():
        parts = ", ".join(f"{part} {seconds * 1000:.0f}" for part, seconds in bar.most_common(12))
        print(f"{name}: {bar.total() * 1000:.0f} ms: {parts}")


if __name__ == "__main__":
    main()
