from typing import Final
from zlib import crc32

from streamsyn.sglang.simulator.cache import CHARACTERS_A_TOKEN

VOCABULARY: Final = 49_152


def token_ids(content: str | list[int], start: int = 0) -> list[int]:
    """The ids from token `start` on: one for each four characters; ids stay as they are."""
    if not isinstance(content, str):
        return content[start:]
    step = CHARACTERS_A_TOKEN
    return [
        crc32(content[at : at + step].encode("utf-8", "surrogatepass")) % VOCABULARY
        for at in range(start * step, len(content), step)
    ]
