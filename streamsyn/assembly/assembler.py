"""Assembly as a function: contexts in the order of the log in, samples out.

The samples follow from the log, the section `assembly` and the run's seed alone. Each context becomes the
relevant one of one sample, unless the configuration excludes it. Distractors come from the window of
contexts before it (and, for the first ones, shortly after it), or from a corpus. So a sample is made as
soon as the log holds enough contexts for it, and memory is bounded by `assembly.window_bytes`. Random draws
depend on the run's seed and the context's id, never on the time, the process or the other contexts.
"""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Any, Literal

from streamsyn.assembly.corpus import Corpus
from streamsyn.assembly.distractors import Choice, Chooser, Goal, Sources
from streamsyn.assembly.sample_prompts import SamplePrompts
from streamsyn.assembly.token_counter import ServerTokenCounter, TokenCounter
from streamsyn.assembly.window import Passage, Piece, Waiting, Window, sign
from streamsyn.config.sections import AssemblySection, LengthsSection, Source
from streamsyn.records import Sample, digest


@dataclass(frozen=True, slots=True)
class AssemblyState:
    """The state of an assembler without the texts, which are read from the log again."""

    consumed: int = 0
    """Contexts added so far; also the seq of the next one."""
    samples: int = 0
    """Samples arranged so far."""
    window_start: int = 0
    """Seq of the oldest context in the window."""
    pending: list[tuple[int, int]] = field(default_factory=list)
    """Contexts that wait for distractors of their task: (seq, `Pool.added` at which to try again)."""
    added: dict[str, int] = field(default_factory=dict)
    """`Pool.added` of each task in the window."""
    pending_any: list[tuple[int, int]] = field(default_factory=list)
    """Contexts that wait for distractors of any task, as in `pending`."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Number of contexts without a sample, by reason: see `Assembler.left_out`."""

    def as_dict(self) -> dict[str, Any]:
        """Return the state as JSON-compatible values."""
        return asdict(self)


