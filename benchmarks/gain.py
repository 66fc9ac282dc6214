"""Does context gain separate contexts that lead to the answer from others? On a real SGLang, with real seeds.

    python -m benchmarks.gain FOLDER [--server URL] [--per-task 13] [--words 250] [--save FILE]
    python -m benchmarks.gain --scored FILE [--server URL]      only the control, for contexts saved before

FOLDER holds seed files (*.jsonl), one a task. `streamsyn run` writes a context for some seeds of each file,
with `checks.context_gain` and `checks.answerable`. Then the control: the same code scores each seed's
answer given contexts of other seeds of its task, from which the answer does not follow. `--others` random
derangements choose them: no context stays with its own seed, and each derangement uses each context once.

AUC is the probability that a seed's own context has a higher gain than one from the control, with ties
counted half (the Mann-Whitney rank statistic): 0.5 is chance, 1 is perfect separation. `own > other`
compares the same seed's answer given its own context and given another seed's. The last row is limited to
contexts that contain the gold answer verbatim, because a small model often writes contexts that do not lead
to the answer.

The packaged model with 135 million parameters writes and scores. The contexts of a better model would
contain their answers more often, and it would lose more likelihood without them.
"""

import argparse
import asyncio
import random
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import orjson

from benchmarks.real import contexts
from streamsyn.config.sections import FleetSection, ScoringSection
from streamsyn.fleet.fleet import open_fleet
from streamsyn.fleet.launch import find_packaged_model, launched
from streamsyn.scoring.measures import AnswerPrompt, Gain, Question, ScoringClient

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Pair:
    """One seed: its context's row, and the gains of its answer given the contexts of other seeds."""

    task: str
    row: Row
    others: tuple[float, ...]

    @property
    def own(self) -> float:
        """Gain of the seed's own context, as the run measured it."""
        return float(self.row["checks"]["context_gain"])


def sample_seeds(folder: Path, into: Path, per_task: int, seed: int) -> Path:
    """Write a random sample of at most `per_task` seeds of each file in `folder` to `into`; return `into`."""
    into.mkdir()
    paths = sorted(folder.glob("*.jsonl"))
    if not paths:
        raise SystemExit(f"no seed files (*.jsonl) in {folder}")
    for path in paths:
        lines = path.read_bytes().splitlines()
        drawn = random.Random(f"{seed} {path.name}").sample(lines, min(per_task, len(lines)))
        (into / path.name).write_bytes(b"\n".join(drawn) + b"\n")
    return into


def derangement(number: int, rng: random.Random) -> list[int]:
    """Return a permutation without a fixed point, drawn uniformly.

    Raises:
        ValueError: `number` is below 2.
    """
    if number < 2:
        raise ValueError(f"a derangement needs at least 2 items, not {number}: raise --per-task")
    order = list(range(number))
    while any(place == moved for place, moved in enumerate(order)):
        rng.shuffle(order)
    return order


def auc(high: Sequence[float], low: Sequence[float]) -> float:
    """Return the probability that a value of `high` is above one of `low`; ties count half."""
    above = sum((a > b) + (a == b) / 2 for a, b in product(high, low))
    return above / (len(high) * len(low))


async def control(rows: Sequence[Row], url: str, args: argparse.Namespace) -> list[Pair]:
    """Score each row's answer given the contexts of other rows of its task."""
    section = FleetSection(servers=(url,), concurrency=args.concurrency)
    async with open_fleet(section, lambda _: None) as fleet:
        await fleet.ask_models()
        gain = Gain(AnswerPrompt(), ScoringSection().answer_tokens)

        async def pair(row: Row, others: Sequence[Row]) -> Pair:
            client = ScoringClient(fleet, fleet.models[0])
            question = Question(row["instruction"], row["answer"], row["task"])
            found = [await gain.measure(client, question, other["context"]) for other in others]
            return Pair(row["task"], row, tuple(one["context_gain"] for one in found))

        async with asyncio.TaskGroup() as group:
            tasks = []
            for task in sorted({row["task"] for row in rows}):
                of_task, rng = [row for row in rows if row["task"] == task], random.Random(args.seed)
                orders = [derangement(len(of_task), rng) for _ in range(args.others)]
                for number, row in enumerate(of_task):
                    others = [of_task[order[number]] for order in orders]
                    tasks.append(group.create_task(pair(row, others), name=row["id"]))
        return [done.result() for done in tasks]


