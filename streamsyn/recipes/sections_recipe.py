"""From an answer that should be an outline to headings, whatever it is: small models write poor outlines.

Where in a long document the facts stand that its answer rests on.

A model tuned on contexts whose facts always stand at the start, or always in the middle, learns where to
look rather than to read; so the place is drawn, evenly over the length, for each draft. (arXiv 2502.15592
shuffles the relevant context among its distractors for that; here it is about the facts within one.)

The recipe `sections`: a long document a draft, written section after section in one conversation.

The contexts of arXiv 2502.15592 have about 2,000 words and become long by being joined; here one context
itself may be long, beyond what a model writes in one answer. So: an outline, then a section at a time, up
to `recipe.target_tokens` as the server counts them. Every step begins with exactly what was said before, so
its whole past is a cached prefix: 32k tokens in 16 sections cost their length to read, not its square.

A conversation that would outgrow `recipe.window_tokens` ends with a running summary, which is still a
cached continuation. The next one begins as the first did, up to the outline, then come the summary and the
last section. The plan learns of that by the text itself: what both begin with keeps its keys in
`Request.prefixes`, what follows is new; group, and with it the server, stays the same.

A step whose answer fails a check is asked again alone. A document that fails as a whole is rejected: to
start over would cost as much as all of it.
"""

import re
from collections.abc import Generator, Sequence
from functools import cached_property
from random import Random
from typing import Any, Literal

from streamsyn.config.sections import ChecksSection, RecipeSection
from streamsyn.errors import ConfigError
from streamsyn.recipes.checks import Checks, Failure
from streamsyn.recipes.manuscript import Conversation, Manuscript
from streamsyn.recipes.parsing import document_text, section_text
from streamsyn.recipes.prompt import EXAMPLE, Opening, Prompt, group_of, opening, seed_group
from streamsyn.recipes.recipe import RejectedDraft, Steps
from streamsyn.records import Completion, Document, Draft, RejectReason, Request, Seed, digest

_MARK = re.compile(
    r"""\A\s*
    (?:[-*+\u2022>]\s+)?                              # a bullet
    (?:\#{1,6}\s*)?(?:\*{1,2}|_{1,2})?                # a heading, or bold
    (?P<marked>(?:(?:section|part|chapter|heading)\s*)?(?:\d{1,3}|[IVXLC]{1,6}|[A-Z])(?:\.\d+)*\s*[.):\u2013-]\s*)?
    (?:\*{1,2}|_{1,2})?\s*
    """,
    re.IGNORECASE | re.VERBOSE,
)
_LONGEST = 120
"""Characters of a heading at most; what is longer is prose."""


def headings(answer: str, wanted: int) -> list[str]:
    """At most `wanted` headings: the numbered lines where there are two or more, else all short lines."""
    numbered, plain = [], []
    for line in document_text(answer).splitlines():
        mark = _MARK.match(line)
        assert mark is not None, "all of it is optional"
        text = line[mark.end() :].strip(" \t*_#:")
        if not 1 < len(text) <= _LONGEST:
            continue
        plain.append(text)
        if mark["marked"]:
            numbered.append(text)
    return (numbered if len(numbered) > 1 else plain)[:wanted]


def title(found: Sequence[str], begins: float, ends: float) -> str:
    """What the part of a document between two shares of its length is on; "" where nothing says."""
    if not found:
        return ""
    first = min(int(begins * len(found)), len(found) - 1)
    # a hair less, so that a part which ends where a heading begins does not have that heading
    last = min(max(int(ends * len(found) - 1e-9), first), len(found) - 1)
    return "; ".join(found[first : last + 1])


SPREAD = 4
"""Sections that facts are spread over, at most."""


class FactPlan:
    """The places drawn for one draft, and which sections they turned out to be.

    Args:
        draft: Its key is all that is drawn from: the same draft always has the same places.
        facts: `recipe.facts`.
        sections: How many sections there will be, about.
    """

    def __init__(self, draft: Draft, facts: Literal["one", "spread"], sections: int) -> None:
        rng = Random(digest(draft.key, "facts"))
        self._parts = 1 if facts == "one" else min(SPREAD, sections)
        self._due = [(part + rng.random()) / self._parts for part in range(self._parts)]
        self.sections: list[int] = []
        """Numbers, from 0, of the sections that were asked to hold facts."""

    def ask(self, section: int, reaches: float, *, is_last: bool) -> str:
        """What `section` is told of the facts.

        Args:
            section: Its number.
            reaches: The share of the document that is expected to be written when it ends.
            is_last: Whether it may be the last one, which has to hold whatever is still untold.

        Returns:
            One of: all, some, rest (of them stand here), later (not yet), done.
        """
        if not self._due:
            return "done"
        is_due = is_last or self._due[0] < reaches
        if not is_due:
            return "later" if not self.sections else "done"
        self._due = [] if is_last else [depth for depth in self._due if depth >= reaches]
        is_first, is_rest = not self.sections, not self._due
        self.sections.append(section)
        if is_first and is_rest:
            return "all"
        return "rest" if is_rest else "some"

    def depth(self, lengths: Sequence[int]) -> float:
        """Where the middle of these sections lies, 0 at the start and 1 at the end; their mean.

        Args:
            lengths: Characters of each section.
        """
        total = max(1, sum(lengths))
        middles = [sum(lengths[:section]) + lengths[section] / 2 for section in self.sections]
        return round(sum(middles) / len(middles) / total, 4) if middles else 0.0


