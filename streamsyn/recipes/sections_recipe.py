"""The recipe `sections`: one long document per draft, written section by section in one conversation.

The contexts of arXiv 2502.15592 have about 2,000 words and become long by joining several. Here one context
itself is long, beyond what a model writes in one answer: first an outline, then a section per request, up to
`recipe.target_tokens` as the servers count them. Every request starts with exactly the messages before it, so
its past is a cached prefix: the tokens computed grow with the length, not with its square.

Before a conversation exceeds `recipe.window_tokens` it ends with a summary. The next conversation starts like
the first one, up to the outline, and continues with the summary and the last section. Group and shared
prefixes stay the same, and with the group the server.

A step whose answer fails a check is tried again alone. A document that fails as a whole is rejected: starting
over would cost as much as the whole document.
"""

from collections.abc import Generator
from dataclasses import replace
from functools import cached_property
from typing import Any

from streamsyn.config.sections import ChecksSection, RecipeSection
from streamsyn.errors import ConfigError
from streamsyn.recipes.checks import Checks, Failure
from streamsyn.recipes.manuscript import Conversation, FactPlan, Manuscript, title_between
from streamsyn.recipes.parsing import document_text, outline_headings, section_text
from streamsyn.recipes.prompt import (
    EXAMPLE,
    Prompt,
    first_request,
    group_of,
    pair_variables,
    seed_group,
)
from streamsyn.recipes.recipe import RejectedDraft, Steps
from streamsyn.records import Completion, Document, Draft, RejectReason, Request, Seed

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
"""Template variables of single steps, with their neutral values."""
_WORDS_A_TOKEN = 0.7
_MOST_HEADINGS = 40
_HEADING_TOKENS = 24
_FRAME_TOKENS = 256
"""Estimated tokens of two questions with their chat template; there is no tokenizer here."""
_OPENING_TOKENS = 512
"""Approximate tokens of the system message, the seed and the outline."""

Asked = Generator[Request, Completion, Completion]


