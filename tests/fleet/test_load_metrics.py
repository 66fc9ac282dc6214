"""Load metrics in the form of SGLang 0.5.23."""

import orjson
import pytest

from streamsyn.errors import BrokenResponse
from streamsyn.fleet.wire import Load, parse_load
from tests.examples import in_turn

RANK = {
    "timestamp": 12.5,
    "dp_rank": 0,
    "num_running_reqs": 30,
    "num_waiting_reqs": 4,
    "num_waiting_uncached_tokens": 900,
    "max_total_num_tokens": 32768,
    "max_running_requests": 32,
    "token_usage": 0.61,
    "gen_throughput": 99.5,
    "queues": {"waiting": 4, "grammar": 0, "paused": 0, "retracted": 2, "prealloc_ready": 0},
}


def body(*ranks: dict[str, object]) -> bytes:
    """An answer."""
    return orjson.dumps({"timestamp": "2026-01-01T00:00:00", "version": "0.5.23", "loads": ranks})


def test_one_rank() -> None:
    """Each value is the server's."""
    assert Load(30, 4, 900, 0.61, 32768, 32, 99.5, 2, (12.5,)) == parse_load(body(RANK))


def test_several_ranks_add_up() -> None:
    """Ranks are added up, except the pool's usage: the fullest rank retracts."""
    load = parse_load(body(RANK, {**RANK, "dp_rank": 1, "token_usage": 0.9, "timestamp": 13.0}))
    assert (60, 8, 0.9, 65536, (12.5, 13.0)) == (
        load.running,
        load.waiting,
        load.token_usage,
        load.pool_tokens,
        load.taken_at,
    )


def test_a_short_form_is_enough() -> None:
    """Only running and waiting are required."""
    load = parse_load(body({"num_running_reqs": 1, "num_waiting_reqs": 0}))
    assert Load(1, 0) == load


@in_turn("text", [b"", b"[]", b"{}", b'{"loads": []}', b'{"loads": [{}]}', b'{"loads": [3]}', b"<html>"])
def test_what_is_no_reading(text: bytes) -> None:
    """Any other body raises BrokenResponse."""
    with pytest.raises(BrokenResponse, match="/v1/loads"):
        parse_load(text)


@in_turn("value", ["1e308", "-1", "NaN", "Infinity", "1e999", "9" * 400, '"5"', "true", "[1]"])
@in_turn("name", sorted(RANK.keys() - {"dp_rank", "queues"}))
def test_a_figure_that_no_server_can_have(name: str, value: str) -> None:
    """Steering by it would fail, or would be wrong for ever."""
    text = body({**RANK, name: "VALUE"}).replace(b'"VALUE"', value.encode())
    with pytest.raises(BrokenResponse, match="/v1/loads"):
        parse_load(text)
