"""Text in which something can be hidden: plain sentences of village life. There are no digits in them."""

import random
from collections.abc import Iterator
from functools import cache
from importlib.resources import files

import orjson


@cache
def words(kind: str) -> tuple[str, ...]:
    """Words that come with the package: `who`, `did`, `where`, `when`, `and`, `colours`, `things`."""
    packaged = files("streamsyn") / "data" / "needles" / "words.json"
    return tuple(orjson.loads(packaged.read_bytes())[kind])


def sentences(chance: random.Random) -> Iterator[str]:
    """Sentences without end, each with a capital letter and a full stop; no two in a row are alike."""
    before = ""
    while True:
        parts = [chance.choice(words(kind)) for kind in ("who", "did", "where")]
        if chance.random() < 0.6:
            parts.append(chance.choice(words("when")))
        if chance.random() < 0.4:
            parts[-1] += ","
            parts.append(chance.choice(words("and")))
        text = " ".join(parts)
        if text != before:
            yield text[0].upper() + text[1:] + "."
        before = text
