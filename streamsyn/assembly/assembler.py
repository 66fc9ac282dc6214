"""Contexts in, samples out: a pure function of the log, the configuration and the run's seed.

Each context becomes the relevant one of one sample. Distractors come from the window of contexts
before it (and, for the first ones, shortly after it): so a sample is made as soon as the log holds
enough contexts of its task, memory is bounded by `assembly.window_bytes`, and assembling the same
log again gives the same samples. What each draw depends on is the seed's id and the run's seed,
never the time, the process or the order of anything but the log.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from heapq import heapify, heappop, heappush
from random import Random
from typing import Any

from streamsyn.assembly.passages import Passage, Pool, Window
from streamsyn.assembly.prompts import SamplePrompts
from streamsyn.records import Sample, digest
from streamsyn.sections import AssemblySection


@dataclass(frozen=True, slots=True)
class AssemblyState:
    """Where assembly stands, without the texts: those are read from the log again."""

    consumed: int = 0
    """Contexts taken in; also the seq of the next one."""
    samples: int = 0
    """Samples arranged."""
    window_start: int = 0
    """Seq of the oldest context still in the window."""
    pending: list[tuple[int, int]] = field(default_factory=list)
    """Contexts that wait for distractors: (seq, size of its pool at which to try again)."""
    added: dict[str, int] = field(default_factory=dict)
    """`Pool.added` of each task in the window."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Which contexts make a sample, in which order. Many may be due at once, so its text is made later."""

    passages: list[Passage]
    relevant_index: int
    prompts: SamplePrompts

    def sample(self) -> Sample:
        """The sample, with its text."""
        relevant = self.passages[self.relevant_index]
        user = self.prompts.user_message(relevant, [one.text for one in self.passages])
        return Sample(
            id=relevant.id,
            seed_id=relevant.seed_id,
            task=relevant.task,
            messages=[
                {"role": "user", "content": user},
                {"role": "assistant", "content": relevant.answer},
            ],
            context_seqs=[one.seq for one in self.passages],
            relevant_index=self.relevant_index,
            n_tokens=sum(one.tokens for one in self.passages),
        )


