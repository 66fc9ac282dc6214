"""The recipe `context`: what it asks, and what it makes of the answers. No server is needed for that."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from streamsyn.config.sections import ChecksSection, RecipeSection
from streamsyn.errors import ConfigError
from streamsyn.fleet.thinking import cleaned
from streamsyn.recipes.context import ContextRecipe
from streamsyn.recipes.recipe import RejectedDraft
from streamsyn.recipes.registry import load_recipe
from streamsyn.records import Completion, Document, Draft, RejectReason, Request, Seed
from tests.examples import in_turn

SEED = Seed("s-1", "qa", "When did the mill of Aldersby burn down?", "In 1847.", "seeds.jsonl:1")
OTHER = Seed("s-2", "qa", "Who rowed to Fairholm?", "Nobody rowed there.", "seeds.jsonl:2")
PROSE = " ".join(f"The {number}th year saw the river rise by {number * 7} feet." for number in range(1, 21))


def recipe(checks: dict[str, Any] | None = None, **fields: Any) -> ContextRecipe:
    """A recipe under a configuration with `fields` changed."""
    return ContextRecipe(RecipeSection(**fields), ChecksSection(**checks or {}))


def completion_of(text: str, finish_reason: str = "stop") -> Completion:
    """An answer of some LLM."""
    return cleaned(Completion(text, finish_reason, 10, 0, 5, "m", "http://one"))


def drive(made: ContextRecipe, *answers: Completion, seed: Seed = SEED) -> tuple[Document, list[Request]]:
    """The document that comes of these answers, and what was asked for them."""
    steps = made.steps(Draft(seed))
    requests = [next(steps), *(steps.send(answer) for answer in answers[:-1])]
    with pytest.raises(StopIteration) as done:
        steps.send(answers[-1])
    document: Document = done.value.value
    return document, requests


def rejected(made: ContextRecipe, *answers: Completion, seed: Seed = SEED) -> RejectedDraft:
    """How a draft with these answers ends."""
    steps = made.steps(Draft(seed))
    next(steps)
    for answer in answers[:-1]:
        steps.send(answer)
    with pytest.raises(RejectedDraft) as raised:
        steps.send(answers[-1])
    return raised.value


def write(folder: Path, text: str) -> Path:
    """A template file."""
    path = folder / "own.j2"
    path.write_text(text)
    return path


def messages(made: ContextRecipe, seed: Seed = SEED) -> dict[str, str]:
    """What is asked first, by role."""
    return {message["role"]: message["content"] for message in made.request(Draft(seed)).messages}


def test_a_good_answer_is_the_document() -> None:
    """Its text, what was measured of it, and the completion that it came from."""
    answer = completion_of(f"Context: {PROSE}")
    document, requests = drive(recipe(), answer)
    repeated = document.checks["repetition"]
    checks = {"words": len(PROSE.split()), "repetition": repeated, "flags": []}
    assert Document(PROSE, checks, [answer]) == document
    assert 1 == len(requests)


def test_the_prompt_holds_the_pair_and_the_length() -> None:
    """Instruction and answer stand in the user message; the length in words in both."""
    asked = messages(recipe(target_words=1234))
    assert ["system", "user"] == list(asked)
    assert SEED.instruction in asked["user"]
    assert SEED.answer in asked["user"]
    assert ["1234" in text for text in asked.values()] == [True, True]


def test_what_seeds_of_a_task_share_comes_first() -> None:
    """The system message is the same for all of them: that is what a server's prefix cache holds."""
    made = recipe()
    one, other = messages(made), messages(made, OTHER)
    assert one["system"] == other["system"]
    assert one["user"] != other["user"]


def test_drafts_of_a_seed_are_asked_alike() -> None:
    """They differ by sampling alone, so they share the seed's whole prefix."""
    made = recipe()
    assert made.request(Draft(SEED, 0)) == made.request(Draft(SEED, 3))


def test_the_sampling_parameters() -> None:
    """Temperature and length have keys of their own; all others are passed through."""
    made = recipe(temperature=0.5, max_tokens=77, sampling={"top_p": 0.9, "min_p": 0.1})
    expected = {"temperature": 0.5, "max_tokens": 77, "top_p": 0.9, "min_p": 0.1}
    assert expected == made.request(Draft(SEED)).sampling


