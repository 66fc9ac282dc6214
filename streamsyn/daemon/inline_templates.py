"""Templates that clients send as text: a part of Jinja2 whose work is linear in what is rendered.

All templates are rendered in Jinja2's sandbox, and up to a maximum length (`streamsyn.templates`). That keeps
a template from reaching Python, but not from looping in a loop, or from doubling a text again and again. So a
client's template may only name, test and filter what it is given, a bounded number of times, and loop over it
once.
"""

from collections.abc import Iterator, Mapping
from typing import Final

import jinja2
from jinja2 import nodes

from streamsyn.daemon.problems import Problem
from streamsyn.templates import environment

MAX_TEMPLATE_CHARS: Final = 2**16
_MAX_NAMES: Final = 200
"""How often a template may name a variable: as many times, at most, is its text gone through."""
_MAX_JOINED: Final = 4
"""Variables that one `~` may join: the text is made whole before its length is looked at."""
_MAX_ARGUMENT: Final = 1000
_ALLOWED: Final = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.Block, nodes.If, nodes.For, nodes.CondExpr),
    *(nodes.Name, nodes.Const, nodes.Getattr, nodes.Getitem, nodes.Filter, nodes.Test, nodes.Keyword),
    *(nodes.And, nodes.Or, nodes.Not, nodes.Compare, nodes.Operand, nodes.Concat),
)
_FILTERS: Final = frozenset(
    {
        "capitalize",
        "count",
        "d",
        "default",
        "first",
        "int",
        "join",
        "last",
        "length",
        "lower",
        "title",
        "trim",
    }
    | {"truncate", "upper", "wordcount"}
)
_WORDS: Final[Mapping[type[nodes.Node], str]] = {
    nodes.Call: "a call",
    nodes.Add: "`+`",
    nodes.Mul: "`*`",
    nodes.Pow: "`**`",
    nodes.Mod: "`%`",
    nodes.Assign: "`set`",
    nodes.AssignBlock: "`set`",
    nodes.Macro: "`macro`",
    nodes.Include: "`include`",
    nodes.Import: "`import`",
    nodes.FromImport: "`import`",
    nodes.Extends: "`extends`",
}


def check_template(name: str, text: str) -> None:
    """Refuse a client's template that is not within the part of Jinja2 that is allowed.

    Args:
        name: What the client calls it, such as `templates.recipe`.
        text: Its text.

    Raises:
        Problem: 422: the message names the line and what is not allowed there.
    """
    if len(text) > MAX_TEMPLATE_CHARS:
        raise Problem(422, f"{name}: longer than {MAX_TEMPLATE_CHARS:,} characters", key=name)
    try:
        tree = environment().parse(text)
    except jinja2.TemplateSyntaxError as error:
        raise Problem(422, f"{name}:{error.lineno}: {error.message}", key=name) from error
    except RecursionError as error:
        raise Problem(422, f"{name}: nested too deeply", key=name) from error
    for line, what in _mistakes(tree):
        raise Problem(
            422, f"{name}:{line}: {what} is not allowed in a template that a client sends", key=name
        )


def _mistakes(tree: nodes.Template) -> Iterator[tuple[int, str]]:
    names = 0
    for node in tree.find_all(nodes.Node):
        names += isinstance(node, nodes.Name)
        if names > _MAX_NAMES:
            yield node.lineno, f"naming variables more than {_MAX_NAMES} times"
        if not isinstance(node, _ALLOWED):
            yield node.lineno, _WORDS.get(type(node), f"`{type(node).__name__.lower()}`")
        elif isinstance(node, nodes.Filter):
            yield from _filter_mistakes(node)
        elif isinstance(node, nodes.Concat) and len(list(node.find_all(nodes.Name))) > _MAX_JOINED:
            yield node.lineno, f"joining more than {_MAX_JOINED} variables with `~`"
        elif isinstance(node, nodes.For):
            yield from _loop_mistakes(node)


def _filter_mistakes(node: nodes.Filter) -> Iterator[tuple[int, str]]:
    if node.name not in _FILTERS:
        yield node.lineno, f"the filter {node.name!r} (allowed are {', '.join(sorted(_FILTERS))})"
    for argument in [*node.args, *(keyword.value for keyword in node.kwargs)]:
        if not isinstance(argument, nodes.Const):
            yield node.lineno, f"an argument of the filter {node.name!r} that is not a constant"
        elif isinstance(argument.value, str) and len(argument.value) > _MAX_ARGUMENT:
            yield node.lineno, f"an argument of more than {_MAX_ARGUMENT:,} characters"


def _loop_mistakes(node: nodes.For) -> Iterator[tuple[int, str]]:
    """A loop goes over a variable, and its body is about the items alone."""
    if node.recursive or not isinstance(node.iter, nodes.Name | nodes.Getattr | nodes.Getitem):
        yield node.lineno, "a loop over anything but a variable"
    if not isinstance(node.target, nodes.Name):
        yield node.lineno, "a loop with several variables"
        return
    own = {node.target.name, "loop"}
    for part in [*node.body, *node.else_, *([node.test] if node.test is not None else [])]:
        for inner in [part, *part.find_all(nodes.Node)]:
            if isinstance(inner, nodes.For):
                yield inner.lineno, "a loop in a loop"
            elif isinstance(inner, nodes.Name) and inner.name not in own:
                yield inner.lineno, f"the variable {inner.name!r} in a loop"
