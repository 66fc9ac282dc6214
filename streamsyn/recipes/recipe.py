"""What a recipe is: the conversation held for one draft, without the I/O."""

from collections.abc import Generator
from typing import Protocol, TypeAlias

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


class RejectedDraft(Exception):
    """Raised by a recipe when the answers it got are not fit to be a context."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
