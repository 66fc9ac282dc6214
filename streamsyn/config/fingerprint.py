"""The fingerprint that a resumed run must match, and the configuration that it resumes with."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from streamsyn.config.data_paths import saved_path
from streamsyn.config.fields import Section, is_operational
from streamsyn.config.loading import Config
from streamsyn.errors import ConfigError
from streamsyn.plain_text import without_userinfo_within


def fingerprint(config: Config) -> dict[str, Any]:
    """Return the keys that shape outputs, as dotted key -> value: all that are not operational.

    A template counts by its text, not by its path.

    Raises:
        ConfigError: A template file cannot be read.
    """
    return dict(_shaping(config, ""))


def differences(before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """Describe the keys that differ between two fingerprints, with both values; "" when none does.

    A key that did not exist yet `before` counts with its value in `defaults`.
    """
    before = {key: value for key, value in defaults.items() if key in now} | dict(before)
    return "; ".join(
        f"{key}: {_short(before.get(key))} before, {_short(now.get(key))} now"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _shaping(section: Section, prefix: str) -> Iterable[tuple[str, Any]]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if is_operational(field):
            continue
        if isinstance(value, Section):
            yield from _shaping(value, f"{prefix}{name}.")
        elif isinstance(value, dict):
            for key, below in value.items():
                if isinstance(below, Section):
                    yield from _shaping(below, f"{prefix}{name}.{key}.")
                else:
                    yield f"{prefix}{name}.{key}", below
        elif isinstance(value, Path):
            try:
                yield prefix + name, value.read_text("utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"{prefix}{name}: cannot read {value}: {error}") from error
        else:
            yield prefix + name, value


def with_absolute_paths(config: Config) -> dict[str, Any]:
    """Return the configuration as JSON values with absolute paths, to resume from any working directory.

    Passwords are cut from URLs.
    """
    saved = config.model_dump(mode="json")
    for source in saved["seeds"]["sources"]:
        source["path"] = saved_path(source["path"])
    recipe, assembly, checks, sink = saved["recipe"], saved["assembly"], saved["checks"], saved["sink"]
    for settings, key in ((assembly, "corpus"), (checks, "eval_sets")):
        settings[key] = [saved_path(path) for path in settings[key]]
    if sink["mirror"] and "://" not in sink["mirror"]:
        sink["mirror"] = str(Path(sink["mirror"]).absolute())
    if assembly["tokenizer"] is not None and Path(assembly["tokenizer"]).is_dir():  # else a name on the hub
        assembly["tokenizer"] = str(Path(assembly["tokenizer"]).absolute())
    templates = [recipe, assembly, saved["scoring"], *recipe["tasks"].values(), *assembly["tasks"].values()]
    paths = [(settings, "template") for settings in templates]
    paths += [(saved["fleet"], key) for key in ("servers_file", "tls_ca", "tls_cert")]
    paths += [(saved["serve"], key) for key in ("tokens_file", "tls_certificate", "tls_key")]
    paths.append((saved["seeds"], "task_losses"))
    for settings, key in paths:
        if settings[key] is not None:
            settings[key] = str(Path(settings[key]).absolute())
    bare: dict[str, Any] = without_userinfo_within(saved)
    return bare
