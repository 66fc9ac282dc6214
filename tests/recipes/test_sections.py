"""The recipe `sections`: what it asks step by step, and what it makes of the answers. No server is needed."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.config.sections import ChecksSection, RecipeSection
from streamsyn.errors import ConfigError
from streamsyn.recipes.recipe import RejectedDraft
from streamsyn.recipes.registry import load_recipe
from streamsyn.recipes.sections_recipe import SectionsRecipe
from streamsyn.records import Completion, Document, Draft, RejectReason, Request, Seed

SEED = Seed("s-1", "qa", "When did the mill of Aldersby burn down?", "In 1847.", "seeds.jsonl:1")
OTHER = Seed("s-2", "qa", "Who rowed to Fairholm?", "Nobody rowed there.", "seeds.jsonl:2")
OUTLINE = "1. The river\n2. The mill\n3. The fire\n4. The years after"
ECHO = (
    "First of all: One coherent text, in well-formed paragraphs, in the voice such a document would have: an "
    "article, a report, a transcript, a story. Each section goes on where the last one ended and repeats "
    "nothing. So far the rules."
)
SMALL: dict[str, Any] = {"target_tokens": 400, "section_tokens": 100}

Answer = Callable[[Request, int], Completion]


def recipe(checks: dict[str, Any] | None = None, **fields: Any) -> SectionsRecipe:
    """A recipe under a configuration with `fields` changed."""
    return SectionsRecipe(RecipeSection(use="sections", **fields), ChecksSection(**checks or {}))


def prose(number: int, words: int = 60) -> str:
    """A text of its own."""
    lines = (f"In year {number * 100 + line} the river rose by {line * 7} feet." for line in range(1, words))
    return " ".join(lines)[: words * 6].rstrip()


def tokens(messages: Sequence[dict[str, str]]) -> int:
    """As a server might count them."""
    return sum(len(message["content"]) // 4 for message in messages)


def completion_of(
    request: Request, text: str, completion_tokens: int, finish_reason: str = "stop"
) -> Completion:
    """An answer of some LLM, with the usage of the whole conversation."""
    prompt = tokens(request.messages)
    return Completion(text, finish_reason, prompt, 0, completion_tokens, "m", "http://one")


def writes(section_tokens: int = 100, finish_reason: str = "stop") -> Answer:
    """Writes an outline, then sections of this length, and summaries where they are asked for."""

    def answer(request: Request, number: int) -> Completion:
        asked = request.messages[-1]["content"]
        if "make an outline" in asked:
            return completion_of(request, OUTLINE, 20)
        if "summarise for yourself" in asked:
            return completion_of(request, f"Summary {number}.", 20)
        most = int(request.sampling["max_tokens"])
        return completion_of(request, prose(number), min(most, section_tokens), finish_reason)

    return answer


def drive(made: SectionsRecipe, answer: Answer, draft: Draft | None = None) -> tuple[Document, list[Request]]:
    """The document that comes of these answers, and what was asked for them."""
    steps, requests = made.steps(draft or Draft(SEED)), list[Request]()
    try:
        request = next(steps)
        while True:
            requests.append(request)
            request = steps.send(answer(request, len(requests)))
    except StopIteration as done:
        document: Document = done.value
        return document, requests


def scripted(*bad: Completion | None, then: Answer | None = None) -> Answer:
    """These answers in place of the first ones; None is as it would be."""
    good = then or writes()

    def answer(request: Request, number: int) -> Completion:
        planned = bad[number - 1] if number <= len(bad) else None
        return planned or good(request, number)

    return answer


def question(request: Request) -> str:
    """What is asked last."""
    return request.messages[-1]["content"]


def test_an_outline_then_sections_up_to_the_target() -> None:
    """As many as it takes, by the server's count; the outline's headings are what they are on, in turn."""
    document, requests = drive(recipe(**SMALL), writes())
    assert 5 == len(requests) == len(document.steps)
    assert (4, 400, 1, []) == tuple(
        document.checks[key] for key in ("sections", "tokens", "windows", "flags")
    )
    assert document.text == "\n\n".join(prose(number) for number in (2, 3, 4, 5))
    assert ["The river", "The mill", "The fire", "The years after"] == [
        question(request).partition(" on: ")[2].partition(".")[0] for request in requests[1:]
    ]
    assert [False] * 4 + [True] == ["It is the last section" in question(request) for request in requests]


def test_every_step_starts_with_all_earlier_messages() -> None:
    """Earlier messages stay as they were and answers stand verbatim, or the cached prefix would break."""
    ragged = "  \n**Outline:**\n\n1) The river \n"
    answer = scripted(None, then=writes())
    given: list[Completion] = []

    def noted(request: Request, number: int) -> Completion:
        completion = answer(request, number)
        if number == 1:
            completion = completion_of(request, ragged, 20)
        given.append(completion)
        return completion

    _, requests = drive(recipe(**SMALL), noted)
    for before, completion, after in zip(requests, given, requests[1:], strict=False):
        assert [*before.messages, {"role": "assistant", "content": completion.text}] == after.messages[:-1]
        assert ("user", before.group, before.prefixes) == (
            after.messages[-1]["role"],
            after.group,
            after.prefixes,
        )


def test_what_seeds_of_a_task_share_comes_first() -> None:
    """The system message is the same for all of them, and has a key; the group is the seed's own."""
    made = recipe(**SMALL)
    one, other = next(made.steps(Draft(SEED))), next(made.steps(Draft(OTHER)))
    assert one.messages[0] == other.messages[0]
    assert one.prefixes == other.prefixes
    assert one.group != other.group
    assert all(key.isalnum() and key.isascii() for key in (one.group, *one.prefixes))