def test_a_task_of_its_own(tmp_path: Path) -> None:
    """Length and template may differ for one task; what is left out is as for all."""
    path = write(tmp_path, "Write {{ target_words }} words on {{ instruction }} {{ answer }}")
    made = recipe(target_words=500, tasks={"qa": {"target_words": 50}, "summary": {"template": path}})
    assert ["50" in text for text in messages(made).values()] == [True, True]
    summary = Seed("s", "summary", "Sum up.", "All is well.", "f:1")
    assert {"user": "Write 500 words on Sum up. All is well."} == messages(made, summary)
    assert "500" in messages(made, Seed("s", "other", "i", "a", "f:1"))["user"]


def test_a_template_with_blocks(tmp_path: Path) -> None:
    """The blocks `system` and `user` become the two messages."""
    path = write(
        tmp_path,
        "{% block system %}You write.{% endblock %}\n{% block user %}{{ task }}: {{ answer }}{% endblock %}",
    )
    assert {"system": "You write.", "user": f"qa: {SEED.answer}"} == messages(recipe(template=path))


def test_a_template_without_blocks(tmp_path: Path) -> None:
    """The whole file is the user message; braces in a seed are no template."""
    path = write(tmp_path, "{{ answer }} / {{ metadata.get('year', '?') }}")
    seed = Seed("s", "qa", "i", "{{ 7 * 7 }}", "f:1", {"year": 1847})
    assert {"user": "{{ 7 * 7 }} / 1847"} == messages(recipe(template=path), seed)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("one\n{% block user %}\n{{ instruction }}", "own.j2:"),
        ("one\n{{ instruction", "own.j2:2"),
        ("{% if %}", "own.j2:1"),
        ("{{ instrction }}", "instrction.*answer, instruction, metadata, target_words, task"),
        ("{{ target_words / 0 }}", "own.j2"),
        ("{% include 'other' %}", "own.j2"),
    ],
)
def test_a_template_that_cannot_be_used(tmp_path: Path, text: str, named: str) -> None:
    """It is refused before anything is asked, by file and line, or with the variables that there are."""
    with pytest.raises(ConfigError, match=named):
        recipe(template=write(tmp_path, text))


def test_a_template_that_is_not_there(tmp_path: Path) -> None:
    """The message names it."""
    with pytest.raises(ConfigError, match=r"no\.j2"):
        recipe(template=tmp_path / "no.j2")
    with pytest.raises(ConfigError, match=r"no\.j2"):
        recipe(tasks={"qa": {"template": tmp_path / "no.j2"}})


@in_turn(
    ("text", "reason"),
    [
        ("", RejectReason.EMPTY),
        ("```\n\n```", RejectReason.EMPTY),
        ("<think>They want a mill. " + PROSE, RejectReason.EMPTY),
        ("A mill burned.", RejectReason.TOO_SHORT),
        ("I'm sorry, but I can't help with that.", RejectReason.REFUSAL),
        (f"Question: {SEED.instruction}\nAnswer: {SEED.answer}\n{PROSE}", RejectReason.QA_PASTED),
        ("The mill is old. " * 40, RejectReason.REPETITION),
        (f"{PROSE}\nNow write the document, about 2000 words.", None),
    ],
)
def test_each_bad_answer_has_its_reason(text: str, reason: RejectReason | None) -> None:
    """The last failure names the reject, and says of how many tries it is."""
    made = recipe(tries=1)
    if reason is None:
        drive(made, completion_of(text))
        return
    rejection = rejected(made, completion_of(text))
    assert reason is rejection.reason
    assert rejection.detail.endswith("(the last of 1 tries)")


@pytest.mark.parametrize(
    ("thinking", "advice"),
    [
        ("auto", r"at recipe\.max_tokens = 5: raise it, or turn its reasoning off"),
        ("on", r"at recipe\.max_tokens \+ recipe\.thinking_tokens = 5: raise recipe\.thinking_tokens"),
    ],
)
def test_a_model_that_was_still_thinking_is_not_asked_again(thinking: str, advice: str) -> None:
    """The detail names the key that limits it."""
    rejection = rejected(recipe(tries=3, thinking=thinking), completion_of("<think>They want", "length"))

    assert RejectReason.STILL_THINKING is rejection.reason
    assert re.search(advice, rejection.detail)


