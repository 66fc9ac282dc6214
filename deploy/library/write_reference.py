"""Write README.md in this folder: the examples and every public name, from signatures and docstrings.

Usage: python deploy/library/write_reference.py
Checked: run, by tests/library/test_reference.py.
"""

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import streamsyn
from streamsyn.config.fields import Section
from streamsyn.following import follow
from streamsyn.library import arguments, run_thread, seed_feed

PAGE = Path(__file__).with_name("README.md")
ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "tests" / "library" / "examples"
INTRODUCTION = """# streamsyn as a library

```python
import streamsyn
```

What `streamsyn run` does, from Python: as an asynchronous stream of samples (`open_run`), or as one call
(`run_sync`). `follow` reads the rows of a run that another process writes. All of it works in a notebook, and
has types.

This page is written by `deploy/library/write_reference.py` from the signatures and docstrings.
Checked: run: the examples, by tests/library.

## Good to know
- Names are imported when they are first used, which takes a second for `open_run`. Import it at
  the top of a module (`from streamsyn import open_run`): an import in a coroutine blocks the event loop.
- The run has a thread with an event loop of its own. Your code may block; it does not delay requests.
- Samples are durable before they are handed out. To continue, pass `after`, the `seq` of the last sample that
  you dealt with.
- What is left early, or killed, is resumed by the same call.
- Messages go to the loggers below `streamsyn` of the standard library: warnings are shown,
  `logging.basicConfig(level="INFO")` shows progress. A program that has configured structlog keeps its
  own.
- Names that are not on this page are internal and change without notice.
"""
TITLES = {
    "script": "A whole run in one call",
    "stream": "A stream of samples that survives kills",
    "async_seeds": "Seeds from an asynchronous iterable",
    "submit": "Seeds that are submitted while the run goes on",
}
FUNCTIONS = ("open_run", "run_sync", "follow")
ALIASES = {
    arguments: ("PathLike", "ConfigLike", "Servers", "Seeds", "Overrides"),
    seed_feed: ("SeedRows",),
    run_thread: ("State",),
    follow: ("Kind",),
}
MADE = ("Run", "Follower")
"""Classes whose objects are made by functions."""
SHOWN = {
    "RunSummary": {
        "out",
        "stopped",
        "too_many_rejects",
        "interrupted",
        "contexts",
        "rejects",
        "samples",
        "notes",
    }
    | {"reject_fraction", "as_dict"},
    "Submitted": {"accepted", "duplicate", "refused_total", "refused"},
}
"""The public attributes and methods of classes that have internal ones, too."""
SECTION = re.compile(r"(Args|Attributes|Returns|Raises)( \(.*\))?:")


def page() -> str:
    """The page."""
    public = [getattr(streamsyn, name) for name in streamsyn.__all__ if name != "__version__"]
    kinds = [one for one in public if inspect.isclass(one) and one.__name__ not in FUNCTIONS]
    errors = [one for one in kinds if issubclass(one, Exception)]
    errors.sort(key=lambda one: [above.__name__ for above in one.__mro__[::-1]])
    others = [one for one in kinds if not issubclass(one, Exception)]
    parts = [INTRODUCTION, "## Examples", *_examples(), "## Functions"]
    parts += [_described(getattr(streamsyn, name)) for name in FUNCTIONS]
    parts += ["## Types", _aliases(), "## Classes", *map(_described, others), "## Errors"]
    parts.append("\n".join(map(_error, errors)))
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _examples() -> Iterator[str]:
    for name, title in TITLES.items():
        text = (EXAMPLES / f"{name}.py").read_text("utf-8").strip()
        yield f"### {title}\n\n```python\n{text}\n```"
    notebook = "[notebook.ipynb](../../tests/library/examples/notebook.ipynb)"
    yield f"### In a notebook\n\n{notebook}: cells may use `async with`."


def _aliases() -> str:
    lines = []
    for module, names in ALIASES.items():
        for node in ast.parse(inspect.getsource(module)).body:
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and node.target.id in names
            ):
                assert node.value is not None
                lines.append(f"{node.target.id} = {_unparsed(node.value)}")
    return "```python\n" + "\n".join(lines) + "\n```"


def _error(kind: type[Exception]) -> str:
    parent = kind.__mro__[1].__name__
    return f"- `{kind.__name__}({parent})`: {' '.join((inspect.getdoc(kind) or '').split())}"


