"""Clusters of several raylets on this machine."""

import asyncio
import os
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

NODE: dict[str, Any] = {"num_cpus": 1, "num_gpus": 8, "object_store_memory": 80_000_000}


class Raylets:
    """A cluster whose nodes are killed without a word, or do not answer any more."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        quick = {
            "health_check_initial_delay_ms": 0,
            "health_check_period_ms": 500,
            "health_check_timeout_ms": 2000,  # of one that does not answer
            "health_check_failure_threshold": 3,
        }
        head = {"num_cpus": 0, "num_gpus": 0, "object_store_memory": 80_000_000, "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args={**head, "_system_config": quick})
        self.nodes: list[Any] = []

    @property
    def address(self) -> str:
        """What to connect to."""
        return str(self._cluster.address)

    async def kill_node(self) -> None:
        """Kill a node that has a server, with all that runs there."""
        await asyncio.to_thread(self.kill_node_without, "GPU")

    def kill_node_without(self, resource: str) -> None:
        """Kill a node whose resource of this kind is taken, with all that runs there."""
        self.kill(self._node_without(resource))

    def kill(self, node: Any) -> None:
        """Kill a node."""
        self._cluster.remove_node(node, allow_graceful=False)
        if node in self.nodes:
            self.nodes.remove(node)

    def cut_node(self) -> "CutNode":
        """Stop all processes of a node that has a server: to others its network is cut."""
        node = self._node_without("GPU")
        self.nodes.remove(node)
        return CutNode(node)

    def _node_without(self, resource: str) -> Any:
        from ray._private.state import available_resources_per_node

        from streamsyn.cluster.placing import connected

        with connected(self.address):  # if this process does not place anything
            free = available_resources_per_node()
        return next(node for node in self.nodes if resource not in free[node.node_id])

    def add_node(self) -> None:
        """Add a node. Only in the main thread: Ray sets a signal handler."""
        self.nodes.append(self._cluster.add_node(**NODE))

    def at_least(self, number: int) -> None:
        """Add nodes until there are this many: earlier tests killed some."""
        while len(self.nodes) < number:
            self.add_node()

    def stop(self) -> None:
        """Stop all of it."""
        self._cluster.shutdown()


class CutNode:
    """A node whose processes are stopped, the servers and runs on it too."""

    def __init__(self, node: Any) -> None:
        self.node = node
        (raylet,) = node.all_processes["raylet"]
        first = psutil.Process(raylet.process.pid)
        self.processes = [first]
        first.suspend()  # it starts no more of them
        self.processes += first.children(recursive=True)
        for process in self.processes[1:]:
            process.suspend()

    def resume(self, *words: str) -> list[psutil.Process]:
        """Let those processes run again whose command has all these words; return them."""
        found = [process for process in self.processes if set(words) <= set(process.cmdline())]
        for process in found:
            process.resume()
        return found


@pytest.fixture(scope="session")
def raylets() -> Iterator[Raylets]:
    """A head without resources; each test adds the nodes that it needs, with a CPU and eight GPUs each."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    started = Raylets()
    yield started
    started.stop()