def test_drafts_of_a_seed_share_its_beginning() -> None:
    """They go to one server, and the first brings the seed's text into its cache for the others."""
    made = recipe(**SMALL, contexts_per_seed=2)
    one, two = next(made.steps(Draft(SEED, 0))), next(made.steps(Draft(SEED, 1)))
    assert one == two
    long = replace(SEED, instruction="i" * 1000)
    counts = [
        len(next(recipe(**SMALL, contexts_per_seed=drafts).steps(Draft(seed))).prefixes)
        for seed in (SEED, long)
        for drafts in (1, 2)
    ]
    assert [1, 1, 1, 2] == counts, "what is short is not worth waiting for"


def test_the_same_answers_give_the_same_conversation() -> None:
    """A replay from the journal relies on it: nothing is drawn but from the draft."""
    first, second = (drive(recipe(**SMALL, facts="spread"), writes()) for _ in range(2))
    assert first == second


def test_the_target_is_never_passed() -> None:
    """The last section may be as long as what is missing; it ends when less than a quarter section is."""
    document, requests = drive(recipe(target_tokens=450, section_tokens=100), writes())
    assert [100, 100, 100, 100, 50] == [request.sampling["max_tokens"] for request in requests[1:]]
    assert 450 == document.checks["tokens"]
    document, requests = drive(recipe(target_tokens=420, section_tokens=100), writes())
    assert (5, 400, []) == (len(requests), document.checks["tokens"], document.checks["flags"])
    document, requests = drive(recipe(target_tokens=40, section_tokens=100), writes())
    assert (2, 40) == (len(requests), document.checks["tokens"])


def test_short_sections_are_asked_for_until_it_is_long_enough() -> None:
    """The loop ends by tokens, not by the number of sections that were planned."""
    document, requests = drive(recipe(**SMALL), writes(50))
    assert (8, 400) == (document.checks["sections"], document.checks["tokens"])
    assert ["The river", "The river", "The mill", "The mill"] == [
        question(request).partition(" on: ")[2].partition(".")[0] for request in requests[1:5]
    ]


def test_a_model_that_writes_next_to_nothing_is_not_asked_for_ever() -> None:
    """After four times the sections that were planned the document is what it is, with a flag."""
    document, _ = drive(recipe(**SMALL), writes(5))
    assert (16, ["below_target"]) == (document.checks["sections"], document.checks["flags"])


def test_a_section_that_was_cut_is_gone_on_from() -> None:
    """It is noted, the next question says so, and both make one paragraph."""
    document, requests = drive(recipe(**SMALL), writes(100, "length"))
    assert ([0, 1, 2, 3], ["truncated"]) == (document.checks["cut_sections"], document.checks["flags"])
    assert "\n\n" not in document.text
    broke_off = ["The last section broke off" in question(request) for request in requests]
    assert [False, False, True, True, True] == broke_off