class SectionsRecipe:
    """Asks for an outline, then for sections until the document is long enough.

    Raises:
        ConfigError: A template is invalid, or `recipe.window_tokens` is too small.
    """

    takes_documents = False

    def __init__(self, recipe: RecipeSection, checks: ChecksSection) -> None:
        self._recipe = recipe
        targets = [recipe.target_tokens, *(task.target_tokens or 1 for task in recipe.tasks.values())]
        # A word has at least one token, so a document of the target length never has too many words.
        most_words = max(checks.max_words, *targets)
        self._checks = Checks(checks.model_copy(update={"max_words": most_words}))
        self._prompt = Prompt(recipe.template, "sections", EXAMPLE | _STEP, _BLOCKS)
        self._prompts = {
            task: Prompt(section.template, "sections", EXAMPLE | _STEP, _BLOCKS)
            for task, section in recipe.tasks.items()
            if section.template is not None
        }
        for prompt in (self._prompt, *self._prompts.values()):
            prompt.check_depends_on("answer")
        if "max_tokens" in recipe.sampling:
            raise ConfigError(
                "recipe.sampling: the recipe sections takes max_tokens from recipe.section_tokens"
            )
        least = 3 * recipe.section_tokens + 2 * recipe.summary_tokens + _OPENING_TOKENS
        if recipe.window_tokens < least:
            raise ConfigError(
                f"recipe.window_tokens = {recipe.window_tokens} is too small: with these section_tokens and "
                f"summary_tokens it must be at least {least}"
            )

    def steps(self, draft: Draft) -> Steps:
        """Write the document of one draft."""
        recipe, seed = self._recipe, draft.seed
        conversation = self._conversation(seed)
        manuscript = Manuscript(self._target_tokens(seed), recipe.section_tokens)
        facts = FactPlan(draft, recipe.facts, manuscript.planned)
        wanted = min(manuscript.planned, _MOST_HEADINGS)
        outline = yield from conversation.ask(
            conversation.question,
            self._sampling(min(recipe.section_tokens, 64 + _HEADING_TOKENS * wanted)),
            lambda completion: self._checks.refusal(document_text(completion.text)),
        )
        headings = outline_headings(outline.text, wanted)
        windows, summary, window_tokens = 1, "", self._window_tokens(conversation.tokens)
        while manuscript.goes_on:
            if self._is_too_long(conversation, manuscript, window_tokens):
                summary = yield from self._summary(conversation, seed)
                conversation.restart()
                windows += 1
            yield from self._section(conversation, seed, manuscript, facts, headings, summary)
            summary = ""
        document = self._document(draft, conversation, manuscript, facts, windows)
        if window_tokens > recipe.window_tokens:
            document.checks["flags"].append("beyond_window")
        return document

    def group(self, seed: Seed) -> str:
        """Return the key of the template's block `group` for a seed."""
        return group_of(self._prompt_of(seed), lambda: self._first_request(seed))

    def outlook(self) -> str:
        """Describe the sections that follow the outline."""
        recipe = self._recipe
        sections = Manuscript(recipe.target_tokens, recipe.section_tokens).planned
        return (
            f"then about {sections} sections of at most {recipe.section_tokens} tokens, up to "
            f"{recipe.target_tokens} in all, each asked for in the same conversation"
        )

    def fingerprint(self) -> dict[str, str]:
        """Return a digest of the prompt, since the packaged one may change between versions."""
        return {"recipe.prompt": self._prompt.digest}

    def _conversation(self, seed: Seed) -> Conversation:
        first = self._first_request(seed)
        target = self._target_tokens(seed)
        sections = Manuscript(target, self._recipe.section_tokens).planned
        whole = target + _HEADING_TOKENS * min(sections, _MOST_HEADINGS) + _FRAME_TOKENS // 2 * sections
        tokens = min(whole, self._recipe.window_tokens)
        grouped = replace(first, group=first.group or seed_group(seed), conversation_tokens=tokens)
        return Conversation(grouped, self._recipe)

    def _first_request(self, seed: Seed) -> Request:
        planned = Manuscript(self._target_tokens(seed), self._recipe.section_tokens).planned
        blocks = self._blocks(seed, headings=min(planned, _MOST_HEADINGS))
        drafts_alike = self._recipe.contexts_per_seed > 1
        return first_request(
            blocks["system"], blocks.get("group", ""), blocks["outline"], {}, drafts_alike=drafts_alike
        )

    def _section(
        self,
        conversation: Conversation,
        seed: Seed,
        manuscript: Manuscript,
        facts: FactPlan,
        headings: list[str],
        summary: str,
    ) -> Generator[Request, Completion, None]:
        """Ask for the next section and add it. `summary` is "" unless the conversation was just restarted."""
        number, is_last = len(manuscript.sections), manuscript.should_end
        last = manuscript.sections[-1] if manuscript.sections else ""
        begins, ends = manuscript.span()
        on = title_between(headings, begins, 1.0 if is_last else ends)
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
                detail = f"its last section was cut at {completion.completion_tokens} tokens"
                return Failure(RejectReason.TRUNCATED, detail)
            return failure

        completion = yield from conversation.ask(question, self._sampling(manuscript.next_tokens), check)
        manuscript.add(section_text(completion.text, on, goes_on=was_cut), completion)

    def _window_tokens(self, opening_tokens: int) -> int:
        """Return the maximum tokens of a conversation: `recipe.window_tokens`, or more for a very long seed.

        Restarting does not make its opening shorter, so there must be room for some sections after it.
        """
        recipe = self._recipe
        least = opening_tokens + 3 * recipe.section_tokens + 2 * recipe.summary_tokens + _FRAME_TOKENS
        return max(recipe.window_tokens, least)

    def _is_too_long(self, conversation: Conversation, manuscript: Manuscript, window_tokens: int) -> bool:
        """Whether there would be no room for a summary after one more section."""
        if not manuscript.sections or not conversation.tokens:  # nothing to summarise, or just restarted
            return False
        more = manuscript.next_tokens + self._recipe.summary_tokens + _FRAME_TOKENS
        return conversation.tokens + more > window_tokens

    def _summary(self, conversation: Conversation, seed: Seed) -> Generator[Request, Completion, str]:
        tokens = self._recipe.summary_tokens
        completion = yield from conversation.ask(
            self._blocks(seed, summary_words=_words(tokens))["summary"],
            self._sampling(tokens),
            lambda completion: self._checks.refusal(document_text(completion.text)),
        )
        return document_text(completion.text)

    def _document(
        self, draft: Draft, conversation: Conversation, manuscript: Manuscript, facts: FactPlan, windows: int
    ) -> Document:
        """Return the document.

        Raises:
            RejectedDraft: The document as a whole fails a check.
        """
        text = manuscript.text()
        own_lines = self._prompt_of(draft.seed).own_lines
        figures, failure = self._checks.judge(text, draft.seed, own_lines)
        if failure is not None:
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
        return Document(text, checks, conversation.answers)

    def _blocks(self, seed: Seed, **step: Any) -> dict[str, str]:
        variables = pair_variables(seed, _words(self._target_tokens(seed)))
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
    """Return the approximate number of words for a number of tokens, with one or two significant digits."""
    words = max(1, round(tokens * _WORDS_A_TOKEN))
    return round(words, 1 - len(str(words))) if words < 100 else round(words, 2 - len(str(words)))
