"""The sections of what is asked of the LLM."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from streamsyn.sections.base import Count, Section


class TaskRecipeSection(Section):
    """What differs for one task; what is left out is as for all."""

    target_words: Count | None = None
    """As `recipe.target_words`."""
    target_tokens: Count | None = None
    """As `recipe.target_tokens`."""
    template: Path | None = None
    """As `recipe.template`."""


class RecipeSection(Section):
    """What is asked of the LLM for a seed."""

    use: str = "context"
    """The recipe: `context` asks for a document at once; `sections` for an outline, then for one section
    after the other, for documents of 4k to 128k tokens; `instruction` takes documents and asks for a question
    and its answer. `my_package.recipes:Mine` is a class of your own."""
    options: dict[str, Any] = {}
    """For a recipe of your own: whatever it needs."""
    window_words: Count | None = None
    """Of a longer document the recipe `instruction` takes so many words, from a place that is drawn."""
    target_words: Count = 2000
    """Length that the LLM is asked for by the recipe `context`."""
    contexts_per_seed: Count = 1
    """Drafts a seed: contexts written independently of each other."""
    max_tokens: Count = 4096
    """Longest answer of the recipes `context` and `instruction`, in tokens of the model that writes."""
    target_tokens: Count = 8000
    """Length that the recipe `sections` writes up to, as the servers count it: never beyond, and short of it
    by less than a quarter of a section. `checks.max_words` does not reject what is asked for here."""
    section_tokens: Count = 1024
    """Longest answer for one section, in tokens; there are about `target_tokens / section_tokens` of them."""
    facts: Literal["one", "spread"] = "one"
    """Where the facts that lead to the answer are placed: in `one` section, drawn evenly for each draft, or
    `spread` over up to four."""
    window_tokens: Count = 32768
    """No conversation of the recipe `sections` grows beyond so many tokens, prompt and answer together (so it
    should not exceed the model's context length): before it would, what has been written is summarised, and a
    new conversation goes on from the summary and the last section. Where the seed itself is too long for that
    the context has the flag `beyond_window`."""
    summary_tokens: Count = 512
    """Longest running summary, in tokens."""
    temperature: Annotated[float, Field(ge=0)] = 0.8
    """Sampling temperature."""
    sampling: dict[str, Any] = {}
    """Any other sampling parameter, passed through to the server, such as `top_p`."""
    template: Path | None = None
    """A Jinja2 file in place of the packaged prompt. For `context` and `instruction`: the blocks `user` and,
    where wanted, `system`. For `sections`: any of `system`, `outline`, `section`, `summary`, `resume`; the
    others stay as packaged. For all: `group`, text that several seeds share, such as a passage; it stands
    first in the user message, and its seeds are sent to one server, one after the other."""
    tasks: dict[str, TaskRecipeSection] = {}
    """Overrides for single tasks: `[recipe.tasks.NAME]`."""
    tries: Count = 3
    """Fresh answers asked for, in all, when one fails a check; in `sections`, for each step."""
    on_truncated: Literal["keep", "continue", "reject"] = "keep"
    """An answer cut at `max_tokens`: keep it with a flag, have it continued, or try afresh. In `sections` a
    cut section is continued by the next one anyway: only `reject` differs, and only for the last section."""
    max_continuations: Count = 4
    """How often one answer is continued at most."""
