"""The image of a training, and its curves."""

import json
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.errors import ConfigError, SinkError
from streamsyn.trainer.metrics.plot import _rate_text, draw, read_curves, smoothed
from tests.examples import in_turn, one_in
from tests.trainer import tiny
from tests.trainer.by_hand import plans, section, train


def step(number: int, **given: Any) -> dict[str, Any]:
    """A line of a step."""
    return {
        "kind": "step",
        "step": number,
        "loss": 5 / number,
        "rate": 0.001,
        "skipped": 0,
        "tokens_per_s": 1000.0 + number,
        "target_tokens_per_s": 100.0,
        "step_s": 2.0,
        "wait_s": 0.5,
        "wall_s": 2.0 * number,
        **given,
    }


EVALUATION = {
    "kind": "evaluation",
    "step": 2,
    "nll_with_context": 3.0,
    "nll_with_context_change": -0.5,
    "context_gain": 0.5,
    "held_out": 9,
}
SCORES = {"kind": "evaluation", "step": 2, "needle_single_2048": 1.0, "needle_multi_key_2048": 0.5}
LONGBENCH = {"kind": "evaluation", "step": 3, "longbench": 0.25, "longbench_qasper": 0.25}
END = {
    "kind": "end",
    "step": 3,
    "examples": 9,
    "tokens": 100,
    "verdict": None,
    "wait_share": 0.1,
    "why": "a signal",
}


def write(out: Path, *lines: dict[str, Any], torn: bytes = b"") -> Path:
    """A metrics.jsonl of these lines."""
    out.mkdir(exist_ok=True)
    whole = b"".join(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in lines)
    (out / "metrics.jsonl").write_bytes(whole + torn)
    return out


def size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_a_real_training_is_drawn(tmp_path: Path) -> None:
    """The image is drawn from the loop's own metrics; a second one replaces it."""
    train(tmp_path, section(eval_every_steps=2), plans(4), held_out=[tiny.example(20, 5, 900)])
    path = draw(tmp_path)
    curves = read_curves(tmp_path)

    assert tmp_path / "training.png" == path == draw(tmp_path)
    assert min(size(path)) > 500
    assert [1, 2, 3, 4] == curves.loss.at
    assert [0, 2, 4] == curves.losses["held out, with context"].at
    assert not list(tmp_path.glob("*.new"))


@pytest.mark.parametrize(
    "lines",
    one_in(
        2,
        [
            [EVALUATION],
            [step(1)],
            [step(1, loss=None), step(2, loss=None, skipped=1)],
            [step(1), EVALUATION, step(2), END],
            [step(1), EVALUATION, SCORES, LONGBENCH, END, step(2, wall_s=1.0)],
            [step(1), SCORES, step(2)],
            [SCORES, END],
        ],
    ),
)
def test_any_part_may_be_missing(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    """Without steps, evaluations, tests or an end, with steps that were skipped, and after one step."""
    assert min(size(draw(write(tmp_path, *lines, torn=b'{"kind":"st')))) > 500


def test_needles_are_drawn_by_their_length(tmp_path: Path) -> None:
    """Kinds of the same length are one curve, their mean."""
    longer = {**SCORES, "step": 4, "needle_single_8192": 0.0}
    scores = read_curves(write(tmp_path, SCORES, LONGBENCH, longer)).scores

    assert {"needles, 2,048 tokens", "needles, 8,192 tokens", "LongBench"} == scores.keys()
    assert ([2, 4], [0.75, 0.75]) == (
        scores["needles, 2,048 tokens"].at,
        scores["needles, 2,048 tokens"].values,
    )
    assert ([3], [0.25]) == (scores["LongBench"].at, scores["LongBench"].values)


def test_time_between_runs_is_left_out(tmp_path: Path) -> None:
    """A resumed run continues the time axis; the earlier end is no longer the end."""
    found = read_curves(write(tmp_path, step(1), step(2), END, step(3, wall_s=1.0), step(4, wall_s=3.0)))

    assert [2.0, 4.0, 5.0, 7.0] == found.tokens.at
    assert [4.0] == found.resumed
    assert found.end is None
    assert [0.0, 0.25, 0.25, 0.0] == found.waits.values[:4]
    assert [0.0, 0.0, 2.0, 2.0] == found.waits.at[:4]


@given(st.lists(st.floats(-10, 10) | st.just(math.nan), max_size=30), st.integers(1, 8))
def test_smoothing_is_the_mean_around(values: list[float], reach: int) -> None:
    """Each value with `reach` on either side; NaN where there is nothing else."""
    for at, found in enumerate(smoothed(values, reach)):
        around = [one for one in values[max(0, at - reach) : at + reach + 1] if not math.isnan(one)]
        expected = sum(around) / len(around) if around else math.nan
        assert found == pytest.approx(expected, nan_ok=True, abs=1e-9)


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    """No file, an empty file, and a file with only an end."""
    for lines in ((), (END,)):
        with pytest.raises(ConfigError, match=f"{tmp_path} has no metrics"):
            draw(tmp_path)
        write(tmp_path, *lines)
    with pytest.raises(ConfigError, match=f"{tmp_path} has no metrics"):
        draw(tmp_path)


def test_lines_that_are_not_objects_are_skipped(tmp_path: Path) -> None:
    """Any other JSON value in the file is ignored."""
    found = read_curves(write(tmp_path, step(1), torn=b'[]\n3\nnull\n"step"\n' + orjson.dumps(step(2))))

    assert [1, 2] == found.loss.at


def test_drawing_errors_name_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that cannot be written, and missing matplotlib."""
    write(tmp_path, step(1))
    (tmp_path / "training.png").mkdir()
    with pytest.raises(SinkError, match=r"cannot write .*training\.png"):
        draw(tmp_path)
    monkeypatch.setattr("streamsyn.trainer.metrics.plot.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="needs matplotlib"):
        draw(tmp_path)


def test_drawing_needs_no_torch(tmp_path: Path) -> None:
    """An image can be drawn where torch is not installed."""
    write(tmp_path, step(1), step(2))
    code = (
        "import sys; from pathlib import Path; from streamsyn.trainer.metrics.plot import draw;"
        f"draw(Path({json.dumps(str(tmp_path))})); sys.exit('torch' in sys.modules)"
    )
    assert 0 == subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode


def test_losses_are_drawn_as_if_on_the_same_samples(tmp_path: Path) -> None:
    """The last loss as measured, earlier ones reconstructed from the changes."""
    told = [(1, 2.0, 0.0), (2, 3.5, -0.5), (3, 3.0, -1.0)]
    rows = [
        {**EVALUATION, "step": at, "nll_with_context": mean, "nll_with_context_change": change}
        for at, mean, change in told
    ]
    drawn = read_curves(write(tmp_path, *rows)).losses["held out, with context"]

    assert ([1, 2, 3], [4.0, 3.5, 3.0]) == (drawn.at, drawn.values)


@in_turn(("value", "expected"), [(0.5, "0.5"), (20, "20"), (1500, "1.5k"), (20_000, "20k"), (3e6, "3M")])
def test_units_of_a_rate(value: float, expected: str) -> None:
    """Never thousandths of a token."""
    assert expected == _rate_text(value)
