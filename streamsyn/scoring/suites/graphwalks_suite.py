"""Questions of GraphWalks (hub: openai/graphwalks): walks over a graph that is given as a list of edges.

A row has `prompt`, `answer_nodes`, `prompt_chars` and `problem_type`. The rule is that of the dataset card:
the last line of the answer must be `Final Answer: [node, node]`; the score is the F1 of the set of nodes, 1
if both sets are empty, and 0 without such a line. An earlier version of the card's code keeps the words
`Final Answer: [` in front of the first node; the nodes alone are compared here, as in later ones.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any, Final

from streamsyn.scoring.suites.suite_question import (
    SuiteQuestion,
    as_user,
    size_class,
    text_field,
    texts_field,
)

GRAPHWALKS: Final = "graphwalks"
_LIST: Final = re.compile(r"Final Answer: ?\[(.*)\]")
_MIN_TOKENS: Final = 4096
"""The card sets no limit; models reason before the last line."""
_TOKENS_PER_NODE: Final = 12
"""Nodes have ten hexadecimal digits."""


def graphwalks_question(row: Mapping[str, Any], where: str) -> SuiteQuestion:
    """The question of a row, which counts by its kind of problem and by its length.

    Raises:
        ConfigError: A field is wrong.
    """
    nodes = texts_field(row, "answer_nodes", where, may_be_empty=True)
    chars = row.get("prompt_chars")
    return SuiteQuestion(
        suite=GRAPHWALKS,
        part=text_field(row, "problem_type", where).lower(),
        id=where,
        messages=as_user(text_field(row, "prompt", where)),
        max_tokens=_MIN_TOKENS + _TOKENS_PER_NODE * len(nodes),
        wanted=tuple(nodes),
        rule=lambda answer: nodes_f1(answer, nodes),
        also=size_class(chars, " chars") if isinstance(chars, int) else "",
    )


def nodes_f1(answer: str, right: Collection[str]) -> float:
    """F1 of the set of nodes in the last line of the answer."""
    found = _LIST.search(answer.rstrip("\n").rpartition("\n")[2])
    if found is None:
        return 0.0
    said = {node for one in found[1].split(",") if (node := one.strip())}
    wanted = set(right)
    if not said and not wanted:
        return 1.0
    return 2 * len(said & wanted) / (len(said) + len(wanted))
