"""A large set of 64-bit numbers that stand for runs of words, each with the file that it is from.

A sorted array: 8 bytes a number, 1 or 2 for the file, and 1 or 2 for a map of bits that spares most look-ups
of numbers that are not in it the way through memory. 40 million numbers take 0.4 GB, and twice that while
they are gathered.
"""

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any, TypeAlias

import numpy
from numpy.typing import NDArray

from streamsyn.wordruns import Hashes

Places: TypeAlias = NDArray[numpy.intp]

CHUNK_RUNS = 2**21
_BITS_A_NUMBER = 8


class RunSet:
    """Tells which numbers are in the set. For any number of threads.

    Args:
        hashes: Rising, without repeats; evenly distributed.
        owners: For each the number of its file.
    """

    def __init__(self, hashes: Hashes, owners: NDArray[Any]) -> None:
        self._hashes = hashes
        self._owners = owners
        bits = max(6, (_BITS_A_NUMBER * len(hashes)).bit_length())
        self._shift = numpy.uint64(64 - bits)
        self._bits = numpy.zeros(2 ** (bits - 3), numpy.uint8)
        for start in range(0, len(hashes), CHUNK_RUNS):
            byte, bit = self._bit(hashes[start : start + CHUNK_RUNS])
            numpy.bitwise_or.at(self._bits, byte, bit)

    def __len__(self) -> int:
        return len(self._hashes)

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return self._hashes.nbytes + self._owners.nbytes + self._bits.nbytes

    def digest(self, key: bytes) -> str:
        """Stands for the numbers and `key`, not for the files."""
        numbers = self._hashes.astype("<u8", copy=False)
        return blake2b(numbers.data, key=key, digest_size=16).hexdigest()

    def find(self, runs: Hashes) -> tuple[Places, NDArray[Any]]:
        """At which places in `runs` there are numbers of the set, rising, and the files of these."""
        byte, bit = self._bit(runs)
        where = numpy.flatnonzero(self._bits[byte] & bit)
        wanted = runs[where]
        places = numpy.searchsorted(self._hashes, wanted)
        found = self._hashes.take(places, mode="clip") == wanted
        return where[found], self._owners[places[found]]

    def _bit(self, hashes: Hashes) -> tuple[Places, NDArray[numpy.uint8]]:
        numbers = (hashes >> self._shift).astype(numpy.intp)
        return numbers >> 3, numpy.left_shift(1, numbers & 7).astype(numpy.uint8)


class GatheredRuns:
    """Gathers numbers file by file; of repeated ones the first counts."""

    def __init__(self, files: int) -> None:
        self._hashes: Hashes = numpy.empty(0, numpy.uint64)
        self._owners: NDArray[Any] = numpy.empty(0, numpy.min_scalar_type(files))
        self._new: list[tuple[Hashes, int]] = []
        self._count = 0

    def add(self, hashes: Hashes, file: int) -> None:
        """Add the numbers of a text in the file with this number."""
        if len(hashes):
            self._new.append((hashes, file))
            self._count += len(hashes)
            # An eighth of what there is: the array is copied a few times, not once for each chunk.
            if self._count >= max(CHUNK_RUNS, len(self._hashes) // 8):
                self._merge()

    def finish(self) -> RunSet:
        """The set of all that were added."""
        if self._new:
            self._merge()
        return RunSet(self._hashes, self._owners)

    def _merge(self) -> None:
        lengths = [len(hashes) for hashes, _ in self._new]
        files = numpy.array([file for _, file in self._new], self._owners.dtype)
        new, first = numpy.unique(numpy.concatenate(list(self._taken())), return_index=True)
        owners = numpy.repeat(files, lengths)[first]
        del first
        if not len(self._hashes):
            self._hashes, self._owners = new, owners
            return
        places = numpy.searchsorted(self._hashes, new)
        is_new = self._hashes.take(places, mode="clip") != new
        places = places[is_new]
        self._hashes = numpy.insert(self._hashes, places, new[is_new])
        self._owners = numpy.insert(self._owners, places, owners[is_new])

    def _taken(self) -> Iterator[Hashes]:
        new, self._new, self._count = self._new, [], 0
        return (hashes for hashes, _ in new)