class Assembler:
    """Makes samples of passages, which must be added in the order of the log.

    Args:
        section: The section `assembly`.
        run_seed: `run.seed`; decides all random draws.
        prompts: Renders user messages.
        counter: Counts tokens; by default the counts of the servers are added up.
        corpus: Passages to draw distractors from; needed where the section names the source `corpus`.
    """

    def __init__(
        self,
        section: AssemblySection,
        run_seed: int,
        prompts: SamplePrompts,
        counter: TokenCounter | None = None,
        corpus: Corpus | None = None,
    ) -> None:
        self._section = section
        self._prompts = prompts
        self._counter = counter or ServerTokenCounter()
        self._sampling = Sampling(section, run_seed)
        self.window = Window(section.window_bytes)
        self.waiting = Waiting()
        self._sources = Sources(section, self._sampling.rng, self.window, corpus)
        self._chooser = Chooser(section, self._counter)
        self.consumed = 0
        self.samples = 0
        self.left_out: Counter[str] = Counter()
        """Number of contexts without a sample, by reason: `excluded` (`assembly.exclude_flags`,
        `assembly.min_context_gain`) or `too_long` (`assembly.max_tokens`)."""

    @property
    def needs_signatures(self) -> bool:
        """Whether passages are compared by their signatures."""
        return bool(self._sources.weights) and self._section.max_similarity < 1

    @property
    def window_start(self) -> int:
        """The seq of the oldest context that a later sample may have."""
        first = self.window.first_seq
        return self.consumed if first is None else first

    def prepare(self, passages: Sequence[Passage]) -> None:
        """Compute what choosing needs of passages that will be added: together it takes less time."""
        if self.needs_signatures:
            sign(passages)
        self._counter.prepare(passages)

    def add(self, passage: Passage) -> list["Arrangement"]:
        """Add the next passage; return the samples that can be made now."""
        assert passage.seq == self.consumed, f"context {self.consumed} is next, not {passage.seq}"
        self.consumed += 1
        reason = self._why_left_out(passage)
        if reason is not None:
            self.left_out[reason] += 1
        if not self._sources.of_log:
            return [] if reason is not None else [self._arrange_now(passage)]
        self.window.add(passage)
        if reason is None:
            self.waiting.add(passage, *self._sources.first_try)
        made = [one for source in ("same_task", "any_task") for one in self._retry(source, passage.task)]
        while (oldest := self.window.overflow()) is not None:
            if oldest in self.waiting:
                made.append(self._arrange_now(oldest))
            self.window.drop_oldest()
            for source in ("same_task", "any_task"):
                self.waiting.compact(source, oldest.task, len(self._sources.pool(source, oldest.task)))
        return made

    def flush(self) -> list["Arrangement"]:
        """At the end of the stream: make the samples that still wait, with the distractors there are."""
        made = [self._arrange_now(passage) for passage in self.waiting.all()]
        self.waiting.clear()
        return made

    def state(self) -> AssemblyState:
        """Return what `restore` needs, besides the log."""
        return AssemblyState(
            consumed=self.consumed,
            samples=self.samples,
            window_start=self.window_start,
            pending=self.waiting.entries("same_task"),
            added={task: pool.added for task, pool in self.window.pools.items()},
            pending_any=self.waiting.entries("any_task"),
            left_out=dict(self.left_out),
        )

    def restore(self, state: AssemblyState, passages: Iterable[Passage]) -> None:
        """Return a new assembler to `state`; `passages` are those from `window_start` up to `consumed`."""
        waiting: tuple[tuple[Source, dict[int, int]], ...] = (
            ("same_task", dict(state.pending)),
            ("any_task", dict(state.pending_any)),
        )
        for passage in passages:
            self.window.add(passage)
            for source, retry_at in waiting:
                if passage.seq in retry_at:
                    self.waiting.add(passage, source, retry_at[passage.seq])
        for task, pool in self.window.pools.items():
            pool.added = state.added[task]
        self.window.everything.added = state.consumed
        self.consumed, self.samples = state.consumed, state.samples
        self.left_out = Counter(state.left_out)

    def choose(self, passage: Passage, *, final: bool) -> Choice:
        """Choose distractors for a passage from what the window holds now.

        Args:
            passage: The relevant one.
            final: Use what there is; otherwise a source that may grow ends the choice when it is exhausted.
        """
        section = self._section
        if not self._sources.weights:
            return Choice(is_complete=True)
        goal = Goal(
            section.contexts_per_sample - 1, self._sampling.target_tokens(passage), section.max_tokens
        )
        return self._chooser.choose(
            passage,
            lambda: self._sources.candidates(passage, final=final),
            goal,
            lambda chosen: self._ordered(passage, chosen)[0],
        )

    def _why_left_out(self, passage: Passage) -> str | None:
        """Return why a passage gets no sample, or None. It can be a distractor in any case."""
        section = self._section
        if not set(section.exclude_flags).isdisjoint(passage.flags):
            return "excluded"
        gain = passage.context_gain
        if section.min_context_gain is not None and gain is not None and gain < section.min_context_gain:
            return "excluded"
        if section.max_tokens is not None and self._counter.count(passage, [passage]) > section.max_tokens:
            return "too_long"
        return None

    def _retry(self, source: Source, task: str) -> list["Arrangement"]:
        """Try the passages again that waited for the pool to reach its present size."""
        made = []
        for passage in self.waiting.pop_due(source, task, self._sources.pool(source, task).added):
            choice = self.choose(passage, final=False)
            if choice.is_complete:
                made.append(self._arranged(passage, choice))
            else:
                # Wait until the pool has doubled: a passage whose answer is in nearly every text must not
                # cost a search for each new context.
                awaited = choice.exhausted or source
                self.waiting.add(passage, awaited, 2 * self._sources.pool(awaited, task).added)
        return made

    def _arrange_now(self, passage: Passage) -> "Arrangement":
        self.waiting.discard(passage)
        return self._arranged(passage, self.choose(passage, final=True))

    def _ordered(self, passage: Passage, distractors: list[Piece]) -> tuple[list[Piece], int]:
        """Return the passages of a sample in order, and the index of the relevant one."""
        index = self._sampling.relevant_index(passage, len(distractors))
        return [*distractors[:index], passage, *distractors[index:]], index

    def _arranged(self, passage: Passage, choice: Choice) -> "Arrangement":
        self.samples += 1
        passages, index = self._ordered(passage, choice.distractors)
        return Arrangement(
            passages,
            index,
            self._sampling.target_tokens(passage),
            choice.n_tokens,
            self._prompts,
            self._counter,
        )


