"""The model of a server's prefix cache: what was sent there, as long as there is room for it."""

from hypothesis import given
from hypothesis import strategies as st

from streamsyn.fleet.prefixes import BLOCK_CHARS, PrefixModel, block_keys, conversation_text, with_answer
from streamsyn.records import Request


def conversation(*texts: str) -> Request:
    """Messages by turns of user and assistant."""
    roles = ["user", "assistant"] * len(texts)
    return Request([{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)], {})


def test_a_conversation_that_goes_on_begins_with_the_one_before() -> None:
    """A request, the answer to it, and the next request: one text is the beginning of the next."""
    first, answer = conversation("a" * 1000), "b" * 1000
    so_far = with_answer(conversation_text(first), answer)
    assert conversation_text(conversation("a" * 1000, answer, "go on")).startswith(so_far)


def test_what_was_sent_is_found_again() -> None:
    """In whole blocks, as far as the beginnings are the same; what another server was sent is not."""
    model, other = PrefixModel(), PrefixModel()
    first = "x" * (4 * BLOCK_CHARS)
    model.add(block_keys(first))
    longer = first + "y" * (4 * BLOCK_CHARS)
    assert 0.5 == model.cached_share(longer, block_keys(longer))
    assert 0.0 == other.cached_share(longer, block_keys(longer))
    different = "z" + longer[1:]
    assert 0.0 == model.cached_share(different, block_keys(different))
    model.clear()
    assert 0.0 == model.cached_share(longer, block_keys(longer))


@given(st.text(max_size=3000), st.text(max_size=3000))
def test_a_chain_can_be_taken_up_where_it_ended(text: str, more: str) -> None:
    """The keys of a longer text begin with those of the shorter one, and need no second computing."""
    assert block_keys(text + more) == block_keys(text + more, block_keys(text))
    assert len(block_keys(text)) == len(text) // BLOCK_CHARS


def test_what_was_used_last_is_forgotten_last() -> None:
    """With no room for all, the shared beginning stays and the oldest own parts go, from their ends."""
    model = PrefixModel(pool_tokens=6 * BLOCK_CHARS // 4)
    shared = "s" * (2 * BLOCK_CHARS)
    texts = [shared + letter * (2 * BLOCK_CHARS) for letter in "abc"]
    for text in texts:
        model.add(block_keys(text))
    assert 6 == len(model)
    assert [0.5, 1.0, 1.0] == [model.cached_share(text, block_keys(text)) for text in texts]
