"""What is left to chance in a sample: each draw follows from the run's seed and the context's id alone.

Which passages make a sample.

Contexts in, samples out: a pure function of the log, the configuration and the run's seed.

Each context becomes the relevant one of one sample, unless the configuration leaves it out. Distractors
come from the window of contexts before it (and, for the first ones, shortly after it), or from a corpus:
so a sample is made as soon as the log holds enough contexts for it, memory is bounded by
`assembly.window_bytes`, and assembling the same log again gives the same samples. What each draw depends
on is the seed's id and the run's seed, never the time, the process or the order of anything but the log.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from streamsyn.assembly.corpus import Corpus
from streamsyn.assembly.distractors import Choice, Chooser, Goal, Sampling, Sources
from streamsyn.assembly.sample_prompts import SamplePrompts
from streamsyn.assembly.token_counter import ServerTokenCounter, TokenCounter
from streamsyn.assembly.window import Passage, Piece, Waiting, Window
from streamsyn.config.sections import AssemblySection, Source
from streamsyn.records import Sample


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Which passages make a sample, in which order. Many may be due at once, so its text is made later."""

    passages: Sequence[Piece]
    relevant_index: int
    target_tokens: int | None
    n_tokens: int | None
    """None where nothing had to be counted so far."""
    prompts: SamplePrompts
    measure: TokenCounter

    def sample(self) -> Sample:
        """The sample, with its text."""
        relevant = self.passages[self.relevant_index]
        assert isinstance(relevant, Passage), "the relevant one is a context"
        user = self.prompts.user_message(relevant, [one.text for one in self.passages])
        n_tokens = self.n_tokens
        if n_tokens is None:
            n_tokens = self.measure.total(relevant, self.passages, user)
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
            n_tokens=n_tokens,
            target_tokens=self.target_tokens,
        )


