"""Turns samples into tokens with the chat template of the model that is tuned.

The prompt is exactly what the model will be given, including what the template puts before an answer. The
targets are the answer and the token that ends it. A conversation with several turns is trained on its last
answer only.

Messages are text: what spells a special token in them is not one (`spelled_tokens`).
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy
from jinja2 import TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from streamsyn.errors import ConfigError
from streamsyn.trainer.examples import Changed, Dropped, Example, Key
from streamsyn.trainer.stream.shortening import around_instruction, common_ends, cut_between
from streamsyn.trainer.stream.spelled_tokens import SpelledTokens, Unspeakable

_GENERATION_TAG = "generation"
"""A Jinja tag that transformers adds and plain Jinja does not know."""
MIN_PROMPT_TOKENS = 16
"""An over-long sample is dropped if its prompt would have fewer tokens than this, or half as many between
those that are never cut."""
_SEAM = 8
"""Characters at either end of a context that are not cut: a token may belong to it and to what is next."""

_PROBE_ANSWERS = ("Because.", " Because", "\n\nBecause it is\n", "3", "\u00e9t\u00e9", "(so)", "\t-")
_PROBE = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]


class Renderer:
    """Turns rows with `messages` into examples. Safe to call from several threads.

    Args:
        tokenizer: The tokenizer of the model to tune, with a chat template.
        seq_len: Maximum tokens of an example.
        overlong: What happens to longer samples: `drop`, or `truncate`, which removes tokens of the prompt
            and never of the answer: see `shortening`.

    Raises:
        ConfigError: The tokenizer has no chat template, or one that cannot be trained on.

    Attributes:
        stop: The token that ends an answer.
        spelled: Keeps what spells a special token as text.
        last_special: The end of a prompt, from its last special token on, if answers can be tokenized from
            there; else they are tokenized with their prompts.
    """

    def __init__(
        self, tokenizer: "ChatTokenizer", seq_len: int, overlong: Literal["drop", "truncate"]
    ) -> None:
        self._tokenizer = tokenizer
        self._seq_len = seq_len
        self._overlong = overlong
        self._lock = threading.Lock()  # tokenizers are not thread-safe
        self._special = special_tokens(tokenizer)
        self.last_special: str | None = None
        self.spelled = SpelledTokens(self._special, getattr(tokenizer, "backend_tokenizer", None))
        self._learn_ending()

    def render_batch(self, rows: Sequence[tuple[dict[str, Any], Key]]) -> list[Example | Dropped]:
        """For each row its example, or the reason why there is none. Slow: call it in a thread."""
        with self._lock:
            texts = [self._texts(row) for row, _ in rows]
            plain = [one for one in texts if isinstance(one, Rendered) and not one.spells]
            tokens = {id(one): both for one, both in zip(plain, self._encode_both(plain), strict=True)}
            return [
                one if isinstance(one, Dropped) else self._example(row, key, one, tokens.get(id(one)))
                for (row, key), one in zip(rows, texts, strict=True)
            ]

    def render_around(self, row: dict[str, Any], key: Key, context: str) -> Example | Dropped:
        """Make the example of a row with only as much of its context as fits. Slow: call it in a thread.

        Args:
            row: A row with the context in its first message, once.
            key: Its key.
            context: The only text that may be cut.
        """
        first, *others = row["messages"]
        content = first["content"].replace(context, context[:_SEAM] + context[-_SEAM:], 1)
        bare = self.render_batch([({**row, "messages": [{**first, "content": content}, *others]}, key)])[0]
        if isinstance(bare, Dropped):
            return bare
        if bare.cut:
            return Dropped("overlong", "its instruction and answer alone are longer than a row")
        with self._lock:
            text = self._texts(row)
            if isinstance(text, Dropped):
                return text
            tokens = None if text.spells else self._encode_both([text])[0]
            return self._example(row, key, text, tokens, bare.tokens[: bare.loss_from].tolist())

    def _learn_ending(self) -> None:
        """Find out how the template ends an answer, and check that a small conversation can be trained on."""
        if not self._tokenizer.chat_template:
            raise ConfigError("the model's tokenizer has no chat template: set train.chat_template")
        try:
            probe = self._rendered(_PROBE)
            _, found, ending = probe.whole.rpartition(_PROBE[-1]["content"])
            if not found:
                raise Unrenderable("the template leaves the answer out")
            self._tail = self._from_first_special(ending)
            stop = self._tail[0] if self._tail else self._tokenizer.eos_token_id
            if stop is None:
                raise Unrenderable("no token ends an answer: there is none in the template, and no eos token")
            self.stop = stop
            self._split(probe, *self._encode([probe.prompt, probe.whole]))
            self._learn_last_special()
        except Unrenderable as error:
            raise ConfigError(f"the model's chat template cannot be trained on: {error}") from error

    def _learn_last_special(self) -> None:
        """Find out whether an answer can be tokenized without its prompt.

        Tokenizers split texts at special tokens first, so that the text from the last special token of the
        prompt on can be tokenized by itself. A few answers show whether that holds for this tokenizer.
        """
        probes = [
            self._rendered([_PROBE[0], {"role": "assistant", "content": answer}]) for answer in _PROBE_ANSWERS
        ]
        as_whole = self._encode_both(probes)
        self.last_special = self.spelled.last_special(probes[0].prompt)
        if self._encode_both(probes) != as_whole:
            self.last_special = None

    def _encode_both(self, texts: Sequence["Rendered"]) -> list[tuple[list[int], list[int]]]:
        """The tokens of the prompt, and of prompt and answer, of each text."""
        begins = [self._answer_begins(one) for one in texts]
        parts = ((one.prompt, one.whole[begin:]) for one, begin in zip(texts, begins, strict=True))
        encoded = self._encode([text for both in parts for text in both]) if texts else []
        both = []
        for begin, prompt, end in zip(begins, encoded[::2], encoded[1::2], strict=True):
            before = (
                next(at for at in range(len(prompt) - 1, -1, -1) if prompt[at] in self._special)
                if begin
                else 0
            )
            both.append((prompt, prompt[:before] + end))
        return both

    def _answer_begins(self, text: "Rendered") -> int:
        """The place from which on a text must be tokenized again, after its prompt."""
        last = self.last_special
        if last is None or not text.prompt.endswith(last) or not text.whole.startswith(text.prompt):
            return 0
        return len(text.prompt) - len(last)

    def _from_first_special(self, ending: str) -> list[int]:
        """The tokens of the text after an answer, from the first special token on.

        Tokens before it vary: they may be merged with the end of the answer.
        """
        tokens = self._encode([ending])[0]
        at = next((at for at, token in enumerate(tokens) if token in self._special), len(tokens))
        return tokens[at:]

    def _texts(self, row: dict[str, Any]) -> "Rendered | Dropped":
        """The text of the prompt, and of prompt and answer; or why there are none."""
        messages = _conversation(row)
        if isinstance(messages, Dropped):
            return messages
        try:
            hidden = self.spelled.hidden(messages)
            return self._rendered(hidden or messages, spells=hidden is not None)
        except Unspeakable as error:
            return Dropped("special_tokens", str(error))
        except Unrenderable as error:
            return Dropped("template", str(error))

    def _rendered(self, messages: list[dict[str, str]], *, spells: bool = False) -> "Rendered":
        prompt = chat_text(self._tokenizer, messages[:-1], asks=True)
        whole = chat_text(self._tokenizer, messages, asks=False)
        return Rendered(prompt, whole, spells=spells, changed=_changed(messages, whole))

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        # The template already contains the tokens that a tokenizer would add.
        encoded = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def _example(
        self,
        row: dict[str, Any],
        key: Key,
        text: "Rendered",
        encoded: tuple[list[int], list[int]] | None,
        bare: list[int] | None = None,
    ) -> Example | Dropped:
        """The example of a row; of one that is too long, what it has in common with `bare` is not cut."""
        try:
            prompt, whole = encoded or map(self.spelled.encode, (text.prompt, text.whole))
            tokens = self._split(text, prompt, whole)
        except Unspeakable as error:
            return Dropped("special_tokens", str(error))
        except Unrenderable as error:
            return Dropped("template", str(error))
        answer, too_long = tokens[len(prompt) :], len(tokens) > self._seq_len
        kept: list[int] | None = prompt
        if too_long:
            kept = None if self._overlong == "drop" else self._cut(row, prompt, answer, bare)
        if kept is None:
            return Dropped("overlong", f"{len(tokens)} tokens, {len(answer)} of them the answer")
        named, task = row.get("id"), row.get("task")
        return Example(
            key=key,
            id=named if isinstance(named, str) else f"{key.source}:{key.seq}",
            task=task if isinstance(task, str) else key.source,
            tokens=numpy.array(kept + answer, dtype=numpy.int32),
            loss_from=len(kept),
            changed=text.changed,
            cut=too_long,
        )

    def _cut(
        self, row: dict[str, Any], prompt: list[int], answer: list[int], bare: list[int] | None
    ) -> list[int] | None:
        """As much of a prompt as there is room for beside its answer; None if that is too little."""
        room = self._seq_len - len(answer)
        instruction = row.get("instruction")
        asked = self._encode([instruction])[0] if isinstance(instruction, str) else []
        if bare is not None:
            head, tail = common_ends(prompt, bare)
        else:
            head, tail = around_instruction(prompt, asked, room // 4)
        if room < MIN_PROMPT_TOKENS or room - head - tail < MIN_PROMPT_TOKENS // 2:
            return None
        return cut_between(prompt, head, tail, room, answer[:-1] + asked)

    def _split(self, text: "Rendered", prompt: list[int], whole: list[int]) -> list[int]:
        """The tokens of prompt, answer and stop token; they begin with exactly the tokens of `prompt`."""
        if whole[: len(prompt)] != prompt:
            # A token may span prompt and answer; the model will never be given that token.
            if not text.whole.startswith(text.prompt):
                raise Unrenderable("the text before the answer is not the prompt that the model is given")
            rest = text.whole[len(text.prompt) :]
            separate = prompt + (self.spelled.encode(rest) if text.spells else self._encode([rest])[0])
            if self._tokenizer.decode(separate) != self._tokenizer.decode(whole):
                raise Unrenderable("prompt and answer are different text when they are tokenized separately")
            whole = separate
        end = len(whole) - len(self._tail)
        if whole[end:] != self._tail:
            raise Unrenderable("the template does not end this answer as it ends others")
        ended = [*whole[:end], self.stop]
        if len(ended) < len(prompt) + 2:
            raise Unrenderable("the template leaves the answer out")
        return ended


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text of a conversation.

    Attributes:
        prompt: Up to what stands before the answer.
        whole: With the answer.
        spells: Whether placeholders stand in it for special tokens that messages spell.
        changed: What the chat template has changed.
    """

    prompt: str
    whole: str
    spells: bool
    changed: Changed | None


