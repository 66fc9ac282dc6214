from typing import Final

from streamsyn.sglang.simulator.cache import BLOCK_TOKENS, extend
from streamsyn.sglang.simulator.engine import Work
from streamsyn.sglang.simulator.radix import RadixCache


class KVPool:
    """The tokens of a server's KV memory: the prefix cache, and what running requests hold beside it.

    At all times: cache + private <= size, and what running requests took from the cache is locked there.
    """

    def __init__(self, size: int, *, caching: bool) -> None:
        self.size: Final = size
        self.caching: Final = caching
        self.cache = RadixCache()
        self.private = 0

    @property
    def free(self) -> int:
        """Tokens that nothing lies in."""
        return self.size - self.cache.blocks * BLOCK_TOKENS - self.private

    @property
    def available(self) -> int:
        """Tokens that are free or can be evicted."""
        return self.size - self.cache.locked * BLOCK_TOKENS - self.private

    @property
    def used(self) -> int:
        """Tokens that running requests hold: the real server does not count what can be evicted."""
        return self.size - self.available

    def lock(self, work: Work) -> int:
        """Locks the longest prefix of `work` that is held, and says how many tokens it spares."""
        blocks = 0
        if self.caching:
            node, blocks = self.cache.match(work.keys, max(0, work.reusable) // BLOCK_TOKENS)
            self.cache.lock(node)
            work.node = node
        work.locked = blocks * BLOCK_TOKENS
        return work.locked

    def unlock(self, work: Work) -> None:
        """Takes back `lock`."""
        if work.node is not None:
            self.cache.unlock(work.node)
            work.node = None
        work.locked = 0

    def take(self, tokens: int) -> None:
        """Makes `tokens` private; evicts what must go for them. There must be as many available."""
        self.private += tokens
        if self.free < 0:
            self.cache.evict(-(self.free // BLOCK_TOKENS))

    def share(self, work: Work) -> None:
        """Puts the prompt of `work`, now computed, into the cache; it stays locked."""
        if not self.caching:
            return
        held = work.locked + work.private
        keys = work.keys
        self.private -= work.private
        node, _ = self.cache.insert(keys)
        self.cache.lock(node)
        self.unlock(work)
        work.node = node
        work.locked = len(keys) * BLOCK_TOKENS
        work.private = held - work.locked
        self.private += work.private

    def release(self, work: Work, private: int, *, keep: bool) -> None:
        """Frees what `work` holds, `private` tokens beside its prefix; `keep`: the cache takes its answer."""
        held = work.locked + private
        self.private -= private
        if keep and self.caching and isinstance(work.prompt, str) and work.output:
            self.cache.insert(extend(work.keys, work.prompt, work.output)[: held // BLOCK_TOKENS])
        self.unlock(work)
        work.private = 0
