"""What a recipe is: the conversation held for one draft, without the I/O."""

from abc import ABC, abstractmethod
from collections.abc import Generator
from typing import Any, Protocol, TypeAlias

from streamsyn.config.sections import ChecksSection, RecipeSection
from streamsyn.recipes.checks import Checks
from streamsyn.records import Completion, Document, Draft, RejectReason, Request, Seed

Steps: TypeAlias = Generator[Request, Completion, Document]
"""Yields a Request, is sent its Completion, and so on; returns the Document."""


class Recipe(Protocol):
    """Decides what is asked of an LLM for a draft, and what is made of the answers.

    A recipe does no I/O and keeps no state between drafts: a worker drives `steps`, so retries,
    placement and time bounds are none of its business. The same answers give the same next request
    and the same document: after a kill, finished steps are played to it again from the journal. So
    what it draws at random comes from the draft, never from a clock.
    """

    @property
    def takes_documents(self) -> bool:
        """Whether its seeds are documents (`Seed.context`), for which it writes the pair."""
        ...

    def steps(self, draft: Draft) -> Steps:
        """Hold the conversation for one draft.

        Raises:
            RejectedDraft: No answer was good enough.
        """
        ...

    def group(self, seed: Seed) -> str:
        """Key of a long text that `seed` shares with other seeds; "" where there is none. Cheap."""
        ...

    def outlook(self) -> str:
        """What follows the first request of a draft, in words; "" when that is all, as a rule."""
        ...

    def fingerprint(self) -> dict[str, str]:
        """What shapes the recipe's outputs besides the configuration, such as packaged prompts."""
        ...


class BaseRecipe(ABC):
    """What a recipe of your own may begin with: then `steps` is all it has to have.

    Attributes:
        takes_documents: Whether its seeds are documents; the Document it returns has the pair then.
        section: The configuration's table `recipe`.
        options: Its table `options`, which is yours.
        checks: The checks, as configured.
        sampling: Sampling parameters for a Request, as configured.
    """

    takes_documents: bool = False

    def __init__(self, recipe: RecipeSection, checks: ChecksSection) -> None:
        self.section = recipe
        self.options = recipe.options
        self.checks = Checks(checks)
        self.sampling = sampling_of(recipe)

    @abstractmethod
    def steps(self, draft: Draft) -> Steps:
        """Hold the conversation for one draft: yield Requests, be sent Completions, return a Document.

        Raises:
            RejectedDraft: No answer was good enough.
        """

    def group(self, seed: Seed) -> str:  # noqa: ARG002 - others look at it
        """Seeds share nothing."""
        return ""

    def outlook(self) -> str:
        """Nothing is known of what follows the first request."""
        return ""

    def fingerprint(self) -> dict[str, str]:
        """The configuration says it all."""
        return {}


class RejectedDraft(Exception):
    """Raised by a recipe when the answers it got are not fit to be a context."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def sampling_of(recipe: RecipeSection) -> dict[str, Any]:
    """The sampling parameters of a Request for one whole answer, as configured."""
    return {"temperature": recipe.temperature, "max_tokens": recipe.max_tokens, **recipe.sampling}