def test_a_continued_answer_keeps_its_thought_in_front() -> None:
    """The prompt may end with the mark that opens it. The document is without it."""
    first = completion_of(f"plan\n</think>\n\n{PROSE}", "length")
    document, requests = drive(recipe(on_truncated="continue"), first, completion_of(" More."))

    assert {"role": "assistant", "content": f"plan\n</think>\n\n{PROSE}"} == requests[1].messages[-1]
    assert f"{PROSE} More." == document.text


def test_a_continuation_that_is_only_a_thought_is_left_out() -> None:
    """What was written is kept, and is flagged as cut."""
    answers = completion_of(PROSE, "length"), completion_of("<think>Hm", "length")
    document, _ = drive(recipe(on_truncated="continue"), *answers)

    assert (PROSE, ["truncated"]) == (document.text, document.checks["flags"])


def test_an_answer_that_repeats_our_prompt(tmp_path: Path) -> None:
    """Lines of our own, from the packaged prompt or the user's; not those of the seed."""
    echo = messages(recipe())["system"].splitlines()[3]
    assert (
        RejectReason.PROMPT_ECHO is rejected(recipe(tries=1), completion_of(f"{PROSE} {echo.upper()}")).reason
    )
    own = "Please be so good as to write the document which has been lost to us."
    made = recipe(template=write(tmp_path, f"{own}\n{{{{ answer }}}}"), tries=1)
    assert RejectReason.PROMPT_ECHO is rejected(made, completion_of(f"{PROSE}\n{own}")).reason


def test_a_failed_check_is_asked_afresh() -> None:
    """With the same question, up to `recipe.tries` times; the good answer alone is kept."""
    good = completion_of(PROSE)
    document, requests = drive(recipe(tries=3), completion_of(""), completion_of("Short."), good)
    assert [good] == document.steps
    assert 3 == len(requests)
    assert requests[0] == requests[1] == requests[2]


def test_tries_come_to_an_end() -> None:
    """The last of them names the reject."""
    rejection = rejected(
        recipe(tries=3),
        completion_of(""),
        completion_of("Short."),
        completion_of("I cannot help you with this."),
    )
    assert RejectReason.REFUSAL is rejection.reason
    assert rejection.detail.endswith("(the last of 3 tries)")


def test_a_cut_answer_is_kept_with_a_flag() -> None:
    """By default: a long document without its end is still one."""
    document, requests = drive(recipe(), completion_of(PROSE, "length"))
    assert ["truncated"] == document.checks["flags"]
    assert 1 == len(requests)


def test_a_cut_answer_is_rejected() -> None:
    """Where that is wanted: asked afresh, and `truncated` in the end."""
    made = recipe(on_truncated="reject", tries=2)
    document, _ = drive(made, completion_of(PROSE, "length"), completion_of(PROSE))
    assert [] == document.checks["flags"]
    rejection = rejected(made, completion_of(PROSE, "length"), completion_of(PROSE, "length"))
    assert (RejectReason.TRUNCATED, True) == (rejection.reason, "cut at 5 tokens" in rejection.detail)


def test_a_cut_answer_is_continued() -> None:
    """What has been written stands as the assistant's message, which the server is told to go on with."""
    made = recipe(on_truncated="continue")
    half = len(PROSE) // 2
    parts = [
        completion_of(PROSE[:half], "length"),
        completion_of(PROSE[half:-9], "length"),
        completion_of(PROSE[-9:]),
    ]
    document, requests = drive(made, *parts)
    assert (PROSE, parts, []) == (document.text, document.steps, document.checks["flags"])
    assert [2, 3, 3] == [len(request.messages) for request in requests]
    assert requests[0].messages == requests[2].messages[:2]
    assert {"role": "assistant", "content": PROSE[:-9]} == requests[2].messages[-1]
    assert [None, True, True] == [request.sampling.get("continue_final_message") for request in requests]


def test_continuations_are_bounded() -> None:
    """After `recipe.max_continuations` it is kept as it is, with its flag."""
    made = recipe({"max_repetition": 1}, on_truncated="continue", max_continuations=2)
    document, requests = drive(made, *[completion_of(f"{PROSE} ", "length")] * 3)
    assert ["truncated"] == document.checks["flags"]
    assert 3 == len(requests)


def test_the_prompt_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    """Another prompt makes other outputs; the same one, wherever it lies, the same."""
    own = recipe(template=write(tmp_path, "{{ answer }}")).fingerprint()
    assert recipe().fingerprint() == recipe().fingerprint() != own


