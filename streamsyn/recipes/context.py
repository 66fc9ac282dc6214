"""The recipe `context`, and the conversation that it shares with `instruction`: one request per draft.

The request is tried again on failure, and its answer continued when it was cut. Source: "Generalizing From
Short to Long: Effective Data Synthesis for Long-Context Instruction Tuning", arXiv 2502.15592, section 3.
"""

from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from streamsyn.config.sections import ChecksSection, RecipeSection
from streamsyn.errors import ConfigError
from streamsyn.recipes.checks import Checks, Failure, thinking_failure
from streamsyn.recipes.parsing import document_text
from streamsyn.recipes.prompt import (
    EXAMPLE,
    Prompt,
    first_request,
    group_of,
    pair_variables,
    seed_group,
)
from streamsyn.recipes.recipe import RejectedDraft, Steps, sampling_of
from streamsyn.records import Completion, Document, Draft, RejectReason, Request, Seed


class ContextRecipe:
    """Asks for the document in one request, and again if the answer fails a check.

    Raises:
        ConfigError: A template is invalid.
    """

    takes_documents = False

    def __init__(self, recipe: RecipeSection, checks: ChecksSection) -> None:
        self._recipe = recipe
        self._checks = Checks(checks)
        self._single = SingleRequest(recipe, "context", EXAMPLE)

    def steps(self, draft: Draft) -> Steps:
        """Ask up to `recipe.tries` times for a document that passes the checks."""
        own_lines = self._single.prompt_of(draft.seed).own_lines

        def judge(completions: list[Completion]) -> Document | Failure:
            text, last = document_text(joined(completions)), completions[-1]
            figures, failure = self._checks.judge(text, draft.seed, own_lines)
            if failure := failure or self._single.cut_failure(last):
                return failure
            flags = ["truncated"] if last.finish_reason == "length" else []
            return Document(text, {**figures, "flags": flags}, completions)

        return self._single.ask(self.request(draft), judge)

    def request(self, draft: Draft) -> Request:
        """Return the request of each try."""
        seed, drafts_alike = draft.seed, self._recipe.contexts_per_seed > 1
        return self._single.request(seed, self._variables(seed), drafts_alike=drafts_alike)

    def group(self, seed: Seed) -> str:
        """Return the key of the template's block `group` for a seed."""
        prompt = self._single.prompt_of(seed)
        return group_of(prompt, lambda: self._single.first_request(seed, self._variables(seed)))

    def outlook(self) -> str:
        """Return "": one request is all."""
        return ""

    def fingerprint(self) -> dict[str, str]:
        """Return a digest of the prompt, since the packaged one may change between versions."""
        return self._single.fingerprint()

    def _variables(self, seed: Seed) -> dict[str, Any]:
        override = self._recipe.tasks.get(seed.task)
        target_words = (override and override.target_words) or self._recipe.target_words
        return pair_variables(seed, target_words)


Judge: TypeAlias = Callable[[list[Completion]], Document | Failure]
"""Makes a Document of an answer and its continuations, or tells why it fails."""


class SingleRequest:
    """Renders the prompt of a seed and asks for an answer that passes the checks.

    Args:
        recipe: The section of the configuration.
        name: Name of the packaged prompt.
        example: The variables of its template, with values for a trial rendering.

    Raises:
        ConfigError: A template is invalid.
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
        """Return the prompt for the task of a seed."""
        return self._prompts.get(seed.task, self._prompt)

    def first_request(self, seed: Seed, variables: dict[str, Any], *, drafts_alike: bool = False) -> Request:
        """Return the request for a seed, rendered with `variables`, in the group of its block `group`."""
        prompt = self.prompt_of(seed)
        blocks = prompt.blocks(variables)
        own = blocks.get("user") or prompt.whole(variables)
        system, group = blocks.get("system", ""), blocks.get("group", "")
        return first_request(system, group, own, self._sampling, drafts_alike=drafts_alike)

    def request(self, seed: Seed, variables: dict[str, Any], *, drafts_alike: bool) -> Request:
        """Return the request of each try; `drafts_alike` if all drafts of the seed send the same messages."""
        request = self.first_request(seed, variables, drafts_alike=drafts_alike)
        if request.group or not (drafts_alike or self._recipe.on_truncated == "continue"):
            return request
        return replace(request, group=seed_group(seed))

    def fingerprint(self) -> dict[str, str]:
        """Return a digest of the prompt, since the packaged one may change between versions."""
        return {"recipe.prompt": self._prompt.digest}

    def ask(
        self, request: Request, judge: Judge, is_enough: Callable[[str], bool] = lambda _: False
    ) -> Steps:
        """Ask up to `recipe.tries` times, until `judge` returns a document.

        Args:
            request: The request to send.
            judge: Makes a document of an answer and its continuations, or returns a Failure.
            is_enough: Whether the text of a cut answer needs no continuation.

        Raises:
            RejectedDraft: All tries failed, or the model was still thinking when its answer was cut.
        """
        failure: Failure | None = None
        for _ in range(self._recipe.tries):
            completions = yield from self._answer(request, is_enough)
            thinking = thinking_failure(completions[0], self._recipe)
            if thinking is not None and thinking.reason is RejectReason.STILL_THINKING:
                # A new thought would be about as long, and costs the most that an answer can.
                raise RejectedDraft(thinking.reason, thinking.detail)
            made = thinking or judge(completions)
            if isinstance(made, Document):
                return made
            failure = made
        assert failure is not None, "recipe.tries is at least one"
        raise RejectedDraft(failure.reason, f"{failure.detail} (the last of {self._recipe.tries} tries)")

    def cut_failure(self, last: Completion) -> Failure | None:
        """Return a Failure if the answer was cut and `recipe.on_truncated` is `reject`."""
        if last.finish_reason != "length" or self._recipe.on_truncated != "reject":
            return None
        return Failure(RejectReason.TRUNCATED, f"cut at {last.completion_tokens} tokens")

    def _answer(
        self, request: Request, is_enough: Callable[[str], bool]
    ) -> Generator[Request, Completion, list[Completion]]:
        """Return one answer and its continuations, if `recipe.on_truncated` asks for them."""
        completions = [(yield request)]
        if self._recipe.on_truncated != "continue":
            return completions
        sampling = {**self._sampling, "continue_final_message": True}
        for _ in range(self._recipe.max_continuations):
            text = joined(completions)
            if completions[-1].finish_reason != "length" or not text.strip() or is_enough(text):
                break
            # With its thought: the prompt may end with the mark that opens it.
            messages = [*request.messages, {"role": "assistant", "content": completions[0].thought + text}]
            more = yield Request(messages, sampling, request.group, request.prefixes)
            if more.is_only_thought:
                break
            completions.append(more)
        return completions


def joined(completions: list[Completion]) -> str:
    """Return the text of an answer and its continuations."""
    return "".join(completion.text for completion in completions)


def _prompt(path: Path | None, name: str, example: dict[str, Any]) -> Prompt:
    prompt = Prompt(path, name, example)
    if prompt.block_names and "user" not in prompt.block_names:
        found = ", ".join(sorted(prompt.block_names))
        raise ConfigError(f"template {path}: the block `user` is missing; its blocks are {found}")
    if "answer" in example:
        prompt.check_depends_on("answer")
    return prompt
