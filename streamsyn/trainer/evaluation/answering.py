"""A user's message as tokens, as the tuned model is given it; and its answer as text.

Answers of the model that is being tuned, word for word the likeliest: no chance has a part in them.

The attention that trains rows of samples knows no cache, so another one takes its place meanwhile.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
import structlog
import torch
from accelerate.utils import DistributedType

from streamsyn.errors import ConfigError
from streamsyn.trainer.commands import Prompt, Ranks
from streamsyn.trainer.model.attention import SEGMENTS, VARLEN
from streamsyn.trainer.model.placed import Placed
from streamsyn.trainer.stream.render import ChatTokenizer, Renderer, Unrenderable, chat_text

log = structlog.get_logger()


class Chat:
    """Prompts and answers of one model. Not for two threads at a time.

    Args:
        tokenizer: The model's; nobody else may be using it.
        more_stops: Tokens that end an answer besides the ones that the model is trained to end it with.

    Raises:
        ConfigError: The model's chat template is of no use.

    Attributes:
        stop: Tokens that end an answer.
    """

    def __init__(self, tokenizer: ChatTokenizer, more_stops: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        taught = Renderer(tokenizer, 0, "drop").stop
        eos = tokenizer.eos_token_id
        ends = (taught, *more_stops, *(() if eos is None else (eos,)))
        self.stop = frozenset(ends)

    def prompt(self, message: str, max_new_tokens: int) -> Prompt:
        """The prompt that asks the model for an answer to a message.

        Raises:
            ConfigError: The chat template refuses the message.
        """
        return Prompt(numpy.array(self._tokens(message), dtype=numpy.int32), max_new_tokens, self.stop)

    def length(self, message: str) -> int:
        """Tokens of the prompt of a message.

        Raises:
            ConfigError: The chat template refuses the message.
        """
        return len(self._tokens(message))

    def encode(self, text: str) -> list[int]:
        """The tokens of a text by itself."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens of a text."""
        text: str = self._tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)
        return text

    def answer(self, tokens: Sequence[int]) -> str:
        """The text of an answer, without what is no text."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text.strip()

    def _tokens(self, message: str) -> list[int]:
        try:
            text = chat_text(self._tokenizer, [{"role": "user", "content": message}], asks=True)
        except Unrenderable as error:
            why = f"train.needles or train.longbench: a question cannot be asked: {error}"
            raise ConfigError(why) from error
        return self.encode(text)


Answer = tuple[int, ...]
_SAY_EVERY_S = 30.0
_ATTENTION = "_attn_implementation"
"""What transformers looks up at each pass; the setter that it makes public looks for kernels on the hub."""


def answer_all(
    placed: Placed, prompts: Sequence[Prompt | None], ranks: Ranks, wants_to_stop: Callable[[], bool]
) -> list[Answer]:
    """The answers of this rank, in tokens, stop tokens left out; fewer of them when a rank wants to stop.

    Every rank calls it with as many prompts; None is one that has no answer. After it the model is as it was.
    """
    # Where weights are sharded, each pass needs all ranks.
    together = placed.accelerator.distributed_type == DistributedType.FSDP
    answers: list[Answer] = []
    said_at = time.monotonic()
    with torch.no_grad(), answering(placed):
        for prompt in prompts:
            if ranks.any(wants_to_stop()):
                break
            if ranks.rank == 0 and time.monotonic() - said_at > _SAY_EVERY_S:
                log.info("train.answering", done=len(answers) * ranks.world, of=len(prompts) * ranks.world)
                said_at = time.monotonic()
            goes_on = ranks.any if together else bool
            answers.append(_answer(placed.plain, prompt, placed.accelerator.device, goes_on))
    return answers


@contextmanager
def answering(placed: Placed) -> Iterator[None]:
    """Within, the model is in evaluation mode and its attention takes caches; afterwards all is as before."""
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
    model: Any, prompt: Prompt | None, device: torch.device, goes_on: Callable[[bool], bool]
) -> Answer:
    """One answer. `goes_on` is told whether this rank wants another token, and says whether any rank does."""
    said: list[int] = []
    wanting = prompt is not None
    fed = torch.zeros((1, 1), dtype=torch.long, device=device)
    if prompt is not None:
        fed = torch.from_numpy(prompt.tokens).long()[None].to(device)
    cache: Any = None
    while goes_on(wanting):
        if prompt is None or not wanting:  # the others need this rank's share of the weights
            model(input_ids=fed[:, -1:], use_cache=False, logits_to_keep=1)
            continue
        out = model(input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        fed = out.logits[:, -1].argmax(-1, keepdim=True)
        token = int(fed)
        if token in prompt.stop:
            wanting = False
        else:
            said.append(token)
            wanting = len(said) < prompt.max_new_tokens
    return tuple(said)
