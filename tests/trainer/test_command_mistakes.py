"""What a user can get wrong with `streamsyn train`, once the command line is right."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.examples import one_in
from tests.trainer import tiny
from tests.trainer.conftest import Start
from tests.trainer.test_command import write_run, written

pytestmark = pytest.mark.timeout(300)


def no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def torn_weights(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def too_few_weights(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def broken_config(model: Path) -> None:
    (model / "config.json").write_text("{")


def unknown_kind(model: Path) -> None:
    (model / "config.json").write_text('{"model_type": "lamma"}')


def no_tokenizer(model: Path) -> None:
    for path in model.glob("token*"):
        path.unlink()


def no_template(model: Path) -> None:
    for path in model.glob("chat_template*"):
        path.unlink()


def another_vocabulary(model: Path) -> None:
    tiny.model(vocab_size=200, eos_token_id=0, pad_token_id=0).save_pretrained(model)


def few_positions(model: Path) -> None:
    """A model with learned positions."""
    made = GPT2LMHeadModel(
        GPT2Config(vocab_size=tiny.VOCABULARY, n_positions=128, n_embd=32, n_layer=1, n_head=2)
    )
    made.save_pretrained(model)


def frequencies_of_the_longest_row(model: Path) -> None:
    dynamic = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    tiny.model(max_position_embeddings=128, rope_parameters=dynamic).save_pretrained(model)


def bidirectional(model: Path) -> None:
    config = BertConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    BertLMHeadModel(config).save_pretrained(model)


def encoder_and_decoder(model: Path) -> None:
    shape: Any = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    T5ForConditionalGeneration(T5Config(vocab_size=tiny.VOCABULARY, **shape)).save_pretrained(model)


def a_file(model: Path) -> None:
    shutil.rmtree(model)
    model.write_text("no model")


@pytest.mark.parametrize(
    ("spoil", "named"),
    one_in(
        2,
        [
            (no_weights, "there are no weights"),
            (torn_weights, "cannot be read"),
            (too_few_weights, "1 of its weights are missing: model.layers.1.mlp.up_proj.weight"),
            (no_config, "no config.json"),
            (broken_config, "is not a model"),
            (unknown_kind, "is not a model"),
            (no_tokenizer, "its tokenizer cannot be read"),
            (no_template, "train.chat_template"),
            (another_vocabulary, "token 259, but the model has embeddings for 200"),
            (few_positions, "train.seq_len: 256 is more"),
            (frequencies_of_the_longest_row, "train.seq_len: 256 is more than the 128 positions"),
            (bidirectional, "the model cannot be trained: the model's attention is not causal"),
            (encoder_and_decoder, "is not a causal language model"),
            (a_file, "is a file"),
        ],
    ),
)
def test_a_model_that_cannot_be_tuned_is_refused(
    start: Start, tmp_path: Path, spoil: Callable[[Path], None], named: str
) -> None:
    """Before anything is trained: one line that names it, exit 2."""
    spoil(tmp_path / "base")
    training = start(write_run(tmp_path / "run", range(4)), tmp_path / "out")

    assert 2 == training.wait(), training.stderr()
    assert named in training.stderr().splitlines()[-1]
    assert "Traceback" not in training.stderr()
    assert [] == list((tmp_path / "out").glob("checkpoints/*"))


SILENT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a poem\nof two lines\n", "--from: all 2 rows are not conversations"),
        ('{"instruction": "q", "answer": "a"}\n', "--from: all 1 rows are not conversations"),
        (f"{json.dumps(SILENT)}\n" * 2 + "{}\n", "--from: the answers of 2 of all 3 samples are empty"),
        ("\n", "rows.jsonl is empty"),
    ],
)
def test_a_file_without_conversations_is_refused(start: Start, tmp_path: Path, text: str, named: str) -> None:
    """Seeds, plain text or nothing instead of chat rows: exit 2, and the most common reason."""
    (tmp_path / "rows.jsonl").write_text(text)
    training = start(tmp_path / "rows.jsonl", tmp_path / "out")

    assert 2 == training.wait(), training.stderr()
    assert named in training.stderr().splitlines()[-1]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"betas": "[0.9,1.0]"}, "train.betas.1: expected less than 1"),
        ({"betas": "[-0.1,0.9]"}, "train.betas.0: expected at least 0"),
        ({"seq_len": 10**23}, "train.seq_len: expected at most"),
        ({"warmup_steps": 10**23}, "train.warmup_steps: expected at most"),
    ],
)
def test_a_number_out_of_range_is_refused(
    start: Start, tmp_path: Path, settings: dict[str, Any], named: str
) -> None:
    """Before torch or JSON fail on it: one line with the key, exit 2."""
    training = start(write_run(tmp_path / "run", range(4)), tmp_path / "out", **settings)

    assert 2 == training.wait(), training.stderr()
    assert named in training.stderr().splitlines()[-1]
    assert "Traceback" not in training.stderr()


def test_nothing_but_held_out_samples_fails(start: Start, tmp_path: Path) -> None:
    """Exit 1, with the number of held-out samples."""
    training = start(write_run(tmp_path / "run", range(3)), tmp_path / "out", holdout=0.999)

    assert 1 == training.wait(), training.stderr()
    last = training.stderr().splitlines()[-1]
    assert "streamsyn: the stream ended without a sample to train on: of 3 rows, 3 held out" == last


def test_a_failed_start_can_be_corrected(start: Start, tmp_path: Path) -> None:
    """The error names the key. The next start may have a different value as long as nothing was trained."""
    run, out = write_run(tmp_path / "run", range(20)), tmp_path / "out"
    failed = start(run, out, seq_len=32)
    assert 2 == failed.wait(), failed.stderr()
    assert failed.stderr().splitlines()[-1].endswith("train.seq_len = 32: all 20 samples are longer")
    assert (out / "train.json").exists()
    mended = start(run, out)
    assert 0 == mended.wait(), mended.stderr()
    other = start(run, out, seq_len=32)

    assert 2 == other.wait()
    assert "train.seq_len: 256 before, 32 now" in other.stderr().splitlines()[-1]


def test_a_run_of_an_unknown_format_is_refused(start: Start, tmp_path: Path) -> None:
    """Exit 2."""
    run = write_run(tmp_path / "run", range(4))
    saved = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**saved, "format": 99}))
    training = start(run, tmp_path / "out")

    assert 2 == training.wait(), training.stderr()
    assert "format 99" in training.stderr().splitlines()[-1]


def test_a_corrupt_line_is_skipped(start: Start, tmp_path: Path) -> None:
    """It is logged with file and line, and counted; the others are trained on."""
    good = [json.dumps({"messages": written(n).messages}) for n in range(9)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*good[:4], '{"messages": [', *good[4:]]) + "\n")
    training = start(tmp_path / "rows.jsonl", tmp_path / "out", holdout=0)

    assert 0 == training.wait(), training.stderr()
    assert "rows.jsonl:5 is not valid JSON" in training.stderr()
    assert "dropped=1 examples=9" in training.stderr()


@pytest.mark.parametrize(("name", "named"), [("taken", "is a file"), ("/proc/nowhere", "cannot create")])
def test_an_out_that_cannot_be_created_is_refused(
    start: Start, tmp_path: Path, name: str, named: str
) -> None:
    """One line, exit 2."""
    (tmp_path / "taken").write_text("")
    training = start(write_run(tmp_path / "run", range(4)), tmp_path / name)

    assert 2 == training.wait(), training.stderr()
    assert named in training.stderr().splitlines()[-1]


def test_rows_beyond_the_positions_of_a_rotary_model_are_logged(start: Start, tmp_path: Path) -> None:
    """It is trained all the same: rotary positions can be extended."""
    training = start(write_run(tmp_path / "run", range(4)), tmp_path / "out", seq_len=5000, holdout=0)

    assert 0 == training.wait(), training.stderr()
    assert "train.beyond_positions" in training.stderr()


def test_a_different_run_in_its_place_is_refused(start: Start, tmp_path: Path) -> None:
    """The checkpoint knows the rows it was trained on: exit 2, and the training can still be resumed with its
    own run.
    """
    run, other, out = write_run(tmp_path / "run", range(40)), tmp_path / "other", tmp_path / "out"
    assert 0 == start(run, out, max_steps=2).wait()
    training = start(write_run(other, range(1, 41)), out)

    assert 2 == training.wait(), training.stderr()
    assert "is not the stream of the checkpoint" in training.stderr().splitlines()[-1]
    assert 0 == start(run, out).wait()
