"""The sections of what a context is examined for."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from streamsyn.sections.base import Count, Section, Threshold, Unit, operational
from streamsyn.sections.fleet import ServerSection


class ChecksSection(Section):
    """What a context must satisfy; the first failure names the reject."""

    min_words: Annotated[int, Field(ge=0)] = 50
    """Fewer words are `too_short`; for the recipe `instruction`, in the document."""
    max_words: Count = 20_000
    """More words are `too_long`; for the recipe `instruction`, in question or answer."""
    refusal: bool = True
    """Reject answers that decline (`refusal`)."""
    max_repetition: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Largest share of repeated five-word runs; above it is `repetition`. 1 switches it off."""
    prompt_echo: bool = True
    """Reject answers that repeat our prompt (`prompt_echo`)."""
    qa_pasted: bool = True
    """Reject answers that are the question and its answer rather than a document (`qa_pasted`)."""
    near_duplicate: Literal["off", "flag", "reject"] = "off"
    """What to do with a context that repeats one that was written before it: nothing, not even look; flag it
    (`near_duplicate`); or reject it."""
    similarity: Unit = 0.8
    """Two contexts repeat each other when so large a share of their runs of five words is the same (Jaccard
    similarity, estimated by MinHash)."""
    eval_sets: Annotated[tuple[str, ...], operational] = ()
    """Files, directories or globs of evaluation data: JSON lines as LongBench has them, Parquet or text. A
    context that shares a run of `checks.eval_ngram_words` words with any text in them is `contaminated`."""
    eval_ngram_words: Annotated[Count, Field(ge=4)] = 13
    """Length of such a run in words, without case and punctuation."""
    on_contaminated: Literal["flag", "reject"] = "reject"
    """What to do with such a context."""
    context_gain: bool = False
    """Have servers measure how much likelier the gold answer is with the context: its mean log-likelihood a
    token, in nats, given context and instruction, less that given the instruction alone."""
    flag_gain_below: Threshold = 0.0
    """A context with less gain gets the flag `low_context_gain`."""
    reject_gain_below: Threshold = None
    """A context with less gain is rejected (`low_context_gain`)."""
    answerable: bool = False
    """Have servers answer the instruction with and without the context, and compare with the gold answer: F1
    of words for questions, as LongBench does, ROUGE-L for summaries."""
    flag_answer_below: Unit | None = 0.1
    """A context whose answer scores less gets the flag `not_answerable`."""
    reject_answer_below: Unit | None = None
    """A context whose answer scores less is rejected (`not_answerable`)."""
    flag_known_above: Unit | None = 0.5
    """A context gets the flag `known_answer` when the answer given without it scores more: the model knows
    it anyway."""


class ScoringSection(Section):
    """Who scores contexts, and how: for `checks.context_gain` and `checks.answerable`."""

    servers: Annotated[tuple[str | ServerSection, ...], operational] = ()
    """Servers that score, as in `fleet.servers`; by default those that write."""
    model: str | None = None
    """The model that scores; by default the one served, or of several the first by name."""
    answer_tokens: Count = 256
    """Of a longer gold answer only so many first tokens are scored."""
    max_answer_tokens: Count = 256
    """Longest answer that `checks.answerable` asks for, in tokens."""
    template: Path | None = None
    """A Jinja2 file for the question, in place of the packaged one; `context` is empty when it is asked
    without one."""
