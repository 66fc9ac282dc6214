"""A fleet that is planned in simulation."""

from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from streamsyn.bench.measured_run import RunToMeasure, measure
from streamsyn.bench.measurement import DraftRecord, Interval, Load, Measurement
from streamsyn.bench.plan import Assumption, extrapolated, parse_price, plan, simulated_fleet
from streamsyn.config.loading import load
from streamsyn.config.sections import RecipeSection
from streamsyn.errors import ConfigError
from tests.examples import in_turn

RECIPE = RecipeSection()
ASSUMED = Assumption("speed", "x", "y")


def measured() -> Measurement:
    """Two GPUs that write ten drafts at a time, each in 20 s: 0.5 drafts/s from 0 to 100 s, then a drain."""
    drafts = [
        DraftRecord(
            seed_id=f"{slot}-{turn}",
            number=0,
            begun_at=20.0 * turn + 2 * slot,
            ended_at=20.0 * turn + 2 * slot + 20,
            outcome="context",
        )
        for slot in range(10)
        for turn in range(5)
    ]
    return Measurement(
        load=Load(),
        started_at=0.0,
        gpus=2,
        warm_up=Interval(0, 20),
        measured=Interval(20, 98),
        drain=Interval(98, 118),
        steady=Interval(20, 98),
        drafts=drafts,
    )


def test_hours_and_price_of_a_seed_set() -> None:
    """Ramp and drain once, and the rest at the rate of the steady state."""
    found = extrapolated(measured(), 10_000, parse_price("2.50 (https://example.com)"), [ASSUMED])

    assert found is not None
    assert pytest.approx(0.5, rel=0.01) == found.drafts_per_s
    # 50 drafts in 118 s, of which 39 in the window; the other 11 are those of ramp and drain.
    assert pytest.approx(20 + 20 + (10_000 - 11) / 0.5, rel=0.01) == found.seconds
    assert pytest.approx(2 * found.seconds / 3600) == found.gpu_hours
    assert pytest.approx(2.5 * found.gpu_hours) == found.cost
    lines = "\n".join(found.lines())
    assert all(text in lines for text in ("speed: x (y)", "10,000 contexts on 2 GPUs", "ramp 20 s"))


def test_without_a_price_there_is_no_cost() -> None:
    """Nobody's price is assumed."""
    found = extrapolated(measured(), 1000, None, [])

    assert found is not None
    assert found.cost is None
    assert "$" not in "\n".join(found.lines())


def test_too_few_drafts_have_no_steady_state() -> None:
    """Those that are written while the fleet ramps up and drains."""
    assert extrapolated(measured(), 5, None, []) is None
    assert extrapolated(replace(measured(), drafts=[]), 1000, None, []) is None


@pytest.mark.parametrize(("drafts", "is_full"), [(250, True), (15, False)])
def test_the_plan_is_as_long_as_the_run(tmp_path: Path, drafts: int, is_full: bool) -> None:
    """Whether it is extrapolated or, with few seeds, simulated to the end."""
    path = tmp_path / "seeds.jsonl"
    rows = [{"instruction": f"What of {number}?", "answer": "It is."} for number in range(drafts)]
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    fleet = simulated_fleet("1xh100:slots=4", RecipeSection(target_words=150))
    config = load(
        None,
        {
            "seeds.sources": [{"path": str(path)}],
            "fleet.servers": fleet.urls,
            "recipe.target_words": 150,
            "checks.max_repetition": 1.0,
        }.items(),
    )
    asked = RunToMeasure(config=config, load=Load(), simulated=fleet.start, handles_signals=False)
    price = parse_price("2 (https://example.com)")

    found = plan(asked, measure(asked), drafts, fleet.assumptions, price)

    assert found is not None
    assert is_full == (found.ramp_s is not None)
    whole = measure(replace(asked, once=True))
    assert drafts == sum(draft.outcome == "context" for draft in whole.drafts)
    assert pytest.approx(whole.drain.ends_at, rel=0.03) == found.seconds
    assert "https://example.com" == found.as_dict()["assumptions"][-1]["source"]


