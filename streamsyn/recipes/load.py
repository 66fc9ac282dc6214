"""From `recipe.use` to a recipe."""

import difflib
from collections.abc import Callable

from streamsyn.errors import ConfigError
from streamsyn.recipes.context import ContextRecipe
from streamsyn.recipes.recipe import Recipe
from streamsyn.recipes.sections import SectionsRecipe
from streamsyn.sections import ChecksSection, RecipeSection

RECIPES: dict[str, Callable[[RecipeSection, ChecksSection], Recipe]] = {
    "context": ContextRecipe,
    "sections": SectionsRecipe,
}


def load_recipe(recipe: RecipeSection, checks: ChecksSection) -> Recipe:
    """The recipe that the configuration names.

    Raises:
        ConfigError: There is none of that name, or it cannot be set up.
    """
    if recipe.use not in RECIPES:
        near = difflib.get_close_matches(recipe.use, RECIPES, n=1, cutoff=0)
        raise ConfigError(f"recipe.use: there is no recipe {recipe.use!r}; the nearest is {near[0]!r}")
    return RECIPES[recipe.use](recipe, checks)
