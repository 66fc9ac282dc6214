"""Context synthesis: short instruction-answer pairs in, long-context training samples out.

    async with streamsyn.open_run("run.toml", out="runs/first", seeds="pairs.jsonl") as run:
        async for sample in run:
            ...

The names in `__all__` are the public API. They are imported when they are first used, so that
`import streamsyn` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamsyn.config.loading import Config
    from streamsyn.errors import (
        ConfigError,
        DirectoryInUse,
        InboxClosed,
        LaunchError,
        RunReplaced,
        ServerError,
        SinkError,
        StoppedEarly,
        StreamsynError,
        TooManyRejects,
    )
    from streamsyn.following.follow import Follower, follow
    from streamsyn.library.open_run import Run, RunStatus, open_run
    from streamsyn.library.run_thread import run_sync
    from streamsyn.pipeline.summary import RunSummary
    from streamsyn.seeds.submission import RefusedLine, Submitted
    from streamsyn.trainer.sample_dataset import SampleDataset

__version__ = "0.1.0"

__all__ = [
    "Config",
    "ConfigError",
    "DirectoryInUse",
    "Follower",
    "InboxClosed",
    "LaunchError",
    "RefusedLine",
    "Run",
    "RunReplaced",
    "RunStatus",
    "RunSummary",
    "SampleDataset",
    "ServerError",
    "SinkError",
    "StoppedEarly",
    "StreamsynError",
    "Submitted",
    "TooManyRejects",
    "__version__",
    "follow",
    "open_run",
    "run_sync",
]

_HOMES = {
    "Config": "streamsyn.config.loading",
    "follow": "streamsyn.following.follow",
    "Follower": "streamsyn.following.follow",
    "SampleDataset": "streamsyn.trainer.sample_dataset",
    "open_run": "streamsyn.library.open_run",
    "Run": "streamsyn.library.open_run",
    "RunStatus": "streamsyn.library.open_run",
    "run_sync": "streamsyn.library.run_thread",
    "RunSummary": "streamsyn.pipeline.summary",
    "RefusedLine": "streamsyn.seeds.submission",
    "Submitted": "streamsyn.seeds.submission",
}
"""Where the public names are defined; errors are in `streamsyn.errors`."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module 'streamsyn' has no attribute {name!r}")
    value = getattr(import_module(_HOMES.get(name, "streamsyn.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return sorted({*globals(), *__all__})
