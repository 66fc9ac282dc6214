"""The recipe `chat`: each seed is a request, sent as it is; the whole answer of the server is kept.

No prompt is rendered and no check of texts applies: the requests are a user's own, of any kind.
"""

from typing import Any

from streamsyn.config.sections import ChecksSection, RecipeSection
from streamsyn.recipes.prompt import MIN_PREFIX_CHARS
from streamsyn.recipes.recipe import RejectedDraft, Steps
from streamsyn.records import Document, Draft, RejectReason, Request, Seed, digest
from streamsyn.seeds.request_lines import BadRequestLine, check_body, texts_of

_NOT_SENT = frozenset({"stream", "stream_options", "rid"})
"""Fields of the transport: an answer is not streamed, and each try has a rid of its own."""


class ChatRecipe:
    """Sends the `body` in a seed's metadata, once. What the server writes is the context, whatever it is.

    Args:
        recipe: Not used: a request holds its own sampling parameters.
        checks: Not used.
    """

    takes_documents = False

    def __init__(self, recipe: RecipeSection, checks: ChecksSection) -> None:
        """Configure nothing."""

    def steps(self, draft: Draft) -> Steps:
        """Ask for one answer.

        Raises:
            RejectedDraft: The seed holds no request.
        """
        body = draft.seed.metadata.get("body")
        body = body if isinstance(body, dict) else {}
        try:
            check_body(body)
        except BadRequestLine as error:
            advice = 'recipe.use = "chat" needs seeds.format = "request"'
            raise RejectedDraft(RejectReason.NOT_A_SEED, f"{error} {advice}") from None
        completion = yield request_of(body)
        flags = ["truncated"] if completion.finish_reason == "length" else []
        return Document(completion.text, {"flags": flags}, [completion])

    def group(self, seed: Seed) -> str:
        """Return the key of what a request shares with others: see `request_of`."""
        body = seed.metadata.get("body")
        return _group(body, texts_of(body["messages"])) if isinstance(body, dict) else ""

    def outlook(self) -> str:
        """Return "": one request is all."""
        return ""

    def fingerprint(self) -> dict[str, str]:
        """Return {}: the seeds hold all that is asked."""
        return {}


def request_of(body: dict[str, Any]) -> Request:
    """Return the request with a body.

    Requests with the same `prompt_cache_key`, or the same messages but for the last, form a prefix group. A
    system message alone does not: as a rule it is the same in all requests, so each server gets it.
    """
    texts = texts_of(body["messages"])
    parameters = {name: value for name, value in body.items() if name not in _NOT_SENT}
    sampling = {name: value for name, value in parameters.items() if name not in {"messages", "model"}}
    return Request(
        texts,
        sampling,
        _group(body, texts),
        _prefixes(texts),
        model=body.get("model") or "",
        body=parameters,
    )


def _group(body: dict[str, Any], texts: list[dict[str, str]]) -> str:
    if isinstance(key := body.get("prompt_cache_key"), str) and key:
        return digest("prompt_cache_key", key).hex()
    shared = texts[:-1]
    return _key(shared) if len(shared) > len(_system(texts)) else ""


def _prefixes(texts: list[dict[str, str]]) -> tuple[str, ...]:
    """Keys of the system messages and of all messages but the last, where it pays to wait for them."""
    heads = (_system(texts), texts[:-1])
    sizes = [sum(len(one["content"]) for one in head) for head in heads]
    keys = (_key(heads[0]),) if sizes[0] >= MIN_PREFIX_CHARS else ()
    return (*keys, _key(heads[1])) if sizes[1] - sizes[0] >= MIN_PREFIX_CHARS else keys


def _system(texts: list[dict[str, str]]) -> list[dict[str, str]]:
    """The system messages at the beginning, but never the last message."""
    end = next((n for n, one in enumerate(texts) if one["role"] not in {"system", "developer"}), len(texts))
    return texts[: min(end, len(texts) - 1)]


def _key(texts: list[dict[str, str]]) -> str:
    return digest(*(part for one in texts for part in (one["role"], one["content"]))).hex()
