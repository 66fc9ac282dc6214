"""The recipe `instruction`: what it asks about a document, and what it makes of the answers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from streamsyn.config.sections import ChecksSection, RecipeSection
from streamsyn.errors import ConfigError
from streamsyn.fleet.thinking import cleaned
from streamsyn.recipes.instruction import InstructionRecipe
from streamsyn.recipes.recipe import RejectedDraft
from streamsyn.recipes.registry import load_recipe
from streamsyn.records import Completion, Document, Draft, RejectReason, Request, Seed
from tests.examples import in_turn

TEXT = " ".join(
    f"In year {number} the river of Aldersby rose by {number * 7} feet." for number in range(1, 101)
)
SEED = Seed("d-1", "books", "", "", "docs.jsonl:1", {"title": "Rivers"}, TEXT)
ASKED = "By how many feet did the river of Aldersby rise in year 3?"
GOOD = f"Question: {ASKED}\nAnswer: By 21 feet."


def recipe(checks: dict[str, Any] | None = None, **fields: Any) -> InstructionRecipe:
    """A recipe under a configuration with `fields` changed."""
    return InstructionRecipe(RecipeSection(**fields), ChecksSection(**checks or {}))


def completion_of(text: str, finish_reason: str = "stop") -> Completion:
    """An answer of some LLM."""
    return cleaned(Completion(text, finish_reason, 10, 0, 5, "m", "http://one"))


def drive(
    made: InstructionRecipe, *answers: Completion, draft: Draft | None = None
) -> tuple[Document, list[Request]]:
    """The document that comes of these answers, and what was asked for them."""
    steps = made.steps(draft or Draft(SEED))
    requests = [next(steps), *(steps.send(answer) for answer in answers[:-1])]
    with pytest.raises(StopIteration) as done:
        steps.send(answers[-1])
    document: Document = done.value.value
    return document, requests


def rejected(made: InstructionRecipe, *answers: Completion) -> RejectedDraft:
    """How a draft with these answers ends."""
    steps = made.steps(Draft(SEED))
    next(steps)
    for answer in answers[:-1]:
        steps.send(answer)
    with pytest.raises(RejectedDraft) as raised:
        steps.send(answers[-1])
    return raised.value


def test_a_pair_is_what_comes_of_a_document() -> None:
    """The document stays as it is; question and answer are the LLM's."""
    answer = completion_of(f"**Question:** {ASKED}\n\n**Answer:** By 21 feet.")
    document, requests = drive(recipe(), answer)
    tokens = answer.prompt_tokens
    checks = {"words": 1100, "tokens": tokens, "window": [0, 1100, 1100], "flags": []}
    assert Document(TEXT, checks, [answer], ASKED, "By 21 feet.") == document
    assert 1 == len(requests)


def test_the_prompt_has_the_document_first() -> None:
    """Before what is asked, so that drafts share it; system and form are the same for all documents."""
    system, user = (message["content"] for message in recipe().request(Draft(SEED)).messages)
    other = recipe().request(Draft(replace(SEED, id="d-2", context="Another text. " * 100))).messages
    assert user.startswith(f"Document:\n{TEXT}\n\n")
    assert system == other[0]["content"]
    assert (
        user[user.index(TEXT) + len(TEXT) :]
        == other[1]["content"][len(f"Document:\n{'Another text. ' * 100}") - 1 :]
    )
    assert "Question: ...\nAnswer: ..." in user


def test_a_window_is_what_the_llm_sees_and_what_is_kept() -> None:
    """As drawn for the draft: the same in every run, another one for another draft."""
    made = recipe(window_words=110, contexts_per_seed=20)
    documents = [drive(made, completion_of(GOOD), draft=Draft(SEED, number))[0] for number in range(20)]
    again = recipe(window_words=110, contexts_per_seed=20)
    for number, document in enumerate(documents):
        first, words, of = document.checks["window"]
        assert (110, 1100) == (words, of) == (document.checks["words"], 1100)
        assert TEXT.split()[first : first + 110] == document.text.split()
        assert 0 == first % 11  # sentences of eleven words
        request = again.request(Draft(SEED, number))
        assert request.messages[1]["content"].startswith(f"Document:\n{document.text}\n")
    assert len({document.text for document in documents}) > 10
    other = drive(made, completion_of(GOOD), draft=Draft(replace(SEED, id="x")))[0]
    assert documents[0].checks["window"] != other.checks["window"]


def test_drafts_share_a_document_that_is_taken_whole() -> None:
    """They go to one server, the first leads; drafts about windows of their own share nothing."""
    whole = [recipe(contexts_per_seed=2).request(Draft(SEED, number)) for number in range(2)]
    assert whole[0] == whole[1]
    assert [True, 1] == [bool(whole[0].group), len(whole[0].prefixes)]
    windows = [
        recipe(contexts_per_seed=2, window_words=50).request(Draft(SEED, number)) for number in range(2)
    ]
    assert [("", ()), ("", ())] == [(request.group, request.prefixes) for request in windows]
    assert ("", ()) == (recipe().request(Draft(SEED)).group, recipe().request(Draft(SEED)).prefixes)
    assert "" == recipe().group(SEED) == recipe().outlook()


