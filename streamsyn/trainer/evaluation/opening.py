"""From the configuration to the questions that are asked while training."""

import copy
from pathlib import Path
from typing import Any

import structlog

from streamsyn.config import Config
from streamsyn.trainer.evaluation.chat import Chat
from streamsyn.trainer.evaluation.grading import Exam
from streamsyn.trainer.evaluation.longbench import longbench_questions
from streamsyn.trainer.evaluation.needles import needle_questions
from streamsyn.trainer.evaluation.question import Question

log = structlog.get_logger()


def open_exam(config: Config, tokenizer: Any, model: Any, out: Path) -> Exam | None:
    """The questions of `train.needles` and `train.longbench`; None when neither is given.

    Args:
        config: The whole configuration.
        tokenizer: That of `model`; a copy of it is used.
        model: Says how many positions it knows, and what ends its answers.
        out: Where the training keeps its files.

    Raises:
        ConfigError: They cannot be asked, or there are none.
    """
    section = config.train
    if section.needles is None and section.longbench is None:
        return None
    chat = Chat(copy.deepcopy(tokenizer), _ends(model))
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    questions: list[Question] = []
    if section.needles is not None:
        seed = config.run.seed
        questions += needle_questions(section.needles, seed, chat, positions)
    if section.longbench is not None:
        longest = section.seq_len if positions is None else min(section.seq_len, positions)
        questions += longbench_questions(section.longbench, chat, longest)
    log.info("train.exam", questions=len(questions), parts=len({one.part for one in questions}))
    return Exam(questions, chat, out)


def _ends(model: Any) -> list[int]:
    ends = getattr(model.generation_config, "eos_token_id", None)
    return list(ends) if isinstance(ends, list) else [] if ends is None else [ends]
