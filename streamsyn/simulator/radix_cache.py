"""A radix tree of token blocks with locks and LRU eviction, as SGLang's prefix cache."""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from streamsyn.simulator.texts import CHARACTERS_PER_TOKEN

BLOCK_TOKENS: Final = 64
"""Prefixes are compared in whole blocks of this many tokens."""


def block_keys(content: str | Sequence[int], after: int = 0) -> list[int]:
    """Return a key per whole block; it identifies that block and all before it, `after` included."""
    keys = []
    if isinstance(content, str):
        step = BLOCK_TOKENS * CHARACTERS_PER_TOKEN
        for start in range(0, len(content) - step + 1, step):
            after = hash((after, content[start : start + step]))
            keys.append(after)
        return keys
    for start in range(0, len(content) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        after = hash((after, tuple(content[start : start + BLOCK_TOKENS])))
        keys.append(after)
    return keys


def extend_keys(keys: list[int], prompt: str, output: str) -> list[int]:
    """Return the block keys of `prompt + output`, given the `keys` of `prompt`."""
    rest = prompt[len(keys) * BLOCK_TOKENS * CHARACTERS_PER_TOKEN :] + output
    return keys + block_keys(rest, keys[-1] if keys else 0)


@dataclass(slots=True, eq=False)
class Node:
    """A run of blocks in the tree. Each key identifies the whole prefix up to its block."""

    keys: list[int]
    parent: "Node | None"
    number: int
    used: int = 0
    locks: int = 0
    queued: bool = False
    """Whether it is in the heap of leaves."""
    children: "dict[int, Node]" = field(default_factory=dict)


class RadixCache:
    """Prefixes as a tree of token blocks; blocks of running requests are locked, the others can be evicted.

    As in SGLang's radix cache (srt/mem_cache/radix_cache.py), matching and inserting mark a path as used, a
    lock counts on every node of its path, and eviction takes whole leaves, least recently used first. Keys
    are chained (see `block_keys`), so equal keys mean equal prefixes. All sizes are in blocks.
    """

    def __init__(self) -> None:
        self.root = Node([], None, 0)
        self.blocks = 0
        """Blocks in the tree."""
        self.locked = 0
        """Locked blocks."""
        self._numbers = 0
        self._uses = 0
        self._leaves: list[tuple[int, int, Node]] = []

    @property
    def evictable(self) -> int:
        """Blocks that `evict` can free."""
        return self.blocks - self.locked

    def match(self, keys: list[int], limit: int) -> tuple[Node, int]:
        """Return the node where the longest cached prefix of at most `limit` blocks ends, and its length."""
        node, held, part = self._walk(keys, limit)
        if part is not None:
            child, common = part
            node, held = self._split(child, common), held + common
        return node, held

    def measure(self, keys: list[int], *, touch: bool = True) -> int:
        """Return the blocks of the longest cached prefix without splitting nodes; mark them as used."""
        _, held, part = self._walk(keys, len(keys), touch=touch)
        return held + (part[1] if part else 0)

    def insert(self, keys: list[int]) -> tuple[Node, int]:
        """Add the prefix with these keys. Return the node where it ends, and the number of new blocks."""
        node, held = self.match(keys, len(keys))
        new = len(keys) - held
        if new:
            self._numbers += 1
            leaf = Node(keys[held:], node, self._numbers, self._uses)
            node.children[leaf.keys[0]] = leaf
            self.blocks += new
            self._offer(leaf)
            node = leaf
        return node, new

    def lock(self, node: Node) -> None:
        """Protect the path to `node` from eviction until `unlock`."""
        at: Node | None = node
        while at is not None:
            if at.locks == 0:
                self.locked += len(at.keys)
            at.locks += 1
            at = at.parent

    def unlock(self, node: Node) -> None:
        """Undo one `lock` of the same node."""
        at: Node | None = node
        while at is not None:
            at.locks -= 1
            if at.locks == 0:
                self.locked -= len(at.keys)
                self._offer(at)
            at = at.parent

    def evict(self, blocks: int) -> int:
        """Free at least `blocks` blocks, or all that are not locked. Return how many were freed."""
        freed = 0
        while freed < blocks and self._leaves:
            used, _, leaf = heapq.heappop(self._leaves)
            leaf.queued = False
            if leaf.used != used:  # used again since it was offered
                self._offer(leaf)
                continue
            if leaf.locks or leaf.children or leaf.parent is None:
                continue
            freed += len(leaf.keys)
            parent = leaf.parent
            del parent.children[leaf.keys[0]]
            self._offer(parent)
        self.blocks -= freed
        return freed

    def clear(self) -> None:
        """Evict everything that is not locked."""
        self.evict(self.blocks)

    def nodes(self) -> Iterator[Node]:
        """Yield every node except the root."""
        waiting = list(self.root.children.values())
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(node.children.values())

    def _walk(
        self, keys: list[int], limit: int, *, touch: bool = True
    ) -> tuple[Node, int, tuple[Node, int] | None]:
        """Follow `keys`. Return the last whole node, its depth, and a child that matches in part."""
        self._uses += touch
        node, held = self.root, 0
        limit = min(limit, len(keys))
        while held < limit:
            child = node.children.get(keys[held])
            if child is None:
                break
            if touch:
                child.used = self._uses
            size = len(child.keys)
            if held + size > limit or child.keys[-1] != keys[held + size - 1]:
                return node, held, (child, _common(child.keys, keys, held, limit))
            node, held = child, held + size
        return node, held, None

    def _split(self, node: Node, size: int) -> Node:
        """Split `node` after its first `size` blocks. It becomes the lower part and keeps its locks."""
        assert node.parent is not None
        self._numbers += 1
        upper = Node(node.keys[:size], node.parent, self._numbers, node.used, node.locks)
        node.parent.children[upper.keys[0]] = upper
        node.keys = node.keys[size:]
        node.parent = upper
        upper.children[node.keys[0]] = node
        return upper

    def _offer(self, node: Node) -> None:
        """Add a leaf that is not locked to the heap of `evict`."""
        if not (node.locks or node.children or node.queued or node.parent is None):
            node.queued = True
            heapq.heappush(self._leaves, (node.used, node.number, node))


def _common(held: list[int], keys: list[int], at: int, limit: int) -> int:
    """Return how many of `held` match `keys` from `at` on, at least 1; binary search, as keys are chained."""
    low, high = 1, min(len(held), limit - at)
    while low < high:
        middle = (low + high + 1) // 2
        if held[middle - 1] == keys[at + middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low
