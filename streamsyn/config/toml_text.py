"""Print the configuration as TOML, with the meaning of each key as a comment."""

import inspect
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from streamsyn.config.fields import Section
from streamsyn.config.loading import Config
from streamsyn.urls import without_userinfo


def as_toml(config: Config) -> str:
    """Return `config` as TOML, each key below its meaning. A key without a value is commented out.

    Passwords are cut from URLs.
    """
    return "\n".join(_section(config, "")) + "\n"


def _section(section: Section, name: str) -> Iterator[str]:
    below: list[tuple[str, Section]] = []
    if name:
        meaning = inspect.cleandoc(type(section).__doc__ or "")
        yield "\n" + "".join(f"# {line}".rstrip() + "\n" for line in meaning.splitlines()) + f"[{name}]"
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        path = f"{name}.{key}" if name else key
        if isinstance(value, Section):
            below.append((path, value))
        elif isinstance(value, dict) and any(isinstance(entry, Section) for entry in value.values()):
            below += [(f"{path}.{_key(entry)}", settings) for entry, settings in value.items()]
        else:
            yield from _line(key, value, field)
    for path, part in below:
        yield from _section(part, path)


def _line(key: str, value: Any, field: FieldInfo) -> Iterator[str]:
    for line in (field.description or "").splitlines():
        yield f"# {line}"
    yield f"# {key} =" if value is None else f"{key} = {toml_value(value)}"


def toml_value(value: Any) -> str:
    """Return a value as TOML."""
    match value:
        case bool():
            return "true" if value else "false"
        case float() if math.isinf(value) or math.isnan(value):
            return str(value)
        case int() | float():
            return repr(value)
        case str() | Path():
            return _string(without_userinfo(str(value)))
        case dict():
            return "{" + ", ".join(f"{_key(key)} = {toml_value(entry)}" for key, entry in value.items()) + "}"
        case Section():
            set_fields = {key: entry for key, entry in value if entry is not None}
            return toml_value(set_fields)
        case _:
            return "[" + ", ".join(map(toml_value, value)) + "]"


def _key(key: str) -> str:
    bare = key.replace("-", "").replace("_", "")
    return key if bare.isascii() and bare.isalnum() else _string(key)


def _string(text: str) -> str:
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return (
        '"'
        + "".join(escapes.get(char, char if char.isprintable() else f"\\U{ord(char):08x}") for char in text)
        + '"'
    )
