"""One training from start to end: model, stream, loop. Every rank runs `train`; rank 0 alone has the
stream.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from streamsyn.config.command_sections import TrainSection
from streamsyn.config.loading import Config
from streamsyn.errors import ConfigError, SinkError, StreamsynError, TrainingFailed
from streamsyn.trainer.commands import Ranks
from streamsyn.trainer.controller import Controller, Totals
from streamsyn.trainer.evaluation.eval_servers import EvalServers
from streamsyn.trainer.evaluation.evaluations import Done, Evaluations, done_before, open_exam
from streamsyn.trainer.evaluation.heldout import HeldOutSet, control_examples, row_tokens
from streamsyn.trainer.examples import Example
from streamsyn.trainer.loop import Loop, Progress, Schedule
from streamsyn.trainer.metrics.mfu import balance_of, mfu_of
from streamsyn.trainer.metrics.record import TrainingMetrics
from streamsyn.trainer.metrics.trackers import FOLDER, consumer_report, start_tracking
from streamsyn.trainer.model.placed import Placed, place, start_accelerator
from streamsyn.trainer.model.pretrained import (
    check_compatibility,
    memory_errors_explained,
    model_dtype,
    read_model,
    read_tokenizer,
    sliced_weights,
)
from streamsyn.trainer.outdir import OutDirectory, record_checksum
from streamsyn.trainer.saving.checkpoint import Checkpoint, Checkpoints
from streamsyn.trainer.saving.publish import Publisher
from streamsyn.trainer.saving.store import Store
from streamsyn.trainer.signals import EXIT_STOPPED, stop_on_signals
from streamsyn.trainer.sources.locate import open_sources
from streamsyn.trainer.sources.run_samples import DaemonSamples
from streamsyn.trainer.stream.planner import Planner, PlanQueue
from streamsyn.trainer.stream.render import Renderer, read_template

log = structlog.get_logger()


Stops = Callable[[Callable[[], None]], AbstractContextManager[None]]
"""Makes a context in which a function is called when the training is to stop."""


def train(config: Config, source: str, model: str, out: Path, stops: Stops = stop_on_signals) -> int:
    """Train until the stream ends.

    Args:
        config: The resolved configuration.
        source: `--from`.
        model: The model to tune: a directory or a name on the hub.
        out: OUT.
        stops: How this rank is told to stop.

    Returns:
        The exit code: 0 when the stream has ended, 75 when the training was stopped before.

    Raises:
        StreamsynError: The training cannot start or continue; the message says why.
    """
    rank, world = place_among_ranks(os.environ)
    section = config.train
    check_shares(section, world)
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
        accelerator = start_accelerator(section, out / FOLDER)
        try:
            accelerator.wait_for_everyone()
            ranks = Ranks(rank, world, section.sequence_parallel)
            _check_shared(out, ranks)
            before = _last_checkpoint(Checkpoints(out, section.keep_checkpoints), ranks)
            store = Store(out, section, tokenizer, ranks)
            with memory_errors_explained(section):
                sliced = sliced_weights(model, accelerator)
                read = read_model(model, section, accelerator, seed=config.run.seed, sliced=sliced)
                placed = place(read, section, accelerator, dtype, sliced)
                if before is not None:
                    store.restore(placed, before)
            config = _with_packing(config, placed)
            code = _run(
                Training(config, source, out, tokenizer, placed, ranks, before, publisher, stops), store
            )
            accelerator.end_training()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()  # its threads must have ended before Python does
    return code


def _with_packing(config: Config, placed: Placed) -> Config:
    """The configuration with `train.packing` as the model needs it."""
    packing = "auto" if placed.packs else "none"
    return config.model_copy(update={"train": config.train.model_copy(update={"packing": packing})})


@dataclass(frozen=True, slots=True)
class Training:
    """What every rank has once the model is in place."""

    config: Config
    source: str
    out: Path
    tokenizer: PreTrainedTokenizerBase
    placed: Placed
    ranks: Ranks
    before: Checkpoint | None
    publisher: Publisher | None
    stops: Stops


def place_among_ranks(environ: Mapping[str, str]) -> tuple[int, int]:
    """The number of this rank, and how many ranks there are, from the launcher's environment variables.

    Raises:
        ConfigError: The variables are not numbers, or the address of rank 0 is missing.
    """
    given = {name: environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))}
    if not all(number.isdecimal() for number in given.values()):
        raise ConfigError(
            f"RANK and WORLD_SIZE must be numbers, not {given['RANK']!r} and {given['WORLD_SIZE']!r}: start "
            "the ranks with `accelerate launch`, or unset both"
        )
    rank, world = map(int, given.values())
    if world > 1 and not environ.get("MASTER_ADDR"):
        raise ConfigError(
            f"WORLD_SIZE is {world}, but MASTER_ADDR is not set: start the ranks with `accelerate launch`, "
            "or unset it"
        )
    return rank, world


def check_shares(section: TrainSection, world: int) -> None:
    """Check that the ranks can be divided into groups, and the rows of a step among the groups.

    Raises:
        ConfigError: They cannot.
    """
    degree, rows = section.sequence_parallel, section.rows_per_step
    if world % degree:
        raise ConfigError(
            f"train.sequence_parallel: {world} ranks cannot be divided into groups of {degree}; start a "
            f"multiple of {degree}"
        )
    groups = world // degree
    if rows % groups:
        among = f"{groups} ranks" if degree == 1 else f"{groups} groups of {degree} ranks"
        raise ConfigError(
            f"train.rows_per_step: {rows} rows cannot be divided among {among}; use a multiple of {groups}"
        )


_NOT_SHARED = "--out must be one folder on storage that all ranks share"


def _check_shared(out: Path, ranks: Ranks) -> None:
    """Check that all ranks have the same OUT: each writes its part of a checkpoint there.

    Raises:
        ConfigError: A rank does not see the record that rank 0 has just written.
    """
    if not ranks.agree(record_checksum(out)):
        raise ConfigError(f"{_NOT_SHARED}: they find different records of a training in it")


def _last_checkpoint(checkpoints: Checkpoints, ranks: Ranks) -> Checkpoint | None:
    """The newest checkpoint, the same on all ranks.

    Raises:
        SinkError: There are checkpoints, but none is whole.
        ConfigError: Ranks find different ones.
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
        raise ConfigError(f"{_NOT_SHARED}: they find different checkpoints in it")
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


