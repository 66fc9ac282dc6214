"""Evaluations while training: when they are due, their figures, and that they do not change the training."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from structlog.testing import capture_logs

from streamsyn.config.loading import load
from streamsyn.errors import ConfigError, SinkError
from streamsyn.trainer import training
from streamsyn.trainer.evaluation.evaluations import Done, Evaluations, done_before
from streamsyn.trainer.evaluation.heldout import control_examples
from streamsyn.trainer.loop import Loop
from streamsyn.trainer.model.placed import Placed
from streamsyn.trainer.stream.render import Renderer
from tests.trainer import tiny
from tests.trainer.by_hand import exam, fresh, plans, section, train, weights

STEPS = 4
CONTROL = [tiny.example(12 + 7 * n, 3 + n, 500 + n) for n in range(5)]
KEPT = [tiny.example(20, 5, 900 + n) for n in range(3)]
PARTS = {"needle_one", "needle_two", "needles", "longbench_a", "longbench"}


def evaluations(out: Path) -> list[dict[str, Any]]:
    """The evaluations in metrics.jsonl."""
    found = [orjson.loads(line) for line in (out / "metrics.jsonl").read_bytes().splitlines()]
    return [line for line in found if line["kind"] == "evaluation"]


@pytest.mark.parametrize(
    "more",
    [{}, {"gradient_checkpointing": True, "lora": {"rank": 4}}, {"precision": "bf16"}],
    ids=["full", "adapters, checkpointing", "bf16"],
)
def test_a_training_is_the_same_bit_for_bit_with_evaluations(tmp_path: Path, more: dict[str, Any]) -> None:
    """After every other step, with losses and answers, or never: the same weights."""
    tiny.write_model(tmp_path / "base")
    often, never = tmp_path / "often", tmp_path / "never"
    for out in (often, never):
        out.mkdir()
    base, settings = tmp_path / "base", section(eval_every_steps=2, **more)
    torch.manual_seed(0)
    expected = weights(train(never, settings, plans(STEPS), base=base)[2])
    torch.manual_seed(0)
    given = {"held_out": KEPT, "control": CONTROL, "exam": exam(often)}
    found = weights(train(often, settings, plans(STEPS), base=base, **given)[2])  # type: ignore[arg-type]

    assert [0, 2, 4] == [line["step"] for line in evaluations(often)]
    assert [] == evaluations(never)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], one) for name, one in found.items())


def test_the_control_loss_is_that_of_each_sample_alone(tmp_path: Path) -> None:
    """The mean over samples of the mean over their targets, computed plainly."""
    placed = train(tmp_path, section(), plans(2), control=CONTROL)[2]
    means = []
    plain = tiny.model("eager")
    plain.load_state_dict(placed.plain.state_dict())
    plain.eval()
    for one in CONTROL:
        ids = torch.from_numpy(one.tokens).long()
        logits = plain(input_ids=ids[None], use_cache=False).logits[0, one.loss_from - 1 : -1].detach()
        means.append(float(torch.nn.functional.cross_entropy(logits, ids[one.loss_from :])))
    last = evaluations(tmp_path)[-1]

    assert sum(means) / len(means) == pytest.approx(last["nll_control"], rel=1e-5)
    assert not {"nll_with_context", "held_out", "context_gain"} & last.keys()


def test_questions_are_asked_less_often_than_losses_are_measured(tmp_path: Path) -> None:
    """Before the first step, at each `tests_every_steps`, and at the end; losses with them."""
    settings = section(eval_every_steps=2, tests_every_steps=3)
    train(tmp_path, settings, plans(5), control=CONTROL, exam=exam(tmp_path))
    told = evaluations(tmp_path)

    assert [0, 2, 3, 4, 5] == [line["step"] for line in told]
    assert all("nll_control" in line for line in told)
    assert [0, 3, 5] == [line["step"] for line in told if PARTS <= line.keys()]
    files = sorted(path.name for path in (tmp_path / "answers").iterdir())
    assert ["step-0000000.jsonl", "step-0000003.jsonl", "step-0000005.jsonl"] == files


def test_questions_alone_are_enough(tmp_path: Path) -> None:
    """Without held-out samples there are evaluations; each answer is in a file."""
    train(tmp_path, section(), plans(2), exam=exam(tmp_path))
    first, last = evaluations(tmp_path)
    lines = [
        orjson.loads(line) for line in (tmp_path / "answers" / "step-0000002.jsonl").read_bytes().splitlines()
    ]

    assert (0, 2) == (first["step"], last["step"])
    assert ["0", "1", "2", "3", "4"] == [line["id"] for line in lines]
    assert [30, 70, 50, 9, 20] == [line["prompt_tokens"] for line in lines]
    keys = {"exam", "part", "id", "prompt_tokens", "answer", "wanted", "grading", "score"}
    assert all(keys == line.keys() for line in lines)
    assert (lines[0]["score"] + lines[1]["score"]) / 2 == last["needle_one"]
    assert (last["needle_one"] + last["needle_two"]) / 2 == last["needles"]
    assert last["longbench_a"] == last["longbench"]


def stop_at_pass(number: int) -> Any:
    """For `before`: ask for a stop during the model's pass `number`."""

    def watch(loop: Loop, placed: Placed) -> None:
        seen: Iterator[int] = iter(range(1, 100_000))

        def on_pass(_module: Any, _given: Any, more: dict[str, Any]) -> None:
            if more.get("use_cache") and next(seen) == number:
                loop.stop()

        placed.plain.register_forward_pre_hook(on_pass, with_kwargs=True)

    return watch


