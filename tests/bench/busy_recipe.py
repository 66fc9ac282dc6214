"""A recipe whose checks keep the client's CPU busy."""

import time

from streamsyn.recipes.context import ContextRecipe
from streamsyn.recipes.recipe import Steps
from streamsyn.records import Draft

CHECK_S = 0.02


class BusyRecipe(ContextRecipe):
    """The recipe `context`, with checks that take 20 ms of CPU."""

    def steps(self, draft: Draft) -> Steps:
        """See Recipe."""
        document = yield from super().steps(draft)
        began = time.thread_time()
        while time.thread_time() - began < CHECK_S:
            sum(range(1000))
        return document
