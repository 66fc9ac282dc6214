"""The recipe `context`: one document a draft, from which the seed's answer follows.

Source: "Generalizing From Short to Long: Effective Data Synthesis for Long-Context Instruction
Tuning", arXiv 2502.15592, section 3.
"""

from collections.abc import Generator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from streamsyn.config import ChecksSection, RecipeSection
from streamsyn.errors import ConfigError
from streamsyn.recipes.checks import Checks, Failure, normalised
from streamsyn.recipes.parse import document_text
from streamsyn.recipes.recipe import RejectedDraft, Steps
from streamsyn.records import Completion, Document, Draft, RejectReason, Request, digest
from streamsyn.templates import PromptTemplate, packaged, read


class _AnyMetadata(dict[str, str]):
    """Stands in for a seed's other fields when a template is tried: nobody knows them yet."""

    def __missing__(self, name: str) -> str:
        return name


_EXAMPLE = {"instruction": "i", "answer": "a", "task": "t", "target_words": 1, "metadata": _AnyMetadata()}


class ContextRecipe:
    """Asks for the document once, and afresh when the answer fails a check.

    Raises:
        ConfigError: A template cannot be used.
    """

    def __init__(self, recipe: RecipeSection, checks: ChecksSection) -> None:
        self._recipe = recipe
        self._checks = Checks(checks)
        self._prompt = _prompt(recipe.template)
        self._prompts = {
            task: _prompt(section.template)
            for task, section in recipe.tasks.items()
            if section.template is not None
        }

    def steps(self, draft: Draft) -> Steps:
        """Ask up to `recipe.tries` times for a document that passes the checks."""
        request = self.request(draft)
        own_lines = self._prompt_of(draft).own_lines
        failure: Failure | None = None
        for _ in range(self._recipe.tries):
            completions = yield from self._answer(request)
            text = document_text("".join(completion.text for completion in completions))
            figures = self._checks.measure(text)
            truncated = completions[-1].finish_reason == "length"
            failure = self._checks.failure(text, figures, draft.seed, own_lines)
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
        template = self._prompt_of(draft).template
        blocks = template.render_blocks(**variables)
        messages = []
        if system := blocks.get("system"):
            messages.append({"role": "system", "content": system})
        messages.append({"role": "user", "content": blocks.get("user") or template.render(**variables)})
        return Request(messages, self._sampling)

    def fingerprint(self) -> dict[str, str]:
        """A digest of the prompt, which may be the packaged one of another version."""
        return {"recipe.prompt": digest(self._prompt.template.source).hex()}

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

    def _prompt_of(self, draft: Draft) -> "_Prompt":
        return self._prompts.get(draft.seed.task, self._prompt)

    @cached_property
    def _sampling(self) -> dict[str, Any]:
        recipe = self._recipe
        return {"temperature": recipe.temperature, "max_tokens": recipe.max_tokens, **recipe.sampling}


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A template, and the lines of it that must not come back in an answer."""

    template: PromptTemplate
    own_lines: tuple[str, ...]


def _prompt(path: Path | None) -> _Prompt:
    name, source = ("context", packaged("prompts", "context")) if path is None else (str(path), read(path))
    template = PromptTemplate(name, source, _EXAMPLE)
    if template.block_names and "user" not in template.block_names:
        found = ", ".join(sorted(template.block_names))
        raise ConfigError(f"template {name}: there is no block `user`, only {found}")
    return _Prompt(template, tuple(normalised(line.lstrip("-* ")) for line in template.fixed_lines))
