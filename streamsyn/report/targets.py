"""How long contexts and samples were asked to be."""

from dataclasses import dataclass

from streamsyn.sections import AssemblySection, LengthsSection, RecipeSection


@dataclass(frozen=True, slots=True)
class LengthTarget:
    """Tokens a sample was to have: one number, or from `low` to `high`."""

    low: int
    high: int

    def __str__(self) -> str:
        return f"{self.low:,}" if self.low == self.high else f"{self.low:,} to {self.high:,}"


def sample_target(assembly: AssemblySection) -> LengthTarget | None:
    """What `assembly.target_tokens` asks for; None when samples have a number of contexts."""
    match assembly.target_tokens:
        case None:
            return None
        case LengthsSection() as lengths:
            if bounds := lengths.uniform or lengths.log_uniform:
                return LengthTarget(*bounds)
            values = lengths.choices or [tokens for _, tokens in lengths.schedule or ()]
            return LengthTarget(min(values), max(values))
        case tokens:
            return LengthTarget(tokens, tokens)


def words_target(recipe: RecipeSection, task: str) -> int | None:
    """Words that a context of a task was asked to have; None when it is not asked in words."""
    if recipe.use != "context":
        return None
    override = recipe.tasks.get(task)
    return (override and override.target_words) or recipe.target_words


def tokens_target(recipe: RecipeSection) -> int | None:
    """Tokens that a context was asked to have; None when it is not asked in tokens."""
    return recipe.target_tokens if recipe.use == "sections" else None
