"""A recipe of the user's own: from `module:name` to an object that has all a recipe must have.

Whatever is wrong with it, as far as that shows before the first seed, is told in one line.

From `recipe.use` to a recipe.
"""

import difflib
import importlib
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import orjson
import structlog

from streamsyn.config.sections import ChecksSection, RecipeSection
from streamsyn.errors import ConfigError
from streamsyn.recipes.context import ContextRecipe
from streamsyn.recipes.instruction import InstructionRecipe
from streamsyn.recipes.recipe import Recipe, Steps
from streamsyn.recipes.sections_recipe import SectionsRecipe
from streamsyn.records import Draft, Seed, digest

log = structlog.get_logger()

_METHODS = ("steps", "group", "outlook", "fingerprint")
_OURS = "streamsyn."


class PluggedRecipe:
    """A user's recipe, as the others see it.

    Args:
        use: How the configuration names it.
        recipe: It.
        fingerprint: What it says shapes its outputs, and a digest of its source.
    """

    def __init__(self, use: str, recipe: Recipe, fingerprint: dict[str, str]) -> None:
        self._use = use
        self._recipe = recipe
        self._fingerprint = fingerprint
        self._has_told = False

    @property
    def takes_documents(self) -> bool:
        """As it says."""
        return self._recipe.takes_documents

    def steps(self, draft: Draft) -> Steps:
        """Its conversation."""
        return self._recipe.steps(draft)

    def group(self, seed: Seed) -> str:
        """Its group; none where it fails: a group saves time, and is no reason to end a run."""
        try:
            return str(self._recipe.group(seed))
        except Exception as bug:  # noqa: BLE001 - it is not our code
            if not self._has_told:
                log.warning("recipe.group_failed", recipe=self._use, seed=seed.id, bug=repr(bug))
            self._has_told = True
            return ""

    def outlook(self) -> str:
        """What it says."""
        return self._recipe.outlook()

    def fingerprint(self) -> dict[str, str]:
        """What shapes its outputs: its source among it, as `recipe.source`."""
        return self._fingerprint


def load_plugin(recipe: RecipeSection, checks: ChecksSection) -> Recipe:
    """The recipe that `recipe.use` names as `module:name`: what the class, or function, makes.

    Raises:
        ConfigError: There is none, or it is none.
    """
    use = recipe.use
    module_name, _, name = use.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), name]):
        raise ConfigError(f"recipe.use = {use!r}: a recipe of your own is named as my_package.recipes:Mine")
    module = _imported(use, module_name)
    made = _made(use, _named(use, module, name), recipe, checks)
    _check(use, made)
    with _told(use, "fingerprint()"):
        own = {str(key): value for key, value in made.fingerprint().items()}
        orjson.dumps(own)  # it has to be written
    return PluggedRecipe(use, made, {**own, **_source(module, made)})


def _imported(use: str, name: str) -> ModuleType:
    if not sys.flags.safe_path and not {"", str(Path.cwd())} & set(sys.path):
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` has it
    try:
        with _told(use, f"importing {name}"):
            return importlib.import_module(name)
    except ConfigError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and f"{name}.".startswith(f"{cause.name}."):
            raise ConfigError(
                f"recipe.use = {use!r}: {cause.msg} (the working directory was looked in, too)"
            ) from cause
        raise


def _named(use: str, module: ModuleType, name: str) -> Callable[..., Any]:
    if not hasattr(module, name):
        public = [there for there in vars(module) if not there.startswith("_")]
        near = difflib.get_close_matches(name, public, n=1, cutoff=0)
        nearest = f"; the nearest is {near[0]!r}" if near else ""
        raise ConfigError(f"recipe.use = {use!r}: there is no {name!r} in {module.__file__}{nearest}")
    found = getattr(module, name)
    if not callable(found):
        raise ConfigError(f"recipe.use = {use!r}: {name} is no class or function but {type(found).__name__}")
    return found  # type: ignore[no-any-return]


def _made(use: str, factory: Callable[..., Any], recipe: RecipeSection, checks: ChecksSection) -> Any:
    called = f"{use.partition(':')[2]}(RecipeSection, ChecksSection)"
    try:
        inspect.signature(factory).bind(recipe, checks)
    except TypeError as error:
        raise ConfigError(
            f"recipe.use = {use!r} is called as {called}, and that does not fit: {error}"
        ) from error
    except ValueError:
        log.debug("recipe.no_signature", recipe=use)  # some callables written in C have none
    with _told(use, called):
        return factory(recipe, checks)


def _check(use: str, made: Any) -> None:
    """Refuse what lacks something that a recipe must have."""
    missing = [name for name in _METHODS if not callable(getattr(made, name, None))]
    if not isinstance(getattr(made, "takes_documents", None), bool):
        missing.append("takes_documents")
    if missing:
        raise ConfigError(
            f"recipe.use = {use!r}: {type(made).__name__} has no {', '.join(missing)}; "
            "streamsyn.recipes.recipe.BaseRecipe has all but steps"
        )
    if inspect.iscoroutinefunction(made.steps) or inspect.isasyncgenfunction(made.steps):
        raise ConfigError(f"recipe.use = {use!r}: steps is `async def`; it is to be a plain generator")


def _source(module: ModuleType, made: Any) -> dict[str, str]:
    """A digest of the code: of the module named, and of the one where the class is."""
    home = type(made).__module__
    modules = [module] if home.startswith(_OURS) else [module, sys.modules.get(home, module)]
    paths = dict.fromkeys(one.__file__ for one in modules if getattr(one, "__file__", None))
    try:
        sources = [Path(path).read_bytes() for path in paths if path is not None]
    except OSError as error:
        raise ConfigError(f"recipe.use: {error.filename} cannot be read: {error.strerror}") from error
    return {"recipe.source": digest(*sources).hex()} if sources else {}


@contextmanager
def _told(use: str, what: str) -> Iterator[None]:
    """Name the place in the user's code where something is raised; a ConfigError is passed on as it is."""
    try:
        yield
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        said = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split()[:60])
        raise ConfigError(
            f"recipe.use = {use!r}: {what} raised {type(error).__name__}: {said} ({_place(error)})"
        ) from error


def _place(error: BaseException) -> str:
    """The `file:line` where it was raised; in the user's code, where any of that is on the way."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"{error.filename}:{error.lineno}"
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")
    ]
    paths = sysconfig.get_paths()
    libraries = tuple(f"{paths[kind]}{os.sep}" for kind in ("stdlib", "platstdlib", "purelib", "platlib"))
    own = [
        frame
        for frame in frames
        if not frame.filename.startswith(libraries) and Path(frame.filename) != Path(__file__)
    ]
    frame = (own or frames)[-1]
    return f"{frame.filename}:{frame.lineno}"


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
