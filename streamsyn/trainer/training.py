"""One training, put together: model, stream, loop. Every rank comes through here; rank 0 has the stream."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from streamsyn.config.loading import Config
from streamsyn.config.train_section import TrainSection
from streamsyn.errors import ConfigError, SinkError, StreamsynError, TrainingFailed
from streamsyn.trainer.commands import Ranks
from streamsyn.trainer.controller import Controller, Totals
from streamsyn.trainer.evaluation.evaluations import Done, Evaluations, done_before, open_exam
from streamsyn.trainer.evaluation.exam import Exam
from streamsyn.trainer.evaluation.heldout import HeldOutSet, control_examples
from streamsyn.trainer.examples import Example
from streamsyn.trainer.loop import Loop, Progress, Schedule
from streamsyn.trainer.metrics.mfu import speed_of
from streamsyn.trainer.metrics.record import TrainingMetrics
from streamsyn.trainer.metrics.trackers import FOLDER, start_tracking
from streamsyn.trainer.model.accelerator import start_accelerator
from streamsyn.trainer.model.placed import Placed, place
from streamsyn.trainer.model.pretrained import (
    check_compatibility,
    memory_errors_explained,
    model_dtype,
    read_model,
    read_tokenizer,
)
from streamsyn.trainer.outdir import OutDirectory
from streamsyn.trainer.saving.checkpoint import Checkpoint, Checkpoints
from streamsyn.trainer.saving.publish import Publisher
from streamsyn.trainer.saving.store import Store, restore_optimizer
from streamsyn.trainer.signals import EXIT_STOPPED, stop_on_signals
from streamsyn.trainer.sources.locate import open_sources
from streamsyn.trainer.stream.planner import Planner, PlanQueue
from streamsyn.trainer.stream.render import Renderer, read_template

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Setting:
    """What every rank knows once the model is in place."""

    config: Config
    source: str
    out: Path
    tokenizer: PreTrainedTokenizerBase
    placed: Placed
    ranks: Ranks
    before: Checkpoint | None
    publisher: Publisher | None


def train(config: Config, source: str, model: str, out: Path) -> int:
    """Train until the stream ends; the exit code: 0 then, 75 when stopped before.

    Raises:
        StreamsynError: It cannot be done; the message says why.
    """
    rank, world = place_among_ranks(os.environ)
    section = config.train
    if section.rows_per_step % world:
        raise ConfigError(
            f"train.rows_per_step: {section.rows_per_step} rows cannot be shared out among {world} ranks"
        )
    dtype = model_dtype(model)
    tokenizer = read_tokenizer(model, read_template(section.chat_template))
    check_compatibility(model, tokenizer, section.seq_len)
    publisher = None
    if section.publish is not None:
        publisher = Publisher(out, section.publish, config.fleet, tokenizer, rank)
    with _own_directory(out, rank) as directory:
        if directory is not None:
            directory.claim(config, model)
            Checkpoints(out, section.keep_checkpoints).prepare()
        accelerator = start_accelerator(section, section.rows_per_step // world, out / FOLDER)
        try:
            accelerator.wait_for_everyone()
            ranks = Ranks(rank, world)
            before = _last_checkpoint(Checkpoints(out, section.keep_checkpoints), ranks)
            saved = None if before is None else before.folder / "model"
            seed = config.run.seed
            with memory_errors_explained(section):
                if section.lora is None:
                    read = read_model(str(saved or model), section, accelerator, None, seed=seed)
                else:
                    read = read_model(model, section, accelerator, saved, seed=seed)
                placed = place(read, section, accelerator, dtype)
                if before is not None:
                    restore_optimizer(placed, before)
            code = _run(Setting(config, source, out, tokenizer, placed, ranks, before, publisher))
            accelerator.end_training()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()  # its threads must not be there when Python ends
    return code


def place_among_ranks(environ: Mapping[str, str]) -> tuple[int, int]:
    """Which rank we are, and of how many, as a launcher says."""
    told = {name: environ.get(name, without) for name, without in (("RANK", "0"), ("WORLD_SIZE", "1"))}
    if not all(number.isdecimal() for number in told.values()):
        raise ConfigError(f"RANK and WORLD_SIZE are {told['RANK']!r} and {told['WORLD_SIZE']!r}: no numbers")
    rank, world = map(int, told.values())
    if world > 1 and not environ.get("MASTER_ADDR"):
        raise ConfigError(
            f"WORLD_SIZE is {world}, but MASTER_ADDR is not set: start the ranks by `accelerate launch`, or "
            "unset it"
        )
    return rank, world


def _last_checkpoint(checkpoints: Checkpoints, ranks: Ranks) -> Checkpoint | None:
    """The newest one, the same for all ranks.

    Raises:
        SinkError: There are some, and none is whole.
        ConfigError: Ranks see different ones.
    """
    found, failure = None, None
    try:
        found = checkpoints.newest()
    except SinkError as error:
        failure = error
    agreed = ranks.agree(-2 if failure is not None else -1 if found is None else found.step)
    if failure is not None:
        raise failure
    if not agreed:
        raise ConfigError("--out is not one folder for all ranks: they find different checkpoints in it")
    return found


@contextmanager
def _own_directory(out: Path, rank: int) -> Iterator[OutDirectory | None]:
    """OUT, locked by rank 0."""
    if rank != 0:
        yield None
        return
    directory = OutDirectory(out)
    try:
        yield directory
    finally:
        directory.close()


def _run(setting: Setting) -> int:
    info: dict[str, Any] = {} if setting.before is None else setting.before.info
    section, ranks = setting.config.train, setting.ranks
    store = Store(setting.out, section, setting.tokenizer, ranks.rank)
    publisher = setting.publisher
    progress = Progress(step=info.get("step", 0), skipped=info.get("skipped", 0))
    loop = Loop(setting.placed, ranks, section, setting.config.run.seed, store, progress, publisher)
    if setting.before is not None:
        store.stream = setting.before.stream
    if ranks.rank != 0:
        with stop_on_signals(loop.stop), memory_errors_explained(section):
            loop.run(None)
        return 0
    with ExitStack() as stack:
        try:
            control, exam = _open_tests(setting)
            plans, held_out = _open_stream(setting, stack)
            done, kept = Done(), -1  # without a checkpoint all begins anew, what was measured too
            if setting.before is not None:
                done, kept = done_before(setting.out / "metrics.jsonl", progress.step, exam), progress.step
            evaluations = Evaluations(
                section, held_out.rows, control, exam, ranks.world, done, info.get("evaluations")
            )
            track = start_tracking(setting.placed.accelerator, section, setting.out, progress.step)
            speed = speed_of(setting.placed.plain, setting.placed.accelerator.device, ranks.world)
            figures = TrainingMetrics(setting.out, kept, info.get("task_losses"), speed, track)
        except StreamsynError:
            loop.call_off()
            raise
        schedule = Schedule(section, info.get("schedule"))
        totals = Totals(**info.get("totals", {}))
        director = Controller(section, ranks, plans, progress, store, schedule, figures, evaluations, totals)

        def stop() -> None:
            loop.stop()
            plans.wake()
            if publisher is not None:
                publisher.servers.hurry()

        if publisher is not None:
            stack.enter_context(publisher.servers)
        log.info("train.start", step=progress.step, ranks=ranks.world, out=str(setting.out))
        try:
            with stop_on_signals(stop), memory_errors_explained(section):
                loop.run(director.orders(lambda: loop.stopping))
                if publisher is not None and director.stopped is None:
                    publisher.servers.finish()
        except StreamsynError as error:
            director.stopped = str(error)
            with suppress(SinkError):  # the first error is the one to tell
                _close(director, progress, totals, figures, plans, section)
            raise
        return _close(director, progress, totals, figures, plans, section)


def _open_tests(setting: Setting) -> tuple[list[Example], Exam | None]:
    """What is evaluated besides samples that are held out of the stream."""
    section = setting.config.train
    control: list[Example] = []
    if section.control is not None:
        renderer = Renderer(setting.tokenizer, section.seq_len, section.overlong)
        control = control_examples(section.control, section.control_samples, renderer)
    return control, open_exam(setting.config, setting.tokenizer, setting.placed.plain, setting.out)


def _open_stream(setting: Setting, stack: ExitStack) -> tuple[PlanQueue, HeldOutSet]:
    """The stream, opened behind what was trained on before; closed with `stack`."""
    section, world = setting.config.train, setting.ranks.world
    renderer = Renderer(setting.tokenizer, section.seq_len, section.overlong)
    sources = open_sources(setting.source, section, setting.out)
    state = None if setting.before is None else setting.before.stream
    planner = Planner(section, setting.config.run.seed, sources, renderer, state, ranks=world)
    stack.callback(planner.close)
    held_out = HeldOutSet(planner, renderer, section.seq_len, world)
    return stack.enter_context(PlanQueue(planner)), held_out


def _close(
    director: Controller,
    progress: Progress,
    totals: Totals,
    figures: TrainingMetrics,
    plans: PlanQueue,
    section: TrainSection,
) -> int:
    """Say what came of it; the exit code."""
    said = plans.figures
    ended = figures.end(
        {
            "step": progress.step,
            "why": director.why,
            "steps_of_run": director.trained,
            "skipped": progress.skipped,
            "examples": totals.examples,
            "tokens": totals.tokens,
            "target_tokens": totals.target_tokens,
            "dropped": sum(said["dropped"].values()),
            "stream": said,
        },
        plans.waited_s,
        plans.stream_waited_s,
    )
    log.info(
        "train.done" if director.stopped is None else "train.stopped",
        why=director.why,
        steps=progress.step,
        examples=totals.examples,
        tokens=totals.tokens,
        dropped=ended["dropped"],
        skipped_steps=progress.skipped,
        wait=f"{ended['wait_share']:.0%}",
        verdict=ended["verdict"] or "nothing trained on",
    )
    if director.stopped is not None:
        return EXIT_STOPPED
    if progress.step == 0:
        if said["rows_read"] and said["rows_read"] == sum(said["dropped"].values()):
            raise ConfigError(_why_all_dropped(said["dropped"], section))
        left = [f"{count} {reason}" for reason, count in said["dropped"].items()]
        left += [f"{said['held_out']} held out"] * bool(said["held_out"])
        why = f": of {said['rows_read']} rows, {', '.join(left)}" if left else ""
        raise TrainingFailed(f"the stream ended without a sample to train on{why}")
    return 0


def _why_all_dropped(dropped: dict[str, int], section: TrainSection) -> str:
    """The commonest reason for which no row can be trained on, and the key that it hangs on."""
    reason, count = max(dropped.items(), key=lambda one: one[1])
    rows = sum(dropped.values())
    many = f"all {rows}" if count == rows else f"{count} of all {rows}"
    return {
        "overlong": f"train.seq_len = {section.seq_len}: {many} samples are longer",
        "template": f"train.chat_template: the template refuses {many} samples",
        "empty_answer": f"--from: the answers of {many} samples are empty",
        "bad_row": f"--from: {many} rows are no conversations (`messages` of role and content, as `run` and "
        f"`export` write them)",
    }[reason]
