"""The sections of how contexts become samples."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from streamsyn.sections.base import Count, Positive, Section, Threshold, Unit, operational

Source = Literal["same_task", "any_task", "corpus"]


class TaskAssemblySection(Section):
    """What differs for one task."""

    family: str | None = None
    """Prompt family: single_doc_qa, multi_doc_qa, summary, meeting_query or general."""
    template: Path | None = None
    """As `assembly.template`."""


class LengthsSection(Section):
    """A distribution of lengths in tokens: one of its keys."""

    uniform: tuple[Count, Count] | None = None
    """Lowest and highest; all between are as likely."""
    log_uniform: tuple[Count, Count] | None = None
    """Lowest and highest; each doubling is as likely."""
    choices: tuple[Count, ...] | None = None
    """One of these."""
    weights: tuple[Positive, ...] | None = None
    """How likely each of `choices` is, beside the others."""
    schedule: tuple[tuple[Annotated[int, Field(ge=0)], Count], ...] | None = None
    """Pairs of a number of contexts and the length from there on: the stream's samples grow."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        ways = [name for name in ("uniform", "log_uniform", "choices", "schedule") if getattr(self, name)]
        if len(ways) != 1:
            raise ValueError("one of uniform, log_uniform, choices and schedule is wanted")
        for bounds in (self.uniform, self.log_uniform):
            if bounds is not None and bounds[0] > bounds[1]:
                raise ValueError(f"the lowest length, {bounds[0]}, is above the highest, {bounds[1]}")
        if self.weights is not None and len(self.weights) != len(self.choices or ()):
            raise ValueError("weights are as many as choices")
        if self.schedule is not None:
            starts = [start for start, _ in self.schedule]
            if starts[0] != 0 or starts != sorted(set(starts)):
                raise ValueError("a schedule begins at 0 contexts and rises")
        return self


class AssemblySection(Section):
    """How contexts become samples."""

    write: bool = True
    """False: contexts only."""
    contexts_per_sample: Count = 10
    """One relevant context and so many less one distractors."""
    target_tokens: Count | LengthsSection | None = None
    """In place of a number of contexts: add distractors until the sample has so many tokens. A number, or a
    distribution: {uniform = [8000, 32000]}, {log_uniform = [8000, 128000]}, {choices = [8000, 32000],
    weights = [3, 1]}, or {schedule = [[0, 8000], [1000, 32000]]}, which grows with the stream."""
    max_tokens: Count | None = None
    """No sample is longer: a distractor that would make it so is left out, and so is a sample whose relevant
    context alone is too long."""
    tokenizer: str | None = None
    """The tokenizer of the model to be tuned, by which tokens are counted: a folder, or a name on the Hugging
    Face hub. Samples are counted whole, under its chat template. Without one the counts are those of the
    servers that wrote the contexts."""
    distractors: Source | Literal["none"] | dict[Source, Positive] = "same_task"
    """Where distractors come from: contexts of the `same_task` or of `any_task`, passages of a `corpus`,
    or `none`; or a mix, such as {same_task = 3, corpus = 1}, drawn for each distractor."""
    corpus: Annotated[tuple[str, ...], operational] = ()
    """Files, directories or globs of documents to take distractors from: text, JSON lines or Parquet."""
    corpus_field: str = "text"
    """Field that holds the text, in JSON lines and Parquet."""
    corpus_words: Count = 1500
    """Longer documents are cut into passages of so many words."""
    position: Literal["uniform"] | Unit | Annotated[tuple[Unit, ...], Field(min_length=1)] = "uniform"
    """Where the relevant context stands: anywhere, at a depth from 0 (first) to 1 (last), or at each depth
    of a list in turn."""
    epoch: Annotated[int, Field(ge=0)] = 0
    """Another number draws other distractors, lengths and positions for the same contexts."""
    max_similarity: Unit = 0.8
    """No sample holds two passages that are so similar, as `checks.similarity` has it. 1 switches it off."""
    exclude_flags: tuple[str, ...] = ()
    """A context with one of these flags gets no sample of its own, such as `low_context_gain`."""
    min_context_gain: Threshold = None
    """Nor does one that was measured to have less gain."""
    min_answer_chars: Count = 5
    """A distractor must not contain the answer, when the answer is at least this long."""
    window_bytes: Count = 16 * 2**20
    """Distractors are drawn from this much of the most recent contexts: the memory that assembly uses."""
    template: Path | None = None
    """A Jinja2 file for the user message in place of the packaged ones."""
    tasks: dict[str, TaskAssemblySection] = {}
    """Overrides for single tasks: `[assembly.tasks.NAME]`."""
