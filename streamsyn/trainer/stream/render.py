"""A chat template of the user's, in place of the tokenizer's own: `train.chat_template`.

Samples as tokens: the model's own chat template, and which tokens carry loss.

The prompt is what the model will be given (with what the template puts in front of an answer); targets are
the answer and the token that ends it. A conversation of many turns is trained on its last answer alone.
"""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy
from jinja2 import TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from streamsyn.errors import ConfigError
from streamsyn.trainer.examples import Dropped, Example, Key

_TAG_OF_TRANSFORMERS = "generation"


def read_template(path: str | None) -> str | None:
    """The text of a template; None where none is named.

    Raises:
        ConfigError: It cannot be read, or is no Jinja.
    """
    if path is None:
        return None
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"train.chat_template: cannot read {path}: {error}") from error
    try:
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except TemplateSyntaxError as error:
        if _TAG_OF_TRANSFORMERS not in str(error.message):
            raise ConfigError(f"train.chat_template: {path}:{error.lineno}: {error.message}") from error
    return text


MIN_PROMPT_TOKENS = 16
"""An over-long sample of whose prompt less than this would be left is dropped."""

_PROBE = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]


class ChatTokenizer(Protocol):
    """What is used of a tokenizer of transformers."""

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text."""
        ...

    @property
    def chat_template(self) -> Any:
        """The template, if there is one."""
        ...

    @property
    def all_special_ids(self) -> list[int]:
        """Tokens that stand for no text and have a role."""
        ...

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """Tokens that were added to the vocabulary, and whether they are `special`."""
        ...

    @property
    def apply_chat_template(self) -> Any:
        """Puts messages into the model's form."""
        ...

    @property
    def decode(self) -> Any:
        """Text of tokens."""
        ...

    def __call__(self, text: Any, **options: Any) -> Mapping[str, Any]:
        """Tokens of texts."""
        ...


class Unrenderable(Exception):
    """Raised when messages cannot be put into the model's form; its text says why."""


def chat_text(tokenizer: ChatTokenizer, messages: Sequence[dict[str, str]], *, asks: bool) -> str:
    """Messages in the model's form; with `asks` also what the template puts in front of an answer.

    Raises:
        Unrenderable: The template fails on them.
    """
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
    except Exception as error:  # a template is not our code, and may fail in any way
        raise Unrenderable(f"the chat template refuses it: {error}") from error
    return text