def test_a_stop_during_the_first_evaluation(tmp_path: Path) -> None:
    """Only figures of finished parts are written, and nothing is trained. The next run repeats the
    evaluation, the run after that does not."""
    tiny.write_model(tmp_path / "base")
    questions = exam(tmp_path)
    one_answer = 8
    given: dict[str, Any] = {"base": tmp_path / "base", "control": CONTROL, "exam": questions}
    with capture_logs() as logs:
        loop, controller, _ = train(
            tmp_path, section(), plans(2), before=stop_at_pass(3 * one_answer + 1), **given
        )
    (partial,) = evaluations(tmp_path)

    assert controller is not None
    assert (0, "a signal") == (loop.progress.step, controller.stopped)
    assert partial["partial"] is True
    assert {"needle_one", "needle_two", "needles"} == PARTS & partial.keys()
    assert "nll_control" in partial
    assert 4 == len((tmp_path / "answers" / "step-0000000.jsonl").read_bytes().splitlines())
    assert [4] == [line["answers"] for line in logs if line["event"] == "train.evaluation_stopped"]
    assert Done() == Done(None, done_before(tmp_path / "metrics.jsonl", 0, questions).examined)

    assert train(tmp_path, section(max_steps=1), plans(2), **given)[0].progress.step == 1
    assert [0, 0, 1] == [line["step"] for line in evaluations(tmp_path)]
    assert PARTS <= evaluations(tmp_path)[1].keys()
    assert Done(0, 0) == done_before(tmp_path / "metrics.jsonl", 0, questions)

    train(tmp_path, section(max_steps=1), plans(2), **given)
    assert [0, 0, 1] == [line["step"] for line in evaluations(tmp_path)]


def test_a_stop_during_the_last_evaluation(tmp_path: Path) -> None:
    """The tuned model is written all the same; the evaluation is marked as partial, and that is logged."""
    settings = section(tests_every_steps=100)
    _, controller, _ = train(
        tmp_path, settings, plans(2), exam=exam(tmp_path), before=stop_at_pass(5 * 8 + 9)
    )

    assert controller is not None
    assert controller.stopped == "a signal, during the last evaluation"
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert [None, True] == [line.get("partial") for line in evaluations(tmp_path)]


@pytest.mark.parametrize(
    ("step", "last", "done", "losses", "questions"),
    [
        (0, False, Done(), True, True),
        (0, False, Done(0, 0), False, False),
        (0, False, Done(0, None), False, True),
        (4, False, Done(), False, False),
        (5, False, Done(0, 0), True, False),
        (10, False, Done(5, 0), True, True),
        (12, True, Done(10, 10), True, True),
        (10, True, Done(10, 10), False, False),
        (5, True, Done(5, 0), False, True),
    ],
)
def test_what_is_due(
    tmp_path: Path, step: int, last: bool, done: Done, losses: bool, questions: bool
) -> None:
    """What is due at a step and was not done there before."""
    settings = section(eval_every_steps=5, tests_every_steps=10)
    commands = Evaluations(settings, dict, CONTROL, exam(tmp_path), 2, done).due(step, last=last)

    if not losses and not questions:
        assert commands is None
        return
    assert commands is not None
    assert [losses] * 2 == [bool(command.rows) for command in commands]
    assert [3 * questions] * 2 == [len(command.prompts) for command in commands]


