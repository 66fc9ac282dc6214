"""Questions that the tuned model answers during training: decoding, grading, metrics, and OUT/answers/."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, TypeAlias

import numpy
import orjson
import structlog
import torch
from accelerate.utils import DistributedType

from streamsyn.answer_text import without_thought
from streamsyn.errors import ConfigError, SinkError
from streamsyn.io.durable import write_whole
from streamsyn.scoring.answer_metrics import answer_score
from streamsyn.scoring.suites.ruler_suite import string_match_all
from streamsyn.scoring.suites.suite_question import SuiteQuestion, as_user
from streamsyn.trainer.commands import Prompt, Ranks
from streamsyn.trainer.model.attention import SEGMENTS, VARLEN
from streamsyn.trainer.model.placed import Placed
from streamsyn.trainer.stream.render import ChatTokenizer, Renderer, Unrenderable, chat_text
from streamsyn.trainer.stream.spelled_tokens import Unspeakable

log = structlog.get_logger()


class Chat:
    """Converts messages to prompts and tokens to text, for one model. Not thread-safe.

    Args:
        tokenizer: The model's tokenizer, not shared with anything else.
        more_stops: Further stop tokens besides those that the chat template puts after an answer.

    Raises:
        ConfigError: The model's chat template cannot be used.

    Attributes:
        stop: Tokens that end an answer.
    """

    def __init__(self, tokenizer: ChatTokenizer, more_stops: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        renderer = Renderer(tokenizer, 0, "drop")
        self._spelled = renderer.spelled
        trained_stop = renderer.stop
        eos = tokenizer.eos_token_id
        self.stop = frozenset((trained_stop, *more_stops, *(() if eos is None else (eos,))))

    def prompt(self, message: str, max_new_tokens: int) -> Prompt:
        """The prompt for an answer to a user message.

        Raises:
            ConfigError: The chat template refuses the message.
        """
        return Prompt(numpy.array(self._tokens(message), dtype=numpy.int32), max_new_tokens, self.stop)

    def length(self, message: str) -> int:
        """The number of tokens of the prompt for a message.

        Raises:
            ConfigError: The chat template refuses the message.
        """
        return len(self._tokens(message))

    def tokens(self, text: str) -> int:
        """The number of tokens of a text."""
        return len(self.encode(text))

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without special tokens."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens that `encode` returned."""
        text: str = self._tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)
        return text

    def answer(self, tokens: Sequence[int]) -> str:
        """The text of an answer, without special tokens."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text.strip()

    def _tokens(self, message: str) -> list[int]:
        messages = [{"role": "user", "content": message}]
        try:
            hidden = self._spelled.hidden(messages)
            text = chat_text(self._tokenizer, hidden or messages, asks=True)
            return self._spelled.encode(text) if hidden else self.encode(text)
        except (Unrenderable, Unspeakable) as error:
            why = f"train.needles or train.longbench: a question cannot be rendered: {error}"
            raise ConfigError(why) from error


Answer = tuple[int, ...]
_LOG_EVERY_S = 30.0
_ATTENTION = "_attn_implementation"
"""transformers reads it at each forward pass. Its public setter would look for kernels on the hub."""


def answer_all(
    placed: Placed, prompts: Sequence[Prompt | None], ranks: Ranks, wants_to_stop: Callable[[], bool]
) -> list[Answer]:
    """Answer the prompts of this rank. A collective: all ranks call it with the same number of prompts.

    Args:
        placed: The model; it is unchanged afterwards.
        prompts: Prompts of this rank; None stands for padding, whose answer is empty.
        ranks: All ranks.
        wants_to_stop: Whether this rank has to stop. All ranks then stop before the next prompt.

    Returns:
        The tokens of each answer without the stop token; fewer than prompts if a rank wanted to stop.
    """
    # Under FSDP2 each forward pass needs all ranks.
    sharded = placed.accelerator.distributed_type == DistributedType.FSDP
    answers: list[Answer] = []
    logged_at = time.monotonic()
    with torch.no_grad(), answering(placed):
        for prompt in prompts:
            if ranks.any(wants_to_stop()):
                break
            if ranks.rank == 0 and time.monotonic() - logged_at > _LOG_EVERY_S:
                log.info("train.answering", done=len(answers) * ranks.world, of=len(prompts) * ranks.world)
                logged_at = time.monotonic()
            any_wants_more = ranks.any if sharded else bool
            answers.append(_answer(placed.plain, prompt, placed.accelerator.device, any_wants_more))
    return answers


@contextmanager
def answering(placed: Placed) -> Iterator[None]:
    """Inside this context the model is in evaluation mode and its attention supports a cache."""
    config = placed.plain.config
    before = getattr(config, _ATTENTION)
    try:
        placed.model.eval()
        if before in (SEGMENTS, VARLEN):
            setattr(config, _ATTENTION, "sdpa")
        yield
    finally:
        setattr(config, _ATTENTION, before)
        placed.model.train()


def _answer(
    model: Any, prompt: Prompt | None, device: torch.device, any_wants_more: Callable[[bool], bool]
) -> Answer:
    """One answer. `any_wants_more` takes whether this rank wants a further token, and returns whether any
    rank does.
    """
    answer: list[int] = []
    wants_more = prompt is not None
    inputs = torch.zeros((1, 1), dtype=torch.long, device=device)
    if prompt is not None:
        inputs = torch.from_numpy(prompt.tokens).long()[None].to(device)
    cache: Any = None
    while any_wants_more(wants_more):
        if prompt is None or not wants_more:  # other ranks need this rank's shards of the weights
            model(input_ids=inputs[:, -1:], use_cache=False, logits_to_keep=1)
            continue
        out = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = getattr(out, "past_key_values", None)
        chosen = out.logits[:, -1].argmax(-1, keepdim=True)
        # Purely recurrent models have other caches: they read the prompt again for each token.
        inputs = chosen if cache is not None else torch.cat((inputs, chosen), dim=1)
        token = int(chosen)
        if token in prompt.stop:
            wants_more = False
        else:
            answer.append(token)
            wants_more = len(answer) < prompt.max_new_tokens
    return tuple(answer)


Grading: TypeAlias = Literal["recall", "f1", "rouge_l"]


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """A prompt and its expected answer.

    Attributes:
        exam: The exam that it belongs to: `needles` or `longbench`.
        part: The part of the exam, which has a metric of its own, such as `needle_single_2048`.
        id: Unique within the part.
        prompt: The prompt, in tokens.
        wanted: With `recall`, texts that should all occur in the answer; otherwise alternative right answers.
        grading: The metric.
        message: The user message of the prompt.
    """

    exam: str
    part: str
    id: str
    prompt: Prompt
    wanted: tuple[str, ...]
    grading: Grading
    message: str = ""

    def score(self, answer: str) -> float:
        """The score of an answer, from 0 to 1. Reasoning in front of the answer is left out."""
        answer = without_thought(answer)
        if self.grading == "recall":
            return string_match_all(answer, self.wanted)
        metric = self.grading
        return max(answer_score(metric, answer, gold) for gold in self.wanted)

    def for_servers(self) -> SuiteQuestion:
        """The same question, to be asked of a server that has the model."""
        return SuiteQuestion(
            suite=self.exam,
            part=self.part,
            id=self.id,
            messages=as_user(self.message),
            max_tokens=self.prompt.max_new_tokens,
            wanted=self.wanted,
            rule=self.score,
        )


def rendered(asked: SuiteQuestion, chat: Chat) -> Question:
    """A question of a suite, graded by recall, for the model at hand.

    Raises:
        ConfigError: The chat template refuses it.
    """
    prompt = chat.prompt(asked.prompt, asked.max_tokens)
    return Question(asked.suite, asked.part, asked.id, prompt, asked.wanted, "recall", asked.prompt)


FOLDER = "answers"


class Exam:
    """All questions of a training.

    Args:
        questions: Grouped by exam, and within an exam by part.
        chat: Decodes answers.
        out: OUT.
    """

    def __init__(self, questions: Sequence[Question], chat: Chat, out: Path) -> None:
        self.questions = tuple(questions)
        self._chat = chat
        self._folder = out / FOLDER

    @property
    def names(self) -> frozenset[str]:
        """The names of the exams. A metric of that name means that the exam was finished."""
        return frozenset(question.exam for question in self.questions)

    def grade(self, step: int, answers: Sequence[Sequence[int]]) -> dict[str, float]:
        """Return the mean score of each finished part, and the mean over the parts of each finished exam.

        All answers are written to a file such as OUT/answers/step-0000100.jsonl.

        Args:
            step: Step of the training.
            answers: Tokens of the answers; fewer than there are questions if the exam was stopped.

        Raises:
            SinkError: The file cannot be written.
        """
        scores: list[float | None] = [None] * len(self.questions)
        lines = []
        for number, (question, tokens) in enumerate(zip(self.questions, answers, strict=False)):
            text = self._chat.answer(tokens)
            score = scores[number] = question.score(text)
            lines.append(_line(question, text, score))
        self._write(step, b"".join(lines))
        graded = zip(self.questions, scores, strict=True)
        return mean_scores((one.exam, one.part, score) for one, score in graded)

    def _write(self, step: int, data: bytes) -> None:
        try:
            self._folder.mkdir(exist_ok=True)
        except OSError as error:
            raise SinkError(f"cannot make {self._folder}: {error.strerror}") from error
        write_whole(self._folder / f"step-{step:07}.jsonl", data)


def mean_scores(graded: Iterable[tuple[str, str, float | None]]) -> dict[str, float]:
    """The mean score of each finished part, and the mean over the parts of each finished exam.

    Args:
        graded: Exam, part and score of each question; None as the score of one without an answer.
    """
    exams: dict[str, dict[str, list[float | None]]] = {}
    for exam, part, score in graded:
        exams.setdefault(exam, {}).setdefault(part, []).append(score)
    found: dict[str, float] = {}
    for exam, parts in exams.items():
        known = {part: [score for score in scores if score is not None] for part, scores in parts.items()}
        means = {part: fmean(some) for part, some in known.items() if len(some) == len(parts[part])}
        found |= means
        if len(means) == len(parts):
            found[exam] = fmean(means.values())
    return found


def _line(question: Question, answer: str, score: float) -> bytes:
    line = {
        "exam": question.exam,
        "part": question.part,
        "id": question.id,
        "prompt_tokens": len(question.prompt.tokens),
        "answer": answer,
        "wanted": question.wanted,
        "grading": question.grading,
        "score": round(score, 4),
    }
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
