"""Keys and ids: the same on every machine, and no two things share one by accident."""

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
    """Not only the text counts but also where one part ends and the next begins."""
    assert (parts == other) == (digest(*parts) == digest(*other))


def test_parts_are_kept_apart() -> None:
    """("ab", "c") is not ("a", "bc")."""
    assert digest("ab", "c") != digest("a", "bc")


def test_a_draft_is_named_for_its_seed() -> None:
    """The first draft has the seed's own id, the others a number behind it."""
    assert ["s-1", "s-1#1", "s-1#2"] == [Draft(SEED, number).id for number in range(3)]


def test_drafts_of_look_alike_seeds_have_different_keys() -> None:
    """A seed whose id looks like another one's second draft is not taken for it."""
    assert draft_key("s-1", 1) != draft_key("s-1#1", 0)


def test_a_context_has_the_key_of_its_draft() -> None:
    """What the log holds leads back to the draft that it finishes."""
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
    """A stage hands on a new record; it never edits another's."""
    kinds = [kind for kind in vars(records).values() if isinstance(kind, type) and is_dataclass(kind)]

    assert kinds
    for kind in kinds:
        with pytest.raises(FrozenInstanceError):
            setattr(object.__new__(kind), fields(kind)[0].name, "edited")


def test_reasons_are_a_closed_set() -> None:
    """Readers of the log switch over the reasons: adding one is a change of the format."""
    expected = (
        "invalid_utf8 invalid_json not_a_seed line_too_long "
        "empty too_short too_long refusal truncated repetition prompt_echo qa_pasted no_pair "
        "near_duplicate contaminated low_context_gain not_answerable "
        "request_refused timeout broken_response server_unavailable internal_error"
    )

    assert expected.split() == [str(reason) for reason in RejectReason]


def test_no_two_drafts_share_an_id() -> None:
    """Not even when a seed is called as another one's second draft."""
    seeds = [Seed(name, "t", "i", "a", "f:1") for name in ("a", "a#1", "a##1", "a#", "#")]
    ids = [Draft(seed, number).id for seed in seeds for number in range(3)]

    assert ["a", "a#1", "a#2"] == ids[:3]
    assert len(ids) == len(set(ids))