def _described(one: Any) -> str:
    node = ast.parse(textwrap.dedent(inspect.getsource(one))).body[0]
    text = [f"### {one.__name__}"]
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        text += [_code(f"{one.__name__}{_signature(node)}"), _markdown(one)]
    elif issubclass(one, Section):
        text += [
            _markdown(one),
            "Sections; `streamsyn config` prints every key with its meaning:",
            _fields(one),
        ]
    else:
        assert isinstance(node, ast.ClassDef)
        members = [part for part in node.body if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)]
        begin = next((part for part in members if part.name == "__init__"), None)
        if begin is not None and one.__name__ in FUNCTIONS:
            text.append(_code(f"async with {one.__name__}{_signature(begin, method=True)} as run: ..."))
        elif begin is not None and one.__name__ not in MADE:
            text.append(_code(f"{one.__name__}{_signature(begin, method=True)}"))
        text.append(_markdown(one, SHOWN.get(one.__name__)))
        shown = SHOWN.get(one.__name__, {part.name for part in members if not part.name.startswith("_")})
        text += [_member(one, part) for part in members if part.name in shown]
    return "\n\n".join(text)


def _member(owner: type, node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    value = inspect.getattr_static(owner, node.name)
    name = f"{owner.__name__}.{node.name}"
    if isinstance(value, property):
        returns = f": {_unparsed(node.returns)}" if node.returns else ""
        return f"#### {name}\n\n{_code(name + returns)}\n\n{_markdown(value)}"
    waits = (
        "await " if isinstance(node, ast.AsyncFunctionDef) and not inspect.isasyncgenfunction(value) else ""
    )
    return f"#### {name}\n\n{_code(waits + name + _signature(node, method=True))}\n\n{_markdown(value)}"


def _fields(section: type[Section]) -> str:
    return "\n".join(
        f"- `[{name}]`: {' '.join((inspect.getdoc(field.annotation) or '').split())}"
        for name, field in section.model_fields.items()
    )


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef, *, method: bool = False) -> str:
    """The arguments, one a line if they are many, and what is returned."""
    arguments = node.args
    if method:
        arguments.args = arguments.args[1:]
    returns = f" -> {_unparsed(node.returns)}" if node.returns and node.name != "__init__" else ""
    line = _unparsed(arguments)
    if len(line) < 80:
        return f"({line}){returns}"
    plain = len(arguments.args) - len(arguments.defaults)
    shown = [
        _argument(one, arguments.defaults[at - plain] if at >= plain else None)
        for at, one in enumerate(arguments.args)
    ]
    if arguments.kwonlyargs:
        shown.append("*")
        pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        shown += [_argument(one, default) for one, default in pairs]
    return "(\n" + "".join(f"    {one},\n" for one in shown) + f"){returns}"


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    return _unparsed(argument) + ("" if default is None else f" = {_unparsed(default)}")


def _unparsed(node: ast.AST) -> str:
    """The source of a node, with the quotes of this project, and types that are quoted without them."""
    return re.sub(r'"([A-Z]\w+)"', r"\1", ast.unparse(node).replace("'", '"'))


def _code(text: str) -> str:
    return f"```python\n{text}\n```"


def _markdown(one: Any, shown: Collection[str] | None = None) -> str:
    """A docstring as Markdown: its sections become lists, its indented examples blocks of code.

    Args:
        one: What has the docstring.
        shown: Names of attributes to list; None lists all.
    """
    found, items = [], False
    lines = (inspect.getdoc(one) or "").splitlines()
    for block in re.split(r"\n(?:[ \t]*\n)+", "\n".join(lines)):
        head, *rest = block.splitlines() or [""]
        if section := SECTION.fullmatch(head):
            items = section[1] != "Returns"
            found.append(f"**{head}**")
            body = textwrap.dedent("\n".join(rest))
            found.append(_items(body, shown) if items else " ".join(body.split()))
        elif head.startswith("    ") and not items:
            found.append(_code(textwrap.dedent(block)))
        else:
            found.append(block)
    return "\n\n".join(found)


def _items(block: str, shown: Collection[str] | None) -> str:
    """`name: meaning` with continued lines, as a list."""
    whole = re.sub(r"\n[ \t]+", " ", block)
    found = (line.partition(": ") for line in whole.splitlines())
    return "\n".join(f"- `{name}`: {meaning}" for name, _, meaning in found if shown is None or name in shown)


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
    sys.stderr.write(f"wrote {PAGE}\n")
