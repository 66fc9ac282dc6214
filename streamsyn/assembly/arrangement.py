"""Which passages make a sample."""

from collections.abc import Sequence
from dataclasses import dataclass

from streamsyn.assembly.measure import Measure
from streamsyn.assembly.passages import Passage, Piece
from streamsyn.assembly.prompts import SamplePrompts
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
    measure: Measure

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
