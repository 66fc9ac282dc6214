"""A radix tree of token blocks with locks and LRU eviction, as SGLang's prefix cache."""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from streamsyn.simulator.tokens import CHARACTERS_PER_TOKEN

BLOCK_TOKENS: Final = 64
"""Prefixes are shared in whole blocks of this many tokens."""


def block_keys(content: str | Sequence[int], after: int = 0) -> list[int]:
    """One key for each whole block: it stands for that block and all before it (`after` for those)."""
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
    """The keys of `prompt + output`, where `keys` are those of `prompt`."""
    rest = prompt[len(keys) * BLOCK_TOKENS * CHARACTERS_PER_TOKEN :] + output
    return keys + block_keys(rest, keys[-1] if keys else 0)


@dataclass(slots=True, eq=False)
class Node:
    """A run of blocks that is held as one. Its keys stand for the whole prefix up to each block."""

    keys: list[int]
    parent: "Node | None"
    number: int
    used: int = 0
    locks: int = 0
    queued: bool = False
    """Whether it lies in the heap of leaves."""
    children: "dict[int, Node]" = field(default_factory=dict)


class RadixCache:
    """Prefixes as a tree of token blocks: what running requests hold is locked, the rest can be evicted.

    As SGLang's radix cache (srt/mem_cache/radix_cache.py): matching and inserting mark a path as used, a lock
    counts on every node of its path, and eviction takes whole leaves, least recently used first. Keys are
    chained (see `block_keys`), so that equal keys mean equal prefixes. All sizes are in blocks.
    """

    def __init__(self) -> None:
        self.root = Node([], None, 0)
        self.blocks = 0
        """Held in all."""
        self.locked = 0
        """Of these, held by somebody."""
        self._numbers = 0
        self._uses = 0
        self._leaves: list[tuple[int, int, Node]] = []

    @property
    def evictable(self) -> int:
        """Blocks that `evict` can free."""
        return self.blocks - self.locked

    def match(self, keys: list[int], limit: int) -> tuple[Node, int]:
        """The node where the longest held prefix of at most `limit` blocks ends, and its length."""
        node, held, part = self._walk(keys, limit)
        if part is not None:
            child, common = part
            node, held = self._split(child, common), held + common
        return node, held

    def measure(self, keys: list[int], *, touch: bool = True) -> int:
        """Blocks of the longest held prefix; leaves the tree as it is, but for marking them as used."""
        _, held, part = self._walk(keys, len(keys), touch=touch)
        return held + (part[1] if part else 0)

    def insert(self, keys: list[int]) -> tuple[Node, int]:
        """Holds the prefix that `keys` stand for; the node where it ends, and how many blocks are new."""
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
        """Keeps the path to `node` from being evicted, until `unlock`."""
        at: Node | None = node
        while at is not None:
            if at.locks == 0:
                self.locked += len(at.keys)
            at.locks += 1
            at = at.parent

    def unlock(self, node: Node) -> None:
        """Takes back one `lock` of the same node."""
        at: Node | None = node
        while at is not None:
            at.locks -= 1
            if at.locks == 0:
                self.locked -= len(at.keys)
                self._offer(at)
            at = at.parent

    def evict(self, blocks: int) -> int:
        """Frees at least that many blocks, or all that nobody holds; says how many."""
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
        """Forgets all that nobody holds."""
        self.evict(self.blocks)

    def nodes(self) -> Iterator[Node]:
        """Every node but the root."""
        waiting = list(self.root.children.values())
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(node.children.values())

    def _walk(
        self, keys: list[int], limit: int, *, touch: bool = True
    ) -> tuple[Node, int, tuple[Node, int] | None]:
        """Down along `keys`: the last whole node, its depth, and a node of which only a part fits."""
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
        """Cuts `node` behind its first `size` blocks; it stays the lower part, so who locked it still has."""
        assert node.parent is not None
        self._numbers += 1
        upper = Node(node.keys[:size], node.parent, self._numbers, node.used, node.locks)
        node.parent.children[upper.keys[0]] = upper
        node.keys = node.keys[size:]
        node.parent = upper
        upper.children[node.keys[0]] = node
        return upper

    def _offer(self, node: Node) -> None:
        """Puts a leaf that nobody holds where `evict` finds it."""
        if not (node.locks or node.children or node.queued or node.parent is None):
            node.queued = True
            heapq.heappush(self._leaves, (node.used, node.number, node))


def _common(held: list[int], keys: list[int], at: int, limit: int) -> int:
    """How many of `held` stand in `keys` from `at` on, at least 1: chained keys differ from one point on."""
    low, high = 1, min(len(held), limit - at)
    while low < high:
        middle = (low + high + 1) // 2
        if held[middle - 1] == keys[at + middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low
