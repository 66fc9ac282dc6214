"""POST /generate (srt/managers/io_struct.py, tokenizer_manager.py, api/v1/api_types.py)."""

from typing import Any, Final

from streamsyn.simulator import protocol
from streamsyn.simulator.completion_request import (
    ABORTED_WAITING,
    Answer,
    CompletionRequest,
    Malformed,
    Refused,
    whole_number,
)
from streamsyn.simulator.texts import (
    CHARACTERS_PER_TOKEN,
    NEW_WORD_LOSS,
    Tokenizer,
    count_tokens,
    token_ids,
    token_losses,
)
from streamsyn.simulator.weights import Weights

DEFAULT_MAX_TOKENS: Final = 128
SAMPLING_FIELDS: Final = (
    "max_new_tokens", "stop", "stop_token_ids", "stop_regex", "temperature", "top_p", "top_k", "min_p",
    "frequency_penalty", "presence_penalty", "repetition_penalty", "min_new_tokens", "n", "json_schema",
    "regex", "ebnf", "structural_tag", "ignore_eos", "skip_special_tokens", "spaces_between_special_tokens",
    "no_stop_trim", "stream_interval", "logit_bias", "sampling_seed", "custom_params", "beam_width",
    "watermark", "choice",
)  # fmt: skip


class UnknownField(Refused):
    """Raised for an unknown sampling parameter; SGLang's error for it is a plain string."""


class Native:
    """Parses the bodies of the native route, and formats its answers.

    Args:
        tokenizer: Decodes token ids.
        weights: The server's weights.
    """

    def __init__(self, tokenizer: Tokenizer, weights: Weights) -> None:
        self._tokenizer = tokenizer
        self._weights = weights

    def parse(self, body: dict[str, Any], rid: str) -> CompletionRequest:
        """Return the request in `body`; `rid` is used if it has none."""
        sampling = body.get("sampling_params") or {}
        if not isinstance(sampling, dict):
            raise Refused("The simulator takes one prompt a request: sampling_params must be an object.")
        for name in sampling:
            if name not in SAMPLING_FIELDS:
                listed = ", ".join(f"`{field}`" for field in SAMPLING_FIELDS)
                raise UnknownField(f"unknown field `{name}`, expected one of {listed}")
        given = _prompt(body)
        ids = given if isinstance(given, list) else None
        # Decoded if possible, so that it shares its prefix with prompts that come as text.
        prompt = given if ids is None else self._tokenizer.decode(ids) or ids
        limit = whole_number(sampling, "max_new_tokens")
        named = body.get("rid")
        return CompletionRequest(
            rid=named if isinstance(named, str) else rid,
            model="",
            prompt=prompt,
            question=prompt if isinstance(prompt, str) else "",
            # An explicit null means no limit, absence means 128 tokens.
            max_tokens=limit if "max_new_tokens" in sampling else DEFAULT_MAX_TOKENS,
            ignore_eos=sampling.get("ignore_eos") is True,
            stream=body.get("stream") is True,
            ids=ids,
            rank=whole_number(body, "routed_dp_rank"),
            logprob_start=_logprob_start(body, given) if body.get("return_logprob") is True else None,
        )

    def refusal(self, message: str) -> protocol.Reply:
        """Return a refusal with 400."""
        return protocol.reply({"error": {"message": message}}, 400)

    def whole(self, request: CompletionRequest, answer: Answer) -> dict[str, Any]:
        """Return text, output ids and `meta_info`."""
        if answer.finish is ABORTED_WAITING:  # shorter, as in `TokenizerManager._handle_abort_req`
            waited: dict[str, Any] = {"id": request.rid, "finish_reason": answer.finish}
            waited |= {
                "weight_version": answer.weight_version,
                "e2e_latency": answer.seconds,
                "completion_tokens": 0,
            }
            return {"text": "", "output_ids": [], "meta_info": waited}
        meta = _meta(request, answer.finish, answer.prompt_tokens, answer.weight_version)
        meta |= {
            "reasoning_tokens": 0,
            "completion_tokens": answer.completion_tokens,
            "cached_tokens": answer.cached_tokens,
            "cached_tokens_details": {"device": answer.cached_tokens, "host": 0}
            if answer.cached_tokens
            else None,
        }
        ids = token_ids(answer.text)
        if request.logprob_start is not None:
            meta["input_token_logprobs"] = _input_logprobs(request, request.logprob_start)
            meta["output_token_logprobs"] = [[-0.5, token, None] for token in ids]
            meta["output_token_logprobs_length"] = len(ids)
        meta["weight_versions"] = answer.weights
        meta["e2e_latency"] = answer.seconds
        return {"text": answer.text, "output_ids": ids, "meta_info": meta}

    def piece(self, request: CompletionRequest, so_far: str, piece: str) -> bytes:
        """Return an event with the whole text so far, as without --incremental-streaming-output."""
        if not piece:
            return b""
        text = so_far + piece
        meta = _meta(request, None, count_tokens(request.prompt), self._weights.version)
        meta |= {"reasoning_tokens": 0, "completion_tokens": count_tokens(text), "cached_tokens": 0}
        return protocol.event({"text": text, "output_ids": token_ids(text), "meta_info": meta})

    def last(self, request: CompletionRequest, answer: Answer) -> bytes:
        """Return the whole answer with its finish reason."""
        return protocol.event(self.whole(request, answer))


def _prompt(body: dict[str, Any]) -> str | list[int]:
    text, ids = body.get("text"), body.get("input_ids")
    if (text is None) == (ids is None):
        raise Refused("Exactly one of text and input_ids must be given.")
    if isinstance(text, str):
        return text
    if isinstance(ids, list) and all(isinstance(token, int) for token in ids):
        return ids
    if isinstance(text, list) or isinstance(ids, list):
        raise Refused("The simulator takes one prompt a request.")
    raise Malformed("text: Input should be a valid string")


def _logprob_start(body: dict[str, Any], prompt: str | list[int]) -> int:
    tokens = count_tokens(prompt)
    start = whole_number(body, "logprob_start_len")
    if start is None or start == -1:
        return tokens
    if not 0 <= start <= tokens:
        raise Refused(
            f"req.logprob_start_len={start} is higher than the number of input tokens "
            f"len(req.origin_input_ids)={tokens}. Please use a smaller logprob_start_len."
        )
    return start


def _meta(
    request: CompletionRequest, finish: dict[str, Any] | None, prompt_tokens: int, version: str
) -> dict[str, Any]:
    return {
        "id": request.rid,
        "finish_reason": finish,
        "prompt_tokens": prompt_tokens,
        "weight_version": version,
        "num_retractions": 0,
    }


def _input_logprobs(request: CompletionRequest, start: int) -> list[list[float | int | None]]:
    """Return one row per token from `start` on; the first has no logprob.

    Tokens of words that occurred before are likelier. Ids that cannot be decoded count as new words.
    """
    ids = token_ids(request.prompt if request.ids is None else request.ids, start)
    if not ids:
        return []
    means = [NEW_WORD_LOSS] * len(ids)
    if isinstance(request.prompt, str):
        at = (start + 1) * CHARACTERS_PER_TOKEN
        means = token_losses(request.prompt[:at], request.prompt[at:])
    rows: list[list[float | int | None]] = [[None, ids[0], None]]
    for mean, token in zip(means, ids[1:], strict=False):
        rows.append([-mean * (0.5 + token % 1024 / 1024), token, None])
    return rows
