"""The log of a launched server: written by the server itself, read here to say how its start goes."""

import re
import time
from pathlib import Path
from typing import IO

TAIL_BYTES = 64 * 1024
LINE_CHARS = 300
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
AN_ERROR = re.compile(r"(Error|Exception)\b|\b(error|FATAL|No module named)\b")


def begin(path: Path, title: str) -> tuple[IO[bytes], int]:
    """The log, open for a server to append to, and the offset at which its own output begins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = path.open("ab")
    log.write(f"=== {time.strftime('%Y-%m-%d %H:%M:%S')} {title}\n".encode())
    log.flush()
    return log, log.tell()


def last_line(path: Path, start: int) -> str:
    """The last line that is not blank, of those written since `start`; empty when there is none."""
    return next(reversed(_lines(path, start)), "")


def telling_line(path: Path, start: int) -> str:
    """The last line that speaks of an error, which shutting down may have buried; else simply the last."""
    errors = [line for line in _lines(path, start) if AN_ERROR.search(line)]
    return errors[-1] if errors else last_line(path, start)


def _lines(path: Path, start: int) -> list[str]:
    with path.open("rb") as log:
        end = log.seek(0, 2)
        log.seek(max(start, end - TAIL_BYTES))
        text = COLOUR.sub("", log.read().decode(errors="replace"))
    return [line.strip()[:LINE_CHARS] for line in text.splitlines() if line.strip()]
