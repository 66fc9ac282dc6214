"""The recipe `context`: one document a draft, from which the seed's answer follows.

Source: "Generalizing From Short to Long: Effective Data Synthesis for Long-Context Instruction
Tuning", arXiv 2502.15592, section 3.
"""

from collections.abc import Generator
from functools import cached_property
from typing import Any

from streamsyn.config import ChecksSection, RecipeSection
from streamsyn.recipes.checks import Checks, Failure
from streamsyn.recipes.parse import document_text
from streamsyn.recipes.recipe import RejectedDraft, Steps
from streamsyn.records import Completion, Document, Draft, RejectReason, Request, digest
from streamsyn.templates import PromptTemplate, packaged, read

_EXAMPLE = {"instruction": "i", "answer": "a", "task": "t", "target_words": 1, "metadata": {}}


class ContextRecipe:
    """Asks for the document once, and afresh when the answer fails a check.

    Raises:
        ConfigError: A template cannot be used.
    """

    def __init__(self, recipe: RecipeSection, checks: ChecksSection) -> None:
        self._recipe = recipe
        self._checks = Checks(checks)
        self._template = (
            PromptTemplate(str(recipe.template), read(recipe.template), _EXAMPLE)
            if recipe.template is not None
            else PromptTemplate("context", packaged("prompts", "context"), _EXAMPLE)
        )
        self._templates = {
            task: PromptTemplate(str(section.template), read(section.template), _EXAMPLE)
            for task, section in recipe.tasks.items()
            if section.template is not None
        }

    def steps(self, draft: Draft) -> Steps:
        """Ask up to `recipe.tries` times for a document that passes the checks."""
        request = self.request(draft)
        prompt = "\n".join(message["content"] for message in request.messages)
        failure: Failure | None = None
        for _ in range(self._recipe.tries):
            completions = yield from self._answer(request)
            text = document_text("".join(completion.text for completion in completions))
            figures = self._checks.measure(text)
            truncated = completions[-1].finish_reason == "length"
            failure = self._checks.failure(text, figures, draft.seed, prompt)
            if failure is None and truncated and self._recipe.on_truncated == "reject":
                failure = Failure(
                    RejectReason.TRUNCATED, f"cut at {completions[-1].completion_tokens} tokens"
                )
            if failure is None:
                flags = ["truncated"] if truncated else []
                return Document(text, {**figures, "flags": flags}, completions)
        assert failure is not None, "recipe.tries is at least one"
        raise RejectedDraft(failure.reason, f"{failure.detail} (the last of {self._recipe.tries} tries)")

    def request(self, draft: Draft) -> Request:
        """The question asked first, and afresh after a failed check."""
        seed = draft.seed
        override = self._recipe.tasks.get(seed.task)
        variables = {
            "instruction": seed.instruction,
            "answer": seed.answer,
            "task": seed.task,
            "target_words": (override and override.target_words) or self._recipe.target_words,
            "metadata": seed.metadata,
        }
        template = self._templates.get(seed.task, self._template)
        messages = []
        if system := template.render("system", **variables):
            messages.append({"role": "system", "content": system})
        user = template.render("user" if template.has_blocks else "", **variables)
        messages.append({"role": "user", "content": user})
        return Request(messages, self._sampling)

    def fingerprint(self) -> dict[str, str]:
        """A digest of the prompt, which may be the packaged one of another version."""
        return {"recipe.prompt": digest(self._template.source).hex()}

    def _answer(self, request: Request) -> Generator[Request, Completion, list[Completion]]:
        """One answer, continued where it was cut and that is wanted."""
        completions = [(yield request)]
        if self._recipe.on_truncated != "continue":
            return completions
        for _ in range(self._recipe.max_continuations):
            if completions[-1].finish_reason != "length":
                break
            so_far = "".join(completion.text for completion in completions)
            messages = [*request.messages, {"role": "assistant", "content": so_far}]
            completions.append((yield Request(messages, {**self._sampling, "continue_final_message": True})))
        return completions

    @cached_property
    def _sampling(self) -> dict[str, Any]:
        recipe = self._recipe
        return {"temperature": recipe.temperature, "max_tokens": recipe.max_tokens, **recipe.sampling}