@dataclass(frozen=True, slots=True)
class Arrangement:
    """The passages of a sample in order. The text is rendered later, as many samples may be due at once."""

    passages: Sequence[Piece]
    relevant_index: int
    target_tokens: int | None
    n_tokens: int | None
    """Tokens of the sample; None if they have not been counted yet."""
    prompts: SamplePrompts
    counter: TokenCounter

    @property
    def relevant(self) -> Passage:
        """The context that the sample is made for."""
        relevant = self.passages[self.relevant_index]
        assert isinstance(relevant, Passage), "the relevant one is a context"
        return relevant

    def sample(self) -> Sample:
        """Render the sample."""
        relevant = self.relevant
        user = self.prompts.user_message(relevant, [one.text for one in self.passages])
        return Sample(
            id=relevant.id,
            seed_id=relevant.seed_id,
            task=relevant.task,
            instruction=relevant.instruction,
            messages=[
                {"role": "user", "content": user},
                {"role": "assistant", "content": relevant.answer},
            ],
            context_seqs=[one.log_seq for one in self.passages],
            relevant_index=self.relevant_index,
            n_tokens=self.count(user),
            target_tokens=self.target_tokens,
        )

    def count(self, user: str | None = None) -> int:
        """Return the tokens of the sample; `user` is its user message, if that has been rendered."""
        if self.n_tokens is not None:
            return self.n_tokens
        return self.counter.count(self.relevant, self.passages, user)


class Sampling:
    """The random draws for a sample: its length, and the position of its relevant context.

    Args:
        section: The section `assembly`.
        run_seed: `run.seed`.
    """

    def __init__(self, section: AssemblySection, run_seed: int) -> None:
        self._target = section.target_tokens
        self._position: Literal["uniform"] | float | Sequence[float] = section.position
        self._run_seed = str(run_seed)
        # Epoch 0 is left out of the digest, so that its draws equal those of versions without epochs.
        self._epoch = (str(section.epoch),) if section.epoch else ()

    def rng(self, purpose: str, passage: Passage) -> Random:
        """Return the random generator for one purpose and one context."""
        return Random(digest(purpose, self._run_seed, passage.id, *self._epoch))

    def target_tokens(self, passage: Passage) -> int | None:
        """Return the length of this context's sample in tokens; None if a number of contexts decides."""
        if not isinstance(self._target, LengthsSection):
            return self._target
        lengths = self._target
        if lengths.schedule is not None:
            starts = [start for start, _ in lengths.schedule]
            return lengths.schedule[bisect_right(starts, passage.seq) - 1][1]
        rng = self.rng("length", passage)
        if lengths.uniform is not None:
            return rng.randint(*lengths.uniform)
        if lengths.log_uniform is not None:
            low, high = lengths.log_uniform
            drawn = round(low * math.exp(rng.random() * math.log(high / low)))
            return min(max(drawn, low), high)
        assert lengths.choices is not None, "a distribution has one of its keys"
        return rng.choices(lengths.choices, lengths.weights)[0]

    def relevant_index(self, passage: Passage, distractors: int) -> int:
        """Return the index of the relevant context among `distractors` others."""
        if not distractors:
            return 0
        if self._position == "uniform":
            return self.rng("position", passage).randint(0, distractors)
        depth = self._position
        if isinstance(depth, Sequence):
            depth = depth[passage.seq % len(depth)]
        return math.floor(float(depth) * distractors + 0.5)
