"""What several drafts of one seed need is worked out once."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Once(Generic[T]):
    """Results by key. Who asks for one that is being worked out waits for it.

    Args:
        most: So many are remembered; those asked for least recently go first.
    """

    def __init__(self, most: int = 16_384) -> None:
        self._most = most
        self._results: OrderedDict[bytes, asyncio.Future[T]] = OrderedDict()

    async def get(self, key: bytes, work: Callable[[], Awaitable[T]]) -> T:
        """The result for `key`: a remembered one, or what `work` gives.

        When it fails that is for its caller alone: the next one who waits works it out again.
        """
        while (result := self._results.get(key)) is not None:
            self._results.move_to_end(key)
            await asyncio.wait([result])  # unlike `await result`, this leaves it alone when we are cancelled
            if not result.cancelled():
                return result.result()
        return await self._work_out(key, work)

    async def _work_out(self, key: bytes, work: Callable[[], Awaitable[T]]) -> T:
        result: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._results[key] = result
        while len(self._results) > self._most:
            self._results.popitem(last=False)
        try:
            result.set_result(await work())
        finally:
            if not result.done():
                if self._results.get(key) is result:
                    del self._results[key]
                result.cancel()
        return result.result()
