"""The tokenizer of the model to be tuned: its vocabulary and its chat template, without transformers.

Chat templates are rendered as `apply_chat_template` of transformers renders them.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from tokenizers import AddedToken, Tokenizer

from streamsyn.errors import ConfigError
from streamsyn.records import digest

_KEY = "assembly.tokenizer"
_TOKENIZER, _CONFIG, _TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_FILES = [_TOKENIZER, _CONFIG, _TEMPLATE, "special_tokens_map.json", "additional_chat_templates/*"]
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TODAY = datetime(2024, 7, 26)
"""The date that templates get; fixed, so that the length of a sample does not change."""


def load_tokenizer(name: str) -> "ChatTokenizer":
    """Load a tokenizer from a folder, or by its name on the Hugging Face hub, where a local copy comes first.

    Raises:
        ConfigError: The tokenizer cannot be found or used.
    """
    folder = Path(name) if Path(name).is_dir() else _from_hub(name)
    config = _json(folder / _CONFIG) if (folder / _CONFIG).is_file() else {}
    special = _special_tokens(folder, config)
    return ChatTokenizer(
        name, _json(folder / _TOKENIZER), _template(name, folder, config), special, _added(config)
    )


class ChatTokenizer:
    """Renders chats and counts their tokens.

    Args:
        name: The tokenizer's name, for error messages.
        spec: The content of tokenizer.json.
        template: The chat template.
        special_tokens: Special tokens that templates use by name, such as bos_token.
        more_tokens: Added tokens of tokenizer_config.json, by id.

    Raises:
        ConfigError: The specification or the template cannot be used.
    """

    def __init__(
        self,
        name: str,
        spec: dict[str, Any],
        template: str,
        special_tokens: dict[str, str],
        more_tokens: dict[int, AddedToken] | None = None,
    ) -> None:
        # Without what would truncate or pad a text or move its offsets. Special tokens are in the template.
        self.spec = {**spec, "truncation": None, "padding": None, "post_processor": None}
        if isinstance(model := spec.get("model"), dict) and model.get("dropout"):
            self.spec["model"] = {**model, "dropout": None}  # a length must not be random
        try:
            self.tokenizer = Tokenizer.from_str(json.dumps(self.spec))
        except Exception as error:  # the library raises no narrower type
            raise ConfigError(f"{_KEY}: {_TOKENIZER} of {name} cannot be used: {error}") from error
        known = self.tokenizer.get_added_tokens_decoder()
        for number, token in sorted((more_tokens or {}).items()):
            if number not in known:
                self.tokenizer.add_tokens([token])
        self.chat = ChatTemplate(name, template, special_tokens)
        more = {number: repr(token) for number, token in (more_tokens or {}).items()}
        shaping = json.dumps([self.spec, template, special_tokens, more], sort_keys=True)
        self.digest = digest(shaping).hex()
        """Digest of everything that lengths depend on."""

    @cached_property
    def added_tokens(self) -> list[AddedToken]:
        """Tokens that are found in a text before it is split."""
        return list(self.tokenizer.get_added_tokens_decoder().values())

    def render(self, user: str, assistant: str) -> str:
        """Return the text of a chat as the model sees it."""
        return self.chat.render(user, assistant)

    def count(self, text: str) -> int:
        """Return the tokens of a rendered chat, including the special tokens in it; none are added."""
        (encoding,) = self.tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return len(encoding)


class ChatTemplate:
    """A model's chat template.

    Args:
        name: The tokenizer's name, for error messages.
        source: The template's text.
        special_tokens: Special tokens by the names that templates use, such as bos_token.

    Raises:
        ConfigError: The template is invalid, or cannot render a question and its answer.
    """

    def __init__(self, name: str, source: str, special_tokens: Mapping[str, str]) -> None:
        self._name = name
        self._special_tokens = special_tokens
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_raise_exception, strftime_now=_TODAY.strftime)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"{_KEY}: the chat template of {name} is invalid: line {error.lineno}: {error.message}"
            ) from error
        self.render("Question?", "Answer.")

    def render(self, user: str, assistant: str) -> str:
        """Return the text of a chat of two messages.

        Raises:
            ConfigError: The template fails or refuses.
        """
        messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=False,
                **self._special_tokens,
            )
        except Exception as error:  # a template can fail in any way
            raise ConfigError(
                f"{_KEY}: the chat template of {self._name} cannot be rendered: {error}"
            ) from error


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _GenerationTag(jinja2.ext.Extension):
    """Ignores the tags `{% generation %}`, which mark the text a model is trained on."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [jinja2.nodes.Scope(body, lineno=line)]


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    failure: Exception | None = None
    for local_only in (True, False):
        try:
            folder = Path(snapshot_download(name, allow_patterns=_FILES, local_files_only=local_only))
        except Exception as error:  # noqa: BLE001 - of the hub, the network or the disk
            failure = error
            continue
        if (folder / _TOKENIZER).is_file():
            return folder
    reason = " ".join(str(failure or f"it has no {_TOKENIZER}").split())
    raise ConfigError(
        f"{_KEY}: {name} is not a folder, and cannot be loaded from the Hugging Face hub: {reason}"
    ) from failure


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{_KEY}: cannot read {path}: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{_KEY}: {path} is not a JSON object")
    return data


def _template(name: str, folder: Path, config: dict[str, Any]) -> str:
    """Return the chat template: a file first, then the configuration, where a list has one named default."""
    if (path := folder / _TEMPLATE).is_file():
        try:
            return path.read_text("utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{_KEY}: cannot read {path}: {error}") from error
    given = config.get("chat_template")
    if isinstance(given, list):
        try:
            given = {named["name"]: named["template"] for named in given}
        except (TypeError, KeyError) as error:
            raise ConfigError(
                f"{_KEY}: {folder / _CONFIG}: chat_template is not a list of named templates"
            ) from error
    if isinstance(given, dict):
        if "default" not in given:
            raise ConfigError(f"{_KEY}: {name} has several chat templates, none of them named default")
        given = given["default"]
    if not isinstance(given, str):
        raise ConfigError(f"{_KEY}: {name} has no chat template: use the tokenizer of a chat model")
    return given


def _special_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Return the special tokens that a template may use by name."""
    named = dict(config)
    if not any(name in config for name in _SPECIAL) and (folder / "special_tokens_map.json").is_file():
        named = _json(folder / "special_tokens_map.json")
    found: dict[str, str] = {}
    for name, value in named.items():
        text = value.get("content") if isinstance(value, dict) else value
        if (name in _SPECIAL or name.endswith("_token")) and isinstance(text, str):
            found[name] = text
    return found


def _added(config: dict[str, Any]) -> dict[int, AddedToken]:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    try:
        return {
            int(number): AddedToken(token["content"], **{flag: bool(token.get(flag)) for flag in flags})
            for number, token in (config.get("added_tokens_decoder") or {}).items()
        }
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{_KEY}: {_CONFIG}: invalid added_tokens_decoder: {error}") from error
