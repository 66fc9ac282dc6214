"""What each driver shares. Drivers run in environments of the peers: only the standard library is there."""

import argparse
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_TOKENS = 4096
MODEL = "simulated"
_NUMBER = re.compile(r"in year (\d+)\?")


@dataclass(frozen=True)
class Job:
    """What a driver is to do.

    Attributes:
        url: The server.
        prompts: A file with a JSON string a line: the prompts.
        out: A folder; what it holds from a run that was killed is resumed where the peer can.
        concurrency: Requests at a time.
    """

    url: str
    prompts: Path
    out: Path
    concurrency: int

    def texts(self) -> Iterator[str]:
        """Yield the prompts."""
        with self.prompts.open() as file:
            for line in file:
                yield json.loads(line)


def parse() -> Job:
    """Return the job of the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("concurrency", type=int)
    return Job(**vars(parser.parse_args()))


def report(job: Job, prompts: Iterable[str]) -> None:
    """Write the numbers of the prompts of all rows that the peer has written, for the harness."""
    numbers = []
    for prompt in prompts:
        found = _NUMBER.search(prompt)
        assert found is not None, prompt
        numbers.append(int(found.group(1)))
    (job.out / "numbers.json").write_text(json.dumps(numbers))