def print_table(pairs: Sequence[Pair], rows: Sequence[Row]) -> None:
    print(
        f"{'task':14}{'n':>4}{'gain: mean':>12}{'q1':>7}{'median':>8}{'q3':>7}{'> 0':>6}"
        f"{'others: mean':>14}{'> 0':>6}{'own > other':>13}{'AUC':>7}"
        f"{'metric':>9}{'with':>7}{'without':>9}"
    )
    groups = {task: [pair for pair in pairs if pair.task == task] for task in sorted({p.task for p in pairs})}
    verbatim = [pair for pair in pairs if pair.row["answer"].lower() in pair.row["context"].lower()]
    for name, subset in {**groups, "all": pairs, "verbatim": verbatim}.items():
        if len(subset) > 1:
            print(_line(name, subset))
    scoring = [row["checks"]["scoring"] for row in rows]
    prompts, cached, written = (
        sum(figures[name] for figures in scoring)
        for name in ("prompt_tokens", "cached_tokens", "completion_tokens")
    )
    print(
        f"\nscoring requests of the run: {prompts:,} prompt tokens, {cached / prompts:.3f} of them cached; "
        f"{written:,} completion tokens"
    )
    words = [len(row["context"].split()) for row in rows]
    print(f"contexts of {statistics.mean(words):.0f} words on average; {len(rows) - len(pairs)} unscored")
    flags = sorted({flag for row in rows for flag in row["checks"]["flags"]})
    counts = {flag: sum(flag in row["checks"]["flags"] for row in rows) for flag in flags}
    print("flags:", ", ".join(f"{flag} {count}" for flag, count in counts.items()) or "none")


def _line(name: str, subset: Sequence[Pair]) -> str:
    own = [pair.own for pair in subset]
    other = [gain for pair in subset for gain in pair.others]
    q1, median, q3 = statistics.quantiles(own, n=4, method="inclusive")
    checks = [pair.row["checks"] for pair in subset]
    metrics = {check["answer_metric"] for check in checks}
    wins = statistics.mean(pair.own > gain for pair in subset for gain in pair.others)
    return (
        f"{name:14}{len(subset):4}{statistics.mean(own):12.3f}{q1:7.2f}{median:8.2f}{q3:7.2f}"
        f"{_share(own):6.2f}{statistics.mean(other):14.3f}{_share(other):6.2f}{wins:13.2f}"
        f"{auc(own, other):7.3f}"
        f"{metrics.pop() if len(metrics) == 1 else '':>9}"
        f"{statistics.mean(check['answer_score'] for check in checks):7.3f}"
        f"{statistics.mean(check['closed_book_score'] for check in checks):9.3f}"
    )


def _share(values: Sequence[float]) -> float:
    return sum(value > 0 for value in values) / len(values)


async def measure(args: argparse.Namespace, folder: Path) -> None:
    settings = {
        "recipe.target_words": str(args.words),
        "recipe.max_tokens": str(args.max_tokens),
        "checks.min_words": "40",
        "checks.context_gain": "true",
        "checks.answerable": "true",
        "scoring.max_answer_tokens": str(args.answer_tokens),
        "fleet.concurrency": str(args.concurrency),
        "assembly.write": "false",
    }
    async with AsyncExitStack() as stack:
        url = args.server
        if url is None:
            server = launched(find_packaged_model(), log_path=folder / "sglang.log")
            url = (await stack.enter_async_context(server)).url
        if args.scored is not None:
            rows = [orjson.loads(line) for line in args.scored.read_bytes().splitlines()]
        else:
            seeds = sample_seeds(args.folder, folder / "seeds", args.per_task, args.seed)
            rows = await asyncio.to_thread(contexts, folder, seeds, [url], settings)
        if args.save is not None:
            args.save.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
        scored = [row for row in rows if "context_gain" in row["checks"]]
        pairs = await control(scored, url, args)
    print_table(pairs, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("folder", nargs="?", type=Path, help="folder of seed files (*.jsonl), one a task")
    source.add_argument("--scored", type=Path, help="contexts saved by --save")
    parser.add_argument("--server", help="URL of a running SGLang; default: start one")
    parser.add_argument("--per-task", type=int, default=13, help="seeds of each file")
    parser.add_argument("--words", type=int, default=250, help="requested words a context")
    parser.add_argument("--max-tokens", type=int, default=400, help="maximum tokens of a context")
    parser.add_argument("--answer-tokens", type=int, default=128, help="maximum tokens of an answer")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--others", type=int, default=3, help="control contexts for each answer")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random sample")
    parser.add_argument("--save", type=Path, help="write the scored contexts to this file (JSON lines)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(measure(args, Path(folder)))


if __name__ == "__main__":
    main()
