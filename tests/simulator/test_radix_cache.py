"""The radix cache compared with a plain set of prefixes."""

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.simulator.radix_cache import Node, RadixCache

Prefix = tuple[str, ...]
KEYS: dict[Prefix, int] = {}


def keys(blocks: str) -> list[int]:
    """Chained keys: one number for each distinct prefix."""
    return [KEYS.setdefault(tuple(blocks[: size + 1]), len(KEYS) + 1) for size in range(len(blocks))]


def check(cache: RadixCache) -> None:
    """Counts are those of the nodes, and every lock reaches up to the root."""
    nodes = list(cache.nodes())
    assert cache.blocks == sum(len(node.keys) for node in nodes)
    assert cache.locked == sum(len(node.keys) for node in nodes if node.locks)
    for node in nodes:
        assert node.keys
        assert node.parent is not None
        assert node.parent.children[node.keys[0]] is node
        assert node.locks >= sum(child.locks for child in node.children.values()) >= 0


class Naive:
    """The same as a set of prefixes, each with the prefixes that hold it."""

    def __init__(self) -> None:
        self.held: set[int] = set()
        self.locks: list[list[int]] = []

    def match(self, path: list[int], limit: int) -> int:
        """Blocks of `path` that are held."""
        return next((size for size, key in enumerate(path[:limit]) if key not in self.held), limit)


words = st.text(alphabet="ab", max_size=7)
operations = st.lists(
    st.tuples(
        st.sampled_from(["insert", "match", "lock", "unlock", "evict", "measure", "clear"]),
        words,
        st.integers(0, 9),
    ),
    max_size=60,
)


@given(operations)
def test_it_holds_what_a_set_of_prefixes_holds(done: list[tuple[str, str, int]]) -> None:
    """Matches are those of a plain set; what is locked is never evicted; counts stay right."""
    cache, naive = RadixCache(), Naive()
    locked: list[tuple[Node, list[int]]] = []
    for what, blocks, number in done:
        path = keys(blocks)
        limit = min(number, len(path))
        match what:
            case "insert":
                before = cache.blocks
                _, new = cache.insert(path)
                assert new == cache.blocks - before == len(set(path) - naive.held)
                naive.held.update(path)
            case "match":
                assert cache.match(path, limit)[1] == naive.match(path, limit)
            case "measure":
                assert cache.measure(path, touch=bool(number % 2)) == naive.match(path, len(path))
            case "lock":
                node, held = cache.match(path, limit)
                cache.lock(node)
                locked.append((node, path[:held]))
            case "unlock" if locked:
                node, _ = locked.pop(number % len(locked))
                cache.unlock(node)
            case "evict" | "clear":
                asked = number if what == "evict" else 10**6
                free = cache.evictable
                freed = cache.evict(asked)
                assert freed >= min(asked, free)
                naive.held = {key for node in cache.nodes() for key in node.keys}
                assert all(set(path) <= naive.held for _, path in locked)
        check(cache)
        assert cache.locked == len({key for _, path in locked for key in path})


def test_the_least_recently_used_leaf_is_evicted_first() -> None:
    """Eviction takes leaves in the order of their last use, and a shared prefix last."""
    cache = RadixCache()
    for blocks in ("sab", "scd", "xyz"):
        cache.insert(keys(blocks))
    cache.match(keys("sab"), 3)
    gone = []
    while cache.blocks:
        cache.evict(1)
        gone += [
            name
            for name in ("sab", "scd", "xyz", "s")
            if cache.measure(keys(name), touch=False) < len(name) and name not in gone
        ]
    assert gone == ["scd", "xyz", "sab", "s"]


def test_a_split_leaves_locks_where_they_were() -> None:
    """A lock on a node that is split later still covers all of it."""
    cache = RadixCache()
    node, _ = cache.insert(keys("abcd"))
    cache.lock(node)
    cache.match(keys("abxx"), 4)
    assert len(list(cache.nodes())) == 2
    assert cache.evict(10) == 0
    cache.unlock(node)
    assert (cache.locked, cache.evict(10), cache.blocks) == (0, 4, 0)


@pytest.mark.parametrize("seed", range(3))
def test_the_same_calls_evict_the_same(seed: int) -> None:
    """The order of eviction depends on the calls alone, not on the values of the keys."""

    def rest(factor: int) -> list[str]:
        rng, cache, names = random.Random(seed), RadixCache(), []
        for _ in range(200):
            name = "".join(rng.choice("abc") for _ in range(rng.randint(1, 8)))
            names.append(name)
            cache.insert([key * factor + 1 for key in keys(name)])
            if cache.blocks > 60:
                cache.evict(20)
        return [
            name for name in names if cache.measure([key * factor + 1 for key in keys(name)]) == len(name)
        ]

    assert all(one == other for one, other in pairwise([rest(1), rest(-977), rest(2**33)]))