class Renderer:
    """Makes examples of rows with `messages`. Safe to call from several threads.

    Args:
        tokenizer: That of the model to be tuned, with a chat template.
        seq_len: Tokens of an example at most.
        overlong: What becomes of longer ones: `drop`, or `truncate`, which cuts the middle out of the
            prompt's tokens and never touches the answer.

    Raises:
        ConfigError: The tokenizer has no chat template, or one that cannot be trained on.

    Attributes:
        stop: The token that ends an answer.
    """

    def __init__(self, tokenizer: ChatTokenizer, seq_len: int, overlong: Literal["drop", "truncate"]) -> None:
        self._tokenizer = tokenizer
        self._seq_len = seq_len
        self._overlong = overlong
        self._one_by_one = threading.Lock()  # a tokenizer is not for two threads at a time
        self._learn_ending()

    def render_batch(self, rows: Sequence[tuple[dict[str, Any], Key]]) -> list[Example | Dropped]:
        """For each row an example, or why there is none. Takes a while: call it in a thread."""
        with self._one_by_one:
            texts = [self._texts(row) for row, _ in rows]
            good = [text for pair in texts if not isinstance(pair, Dropped) for text in pair]
            tokens = iter(self._encode(good) if good else ())
            made: list[Example | Dropped] = []
            for (row, key), pair in zip(rows, texts, strict=True):
                if isinstance(pair, Dropped):
                    made.append(pair)
                else:
                    made.append(self._example(row, key, pair, next(tokens), next(tokens)))
            return made

    def _learn_ending(self) -> None:
        """Find out how the template ends an answer, and whether a small conversation can be trained on."""
        if not self._tokenizer.chat_template:
            raise ConfigError(
                "the model's tokenizer has no chat template to put samples into: set train.chat_template"
            )
        try:
            prompt, whole = self._as_texts(_PROBE)
            _, found, behind = whole.rpartition(_PROBE[-1]["content"])
            if not found:
                raise Unrenderable("the template leaves the answer out")
            self._tail = self._from_special(behind)
            stop = self._tail[0] if self._tail else self._tokenizer.eos_token_id
            if stop is None:
                raise Unrenderable("nothing ends an answer: neither the template nor an eos token")
            self.stop = stop
            self._split(prompt, whole, *self._encode([prompt, whole]))
        except Unrenderable as error:
            raise ConfigError(f"the model's chat template cannot be trained on: {error}") from error

    def _from_special(self, behind: str) -> list[int]:
        """The tokens of what stands behind an answer, from the first special one on.

        Those before it are not always the same: they may be one token with the end of the answer.
        """
        added = self._tokenizer.added_tokens_decoder.items()
        special = {*self._tokenizer.all_special_ids, *(number for number, token in added if token.special)}
        tokens = self._encode([behind])[0]
        at = next((at for at, token in enumerate(tokens) if token in special), len(tokens))
        return tokens[at:]

    def _texts(self, row: dict[str, Any]) -> tuple[str, str] | Dropped:
        """The prompt, and the prompt with its answer; or why there are none."""
        messages = _conversation(row)
        if isinstance(messages, Dropped):
            return messages
        try:
            return self._as_texts(messages)
        except Unrenderable as error:
            return Dropped("template", str(error))

    def _as_texts(self, messages: list[dict[str, str]]) -> tuple[str, str]:
        prompt = chat_text(self._tokenizer, messages[:-1], asks=True)
        return prompt, chat_text(self._tokenizer, messages, asks=False)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        # The template has written what a tokenizer would add.
        encoded = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def _example(
        self, row: dict[str, Any], key: Key, texts: tuple[str, str], prompt: list[int], whole: list[int]
    ) -> Example | Dropped:
        try:
            tokens = self._split(*texts, prompt, whole)
        except Unrenderable as error:
            return Dropped("template", str(error))
        loss_from, answer = len(prompt), len(tokens) - len(prompt)
        if len(tokens) > self._seq_len:
            room = self._seq_len - answer
            if self._overlong == "drop" or room < MIN_PROMPT_TOKENS:
                return Dropped("overlong", f"{len(tokens)} tokens, {answer} of them its answer")
            loss_from, tail = room, room - room // 2
            tokens = prompt[: room // 2] + prompt[-tail:] + tokens[len(prompt) :]
        named, task = row.get("id"), row.get("task")
        return Example(
            key=key,
            id=named if isinstance(named, str) else f"{key.source}:{key.seq}",
            task=task if isinstance(task, str) else key.source,
            tokens=numpy.array(tokens, dtype=numpy.int32),
            loss_from=loss_from,
        )

    def _split(self, prompt_text: str, text: str, prompt: list[int], whole: list[int]) -> list[int]:
        """The tokens of prompt, answer and stop token, of which those of the prompt are the beginning."""
        if whole[: len(prompt)] != prompt:
            # A token may reach from the prompt into the answer; the model will never be given that one.
            if not text.startswith(prompt_text):
                raise Unrenderable("what comes before the answer is not what the model is asked with")
            apart = prompt + self._encode([text[len(prompt_text) :]])[0]
            if self._tokenizer.decode(apart) != self._tokenizer.decode(whole):
                raise Unrenderable("prompt and answer are other tokens apart than together")
            whole = apart
        end = len(whole) - len(self._tail)
        if whole[end:] != self._tail:
            raise Unrenderable("the template does not end it as it ends others")
        ended = [*whole[:end], self.stop]
        if len(ended) < len(prompt) + 2:
            raise Unrenderable("the template leaves the answer out")
        return ended


def _conversation(row: dict[str, Any]) -> list[dict[str, str]] | Dropped:
    """The messages of a row up to its last answer."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        return Dropped("bad_row", "there is no list `messages` of role and content")
    turns = [{"role": message["role"], "content": message["content"]} for message in messages]
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    if len(turns) < 2:
        return Dropped("bad_row", "no assistant answers anybody in it")
    if not turns[-1]["content"].strip():
        return Dropped("empty_answer", "the answer is empty")
    return turns


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
    )
