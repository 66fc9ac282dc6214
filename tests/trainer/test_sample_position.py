"""TRL's SFTTrainer on a live run, stopped and resumed: every row is trained on once."""

import re
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

import streamsyn
from streamsyn import ConfigError, SampleDataset
from tests.builders import new_run, opened, sample, sink
from tests.trainer import tiny


def write(root: Path, count: int, *, finish: bool) -> None:
    """Have a run write samples whose answers tell them apart."""
    with opened(new_run(root), sink()) as log:
        first = log.samples.rows
        log.samples.append([numbered(at) for at in range(first, first + count)])
        if finish:
            log.finish()


def numbered(at: int) -> Any:
    """A sample whose answer is its number."""
    user, assistant = {"role": "user", "content": "which? " * 9}, {"role": "assistant", "content": f"{at}."}
    return sample(at, messages=[user, assistant])


class Trained(TrainerCallback):
    """Stops after a step, and knows which answers have been trained on in the steps up to each checkpoint."""

    def __init__(self, stop_at: int) -> None:
        self.stop_at = stop_at
        self.batches: list[Any] = []
        self.answers: list[str] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        self.answers += [answer for batch in self.batches for answer in batch]
        self.batches.clear()
        control.should_training_stop = state.global_step >= self.stop_at
        return control


def train(root: Path, out: Path, *, stop_at: int = 10**6, **given: Any) -> list[str]:
    """Train, or resume; returns the answers trained on, as the labels have them."""
    tokenizer, dataset, trained = tiny.tokenizer(), SampleDataset(root), Trained(stop_at)
    settings = {
        "output_dir": str(out),
        "max_length": None,
        "max_steps": 10**6,
        "lr_scheduler_type": "constant",
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **given,
    }

    class Watched(SFTTrainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            labels = [[token for token in row if token != -100] for row in inputs["labels"].tolist()]
            trained.batches.append([tokenizer.decode(row) for row in labels])
            return super().training_step(model, inputs, *rest)  # type: ignore[no-untyped-call]

    trainer = Watched(
        tiny.model(),
        args=SFTConfig(**settings),
        train_dataset=dataset.as_hf(),
        processing_class=tokenizer,
        callbacks=[trained, dataset.callback()],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(out)) if out.exists() else None)
    return trained.answers


def answers(first: int, end: int) -> list[str]:
    """The labels of rows: their answers alone, with the token that ends them."""
    return [f"{at}.<|end|>" for at in range(first, end)]


def test_a_training_resumes_behind_its_last_checkpoint(tmp_path: Path) -> None:
    """Rows of steps after the checkpoint are trained on again, from the weights before them; no others are.
    The labels are the answers alone.
    """
    run, out = tmp_path / "run", tmp_path / "out"
    write(run, 19, finish=False)
    first = train(run, out, stop_at=3, save_steps=2)
    write(run, 4, finish=False)
    writer = threading.Thread(target=write, args=(run, 13), kwargs={"finish": True})
    writer.start()
    second = train(run, out, stop_at=6, save_steps=3)
    third = train(run, out, save_steps=100)
    writer.join()

    assert answers(0, 12) == first
    assert answers(8, 24) == second[: len(answers(8, 24))]
    assert answers(24, 36) == third


def test_an_incomplete_last_step_is_left_for_later(tmp_path: Path) -> None:
    """Trainer drops the batches of a step that is not full; they come first if the run is taken up again."""
    run, out = tmp_path / "run", tmp_path / "out"
    write(run, 10, finish=True)
    assert answers(0, 8) == train(run, out, save_steps=1)
    write(run, 6, finish=True)

    assert answers(8, 16) == train(run, out)


def test_what_hides_the_position_is_refused(tmp_path: Path) -> None:
    """In words, before anything is trained on."""
    run, out = tmp_path / "run", tmp_path / "out"
    write(run, 8, finish=True)

    with pytest.raises(ConfigError, match="dataloader_num_workers: must be 0"):
        train(run, tmp_path / "workers", dataloader_num_workers=1)
    with pytest.raises(ConfigError, match="set packing=False"):
        train(run, tmp_path / "packed", packing=True, max_length=512)
    train(run, out, stop_at=1, save_steps=1)
    state = out / "checkpoint-1" / "trainer_state.json"
    state.write_text(state.read_text().replace("SamplePosition", "Other"))
    with pytest.raises(ConfigError, match="it was saved without this callback"):
        train(run, out)


def test_the_guide_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of the guide for other trainers, on a CPU; run once more it finds nothing left."""
    guide = Path(streamsyn.__file__).parents[1] / "deploy" / "guides" / "other-trainers.md"
    blocks = re.findall(r"^```python\n(.*?)^```$", guide.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    live, torchdata = (block for block in blocks if "SampleDataset" in block)
    on_cpu = (
        "SFTConfig(use_cpu=True, bf16=False, disable_tqdm=True, report_to=[], dataloader_pin_memory=False,"
    )
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "runs" / "first", 12, finish=True)
    tiny.write_model(tmp_path / "models" / "my-base")
    for _ in range(2):
        code = live.replace("SFTConfig(", on_cpu).replace("save_steps=100", "save_steps=4")
        names: dict[str, Any] = {}
        exec(code, names)
        assert 12 == names["trainer"].state.global_step
        assert 11 == names["samples"].state_dict()["seq"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchdata's own
        exec(torchdata, names)
    assert [1, 3, 5, 7, 9, 11] == [row["seq"] for row in names["batch"]]