def _run(training: Training, store: Store) -> int:
    info: dict[str, Any] = {} if training.before is None else training.before.info
    section, ranks = training.config.train, training.ranks
    progress = Progress(step=info.get("step", 0), skipped=info.get("skipped", 0))
    seed = training.config.run.seed
    loop = Loop(training.placed, ranks, section, seed, store, progress, training.publisher)
    if section.dry_step:
        with memory_errors_explained(section):
            loop.rehearse()
    if ranks.rank == 0:
        return _lead(training, loop, store, info)
    with training.stops(loop.stop), memory_errors_explained(section):
        loop.run(None)
    return 0


def _lead(training: Training, loop: Loop, store: Store, info: Mapping[str, Any]) -> int:
    """Rank 0's part: read the stream, decide what all ranks do, record it.

    Args:
        training: What every rank has.
        loop: The loop of this rank.
        store: What the loop saves with.
        info: `info` of the last checkpoint; empty without one.
    """
    section, publisher = training.config.train, training.publisher
    with ExitStack() as stack:
        try:
            controller, plans = _open(training, loop.progress, store, info, stack)
        except StreamsynError:
            loop.stop_other_ranks()
            raise

        def stop() -> None:
            loop.stop()
            plans.wake()
            for receiver in publisher.receivers if publisher is not None else ():
                receiver.hurry()

        if publisher is not None:
            stack.enter_context(publisher.servers)
        log.info("train.start", step=loop.progress.step, ranks=training.ranks.world, out=str(training.out))
        try:
            with training.stops(stop), memory_errors_explained(section):
                loop.run(controller.commands(lambda: loop.stopping))
                if publisher is not None:
                    publisher.finish(in_a_hurry=controller.stopped is not None)
                controller.record_servers()
        except StreamsynError as error:
            controller.stopped = str(error)
            with suppress(SinkError):  # the first error is the one to report
                controller.record_servers()
                _finish(controller, section)
            raise
        code = _finish(controller, section)
        model = training.out / "model"
        if code == 0:
            log.info("train.model", plain=f"the tuned model is in {model}", path=str(model))
        return code