def test_a_cut_end_is_rejected_where_that_is_wanted() -> None:
    """Only the last section's: it is asked for afresh, alone."""
    made = recipe(**SMALL, on_truncated="reject", tries=2)
    with pytest.raises(RejectedDraft, match=r"truncated.*step 5, the last of 2 tries"):
        drive(made, writes(100, "length"))

    def ends_well(request: Request, number: int) -> Completion:
        return writes(100, "length" if number < 6 else "stop")(request, number)

    document, requests = drive(made, ends_well)
    assert requests[4] == requests[5]
    assert (6, 5, []) == (len(requests), len(document.steps), document.checks["flags"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", RejectReason.EMPTY),
        ("## The mill\n", RejectReason.EMPTY),
        ("I'm sorry, but I can't help with that.", RejectReason.REFUSAL),
        ("The mill is old. " * 40, RejectReason.REPETITION),
        (ECHO, RejectReason.PROMPT_ECHO),
    ],
)
def test_a_bad_section_is_asked_again_alone(text: str, reason: RejectReason) -> None:
    """With the same question; what was good stays, and the bad one is in no later conversation."""
    bad = Completion(text, "stop", 10, 0, 7, "m", "http://one")
    document, requests = drive(recipe(**SMALL), scripted(None, None, bad))
    assert requests[2] == requests[3]
    assert 6 == len(requests)
    assert bad not in document.steps
    with pytest.raises(RejectedDraft) as raised:
        drive(recipe(**SMALL, tries=2), scripted(None, None, bad, bad))
    assert reason is raised.value.reason
    assert "step 3, the last of 2 tries" in raised.value.detail


def test_a_document_that_fails_as_a_whole_is_rejected() -> None:
    """It is not begun again: that would cost as much as all of it."""
    with pytest.raises(RejectedDraft, match=r"too_short.*\(the whole document\)"):
        drive(recipe({"min_words": 10_000}, **SMALL), writes())

    def by_turns(request: Request, number: int) -> Completion:
        return completion_of(request, OUTLINE if number == 1 else prose(number % 2), 100)

    with pytest.raises(RejectedDraft, match=r"repetition.*\(the whole document\)"):
        drive(recipe(**SMALL), by_turns)


def test_a_section_that_repeats_the_one_before_is_asked_again() -> None:
    """Small models fall into that, and would never get out of it."""
    document, requests = drive(
        recipe(**SMALL), scripted(None, None, Completion(prose(2), "stop", 10, 0, 7, "m", "http://one"))
    )
    assert requests[2] == requests[3]
    assert 4 == document.checks["sections"]


def test_what_was_asked_for_is_never_too_long() -> None:
    """`checks.max_words` rejects nothing that `target_tokens` asks for."""
    drive(recipe({"max_words": 1}, **SMALL), writes())


@pytest.mark.parametrize(
    "outline", ["no headings at all, only prose that goes on. " * 9, "* \n* \n", "# Ideas", OUTLINE * 3]
)
def test_a_poor_outline_will_do(outline: str) -> None:
    """Sections without a title are still sections."""
    bad = Completion(outline, "length", 10, 0, 7, "m", "http://one")
    document, _ = drive(recipe(**SMALL), scripted(bad))
    assert 4 == document.checks["sections"]


def fact_questions(requests: Sequence[Request]) -> list[int]:
    """The sections, from 0, that were asked to hold facts."""
    marks = ("holds the facts", "Some of the facts", "All facts")
    return [
        number
        for number, request in enumerate(requests[1:])
        if any(mark in question(request) for mark in marks)
    ]


def test_the_facts_stand_in_one_section_drawn_evenly() -> None:
    """Over many drafts each section has its turn; it is recorded, with its depth."""
    counts = dict.fromkeys(range(4), 0)
    for number in range(200):
        document, requests = drive(recipe(**SMALL), writes(), Draft(Seed(f"s{number}", "qa", "q?", "a", "f")))
        [section] = document.checks["fact_sections"]
        assert [section] == fact_questions(requests)
        assert document.checks["fact_depth"] == pytest.approx((section + 0.5) / 4, abs=0.01)
        counts[section] += 1
    assert min(counts.values()) > 30
    assert max(counts.values()) < 70


@given(name=st.text(), length=st.integers(1, 130), facts=st.sampled_from(["one", "spread"]))
def test_the_facts_are_always_told(name: str, length: int, facts: str) -> None:
    """Whatever the length of sections turns out to be: all of them, in rising order, before the end."""
    draft = Draft(Seed(name, "qa", "q?", "a", "f"))
    document, requests = drive(
        recipe(target_tokens=1000, section_tokens=100, facts=facts), writes(length), draft
    )
    sections = document.checks["fact_sections"]
    assert fact_questions(requests) == sections == sorted(set(sections))
    assert 1 <= len(sections) <= (1 if facts == "one" else 4)
    last = question(requests[1 + sections[-1]])
    assert "holds the facts" in last or "All facts" in last
    assert 0 <= document.checks["fact_depth"] <= 1
    assert document.checks["tokens"] <= 1000


