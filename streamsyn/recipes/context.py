"""The recipe `context`: one document per draft, from which the seed's answer follows.

Source: "Generalizing From Short to Long: Effective Data Synthesis for Long-Context Instruction
Tuning", arXiv 2502.15592, section 3.
"""

from streamsyn.config.sections import ChecksSection, RecipeSection
from streamsyn.recipes.checks import Checks, Failure
from streamsyn.recipes.parsing import document_text
from streamsyn.recipes.prompt import EXAMPLE, Opening, group_of
from streamsyn.recipes.recipe import Steps
from streamsyn.recipes.single_request import SingleRequest, joined
from streamsyn.records import Completion, Document, Draft, Request, Seed


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
            figures = self._checks.measure(text)
            failure = self._checks.failure(text, figures, draft.seed, own_lines)
            if failure := failure or self._single.cut_failure(last):
                return failure
            flags = ["truncated"] if last.finish_reason == "length" else []
            return Document(text, {**figures, "flags": flags}, completions)

        return self._single.ask(self.request(draft), judge)

    def request(self, draft: Draft) -> Request:
        """Return the request of each try."""
        seed, drafts_alike = draft.seed, self._recipe.contexts_per_seed > 1
        return self._single.request(self._opening(seed), seed, drafts_alike=drafts_alike)

    def group(self, seed: Seed) -> str:
        """Return the key of the template's block `group` for a seed."""
        return group_of(self._single.prompt_of(seed), seed, self._opening)

    def outlook(self) -> str:
        """Return "": one request is all."""
        return ""

    def fingerprint(self) -> dict[str, str]:
        """Return a digest of the prompt, since the packaged one may change between versions."""
        return self._single.fingerprint()

    def _opening(self, seed: Seed) -> Opening:
        override = self._recipe.tasks.get(seed.task)
        variables = {
            "instruction": seed.instruction,
            "answer": seed.answer,
            "task": seed.task,
            "target_words": (override and override.target_words) or self._recipe.target_words,
            "metadata": seed.metadata,
        }
        return self._single.open(seed, variables)