__all__ = ["Arrangement", "Assembler", "AssemblyState"]


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
    """Contexts that wait for distractors of their task: (seq, size of the pool at which to try again)."""
    added: dict[str, int] = field(default_factory=dict)
    """`Pool.added` of each task in the window."""
    pending_any: list[tuple[int, int]] = field(default_factory=list)
    """Those that wait for distractors of any task."""
    left_out: dict[str, int] = field(default_factory=dict)
    """`Assembler.left_out`."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Assembler:
    """Makes samples of passages, which must come in the order of the log.

    Args:
        section: How.
        run_seed: Decides all draws.
        prompts: Renders user messages.
        measure: Counts tokens; by default as the servers did.
        corpus: Passages to draw distractors from, where the section wants that.
    """

    def __init__(
        self,
        section: AssemblySection,
        run_seed: int,
        prompts: SamplePrompts,
        measure: TokenCounter | None = None,
        corpus: Corpus | None = None,
    ) -> None:
        self._section = section
        self._prompts = prompts
        self._measure = measure or ServerTokenCounter()
        self._lots = Sampling(section, run_seed)
        self._window = Window(section.window_bytes)
        self._sources = Sources(section, self._lots, self._window, corpus)
        self._chooser = Chooser(section, self._measure)
        self._waiting = Waiting()
        self.consumed = 0
        self.samples = 0
        self.left_out: Counter[str] = Counter()
        """Contexts that got no sample, by why: excluded or too_long."""

    def add(self, passage: Passage) -> list[Arrangement]:
        """Take in the next passage; what can be arranged now, each once."""
        assert passage.seq == self.consumed, f"context {self.consumed} is next, not {passage.seq}"
        self.consumed += 1
        why = self._why_left_out(passage)
        if why is not None:
            self.left_out[why] += 1
        if not self._sources.of_log:
            return [] if why is not None else [self._make_do(passage)]
        self._window.add(passage)
        if why is None:
            self._waiting.add(passage, *self._sources.first_try)
        made = [one for source in ("same_task", "any_task") for one in self._retry(source, passage.task)]
        while (oldest := self._window.overflow()) is not None:
            if self._waiting.holds(oldest):
                made.append(self._make_do(oldest))
            self._window.drop_oldest()
            for source in ("same_task", "any_task"):
                self._waiting.tidy(source, oldest.task, len(self._sources.pool(source, oldest.task)))
        return made

    def flush(self) -> list[Arrangement]:
        """At the end of the stream: arrange those that still wait, with what there is."""
        made = [self._make_do(passage) for passage in self._waiting.all()]
        self._waiting.clear()
        return made

    def state(self) -> AssemblyState:
        """What `restore` needs, besides the log."""
        first = self._window.first_seq
        return AssemblyState(
            consumed=self.consumed,
            samples=self.samples,
            window_start=self.consumed if first is None else first,
            pending=self._waiting.entries("same_task"),
            added={task: pool.added for task, pool in self._window.pools.items()},
            pending_any=self._waiting.entries("any_task"),
            left_out=dict(self.left_out),
        )

    def restore(self, state: AssemblyState, passages: Iterable[Passage]) -> None:
        """Go back to `state`; `passages` are those from `window_start` up to `consumed`."""
        waiting: tuple[tuple[Source, dict[int, int]], ...] = (
            ("same_task", dict(state.pending)),
            ("any_task", dict(state.pending_any)),
        )
        for passage in passages:
            self._window.add(passage)
            for source, retry_at in waiting:
                if passage.seq in retry_at:
                    self._waiting.add(passage, source, retry_at[passage.seq])
        for task, pool in self._window.pools.items():
            pool.added = state.added[task]
        self._window.everything.added = state.consumed
        self.consumed, self.samples = state.consumed, state.samples
        self.left_out = Counter(state.left_out)

    def _why_left_out(self, passage: Passage) -> str | None:
        """Why it gets no sample; it may be a distractor all the same."""
        section = self._section
        if not set(section.exclude_flags).isdisjoint(passage.flags):
            return "excluded"
        gain = passage.context_gain
        if section.min_context_gain is not None and gain is not None and gain < section.min_context_gain:
            return "excluded"
        if section.max_tokens is not None and self._measure.total(passage, [passage]) > section.max_tokens:
            return "too_long"
        return None

    def _retry(self, source: Source, task: str) -> list[Arrangement]:
        """Arrangements of those that wait for the pool to be as large as it is now."""
        made = []
        size = self._sources.pool(source, task).added
        for passage in self._waiting.due(source, task, size):
            choice, dry = self._choice(passage, final=False)
            if choice.is_enough:
                made.append(self._arranged(passage, choice))
            else:
                # Twice as many next time: one that finds few, as its answer stands everywhere,
                # must not cost a search for each context that comes.
                there = self._sources.pool(dry or source, task).added
                self._waiting.add(passage, dry or source, 2 * there)
        return made

    def _make_do(self, passage: Passage) -> Arrangement:
        self._waiting.remove(passage)
        return self._arranged(passage, self._choice(passage, final=True)[0])

    def _choice(self, passage: Passage, *, final: bool) -> tuple[Choice, Source | None]:
        """Distractors drawn for `passage`, and which source has run dry before they were enough."""
        section = self._section
        if not self._sources.weights:
            return Choice(is_enough=True), None
        goal = Goal(section.contexts_per_sample - 1, self._lots.target_tokens(passage), section.max_tokens)
        draws = self._sources.drawn(passage, final=final)
        choice = self._chooser.choose(passage, draws, goal, lambda chosen: self._ordered(passage, chosen))
        return choice, draws.dry

    def _ordered(self, passage: Passage, distractors: list[Piece]) -> list[Piece]:
        place = self._lots.place(passage, len(distractors))
        return [*distractors[:place], passage, *distractors[place:]]

    def _arranged(self, passage: Passage, choice: Choice) -> Arrangement:
        self.samples += 1
        return Arrangement(
            self._ordered(passage, choice.distractors),
            self._lots.place(passage, len(choice.distractors)),
            self._lots.target_tokens(passage),
            choice.n_tokens,
            self._prompts,
            self._measure,
        )