def test_answers_that_cannot_be_written_are_an_error(tmp_path: Path) -> None:
    """One line that names the directory."""
    (tmp_path / "answers").write_text("in the way")
    with pytest.raises(SinkError, match=r"cannot make .*answers"):
        exam(tmp_path).grade(0, [(1,)])


def chat_row(answer: str) -> str:
    """One row, as a line."""
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}) + "\n"


def test_unusable_control_rows_are_counted_and_logged(tmp_path: Path) -> None:
    """With file and line; the first usable rows are taken."""
    path = tmp_path / "control.jsonl"
    path.write_text(
        chat_row("One.") + "{broken\n" + chat_row(" ") + chat_row("x" * 300) + 3 * chat_row("Two.")
    )
    with capture_logs() as logs:
        found = control_examples(str(path), 3, Renderer(tiny.tokenizer(), 64, "drop"))

    assert [0, 4, 5] == [one.key.seq for one in found]
    said = [
        (line["at"].split(":")[-1], line["reason"]) for line in logs if line["event"] == "control.dropped"
    ]
    assert [("2", "bad_row"), ("3", "empty_answer"), ("4", "overlong")] == said
    assert [3] == [line["count"] for line in logs if line["event"] == "control.dropped_rows"]


def test_a_changed_control_file_is_a_different_set_of_samples(tmp_path: Path) -> None:
    """A training that resumes with a different file does not compare losses with the old one."""
    known = []
    for name, answers in (("a", "12"), ("b", "34"), ("a again", "12")):
        (tmp_path / name).with_suffix(".jsonl").write_text("".join(map(chat_row, answers)))
        path = str((tmp_path / name).with_suffix(".jsonl"))
        found = control_examples(path, 3, Renderer(tiny.tokenizer(), 64, "drop"))
        known.append({one.key for one in found})
    first, other, again = known

    assert 2 == len(first)
    assert not first & other
    assert first == again


def started(tmp_path: Path, **given: Any) -> int:
    """`streamsyn train` in this process, over a few chat rows."""
    if not (tmp_path / "base").exists():
        tiny.write_model(tmp_path / "base")
        (tmp_path / "chat.jsonl").write_text("".join(chat_row(f"Because {n}.") for n in range(6)))
    defaults: dict[str, Any] = {"seq_len": 1024, "rows_per_step": 1, "shuffle_min": 2, "warmup_steps": 1}
    config = load(None, [("train", defaults | given)])
    with fresh():
        return training.train(config, str(tmp_path / "chat.jsonl"), str(tmp_path / "base"), tmp_path / "out")


def test_the_command_evaluates_without_held_out_samples(tmp_path: Path) -> None:
    """Control data, needles and LongBench by configuration alone, before the first step and at the end."""
    (tmp_path / "control.jsonl").write_text(3 * chat_row("Yes."))
    row = {"input": "Who?", "context": "It was Ada.", "answers": ["Ada"], "dataset": "hotpotqa"}
    (tmp_path / "bench.jsonl").write_text(json.dumps(row) + "\n{}\n")
    given: dict[str, Any] = {
        "control": str(tmp_path / "control.jsonl"),
        "needles": {"lengths": [700], "kinds": ["single"], "samples": 1},
        "longbench": {"path": str(tmp_path / "bench.jsonl")},
    }

    assert 0 == started(tmp_path, **given)
    first, last = evaluations(tmp_path / "out")
    assert 0 == first["step"] < last["step"]
    keys = {"nll_control", "needle_single_700", "needles", "longbench_hotpotqa", "longbench"}
    assert keys < first.keys()
    assert keys < last.keys()
    assert "held_out" not in first
    assert last["nll_control"] < first["nll_control"]
    before = evaluations(tmp_path / "out")

    assert 0 == started(tmp_path, **given)  # all is done
    assert before == evaluations(tmp_path / "out")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"control": "bad.jsonl"}, r"train\.control: .*bad\.jsonl: no row .* \(bad_row: 1\)"),
        ({"longbench": {"path": "bad.jsonl"}}, r"train\.longbench\.path: .*bad\.jsonl"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_training(
    tmp_path: Path, given: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the key, and nothing is trained."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=said):
        started(tmp_path, **given)

    assert not (tmp_path / "out" / "metrics.jsonl").exists()
