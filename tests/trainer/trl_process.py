"""One process of a training with TRL: RUN OUT. Writes the answers of each step to OUT/trained-RANK.jsonl."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

import streamsyn
from tests.trainer import tiny

run, out = sys.argv[1:]
record = Path(out) / f"trained-{os.environ['RANK']}.jsonl"
answers: list[Any] = []
tokenizer = tiny.tokenizer()


class Watched(SFTTrainer):
    def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
        rows = inputs["labels"].tolist()
        answers.extend(tokenizer.decode([token for token in row if token != -100]) for row in rows)
        return super().training_step(model, inputs, *rest)  # type: ignore[no-untyped-call]


class Record(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with record.open("a") as file:
            file.write(json.dumps([state.global_step, answers]) + "\n")
        answers.clear()


samples = streamsyn.SampleDataset(run)
trainer = Watched(
    tiny.model(),
    args=SFTConfig(
        output_dir=out,
        max_length=None,
        max_steps=10**6,
        lr_scheduler_type="constant",
        save_steps=2,
        per_device_train_batch_size=2,
        accelerator_config={"dispatch_batches": False},
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    ),
    train_dataset=samples.as_hf(),
    processing_class=tokenizer,
    callbacks=[Record(), samples.callback()],
)
trainer.train(resume_from_checkpoint=get_last_checkpoint(out))