@pytest.mark.parametrize(("draft_s", "times"), [(22.0, 1), (40.0, 2)])
def test_a_measurement_is_repeated_only_if_it_is_clearly_too_short(
    monkeypatch: pytest.MonkeyPatch, draft_s: float, times: int
) -> None:
    """78 s are 3.5 drafts of 22 s, and 2 of 40 s."""
    slower = [replace(one, ended_at=one.begun_at + draft_s) for one in measured().drafts]
    first = replace(measured(), drafts=slower, warm_up=Interval(0, 40), steady=Interval(40, 118))
    runs = [first]

    def again(asked: RunToMeasure) -> Measurement:
        assert asked.load.duration_s == 4 * draft_s
        runs.append(first)
        return first

    monkeypatch.setattr("streamsyn.bench.plan.measure", again)
    asked = RunToMeasure(config=load(None, ()), load=Load())

    assert plan(asked, first, 10_000, [], None) is not None

    assert times == len(runs)


def test_a_fleet_of_equal_servers_with_answers_as_long_as_the_recipe_asks() -> None:
    """2,000 words are 2,667 tokens; `sections` cuts at the length of a section."""
    fleet = simulated_fleet("64xh100", RECIPE)

    assert (64, "h100") == (len(fleet.start().simulations), fleet.config.cost_model)
    assert 1500 <= fleet.config.words <= 1510  # as many tokens: the simulator has more of them in a word
    assert any("H100 80GB" in one.source for one in fleet.assumptions)
    assert any("recipe.target_words = 2000" in one.source for one in fleet.assumptions)
    sections = simulated_fleet("1xcpu", RecipeSection(use="sections", section_tokens=512))
    assert 270 <= sections.config.words <= 280
    set_ = simulated_fleet("2xh100:words=99,cache_tokens=0,speed=0.5", RECIPE).config
    assert (99, 0, 0.5) == (set_.words, set_.cache_tokens, set_.speed)


@pytest.mark.parametrize("drafts", [400, 30])
def test_a_sample_of_the_servers_stands_for_all(tmp_path: Path, drafts: int) -> None:
    """A server takes as long for its part, whether extrapolated or simulated to the end."""
    path = tmp_path / "seeds.jsonl"
    rows = [{"instruction": f"What of {number}?", "answer": "It is."} for number in range(drafts)]
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    plans = []
    for sample in (1, 2):
        fleet = simulated_fleet(f"2xh100:slots=4,sample={sample}", RecipeSection(target_words=150))
        settings = {
            "seeds.sources": [{"path": str(path)}],
            "fleet.servers": fleet.urls,
            "recipe.target_words": 150,
            "checks.max_repetition": 1.0,
        }
        config = load(None, settings.items())
        asked = RunToMeasure(config=config, load=Load(), simulated=fleet.start, handles_signals=False)
        assert sample == len(fleet.start().simulations)
        plans.append(plan(asked, measure(asked), drafts, fleet.assumptions, None, fleet.share))

    sampled, whole = plans
    assert sampled is not None
    assert whole is not None
    assert (drafts, 2) == (sampled.drafts, sampled.gpus)
    assert pytest.approx(whole.seconds, rel=0.1) == sampled.seconds
    assert pytest.approx(whole.drafts_per_s, rel=0.1) == sampled.drafts_per_s
    assert "1 of 2 servers are simulated" in "".join(one.value for one in sampled.assumptions)


@in_turn(
    ("asked", "named"),
    [
        ("2xh100:sample=3", "sample must be from 1 to 2, not 3"),
        ("3xfoo", "no cost model 'foo'; choose cpu or h100"),
        ("h100", "expected NUMBERxMODEL"),
        ("0xh100", "expected NUMBERxMODEL"),
        ("2xh100:word=3", "unknown setting 'word'; the nearest is 'words'"),
        ("2xh100:words=many", "words must be a number, not 'many'"),
        ("2xh100:words=0", "words must be at least 1"),
        ("2xplain", "no cost model 'plain'"),
    ],
)
def test_mistakes_are_named(asked: str, named: str) -> None:
    """With the value that was given and what would do."""
    with pytest.raises(ConfigError, match=named) as raised:
        simulated_fleet(asked, RECIPE)

    assert f"--simulate {asked}" in str(raised.value)


@pytest.mark.parametrize("asked", ["cheap", "-1", "", "inf"])
def test_a_price_is_a_number_of_dollars(asked: str) -> None:
    """And nothing else."""
    with pytest.raises(ConfigError, match="--price"):
        parse_price(asked)