def _open(
    training: Training, progress: Progress, store: Store, info: Mapping[str, Any], stack: ExitStack
) -> tuple[Controller, PlanQueue]:
    """Open the stream after what was trained on, and all that rank 0 writes; closed with `stack`."""
    config, placed, out, ranks = training.config, training.placed, training.out, training.ranks
    section = config.train
    renderer = Renderer(training.tokenizer, section.seq_len, section.overlong)
    control: list[Example] = []
    if section.control is not None:
        control = control_examples(section.control, section.control_samples, renderer, section.holdout)
    exam = open_exam(config, training.tokenizer, placed.plain, out)
    sources = open_sources(training.source, section, out)
    planner = Planner(section, config.run.seed, sources, renderer, store.stream, ranks=ranks.groups)
    stack.callback(planner.close)
    plans = stack.enter_context(PlanQueue(planner))
    held_out = HeldOutSet(planner, renderer, row_tokens(section), ranks.groups)
    done, kept = Done(), -1  # without a checkpoint everything starts anew, evaluations too
    if training.before is not None:
        done, kept = done_before(out / "metrics.jsonl", progress.step, exam), progress.step
    evaluations = Evaluations(
        section, held_out.rows, control, exam, ranks.world, done, info.get("evaluations")
    )
    track = start_tracking(placed.accelerator, section, out, progress.step)
    if isinstance(sources.stream, DaemonSamples):
        track = consumer_report(sources.stream, out, section.epochs, lambda: store.stream, track)
    mfu = mfu_of(placed.plain, placed.accelerator.device, ranks.world)
    balance = balance_of(placed.plain, ranks.groups)
    metrics = TrainingMetrics(out, kept, info.get("task_losses"), mfu, track, balance)
    schedule = Schedule(section, info.get("schedule"))
    totals = Totals(**info.get("totals", {}))
    servers = None
    if section.eval_servers and training.publisher is not None and exam is not None:
        questions = [one.for_servers() for one in exam.questions]
        servers = stack.enter_context(EvalServers(section, config.fleet, questions, out))
        training.publisher.receivers.append(servers)
    controller = Controller(
        section, ranks, plans, progress, store, schedule, metrics, evaluations, totals, servers
    )
    return controller, plans


def _finish(controller: Controller, section: TrainSection) -> int:
    """Record and log how the training ended.

    Returns:
        The exit code.

    Raises:
        ConfigError: No row of the stream can be trained on, and a key is the reason.
        TrainingFailed: The stream had nothing else to train on.
    """
    ended = controller.record_end()
    stream = ended["stream"]
    log.info(
        "train.done" if controller.stopped is None else "train.stopped",
        why=ended["why"],
        steps=ended["step"],
        examples=ended["examples"],
        tokens=ended["tokens"],
        dropped=ended["dropped"],
        skipped_steps=ended["skipped"],
        wait=f"{ended['wait_share']:.0%}",
        verdict=ended["verdict"] or "nothing trained on",
    )
    if changed := stream["changed"]:
        what = " and ".join(f"{count} {name}" for name, count in sorted(changed.items()))
        log.warning("train.template_changes", why=f"the chat template changes {what} of the samples")
    if controller.stopped is not None:
        return EXIT_STOPPED
    if ended["step"] == 0:
        if stream["rows_read"] and stream["rows_read"] == sum(stream["dropped"].values()):
            raise ConfigError(_why_all_dropped(stream["dropped"], section))
        left_out = [f"{count} {reason}" for reason, count in stream["dropped"].items()]
        left_out += [f"{stream['held_out']} held out"] * bool(stream["held_out"])
        why = f": of {stream['rows_read']} rows, {', '.join(left_out)}" if left_out else ""
        raise TrainingFailed(f"the stream ended without a sample to train on{why}")
    return 0


def _why_all_dropped(dropped: dict[str, int], section: TrainSection) -> str:
    """The most common reason why no row can be trained on, with the key to change."""
    reason, count = max(dropped.items(), key=lambda one: one[1])
    rows = sum(dropped.values())
    share = f"all {rows}" if count == rows else f"{count} of all {rows}"
    return {
        "overlong": f"train.seq_len = {section.seq_len}: {share} samples are longer",
        "template": f"train.chat_template: the template fails on {share} samples",
        "special_tokens": f"--from: {share} samples spell special tokens, which the tokenizer cannot read as "
        "text",
        "held_out": f"train.holdout = {section.holdout}: {share} samples are of held-out seeds",
        "empty_answer": f"--from: the answers of {share} samples are empty",
        "bad_row": f"--from: {share} rows are not conversations (`messages` of role and content, as `run` "
        "and `export` write them)",
    }[reason]
