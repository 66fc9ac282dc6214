"""A user's message as tokens, as the tuned model is given it; and its answer as text."""

from collections.abc import Sequence

import numpy

from streamsyn.errors import ConfigError
from streamsyn.trainer.evaluation.question import Prompt
from streamsyn.trainer.stream.render import ChatTokenizer, Renderer, Unrenderable, chat_text


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
