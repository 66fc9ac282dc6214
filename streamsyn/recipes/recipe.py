"""The interface of recipes, and the base class for your own: a conversation for one draft, without I/O."""

from abc import ABC, abstractmethod
from collections.abc import Generator
from typing import Any, Protocol, TypeAlias

from streamsyn.config.sections import ChecksSection, RecipeSection
from streamsyn.recipes.checks import Checks
from streamsyn.records import Completion, Document, Draft, RejectReason, Request, Seed

Steps: TypeAlias = Generator[Request, Completion, Document]
"""A generator that yields Requests, is sent their Completions, and returns the Document."""


class Recipe(Protocol):
    """Decides what the LLM is asked for a draft, and makes a document of the answers.

    A recipe does no I/O and keeps no state between drafts. A worker drives `steps`: retries, placement and
    timeouts are not the recipe's concern. The same answers must give the same next request and the same
    document, because after a kill the finished steps are replayed from the journal. So seed random choices by
    `Draft.key`, and never use the time. The steps of a long draft run in threads, one after the other.
    """

    @property
    def takes_documents(self) -> bool:
        """Whether its seeds are documents (`Seed.context`), for which it writes instruction and answer."""
        ...

    def steps(self, draft: Draft) -> Steps:
        """Ask the LLM for one draft.

        Raises:
            RejectedDraft: No answer can be used.
        """
        ...

    def group(self, seed: Seed) -> str:
        """Return the key of a long text that `seed` shares with other seeds, or "". Must be fast."""
        ...

    def outlook(self) -> str:
        """Describe what follows the first request of a draft, for `streamsyn preview`; "" if nothing does."""
        ...

    def fingerprint(self) -> dict[str, str]:
        """Return what shapes outputs besides the configuration, such as packaged prompts, as key -> value."""
        ...


class BaseRecipe(ABC):
    """Base class for a recipe of your own: only `steps` must be implemented.

    Attributes:
        takes_documents: Whether its seeds are documents; then the Document has instruction and answer.
        section: The section [recipe] of the configuration.
        options: Its table `options`, for settings of your own.
        checks: The configured checks.
        sampling: The configured sampling parameters for a Request.
    """

    takes_documents: bool = False

    def __init__(self, recipe: RecipeSection, checks: ChecksSection) -> None:
        self.section = recipe
        self.options = recipe.options
        self.checks = Checks(checks)
        self.sampling = sampling_of(recipe)

    @abstractmethod
    def steps(self, draft: Draft) -> Steps:
        """Yield Requests, receive their Completions, and return a Document.

        Raises:
            RejectedDraft: No answer can be used.
        """

    def group(self, seed: Seed) -> str:  # noqa: ARG002 - subclasses use it
        """Return "": seeds share no text."""
        return ""

    def outlook(self) -> str:
        """Return "": what follows the first request is unknown."""
        return ""

    def fingerprint(self) -> dict[str, str]:
        """Return {}: only the configuration shapes outputs."""
        return {}


class RejectedDraft(Exception):
    """Raised by a recipe when no answer can be used as a context; the draft becomes a Reject."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def sampling_of(recipe: RecipeSection) -> dict[str, Any]:
    """Return the configured sampling parameters of a Request for a whole answer."""
    return {"temperature": recipe.temperature, "max_tokens": recipe.max_tokens, **recipe.sampling}
