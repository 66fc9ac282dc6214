"""The model of a server's prefix cache."""

from hypothesis import given
from hypothesis import strategies as st

from streamsyn.fleet.prefixes import (
    BLOCK_CHARS,
    MAX_BLOCKS,
    PrefixModel,
    block_keys,
    conversation_text,
    with_answer,
)
from streamsyn.records import Request


def conversation(*texts: str) -> Request:
    """Messages by turns of user and assistant."""
    roles = ["user", "assistant"] * len(texts)
    return Request([{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)], {})


def test_a_conversation_that_goes_on_begins_with_the_one_before() -> None:
    """The text of a request with its answer is a prefix of the text of the next request."""
    first, answer = conversation("a" * 1000), "b" * 1000
    so_far = with_answer(conversation_text(first), answer)
    assert conversation_text(conversation("a" * 1000, answer, "go on")).startswith(so_far)


def test_what_was_sent_is_found_again() -> None:
    """Common prefixes are found in whole blocks, per server."""
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
def test_block_keys_can_be_continued(text: str, more: str) -> None:
    """The keys of a text start with those of its prefix, which need not be computed again."""
    assert block_keys(text + more) == block_keys(text + more, block_keys(text))
    assert len(block_keys(text)) == len(text) // BLOCK_CHARS


def test_what_was_used_last_is_forgotten_last() -> None:
    """Without room for all, the shared prefix stays and the oldest tails are evicted."""
    model = PrefixModel(pool_tokens=6 * BLOCK_CHARS // 4)
    shared = "s" * (2 * BLOCK_CHARS)
    texts = [shared + letter * (2 * BLOCK_CHARS) for letter in "abc"]
    for text in texts:
        model.add(block_keys(text))
    assert 6 == len(model)
    assert [0.5, 1.0, 1.0] == [model.cached_share(text, block_keys(text)) for text in texts]


def test_a_pool_of_any_size_is_bounded() -> None:
    """What a server reports cannot make the model grow for ever."""
    model = PrefixModel()
    model.resize(2**53)
    model.add(list(range(MAX_BLOCKS + 100)))
    assert MAX_BLOCKS == len(model)
