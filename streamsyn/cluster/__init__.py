"""SGLang servers on the nodes of a Ray cluster: placed, restarted, added and removed while a run goes on.

Modules:
    replica: One server on its node or nodes: the actor that Ray places.
    placing: Keeps as many servers alive as there is work for, and lists those that are.
    coordinator: A run as an actor: a process of `streamsyn run` on some node.
    submitted: A run that is started again on another node when it dies (`streamsyn submit`).
    placed_coordinators: Those of a run with partitions.
    scaling: The rule for how many that are.
    spread: Work on the shards of a log, by Ray Data.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from streamsyn.errors import ConfigError


@contextmanager
def needing_ray(what: str) -> Iterator[None]:
    """Import from this package within the block.

    Raises:
        ConfigError: Ray, which `what` needs, is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "ray":
            raise
        raise ConfigError(f"{what} needs Ray: pip install 'streamsyn[ray]'") from error


@contextmanager
def joined(address: str | None) -> Iterator[None]:
    """Connect to a Ray cluster within the block, if there is an address.

    Raises:
        ConfigError: Ray is not installed, or no cluster is at the address.
    """
    if address is None:
        yield
        return
    with needing_ray("--ray"):
        from streamsyn.cluster.placing import connected
    with connected(address):
        yield
