"""Load the recipe that `recipe.use` names: a built-in one, or a class of the user as `module:name`.

A plug-in is checked before the first seed; each problem is reported as one line with its `file:line`.
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
from streamsyn.recipes.chat_recipe import ChatRecipe
from streamsyn.recipes.context import ContextRecipe
from streamsyn.recipes.instruction import InstructionRecipe
from streamsyn.recipes.recipe import Recipe, Steps
from streamsyn.recipes.sections_recipe import SectionsRecipe
from streamsyn.records import Draft, Seed, digest

log = structlog.get_logger()

_METHODS = ("steps", "group", "outlook", "fingerprint")
_OWN_PACKAGE = "streamsyn."
RECIPES: dict[str, Callable[[RecipeSection, ChecksSection], Recipe]] = {
    "context": ContextRecipe,
    "sections": SectionsRecipe,
    "instruction": InstructionRecipe,
    "chat": ChatRecipe,
}


def load_recipe(recipe: RecipeSection, checks: ChecksSection) -> Recipe:
    """Return the recipe that the configuration names.

    Raises:
        ConfigError: There is no recipe of this name, or it cannot be loaded.
    """
    if ":" in recipe.use:
        return load_plugin(recipe, checks)
    if recipe.use not in RECIPES:
        near = difflib.get_close_matches(recipe.use, RECIPES, n=1, cutoff=0)
        raise ConfigError(
            f"recipe.use: unknown recipe {recipe.use!r}; the nearest is {near[0]!r}. A recipe of your own is "
            "written as my_package.recipes:Mine"
        )
    return RECIPES[recipe.use](recipe, checks)


def load_plugin(recipe: RecipeSection, checks: ChecksSection) -> Recipe:
    """Import and create the recipe that `recipe.use` names as `module:name`, a class or a function.

    Raises:
        ConfigError: It cannot be imported or created, or is not a recipe.
    """
    use = recipe.use
    module_name, _, name = use.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), name]):
        raise ConfigError(f"recipe.use = {use!r}: a recipe of your own is written as my_package.recipes:Mine")
    module = _import_module(use, module_name)
    made = _call(use, _find(use, module, name), recipe, checks)
    _check(use, made)
    with _naming_the_source(use, "fingerprint()"):
        own = {str(key): value for key, value in made.fingerprint().items()}
        orjson.dumps(own)  # it must be valid JSON for run.json
    return PluggedRecipe(use, made, {**own, **_source_digest(module, made)})


class PluggedRecipe:
    """A user's recipe, guarded where its bugs must not end the run.

    Args:
        use: The value of `recipe.use`.
        recipe: The user's recipe.
        fingerprint: The recipe's own fingerprint, and a digest of its source.
    """

    def __init__(self, use: str, recipe: Recipe, fingerprint: dict[str, str]) -> None:
        self._use = use
        self._recipe = recipe
        self._fingerprint = fingerprint
        self._has_warned = False

    @property
    def takes_documents(self) -> bool:
        """As the user's recipe."""
        return self._recipe.takes_documents

    def steps(self, draft: Draft) -> Steps:
        """As the user's recipe."""
        return self._recipe.steps(draft)

    def group(self, seed: Seed) -> str:
        """As the user's recipe; "" if it fails, since a group only saves time and must not end the run."""
        try:
            return str(self._recipe.group(seed))
        except Exception as bug:  # noqa: BLE001 - user code may raise anything
            if not self._has_warned:
                log.warning("recipe.group_failed", recipe=self._use, seed=seed.id, bug=repr(bug))
            self._has_warned = True
            return ""

    def outlook(self) -> str:
        """As the user's recipe."""
        return self._recipe.outlook()

    def fingerprint(self) -> dict[str, str]:
        """Return the recipe's own fingerprint with a digest of its source as `recipe.source`."""
        return self._fingerprint


def _import_module(use: str, name: str) -> ModuleType:
    if not sys.flags.safe_path and not {"", str(Path.cwd())} & set(sys.path):
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    try:
        with _naming_the_source(use, f"importing {name}"):
            return importlib.import_module(name)
    except ConfigError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and f"{name}.".startswith(f"{cause.name}."):
            raise ConfigError(
                f"recipe.use = {use!r}: {cause.msg} (searched in the working directory and sys.path)"
            ) from cause
        raise


def _find(use: str, module: ModuleType, name: str) -> Callable[..., Any]:
    if not hasattr(module, name):
        public = [known for known in vars(module) if not known.startswith("_")]
        near = difflib.get_close_matches(name, public, n=1, cutoff=0)
        nearest = f"; the nearest is {near[0]!r}" if near else ""
        raise ConfigError(f"recipe.use = {use!r}: there is no {name!r} in {module.__file__}{nearest}")
    found = getattr(module, name)
    if not callable(found):
        raise ConfigError(
            f"recipe.use = {use!r}: {name} is of type {type(found).__name__}, not a class or function"
        )
    return found  # type: ignore[no-any-return]


def _call(use: str, factory: Callable[..., Any], recipe: RecipeSection, checks: ChecksSection) -> Any:
    called = f"{use.partition(':')[2]}(RecipeSection, ChecksSection)"
    try:
        inspect.signature(factory).bind(recipe, checks)
    except TypeError as error:
        raise ConfigError(
            f"recipe.use = {use!r} is called as {called}, but does not accept these arguments: {error}"
        ) from error
    except ValueError:
        log.debug("recipe.no_signature", recipe=use)  # some callables written in C have no signature
    with _naming_the_source(use, called):
        return factory(recipe, checks)


def _check(use: str, made: Any) -> None:
    """Raise a ConfigError if `made` is not a recipe."""
    missing = [name for name in _METHODS if not callable(getattr(made, name, None))]
    if not isinstance(getattr(made, "takes_documents", None), bool):
        missing.append("takes_documents")
    if missing:
        raise ConfigError(
            f"recipe.use = {use!r}: {type(made).__name__} has no {', '.join(missing)}; "
            "inherit from streamsyn.recipes.recipe.BaseRecipe, which has all but steps"
        )
    if inspect.iscoroutinefunction(made.steps) or inspect.isasyncgenfunction(made.steps):
        raise ConfigError(f"recipe.use = {use!r}: steps is `async def`; it must be a plain generator")


def _source_digest(module: ModuleType, made: Any) -> dict[str, str]:
    """Return a digest of the source of the named module and of the module that defines the class."""
    home = type(made).__module__
    modules = [module] if home.startswith(_OWN_PACKAGE) else [module, sys.modules.get(home, module)]
    paths = dict.fromkeys(one.__file__ for one in modules if getattr(one, "__file__", None))
    try:
        sources = [Path(path).read_bytes() for path in paths if path is not None]
    except OSError as error:
        raise ConfigError(f"recipe.use: {error.filename} cannot be read: {error.strerror}") from error
    return {"recipe.source": digest(*sources).hex()} if sources else {}


@contextmanager
def _naming_the_source(use: str, what: str) -> Iterator[None]:
    """Translate errors of the user's code, except ConfigError, to ConfigError with their `file:line`."""
    try:
        yield
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        message = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split()[:60])
        raise ConfigError(
            f"recipe.use = {use!r}: {what} raised {type(error).__name__}: {message} ({_source_line(error)})"
        ) from error


def _source_line(error: BaseException) -> str:
    """Return the `file:line` where an error was raised, in the user's code if the traceback has any."""
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
