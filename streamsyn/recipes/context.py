"""The recipe `context`: one document a draft, from which the seed's answer follows.

Source: "Generalizing From Short to Long: Effective Data Synthesis for Long-Context Instruction
Tuning", arXiv 2502.15592, section 3.
"""

from collections.abc import Generator
from functools import cached_property
from pathlib import Path
from typing import Any

from streamsyn.errors import ConfigError
from streamsyn.recipes.checks import Checks, Failure
from streamsyn.recipes.parse import document_text
from streamsyn.recipes.prompt import EXAMPLE, Opening, Prompt, group_of, opening, seed_group
from streamsyn.recipes.recipe import RejectedDraft, Steps
from streamsyn.records import Completion, Document, Draft, RejectReason, Request, Seed
from streamsyn.sections import ChecksSection, RecipeSection


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
        own_lines = self._prompt_of(draft.seed).own_lines
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
        begins = self._opening(draft.seed)
        asks_alike = self._recipe.contexts_per_seed > 1
        group, beginnings = begins.group, begins.alike if asks_alike else begins.beginnings
        if asks_alike or self._recipe.on_truncated == "continue":
            group = group or seed_group(draft.seed)
        return Request(begins.messages, self._sampling, group, beginnings)

    def group(self, seed: Seed) -> str:
        """Key of what the template's block `group` makes of a seed."""
        return group_of(self._prompt_of(seed), seed, self._opening)

    def outlook(self) -> str:
        """Nothing follows a good answer."""
        return ""

    def fingerprint(self) -> dict[str, str]:
        """A digest of the prompt, which may be the packaged one of another version."""
        return {"recipe.prompt": self._prompt.digest}

    def _opening(self, seed: Seed) -> Opening:
        override = self._recipe.tasks.get(seed.task)
        variables = {
            "instruction": seed.instruction,
            "answer": seed.answer,
            "task": seed.task,
            "target_words": (override and override.target_words) or self._recipe.target_words,
            "metadata": seed.metadata,
        }
        prompt = self._prompt_of(seed)
        blocks = prompt.blocks(variables)
        own = blocks.get("user") or prompt.whole(variables)
        return opening(blocks.get("system", ""), blocks.get("group", ""), own)

    def _answer(self, request: Request) -> Generator[Request, Completion, list[Completion]]:
        """One answer, continued where it was cut and that is wanted."""
        completions = [(yield request)]
        if self._recipe.on_truncated != "continue":
            return completions
        goes_on = {**self._sampling, "continue_final_message": True}
        for _ in range(self._recipe.max_continuations):
            if completions[-1].finish_reason != "length":
                break
            so_far = "".join(completion.text for completion in completions)
            messages = [*request.messages, {"role": "assistant", "content": so_far}]
            completions.append((yield Request(messages, goes_on, request.group, request.beginnings)))
        return completions

    def _prompt_of(self, seed: Seed) -> Prompt:
        return self._prompts.get(seed.task, self._prompt)

    @cached_property
    def _sampling(self) -> dict[str, Any]:
        recipe = self._recipe
        return {"temperature": recipe.temperature, "max_tokens": recipe.max_tokens, **recipe.sampling}


def _prompt(path: Path | None) -> Prompt:
    prompt = Prompt(path, "context", EXAMPLE)
    if prompt.block_names and "user" not in prompt.block_names:
        found = ", ".join(sorted(prompt.block_names))
        raise ConfigError(f"template {path}: there is no block `user`, only {found}")
    return prompt