def _changed(messages: Sequence[dict[str, str]], whole: str) -> Changed | None:
    """Whether the answer, or what it answers, stands differently in the text, white space aside.

    Earlier answers do not count: templates may shorten them.
    """
    *before, answer = messages
    if not _stands_in(answer["content"], whole):
        return "answers"
    asked = (message["content"] for message in before if message["role"] != "assistant")
    return None if all(_stands_in(content, whole) for content in asked) else "prompts"


def _stands_in(content: str, whole: str) -> bool:
    return content.strip() in whole or " ".join(content.split()) in " ".join(whole.split())


def special_tokens(tokenizer: "ChatTokenizer") -> dict[int, str]:
    """The special tokens of a tokenizer, by number."""
    added = tokenizer.added_tokens_decoder
    numbers = {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
    return {number: str(added[number]) if number in added else "" for number in sorted(numbers)}


def chat_text(tokenizer: "ChatTokenizer", messages: Sequence[dict[str, str]], *, asks: bool) -> str:
    """Render messages with the chat template; with `asks` also what it puts before an answer.

    Raises:
        Unrenderable: The template fails on them.
    """
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
    except Exception as error:  # a template is foreign code, which may fail in any way
        raise Unrenderable(f"the chat template fails: {error}") from error
    return text


class Unrenderable(Exception):
    """Raised when messages cannot be rendered with the chat template; its text says why."""


class ChatTokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text, if there is one."""
        ...

    @property
    def chat_template(self) -> Any:
        """The chat template, if there is one."""
        ...

    @property
    def all_special_ids(self) -> list[int]:
        """Tokens with a role, such as the end of a turn, that are not text."""
        ...

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """Tokens added to the vocabulary, each with its flag `special`."""
        ...

    @property
    def apply_chat_template(self) -> Any:
        """Renders messages with the chat template."""
        ...

    @property
    def decode(self) -> Any:
        """The text of tokens."""
        ...

    def __call__(self, text: Any, **options: Any) -> Mapping[str, Any]:
        """The tokens of texts."""
        ...


def read_template(path: str | None) -> str | None:
    """The text of the file `train.chat_template`; None if the key is not set.

    Raises:
        ConfigError: The file cannot be read, or is not a valid Jinja template.
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
        if _GENERATION_TAG not in str(error.message):
            raise ConfigError(f"train.chat_template: {path}:{error.lineno}: {error.message}") from error
    return text


def _conversation(row: dict[str, Any]) -> list[dict[str, str]] | Dropped:
    """The messages of a row up to its last answer, or why there are none."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        return Dropped("bad_row", "`messages` is missing or not a list of role and content")
    turns = [{"role": message["role"], "content": message["content"]} for message in messages]
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    if len(turns) < 2:
        return Dropped("bad_row", "no message of an assistant answers another message")
    if not turns[-1]["content"].strip():
        return Dropped("empty_answer", "the answer is empty")
    return turns


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
    )