@in_turn(
    ("text", "reason", "detail"),
    [
        ("", RejectReason.EMPTY, "no text"),
        ("<think>What to ask?", RejectReason.EMPTY, "only a thought of 5 tokens"),
        ("I'm sorry, but I can't help with that.", RejectReason.REFUSAL, "sorry"),
        ("The river rose.", RejectReason.NO_PAIR, "'The river rose.'"),
        (f"Question: {ASKED}", RejectReason.NO_PAIR, "By how many feet"),
        (f"Question: {ASKED}\nAnswer:", RejectReason.EMPTY, "the answer is empty"),
        (f"Question: {ASKED}\nAnswer: ...", RejectReason.NO_PAIR, "the answer says nothing"),
        ("Question: Question\nAnswer: By 21 feet.", RejectReason.NO_PAIR, "the question says nothing"),
        ("Question: [Your question]\nAnswer: [Your answer]", RejectReason.NO_PAIR, "says nothing"),
        (
            f"Question: {ASKED}\nAnswer: I'm sorry, but I cannot answer.",
            RejectReason.REFUSAL,
            "the answer: I'm",
        ),
        (f"Question: {ASKED}\nAnswer: {'word ' * 301}", RejectReason.REPETITION, "the answer"),
        (
            f"Question: {ASKED}\nAnswer: {TEXT}",
            RejectReason.TOO_LONG,
            "1100 words, more than checks.max_words = 300",
        ),
    ],
)
def test_each_bad_answer_has_its_reason(text: str, reason: RejectReason, detail: str) -> None:
    """The last failure names the reject, and says of how many tries it is."""
    rejection = rejected(recipe({"max_words": 300}, tries=1), completion_of(text))
    assert reason is rejection.reason
    assert detail in rejection.detail
    assert rejection.detail.endswith("(the last of 1 tries)")


def test_an_answer_that_repeats_our_prompt() -> None:
    """Lines of our own are no question."""
    system = recipe().request(Draft(SEED)).messages[0]["content"]
    echo = next(line for line in system.splitlines() if line.startswith("- Name the persons"))
    rejection = rejected(recipe(tries=1), completion_of(f"Question: {echo}\nAnswer: By 21 feet."))
    assert RejectReason.PROMPT_ECHO is rejection.reason


def test_a_bad_answer_is_asked_afresh() -> None:
    """With the same question, up to `recipe.tries` times."""
    good = completion_of(GOOD)
    document, requests = drive(recipe(tries=3), completion_of(""), completion_of("Hm."), good)
    assert [good] == document.steps
    assert requests[0] == requests[1] == requests[2]
    rejection = rejected(recipe(tries=2), completion_of(""), completion_of("Hm."))
    assert (RejectReason.NO_PAIR, True) == (rejection.reason, "(the last of 2 tries)" in rejection.detail)


def test_a_document_that_is_too_short_is_not_asked_about() -> None:
    """`checks.min_words` holds for the document; the answer may be a single word."""
    with pytest.raises(
        RejectedDraft, match=r"the document has 1100 words, fewer than checks\.min_words = 1101"
    ):
        next(recipe({"min_words": 1101}).steps(Draft(SEED)))
    document, _ = drive(recipe({"min_words": 1100}), completion_of(f"Question: {ASKED}\nAnswer: 21"))
    assert "21" == document.answer


def test_a_cut_answer_is_kept_with_a_flag() -> None:
    """Unless another question had begun: then it is whole."""
    document, _ = drive(recipe(), completion_of(GOOD, "length"))
    assert ["truncated"] == document.checks["flags"]
    document, _ = drive(recipe(on_truncated="reject"), completion_of(f"{GOOD}\nQuestion: And in y", "length"))
    assert ([], "By 21 feet.") == (document.checks["flags"], document.answer)


def test_a_cut_answer_is_rejected() -> None:
    """Where that is wanted: asked afresh, and `truncated` in the end."""
    made = recipe(on_truncated="reject", tries=2)
    document, _ = drive(made, completion_of(GOOD, "length"), completion_of(GOOD))
    assert [] == document.checks["flags"]
    assert (
        RejectReason.TRUNCATED
        is rejected(made, completion_of(GOOD, "length"), completion_of(GOOD, "length")).reason
    )


def test_a_cut_answer_is_continued() -> None:
    """As long as it is cut, and no whole pair stands in it."""
    made = recipe(on_truncated="continue")
    parts = [
        completion_of(GOOD[:20], "length"),
        completion_of(GOOD[20:-5], "length"),
        completion_of(f"{GOOD[-5:]}\nQuestion: A", "length"),
    ]
    document, requests = drive(made, *parts)
    assert (ASKED, "By 21 feet.", parts, []) == (
        document.instruction,
        document.answer,
        document.steps,
        document.checks["flags"],
    )
    assert {"role": "assistant", "content": GOOD[:-5]} == requests[2].messages[-1]
    assert requests[0].group


def test_a_template_of_its_own(tmp_path: Path) -> None:
    """For all tasks or one, with document, task and metadata, and `group` for what several share."""
    path = tmp_path / "own.j2"
    path.write_text(
        "{% block group %}{{ metadata.title * 200 }}{% endblock %}"
        "{% block user %}{{ task }}: {{ context[:7] }}{% endblock %}"
    )
    made = recipe(tasks={"books": {"template": path}}, contexts_per_seed=2)
    request = made.request(Draft(SEED))
    assert [{"role": "user", "content": f"{'Rivers' * 200}\n\nbooks: In year"}] == request.messages
    assert made.group(SEED) == request.group == request.prefixes[0]
    assert "Document:" in made.request(Draft(replace(SEED, task="other"))).messages[1]["content"]
    path.write_text("{{ instruction }}")
    with pytest.raises(ConfigError, match=r"instruction.*context, metadata, task"):
        recipe(template=path)


def test_by_its_name() -> None:
    """It takes documents, the others pairs; its prompt is part of the fingerprint."""
    made = [
        load_recipe(RecipeSection(use=use), ChecksSection()) for use in ("instruction", "context", "sections")
    ]
    assert [True, False, False] == [one.takes_documents for one in made]
    assert 3 == len({one.fingerprint()["recipe.prompt"] for one in made})