class Assembler:
    """Makes samples of passages, which must come in the order of the log."""

    def __init__(self, section: AssemblySection, run_seed: int, prompts: SamplePrompts) -> None:
        self._section = section
        self._run_seed = str(run_seed)
        self._prompts = prompts
        self._window = Window(section.window_bytes)
        self._waiting: dict[str, list[tuple[int, int]]] = {}
        self._pending: dict[int, Passage] = {}
        self.consumed = 0
        self.samples = 0

    def add(self, passage: Passage) -> list[Arrangement]:
        """Take in the next passage; what can be arranged now, each once."""
        assert passage.seq == self.consumed, f"context {self.consumed} is next, not {passage.seq}"
        self.consumed += 1
        if self._is_single:
            return [self._arranged(passage, [])]
        pool = self._window.add(passage)
        self._wait(passage, self._section.contexts_per_sample if self._section.target_tokens is None else 1)
        made = self._retry(passage.task, pool)
        while (oldest := self._window.overflow()) is not None:
            if oldest.seq in self._pending:
                made.append(self._make_do(oldest))
            self._window.drop_oldest()
            self._forget_gone(oldest.task)
        return made

    def flush(self) -> list[Arrangement]:
        """At the end of the stream: arrange those that still wait, with what there is."""
        made = [self._make_do(self._pending[seq]) for seq in sorted(self._pending)]
        self._waiting.clear()
        return made

    def state(self) -> AssemblyState:
        """What `restore` needs, besides the log."""
        first = self._window.first_seq
        return AssemblyState(
            consumed=self.consumed,
            samples=self.samples,
            window_start=self.consumed if first is None else first,
            pending=sorted(
                (seq, retry_at)
                for waiting in self._waiting.values()
                for retry_at, seq in waiting
                if seq in self._pending
            ),
            added={task: pool.added for task, pool in self._window.pools.items()},
        )

    def restore(self, state: AssemblyState, passages: Iterable[Passage]) -> None:
        """Go back to `state`; `passages` are those from `window_start` up to `consumed`."""
        retry_at = dict(state.pending)
        for passage in passages:
            self._window.add(passage)
            if passage.seq in retry_at:
                self._wait(passage, retry_at[passage.seq])
        for task, pool in self._window.pools.items():
            pool.added = state.added[task]
        self.consumed, self.samples = state.consumed, state.samples

    @property
    def _is_single(self) -> bool:
        return self._section.contexts_per_sample == 1 and self._section.target_tokens is None

    def _wait(self, passage: Passage, retry_at: int) -> None:
        self._pending[passage.seq] = passage
        heappush(self._waiting.setdefault(passage.task, []), (retry_at, passage.seq))

    def _retry(self, task: str, pool: Pool) -> list[Arrangement]:
        """Arrangements of those that wait for the pool to be as large as it is now."""
        made = []
        waiting = self._waiting[task]
        while waiting and waiting[0][0] <= pool.added:
            _, seq = heappop(waiting)
            if (passage := self._pending.get(seq)) is None:
                continue  # it has left the window
            distractors, enough = self._distractors(passage, pool)
            if enough:
                del self._pending[seq]
                made.append(self._arranged(passage, distractors))
            else:
                # Twice as many next time: one that finds few, as its answer stands everywhere,
                # must not cost a search for each context that comes.
                heappush(waiting, (2 * pool.added, seq))
        if not waiting:
            del self._waiting[task]
        return made

    def _forget_gone(self, task: str) -> None:
        """Keep `_waiting` no longer than twice the pool, whatever has left the window."""
        waiting = self._waiting.get(task, [])
        pool = self._window.pools.get(task)
        if len(waiting) <= 2 * (0 if pool is None else len(pool)):
            return
        waiting[:] = [entry for entry in waiting if entry[1] in self._pending]
        heapify(waiting)
        if not waiting:
            self._waiting.pop(task, None)

    def _make_do(self, passage: Passage) -> Arrangement:
        del self._pending[passage.seq]
        distractors, _ = self._distractors(passage, self._window.pools[passage.task])
        return self._arranged(passage, distractors)

    def _distractors(self, passage: Passage, pool: Pool) -> tuple[list[Passage], bool]:
        """Distractors drawn for `passage`, and whether they are as many as are wanted."""
        section = self._section
        wanted, tokens = section.contexts_per_sample - 1, passage.tokens
        answer = " ".join(passage.answer.casefold().split())
        draw = self._draw("distractors", passage)
        seeds = {passage.seed_id}  # drafts of one seed tell the same story
        chosen: list[Passage] = []
        for tried, candidate in enumerate(pool.shuffled(draw)):
            if self._is_enough(len(chosen), wanted, tokens):
                return chosen, True
            if tried > 8 * (len(chosen) + 8):
                break  # nearly everything holds the answer
            if candidate.seed_id in seeds:
                continue
            if len(answer) >= section.min_answer_chars and candidate.holds(answer):
                continue
            chosen.append(candidate)
            seeds.add(candidate.seed_id)
            tokens += candidate.tokens
        return chosen, self._is_enough(len(chosen), wanted, tokens)

    def _is_enough(self, chosen: int, wanted: int, tokens: int) -> bool:
        if isinstance(self._section.target_tokens, int):
            return tokens >= self._section.target_tokens
        return chosen >= wanted

    def _arranged(self, passage: Passage, distractors: list[Passage]) -> Arrangement:
        relevant_index = self._draw("position", passage).randint(0, len(distractors)) if distractors else 0
        passages = [*distractors[:relevant_index], passage, *distractors[relevant_index:]]
        self.samples += 1
        return Arrangement(passages, relevant_index, self._prompts)

    def _draw(self, what: str, passage: Passage) -> Random:
        return Random(digest(what, self._run_seed, passage.id))
