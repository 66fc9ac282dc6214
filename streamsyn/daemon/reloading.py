"""SIGHUP: what is read again while the daemon goes on, and what needs a restart."""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import structlog

from streamsyn.config.command_sections import ServeSection
from streamsyn.config.loading import Config
from streamsyn.daemon.daemon import Daemon
from streamsyn.errors import ConfigError

log = structlog.get_logger()

RELOADED: Final = {
    "serve": (
        "tokens_file",
        "max_body_bytes",
        "max_line_bytes",
        "max_connections",
        "requests_per_s",
        "body_timeout_s",
        "max_unread_seeds",
        "allow_recipes",
        "allow_private_webhooks",
        "min_free_bytes",
        "retain_s",
        "retain_bytes",
    ),
    "run": ("drain_timeout_s",),
}
"""The keys that take effect without a restart, by section."""


async def reload(daemon: Daemon, load: Callable[[], Config], check: Callable[[ServeSection], None]) -> None:
    """Read the configuration, the tokens and the file of servers again.

    A mistake is logged, and everything stays as it was. Keys that changed and need a restart are logged.

    Args:
        daemon: The daemon.
        load: Loads the configuration as at the start.
        check: Raises a ConfigError if the daemon cannot go on with a section; may block.
    """
    before = daemon.config
    try:
        after = await asyncio.to_thread(load)
        merged = _merged(before, after)
        await asyncio.to_thread(check, merged.serve)
        await asyncio.to_thread(daemon.access.reload, merged.serve.tokens_file)
    except ConfigError as error:
        log.error("reload.failed", error=str(error), then="everything stays as it was")  # noqa: TRY400
        return
    daemon.hosting.config = merged
    await daemon.hosting.servers.rediscover()
    applied, late = changed_keys(before, merged), changed_keys(merged, after)
    log.info("reload.done", changed=applied, plain=f"reloaded: {', '.join(applied) or 'no key has changed'}")
    if late:
        plain = f"changed, but needs a restart: {', '.join(late)}"
        log.warning("reload.needs_restart", keys=late, plain=plain)


def changed_keys(one: Config, other: Config) -> list[str]:
    """The keys with different values; only their names, since a value may be a secret."""
    before, after = dict(_flat(one.model_dump())), dict(_flat(other.model_dump()))
    return sorted(key for key in {*before, *after} if before.get(key) != after.get(key))


def _merged(before: Config, after: Config) -> Config:
    """The configuration `before`, with the keys of `after` that need no restart."""
    sections = {}
    for name, keys in RELOADED.items():
        new = getattr(after, name)
        sections[name] = getattr(before, name).model_copy(update={key: getattr(new, key) for key in keys})
    return before.model_copy(update=sections)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