_BLOCKS = ("system", "group", "outline", "section", "summary", "resume")
_STEP: dict[str, Any] = {
    "headings": 1,
    "number": 1,
    "title": "",
    "words": 1,
    "was_cut": False,
    "facts": "done",
    "is_last": False,
    "summary_words": 1,
    "summary": "",
    "last_section": "",
}
"""Variables of single steps, as they are where they say nothing."""
_WORDS_A_TOKEN = 0.7
_MOST_HEADINGS = 40
_HEADING_TOKENS = 24
_FRAME_TOKENS = 256
"""What two questions of ours and their frames come to, about: there is no tokenizer here."""
_OPENING_TOKENS = 512
"""What system, seed and outline come to, about."""

Asked = Generator[Request, Completion, Completion]


class SectionsRecipe:
    """Asks for an outline, then for sections until the document is long enough.

    Raises:
        ConfigError: A template cannot be used, or a window holds too little.
    """

    takes_documents = False

    def __init__(self, recipe: RecipeSection, checks: ChecksSection) -> None:
        self._recipe = recipe
        targets = [recipe.target_tokens, *(task.target_tokens or 1 for task in recipe.tasks.values())]
        # A word has a token at least: what was asked for is never too long.
        most_words = max(checks.max_words, *targets)
        self._checks = Checks(checks.model_copy(update={"max_words": most_words}))
        self._prompt = Prompt(recipe.template, "sections", EXAMPLE | _STEP, _BLOCKS)
        self._prompts = {
            task: Prompt(section.template, "sections", EXAMPLE | _STEP, _BLOCKS)
            for task, section in recipe.tasks.items()
            if section.template is not None
        }
        if "max_tokens" in recipe.sampling:
            raise ConfigError("recipe.sampling: max_tokens is recipe.section_tokens in the recipe sections")
        least = 3 * recipe.section_tokens + 2 * recipe.summary_tokens + _OPENING_TOKENS
        if recipe.window_tokens < least:
            raise ConfigError(
                f"recipe.window_tokens = {recipe.window_tokens} holds too little: with these section_tokens "
                f"and summary_tokens it takes {least}"
            )

    def steps(self, draft: Draft) -> Steps:
        """Hold the conversation for one draft."""
        recipe, seed = self._recipe, draft.seed
        talk = self._conversation(seed)
        manuscript = Manuscript(self._target_tokens(seed), recipe.section_tokens)
        facts = FactPlan(draft, recipe.facts, manuscript.planned)
        wanted = min(manuscript.planned, _MOST_HEADINGS)
        outline = yield from talk.ask(
            talk.question,
            self._sampling(min(recipe.section_tokens, 64 + _HEADING_TOKENS * wanted)),
            lambda completion: self._checks.refusal(document_text(completion.text)),
        )
        found = headings(outline.text, wanted)
        windows, summary, window_tokens = 1, "", self._window_tokens(talk.tokens)
        while manuscript.goes_on:
            if self._is_too_long(talk, manuscript, window_tokens):
                summary = yield from self._summary(talk, seed)
                talk.begin_again()
                windows += 1
            yield from self._section(talk, seed, manuscript, facts, found, summary)
            summary = ""
        document = self._document(draft, talk, manuscript, facts, windows)
        if window_tokens > recipe.window_tokens:
            document.checks["flags"].append("beyond_window")
        return document

    def group(self, seed: Seed) -> str:
        """Key of what the template's block `group` makes of a seed."""
        return group_of(self._prompt_of(seed), seed, self._opening)

    def outlook(self) -> str:
        """Sections follow."""
        recipe = self._recipe
        sections = Manuscript(recipe.target_tokens, recipe.section_tokens).planned
        return (
            f"then about {sections} sections of at most {recipe.section_tokens} tokens, up to "
            f"{recipe.target_tokens} in all, each asked for in the same conversation"
        )

    def fingerprint(self) -> dict[str, str]:
        """A digest of the prompt, which may be the packaged one of another version."""
        return {"recipe.prompt": self._prompt.digest}

    def _conversation(self, seed: Seed) -> Conversation:
        begins = self._opening(seed)
        prefixes = begins.alike if self._recipe.contexts_per_seed > 1 else begins.prefixes
        return Conversation(begins, begins.group or seed_group(seed), prefixes, self._recipe.tries)

    def _opening(self, seed: Seed) -> Opening:
        planned = Manuscript(self._target_tokens(seed), self._recipe.section_tokens).planned
        blocks = self._blocks(seed, headings=min(planned, _MOST_HEADINGS))
        return opening(blocks["system"], blocks.get("group", ""), blocks["outline"])

    def _section(
        self,
        talk: Conversation,
        seed: Seed,
        manuscript: Manuscript,
        facts: FactPlan,
        found: list[str],
        summary: str,
    ) -> Generator[Request, Completion, None]:
        """Ask for the next section, and add it; `summary` is given where the conversation has begun again."""
        number, is_last = len(manuscript.sections), manuscript.should_end
        last = manuscript.sections[-1] if manuscript.sections else ""
        begins, ends = manuscript.span()
        on = title(found, begins, 1.0 if is_last else ends)
        blocks = self._blocks(
            seed,
            number=number + 1,
            title=on,
            words=_words(manuscript.next_tokens),
            was_cut=manuscript.was_cut,
            facts=facts.ask(number, ends, is_last=manuscript.may_end),
            is_last=is_last,
            summary=summary,
            last_section=last,
        )
        question = f"{blocks['resume']}\n\n{blocks['section']}" if summary else blocks["section"]
        own_lines, was_cut = self._prompt_of(seed).own_lines, manuscript.was_cut

        def check(completion: Completion) -> Failure | None:
            text = section_text(completion.text, on, goes_on=was_cut)
            failure = self._checks.part_failure(text, own_lines, last)
            is_cut = completion.finish_reason == "length" and manuscript.ends_with(completion)
            if failure is None and is_cut and self._recipe.on_truncated == "reject":
                said = f"its last section was cut at {completion.completion_tokens} tokens"
                return Failure(RejectReason.TRUNCATED, said)
            return failure

        completion = yield from talk.ask(question, self._sampling(manuscript.next_tokens), check)
        manuscript.add(section_text(completion.text, on, goes_on=was_cut), completion)

    def _window_tokens(self, opening_tokens: int) -> int:
        """The bound of a conversation: more than was asked for where the seed alone is that long.

        To begin again would not make it shorter, so there has to be room for some sections behind it.
        """
        recipe = self._recipe
        least = opening_tokens + 3 * recipe.section_tokens + 2 * recipe.summary_tokens + _FRAME_TOKENS
        return max(recipe.window_tokens, least)

    def _is_too_long(self, talk: Conversation, manuscript: Manuscript, window_tokens: int) -> bool:
        """Whether after one more section there would be no room for a summary."""
        if not manuscript.sections or not talk.tokens:  # nothing to summarise, or nothing new
            return False
        more = manuscript.next_tokens + self._recipe.summary_tokens + _FRAME_TOKENS
        return talk.tokens + more > window_tokens

    def _summary(self, talk: Conversation, seed: Seed) -> Generator[Request, Completion, str]:
        tokens = self._recipe.summary_tokens
        completion = yield from talk.ask(
            self._blocks(seed, summary_words=_words(tokens))["summary"],
            self._sampling(tokens),
            lambda completion: self._checks.refusal(document_text(completion.text)),
        )
        return document_text(completion.text)

    def _document(
        self, draft: Draft, talk: Conversation, manuscript: Manuscript, facts: FactPlan, windows: int
    ) -> Document:
        """The document, if it passes the checks as a whole.

        Raises:
            RejectedDraft: It does not.
        """
        text = manuscript.text()
        figures = self._checks.measure(text)
        own_lines = self._prompt_of(draft.seed).own_lines
        if failure := self._checks.failure(text, figures, draft.seed, own_lines):
            raise RejectedDraft(failure.reason, f"{failure.detail} (the whole document)")
        flags = ["truncated"] if manuscript.was_cut else []
        flags += [] if manuscript.is_complete else ["below_target"]
        checks = {
            **figures,
            "flags": flags,
            "tokens": manuscript.tokens,
            "sections": len(manuscript.sections),
            "cut_sections": manuscript.cut,
            "fact_sections": facts.sections,
            "fact_depth": facts.depth([len(section) for section in manuscript.sections]),
            "windows": windows,
        }
        return Document(text, checks, talk.answers)

    def _blocks(self, seed: Seed, **step: Any) -> dict[str, str]:
        variables = {
            "instruction": seed.instruction,
            "answer": seed.answer,
            "task": seed.task,
            "target_words": _words(self._target_tokens(seed)),
            "metadata": seed.metadata,
        }
        return self._prompt_of(seed).blocks({**variables, **_STEP, **step})

    def _prompt_of(self, seed: Seed) -> Prompt:
        return self._prompts.get(seed.task, self._prompt)

    def _target_tokens(self, seed: Seed) -> int:
        override = self._recipe.tasks.get(seed.task)
        return (override and override.target_tokens) or self._recipe.target_tokens

    def _sampling(self, max_tokens: int) -> dict[str, Any]:
        return {**self._shared_sampling, "max_tokens": max_tokens}

    @cached_property
    def _shared_sampling(self) -> dict[str, Any]:
        return {"temperature": self._recipe.temperature, **self._recipe.sampling}


def _words(tokens: int) -> int:
    """About so many words: a round number, as one would ask for."""
    words = max(1, round(tokens * _WORDS_A_TOKEN))
    return round(words, 1 - len(str(words))) if words < 100 else round(words, 2 - len(str(words)))
