import heapq
from typing import Final

from streamsyn.sglang.simulator.costs import CostModel
from streamsyn.sglang.simulator.engine import Work

RESERVE_LIMIT: Final = 4096
"""No more new tokens than this are reserved for a request (SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION)."""


def remaining(work: Work, written: int) -> int:
    """New tokens to reserve for a request that has written so many."""
    return min(max(0, (work.max_new_tokens or 0) - written), RESERVE_LIMIT)


class Lockstep:
    """The running batch: at each step every request in it writes one token.

    Steps are not simulated one by one. A request's progress is the number of steps that passed since it
    joined, and a heap holds the step counts at which somebody wants to know.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.context = 0
        """Tokens in the contexts of all requests."""
        self.batch: dict[Work, None] = {}
        self._milestones: list[tuple[int, int, Work]] = []
        self._entries = 0
        # What is reserved for new tokens shrinks by one a step for all but those that hit the limit.
        self._shrinking = 0
        self._shrinking_reserve = 0

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def reserve(self) -> int:
        """New tokens that the requests may still ask for."""
        return self._shrinking_reserve + (len(self.batch) - self._shrinking) * RESERVE_LIMIT

    def join(self, work: Work) -> None:
        """Takes a request whose prefill is done and whose next token comes with the next step."""
        self.batch[work] = None
        work.joined, work.start = self.steps, work.written
        self.context += work.tokens + work.start - 1
        self._count(work, 1, work.written)
        self._mark(work)

    def part(self, work: Work) -> int:
        """Lets a request go, as of now; says how many tokens it holds beside its locked prefix."""
        del self.batch[work]
        passed = self.steps - work.joined
        work.written = work.start + passed
        self.context -= work.tokens + work.written - 1
        self._count(work, -1, work.written)
        work.entry = 0
        return work.private + passed

    def advance(self, steps: int) -> list[Work]:
        """Lets steps pass, no more than `next_milestone` of them; those that are where they wanted to be."""
        self.steps += steps
        self.context += steps * len(self.batch)
        self._shrinking_reserve -= steps * self._shrinking
        there = []
        heap = self._milestones
        while heap and heap[0][0] <= self.steps:
            _, entry, work = heapq.heappop(heap)
            if work.entry == entry:
                work.written = work.start + self.steps - work.joined
                there.append(work)
                if work.written < work.target:
                    self._mark(work)
        return there

    def next_milestone(self) -> int:
        """Steps until somebody is where it wanted to be."""
        heap = self._milestones
        while heap[0][2].entry != heap[0][1]:
            heapq.heappop(heap)
        return heap[0][0] - self.steps

    def seconds(self, model: CostModel, steps: int) -> float:
        """What so many steps take."""
        return model.decode(len(self.batch), self.context, steps)

    def steps_until(self, model: CostModel, seconds: float) -> int:
        """Steps until the first step that ends after `seconds`, or just then."""
        return model.steps_until(len(self.batch), self.context, seconds)

    def _count(self, work: Work, sign: int, written: int) -> None:
        wanted = (work.max_new_tokens or 0) - work.start
        if wanted <= RESERVE_LIMIT:
            self._shrinking += sign
            self._shrinking_reserve += sign * ((work.max_new_tokens or 0) - written)

    def _mark(self, work: Work) -> None:
        goal = work.target
        if work.piece:
            goal = min(goal, (work.written // work.piece + 1) * work.piece)
        self._entries += 1
        work.entry = self._entries
        heapq.heappush(self._milestones, (work.joined - work.start + goal, work.entry, work))