def test_a_recipe_by_its_name() -> None:
    """One that there is not is refused with the nearest."""
    assert isinstance(load_recipe(RecipeSection(), ChecksSection()), ContextRecipe)
    with pytest.raises(ConfigError, match=r"recipe\.use.*'contxt'.*'context'"):
        load_recipe(RecipeSection(use="contxt"), ChecksSection())


def test_a_template_may_use_any_metadata(tmp_path: Path) -> None:
    """What other fields seeds have is not known when a template is loaded."""
    template = tmp_path / "mine.j2"
    template.write_text("{% block user %}{{ metadata.title }}: {{ instruction }} {{ answer }}{% endblock %}")
    recipe = ContextRecipe(RecipeSection(template=template), ChecksSection())
    seed = Seed("id", "task", "Who?", "Me", "x:1", {"title": "Rivers"})

    assert "Rivers: Who? Me" == recipe.request(Draft(seed)).messages[0]["content"]


def test_a_template_with_blocks_but_no_user_block_is_refused(tmp_path: Path) -> None:
    """A misspelt block is named, rather than the whole file sent."""
    template = tmp_path / "mine.j2"
    template.write_text("{% block usr %}{{ instruction }}{% endblock %}")

    with pytest.raises(ConfigError, match="block `user` is missing; its blocks are usr"):
        ContextRecipe(RecipeSection(template=template), ChecksSection())


@pytest.mark.parametrize(
    "text", ["Write about {{ task }}.", "{% block user %}{{ instruction }}{% endblock %}"]
)
def test_a_template_without_the_answer_is_refused(text: str, tmp_path: Path) -> None:
    """Contexts from which the answer does not follow would be worthless, and nothing would show it."""
    template = tmp_path / "mine.j2"
    template.write_text(text)

    with pytest.raises(ConfigError, match=r"mine.j2: it never mentions \{\{ answer \}\}"):
        ContextRecipe(RecipeSection(template=template), ChecksSection())


def test_the_keys_of_a_request() -> None:
    """One seed, one draft: what it shares with others is the system message alone."""
    made = recipe()
    request, other = made.request(Draft(SEED)), made.request(Draft(OTHER))
    assert ("", 1) == (request.group, len(request.prefixes))
    assert request.prefixes == other.prefixes
    assert all(key.isalnum() and key.isascii() for key in request.prefixes)
    assert "" == made.group(SEED) == made.outlook()


def test_drafts_of_a_seed_go_to_one_server() -> None:
    """And so does an answer that is to be continued; the first draft of a long seed is waited for."""
    made = recipe(contexts_per_seed=2)
    request, other = made.request(Draft(SEED, 1)), made.request(Draft(OTHER, 1))
    assert request.group != other.group
    assert request.prefixes == other.prefixes
    long, longer = replace(SEED, instruction="i" * 1000), replace(OTHER, instruction="i" * 1001)
    request, other = made.request(Draft(long, 1)), made.request(Draft(longer, 1))
    assert request.prefixes[0] == other.prefixes[0]
    assert request.prefixes[1] != other.prefixes[1]
    assert request.group == recipe(on_truncated="continue").request(Draft(SEED)).group


def test_a_text_that_several_seeds_share(tmp_path: Path) -> None:
    """The block `group` stands between the system message and what is the seed's own."""
    path = write(
        tmp_path,
        "{% block user %}{{ instruction }} {{ answer }}{% endblock %}"
        "{% block system %}{{ 's' * 1000 }}{% endblock %}"
        "{% block group %}{{ metadata.passage }}{% endblock %}",
    )
    made = recipe(template=path)
    one, another = "One passage." * 100, "Another one." * 100
    passages = (one, one, another, "")
    seeds = [Seed(f"s{n}", "qa", f"i {n}", "a", "f", {"passage": text}) for n, text in enumerate(passages)]
    requests = [made.request(Draft(seed)) for seed in seeds]
    assert [f"{one}\n\ni 0 a", f"{one}\n\ni 1 a", f"{another}\n\ni 2 a", "i 3 a"] == [
        request.messages[1]["content"] for request in requests
    ]
    assert [request.group for request in requests] == [made.group(seed) for seed in seeds]
    assert requests[0].group == requests[1].group != requests[2].group
    assert ("", 1) == (requests[3].group, len(requests[3].prefixes))
    assert requests[0].prefixes == requests[1].prefixes == (requests[3].prefixes[0], requests[0].group)
    assert "" == made.group(SEED)  # it has no passage: the worker that gets it will tell
