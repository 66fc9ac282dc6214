"""From `recipe.use` to a recipe."""

import difflib
from collections.abc import Callable

from streamsyn.errors import ConfigError
from streamsyn.recipes.context import ContextRecipe
from streamsyn.recipes.instruction import InstructionRecipe
from streamsyn.recipes.plugin import load_plugin
from streamsyn.recipes.recipe import Recipe
from streamsyn.recipes.sections import SectionsRecipe
from streamsyn.sections import ChecksSection, RecipeSection

RECIPES: dict[str, Callable[[RecipeSection, ChecksSection], Recipe]] = {
    "context": ContextRecipe,
    "sections": SectionsRecipe,
    "instruction": InstructionRecipe,
}


def load_recipe(recipe: RecipeSection, checks: ChecksSection) -> Recipe:
    """The recipe that the configuration names: one of ours, or `module:name` for one of the user's.

    Raises:
        ConfigError: There is none of that name, or it cannot be set up.
    """
    if ":" in recipe.use:
        return load_plugin(recipe, checks)
    if recipe.use not in RECIPES:
        near = difflib.get_close_matches(recipe.use, RECIPES, n=1, cutoff=0)
        raise ConfigError(
            f"recipe.use: there is no recipe {recipe.use!r}; the nearest is {near[0]!r}, and one of your own "
            "is named as my_package.recipes:Mine"
        )
    return RECIPES[recipe.use](recipe, checks)