def test_facts_that_are_spread_stand_in_several_sections() -> None:
    """Up to four, each told what the others leave to it."""
    document, requests = drive(recipe(target_tokens=1600, section_tokens=100, facts="spread"), writes())
    sections = document.checks["fact_sections"]
    assert 4 == len(sections)
    told = [question(requests[1 + section]) for section in sections]
    assert [True, True, True, False] == ["Some of the facts" in one for one in told]
    assert "All facts" in told[-1]


WINDOWED: dict[str, Any] = {
    "target_tokens": 4000,
    "section_tokens": 200,
    "summary_tokens": 50,
    "window_tokens": 1600,
}


def test_a_conversation_that_grows_too_long_begins_again() -> None:
    """It ends with a summary; the next has system, seed, outline, summary and last section."""
    document, requests = drive(recipe({"max_repetition": 1}, **WINDOWED), writes(200))
    asked = [question(request) for request in requests]
    summaries = [number for number, text in enumerate(asked) if "summarise for yourself" in text]
    assert document.checks["windows"] == len(summaries) + 1 > 2
    for number in summaries:
        ended, begun = requests[number], requests[number + 1]
        assert requests[number - 1].messages == ended.messages[: len(requests[number - 1].messages)]
        assert ended.messages[:3] == begun.messages[:3]
        assert 4 == len(begun.messages)
        assert f"Summary {number + 1}." in question(begun)
        assert requests[number - 1].messages[-1]["content"] not in question(begun)
        assert prose(number) in question(begun)
        assert "Now write section" in question(begun)
        assert (ended.group, ended.prefixes) == (begun.group, begun.prefixes)
    assert 4000 == document.checks["tokens"]
    assert 20 == document.checks["sections"] == len(requests) - 1 - len(summaries)
    for request in requests:
        assert tokens(request.messages) + request.sampling["max_tokens"] <= 1600


def test_a_window_that_holds_too_little_is_refused() -> None:
    """It would be summarised at every step; the message says what it takes."""
    with pytest.raises(ConfigError, match=r"recipe\.window_tokens = 1000 .* 4608"):
        recipe(window_tokens=1000)


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    """Blocks that it lacks are the packaged ones; `group` stands before what is the seed's own."""
    path = tmp_path / "own.j2"
    path.write_text(
        "{% block system %}{{ 's' * 1000 }}{% endblock %}"
        "{% block group %}{{ metadata.passage }}{% endblock %}"
    )
    made = recipe(template=path, **SMALL)
    seed = Seed("s", "qa", "Who?", "Ada.", "f:1", {"passage": "A long passage." * 100})
    twin = Seed("t", "qa", "When?", "1843.", "f:2", {"passage": "A long passage." * 100})
    one, other = next(made.steps(Draft(seed))), next(made.steps(Draft(twin)))
    assert "s" * 1000 == one.messages[0]["content"]
    assert one.messages[1]["content"].startswith(
        "A long passage." * 100 + "\n\nQuestion or instruction:\nWho?"
    )
    assert one.group == other.group == made.group(seed) != recipe(**SMALL).group(seed) == ""
    assert one.prefixes == other.prefixes
    assert 2 == len(one.prefixes)
    assert made.fingerprint() != recipe(**SMALL).fingerprint()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (
            "{% block outlin %}x{% endblock %}",
            "unknown block 'outlin'; this recipe has the blocks group, outline",
        ),
        ("{{ instruction }}", "no blocks; this recipe has the blocks group"),
        ("{% block section %}{{ nmber }}{% endblock %}", "nmber"),
    ],
)
def test_a_template_that_cannot_be_used(tmp_path: Path, text: str, named: str) -> None:
    """A misspelt block is named, rather than passed over."""
    path = tmp_path / "own.j2"
    path.write_text(text)
    with pytest.raises(ConfigError, match=named):
        recipe(template=path)


def test_a_task_of_its_own() -> None:
    """Its length may differ."""
    made = recipe(**SMALL, tasks={"qa": {"target_tokens": 200}})
    assert 3 == len(drive(made, writes())[1])
    assert 5 == len(drive(made, writes(), Draft(Seed("s", "other", "q?", "a", "f")))[1])


def test_the_recipe_by_its_name() -> None:
    """It says what follows its first request."""
    made = load_recipe(RecipeSection(use="sections", **SMALL), ChecksSection())
    assert isinstance(made, SectionsRecipe)
    assert "about 4 sections of at most 100 tokens" in made.outlook()
