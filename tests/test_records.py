"""Keys and ids are the same on every machine and do not collide."""

from dataclasses import FrozenInstanceError, fields, is_dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamsyn import records
from streamsyn.records import Attempt, Context, Draft, RejectReason, Seed, digest, draft_key

SEED = Seed("s-1", "qa", "Who?", "Ada.", "seeds.jsonl:1")


def test_a_digest_is_the_same_everywhere() -> None:
    """The bytes are part of the format on disk: they must never change."""
    assert "a2f37a785d1569cdf71c2b698d13a416" == digest("Who?", b"Ada.").hex()


@settings(deadline=None)
@given(
    parts=st.lists(st.text(st.characters(codec="utf-8"))),
    other=st.lists(st.text(st.characters(codec="utf-8"))),
)
def test_digests_differ_where_parts_do(parts: list[str], other: list[str]) -> None:
    """A digest depends on the text and on where one part ends and the next begins."""
    assert (parts == other) == (digest(*parts) == digest(*other))


def test_part_boundaries_change_the_digest() -> None:
    """("ab", "c") and ("a", "bc") have different digests."""
    assert digest("ab", "c") != digest("a", "bc")


def test_draft_ids_start_with_the_seed_id() -> None:
    """The first draft has the seed's id; the others append #N."""
    assert ["s-1", "s-1#1", "s-1#2"] == [Draft(SEED, number).id for number in range(3)]


def test_drafts_of_seeds_with_similar_ids_have_different_keys() -> None:
    """A seed with the id s-1#1 is not mistaken for the second draft of the seed s-1."""
    assert draft_key("s-1", 1) != draft_key("s-1#1", 0)


def test_a_context_has_the_key_of_its_draft() -> None:
    """The key of a logged context identifies the draft that it completes."""
    context = Context(
        id="s-1#2",
        seed_id="s-1",
        draft=2,
        task="qa",
        instruction="Who?",
        answer="Ada.",
        context="Ada was there.",
        model="m",
        server="http://a",
        weight_version=None,
        finish_reason="stop",
        prompt_tokens=1,
        cached_tokens=0,
        completion_tokens=3,
        wasted_tokens=0,
        attempts=[Attempt("http://a", 0.0, 1.0)],
        steps=[],
        checks={},
        origin="seeds.jsonl:1",
        metadata={},
        written_at=0.0,
    )

    assert Draft(SEED, 2).key == context.key


def test_records_cannot_be_edited() -> None:
    """Records are frozen: a stage that changes one passes on a new record."""
    kinds = [kind for kind in vars(records).values() if isinstance(kind, type) and is_dataclass(kind)]

    assert kinds
    for kind in kinds:
        with pytest.raises(FrozenInstanceError):
            setattr(object.__new__(kind), fields(kind)[0].name, "edited")


def test_reasons_are_a_closed_set() -> None:
    """Readers of the log depend on these reasons: a new one changes the format."""
    expected = (
        "invalid_utf8 invalid_json not_a_seed line_too_long "
        "empty too_short too_long still_thinking refusal truncated repetition prompt_echo qa_pasted no_pair "
        "near_duplicate contaminated low_context_gain not_answerable "
        "request_refused timeout broken_response server_unavailable internal_error"
    )

    assert expected.split() == [str(reason) for reason in RejectReason]


def test_draft_ids_are_unique() -> None:
    """Draft ids are unique even if the id of one seed looks like a draft id of a different seed."""
    seeds = [Seed(name, "t", "i", "a", "f:1") for name in ("a", "a#1", "a##1", "a#", "#")]
    ids = [Draft(seed, number).id for seed in seeds for number in range(3)]

    assert ["a", "a#1", "a#2"] == ids[:3]
    assert len(ids) == len(set(ids))
