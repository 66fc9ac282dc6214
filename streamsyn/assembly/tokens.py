"""The tokenizer of the model to be tuned: its vocabulary and its chat template, without transformers."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from streamsyn.assembly.chat import ChatTemplate
from streamsyn.errors import ConfigError
from streamsyn.records import digest

_KEY = "assembly.tokenizer"
_TOKENIZER, _CONFIG, _TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_FILES = [_TOKENIZER, _CONFIG, _TEMPLATE, "special_tokens_map.json", "additional_chat_templates/*"]
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTokenizer:
    """Counts the tokens of chats.

    Args:
        name: For messages.
        spec: What tokenizer.json says.
        template: The chat template.
        special_tokens: Those it knows by name, such as bos_token.
        more_tokens: Tokens of tokenizer_config.json, by id.

    Raises:
        ConfigError: One of them cannot be used.
    """

    def __init__(
        self,
        name: str,
        spec: dict[str, Any],
        template: str,
        special_tokens: dict[str, str],
        more_tokens: dict[int, AddedToken] | None = None,
    ) -> None:
        # What would cut a text, pad it or move its offsets; it adds no tokens where no special ones are.
        self.spec = {**spec, "truncation": None, "padding": None, "post_processor": None}
        if isinstance(model := spec.get("model"), dict) and model.get("dropout"):
            self.spec["model"] = {**model, "dropout": None}  # a length must not be left to chance
        try:
            self.tokenizer = Tokenizer.from_str(json.dumps(self.spec))
        except Exception as error:  # the library raises nothing more special
            raise ConfigError(f"{_KEY}: {_TOKENIZER} of {name} cannot be used: {error}") from error
        known = self.tokenizer.get_added_tokens_decoder()
        for number, token in sorted((more_tokens or {}).items()):
            if number not in known:
                self.tokenizer.add_tokens([token])
        self.chat = ChatTemplate(name, template, special_tokens)
        more = {number: repr(token) for number, token in (more_tokens or {}).items()}
        shaping = json.dumps([self.spec, template, special_tokens, more], sort_keys=True)
        self.digest = digest(shaping).hex()
        """Stands for all that lengths depend on."""

    @cached_property
    def added_tokens(self) -> list[AddedToken]:
        """Tokens that are found in a text before it is split."""
        return list(self.tokenizer.get_added_tokens_decoder().values())

    def render(self, user: str, assistant: str) -> str:
        """The text of a chat, as the model sees it."""
        return self.chat.render(user, assistant)

    def count(self, text: str) -> int:
        """How many tokens a rendered chat has: its special tokens count, none are added."""
        (encoding,) = self.tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return len(encoding)


def load_tokenizer(name: str) -> ChatTokenizer:
    """The tokenizer in a folder, or of a name on the Hugging Face hub: local copies come first.

    Raises:
        ConfigError: It cannot be had or used.
    """
    folder = Path(name) if Path(name).is_dir() else _from_hub(name)
    config = _json(folder / _CONFIG) if (folder / _CONFIG).is_file() else {}
    special = _special_tokens(folder, config)
    return ChatTokenizer(
        name, _json(folder / _TOKENIZER), _template(name, folder, config), special, _added(config)
    )


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    why: Exception | None = None
    for local_only in (True, False):
        try:
            folder = Path(snapshot_download(name, allow_patterns=_FILES, local_files_only=local_only))
        except Exception as error:  # noqa: BLE001 - whatever the hub, the network or the disk says
            why = error
            continue
        if (folder / _TOKENIZER).is_file():
            return folder
    said = " ".join(str(why or f"it has no {_TOKENIZER}").split())
    raise ConfigError(
        f"{_KEY}: {name} is no folder, and cannot be had from the Hugging Face hub: {said}"
    ) from why


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{_KEY}: cannot read {path}: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{_KEY}: {path} holds no JSON object")
    return data


def _template(name: str, folder: Path, config: dict[str, Any]) -> str:
    """The chat template: a file of its own goes before the configuration, one named default before others."""
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
            raise ConfigError(f"{_KEY}: {folder / _CONFIG}: chat_template is no list of templates") from error
    if isinstance(given, dict):
        if "default" not in given:
            raise ConfigError(f"{_KEY}: {name} has several chat templates, and none is called default")
        given = given["default"]
    if not isinstance(given, str):
        raise ConfigError(f"{_KEY}: {name} has no chat template: take the tokenizer of a chat model")
    return given


def _special_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Those that a template may use by name."""
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
        raise ConfigError(f"{_KEY}: {_CONFIG}: added_tokens_decoder cannot be understood: {error}") from error
