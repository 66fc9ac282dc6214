"""Clusters of several raylets on this machine."""

import asyncio
import os
from collections.abc import Iterator
from typing import Any

import pytest

NODE: dict[str, Any] = {"num_cpus": 1, "num_gpus": 8, "object_store_memory": 80_000_000}


class Raylets:
    """A cluster whose nodes are killed without a word."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        quick = {
            "health_check_initial_delay_ms": 0,
            "health_check_period_ms": 500,
            "health_check_failure_threshold": 3,
        }
        head = {"num_cpus": 0, "num_gpus": 0, "object_store_memory": 80_000_000, "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args={**head, "_system_config": quick})
        self.nodes = [self._cluster.add_node(**NODE) for _ in range(3)]

    @property
    def address(self) -> str:
        """What to connect to."""
        return str(self._cluster.address)

    async def kill_node(self) -> None:
        """Kill a node that has a server, with all that runs there."""
        await asyncio.to_thread(self.kill_node_without, "GPU")

    def kill_node_without(self, resource: str) -> None:
        """Kill a node whose resource of this kind is taken, with all that runs there."""
        from ray._private.state import available_resources_per_node

        free = available_resources_per_node()
        node = next(node for node in self.nodes if resource not in free[node.node_id])
        self._cluster.remove_node(node, allow_graceful=False)
        self.nodes.remove(node)

    def add_node(self) -> None:
        """Add a node."""
        self.nodes.append(self._cluster.add_node(**NODE))

    def stop(self) -> None:
        """Stop all of it."""
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def raylets() -> Iterator[Raylets]:
    """A head without resources, and three nodes with a CPU and eight GPUs that nobody uses."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    started = Raylets()
    yield started
    started.stop()
