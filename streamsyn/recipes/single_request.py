"""What recipes share that ask one thing a draft: afresh when an answer will not do, on when it was cut."""

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeAlias

from streamsyn.config.sections import RecipeSection
from streamsyn.errors import ConfigError
from streamsyn.recipes.checks import Failure
from streamsyn.recipes.prompt import Opening, Prompt, opening, seed_group
from streamsyn.recipes.recipe import RejectedDraft, Steps, sampling_of
from streamsyn.records import Completion, Document, RejectReason, Request, Seed

Judge: TypeAlias = Callable[[list[Completion]], Document | Failure]
"""What is made of an answer, and of what continued it."""


class Asking:
    """The prompts of a recipe, one for each task that has its own, and how it asks.

    Args:
        recipe: The section of the configuration.
        name: The packaged prompt.
        example: Variables of a template, with values to try it on.

    Raises:
        ConfigError: A template cannot be used.
    """

    def __init__(self, recipe: RecipeSection, name: str, example: dict[str, Any]) -> None:
        self._recipe = recipe
        self._prompt = _prompt(recipe.template, name, example)
        self._prompts = {
            task: _prompt(section.template, name, example)
            for task, section in recipe.tasks.items()
            if section.template is not None
        }
        self._sampling = sampling_of(recipe)

    def prompt_of(self, seed: Seed) -> Prompt:
        """The prompt of its task."""
        return self._prompts.get(seed.task, self._prompt)

    def opening(self, seed: Seed, variables: dict[str, Any]) -> Opening:
        """The messages made of a seed's prompt."""
        prompt = self.prompt_of(seed)
        blocks = prompt.blocks(variables)
        own = blocks.get("user") or prompt.whole(variables)
        return opening(blocks.get("system", ""), blocks.get("group", ""), own)

    def request(self, begins: Opening, seed: Seed, *, asks_alike: bool) -> Request:
        """The question asked first, and afresh; `asks_alike` if the seed's other drafts ask the same."""
        group, prefixes = begins.group, begins.alike if asks_alike else begins.prefixes
        if asks_alike or self._recipe.on_truncated == "continue":
            group = group or seed_group(seed)
        return Request(begins.messages, self._sampling, group, prefixes)

    def fingerprint(self) -> dict[str, str]:
        """A digest of the prompt, which may be the packaged one of another version."""
        return {"recipe.prompt": self._prompt.digest}

    def ask(
        self, request: Request, judge: Judge, is_enough: Callable[[str], bool] = lambda _: False
    ) -> Steps:
        """Ask up to `recipe.tries` times for an answer that `judge` makes a document of.

        Args:
            request: What to ask.
            judge: Says what is made of an answer.
            is_enough: Whether a cut answer, so far, needs no more.

        Raises:
            RejectedDraft: The last try failed too.
        """
        failure: Failure | None = None
        for _ in range(self._recipe.tries):
            made = judge((yield from self._answer(request, is_enough)))
            if isinstance(made, Document):
                return made
            failure = made
        assert failure is not None, "recipe.tries is at least one"
        raise RejectedDraft(failure.reason, f"{failure.detail} (the last of {self._recipe.tries} tries)")

    def cut_failure(self, last: Completion) -> Failure | None:
        """Why an answer that ends with `last` will not do, where what was cut is to be rejected."""
        if last.finish_reason != "length" or self._recipe.on_truncated != "reject":
            return None
        return Failure(RejectReason.TRUNCATED, f"cut at {last.completion_tokens} tokens")

    def _answer(
        self, request: Request, is_enough: Callable[[str], bool]
    ) -> Generator[Request, Completion, list[Completion]]:
        """One answer, continued where it was cut and that is wanted."""
        completions = [(yield request)]
        if self._recipe.on_truncated != "continue":
            return completions
        goes_on = {**self._sampling, "continue_final_message": True}
        for _ in range(self._recipe.max_continuations):
            so_far = joined(completions)
            if completions[-1].finish_reason != "length" or is_enough(so_far):
                break
            messages = [*request.messages, {"role": "assistant", "content": so_far}]
            completions.append((yield Request(messages, goes_on, request.group, request.prefixes)))
        return completions


def joined(completions: list[Completion]) -> str:
    """An answer with what continued it."""
    return "".join(completion.text for completion in completions)


def _prompt(path: Path | None, name: str, example: dict[str, Any]) -> Prompt:
    prompt = Prompt(path, name, example)
    if prompt.block_names and "user" not in prompt.block_names:
        found = ", ".join(sorted(prompt.block_names))
        raise ConfigError(f"template {path}: there is no block `user`, only {found}")
    return prompt
