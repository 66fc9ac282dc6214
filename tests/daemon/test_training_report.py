"""A training on a daemon's samples reports its loss, and which rows it has done with."""

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from streamsyn.trainer.examples import Dropped, Example, Key, StepPlan
from streamsyn.trainer.metrics.trackers import consumer_name, consumer_report, last_done
from streamsyn.trainer.sources.run_samples import DaemonSamples
from streamsyn.trainer.sources.source import Sources
from tests.daemon.conftest import Served
from tests.trainer.streams import Lengths, planner, plans


class Short(Lengths):
    """Rendering: each sample has 16 tokens."""

    def render_batch(self, rows: Sequence[tuple[dict[str, Any], Key]]) -> list[Example | Dropped]:
        return super().render_batch([({**row, "length": 16}, key) for row, key in rows])


def trained(url: str, out: Path) -> tuple[list[StepPlan], list[dict[str, Any]]]:
    """Plan all steps of a training, report each of them, and a checkpoint after every second one."""
    samples = DaemonSamples(url)
    made = asyncio.run(plans(planner(Sources(samples), rendering=Short(64), max_wait_s=0.01)))
    seen: list[dict[str, Any]] = []
    state: dict[str, Any] | None = None

    def also(kind: str, line: Any, _at: int) -> None:
        seen.append({"kind": kind, **line})

    samples = DaemonSamples(url)  # the planner has closed the first
    track = consumer_report(samples, out, 1, lambda: state, also)
    for step, plan in enumerate(made, 1):
        track("step", {"step": step, "loss": 3.0 / step, "stream": {"held": 1}}, step)
        state = plan.state  # the controller, too, moves on after it has recorded the step
        if step % 2 == 0 or plan is made[-1]:
            (out / "LATEST").write_text(f"step-{step:07d}\n")
    track("evaluation", {"step": len(made), "loss": math.nan}, len(made))
    track("end", {"step": len(made), "wait_share": 0.5}, len(made))
    samples.close()
    return made, seen


async def test_loss_and_position_are_reported(daemon: Served, tmp_path: Path) -> None:
    """The position is that of the newest checkpoint: what a resumed training needs is kept."""
    await daemon.new_run("one")
    await daemon.submit("one", 40)
    await daemon.ask("POST", "/v1/runs/one/close")
    await daemon.until_state("one", "finished")
    made, seen = await asyncio.to_thread(trained, f"{daemon.url}/v1/runs/one", tmp_path)
    (consumer,) = (await daemon.ask("GET", "/v1/runs/one/consumers"))["data"]

    assert len(made) > 3
    assert ["step"] * len(made) + ["evaluation", "end"] == [line["kind"] for line in seen]
    assert (consumer["name"], consumer["kind"]) == (
        await asyncio.to_thread(consumer_name, tmp_path),
        "samples",
    )
    assert consumer["acked"] == last_done(made[-1].state, 1)
    assert consumer["metrics"] == {"step": len(made), "loss": 3.0 / len(made)}


async def test_a_daemon_that_is_gone_is_logged_once(daemon: Served, tmp_path: Path) -> None:
    """The training goes on."""
    await daemon.new_run("one")
    samples = await asyncio.to_thread(DaemonSamples, f"{daemon.url}/v1/runs/one")
    await daemon.ask("DELETE", "/v1/runs/one?force=true")
    track = await asyncio.to_thread(consumer_report, samples, tmp_path, 1, lambda: None, None)
    with capture_logs() as logs:
        for step in (1, 2):
            await asyncio.to_thread(track, "end", {"step": step}, step)
    await asyncio.to_thread(samples.close)

    assert ["train.not_reported"] == [line["event"] for line in logs if line["log_level"] == "warning"]


@pytest.mark.parametrize(
    ("held", "epochs", "expected"),
    [([], 1, 8), ([["run", 0, 4], ["run", 0, 7]], 1, 3), ([["mix", 0, 2]], 1, 8), ([], 2, -1)],
)
def test_rows_that_a_resumed_training_reads_again_are_not_done(
    held: list[Any], epochs: int, expected: int
) -> None:
    state = {
        "feed": {"source": "run", "stream": {"epoch": 0, "next": 10}},
        "held": held,
        "drawn": [],
        "held_out": [],
        "rows": [],
    }
    assert last_done(state, epochs) == expected
    assert last_done({**state, "held": [], "rows": [held]}, epochs) == expected
    assert last_done(None, epochs) == -1


@pytest.mark.parametrize("name", ["tuned", "Größe 7 B", "..", "x" * 300])
def test_the_name_of_a_consumer_is_an_id(tmp_path: Path, name: str) -> None:
    from streamsyn.daemon.route import checked_id

    found = consumer_name(tmp_path / name)
    assert checked_id(found, "consumer") == found == consumer_name(tmp_path / name)
