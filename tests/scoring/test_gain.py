"""Context gain: what a context adds to the likelihood of the gold answer."""

import asyncio
from statistics import mean

import pytest

from streamsyn.errors import ServerError
from streamsyn.records import Request
from streamsyn.scoring.measures import Gain, Question, ScoringClient, SingleFlight
from streamsyn.simulator.settings import Fault
from tests.scoring.conftest import HELPS, PROMPT, QUESTION, UNRELATED, fleet_at


async def test_gain_is_the_difference_of_mean_nlls() -> None:
    """The NLL without the context minus that with it, in nats per token, from the server's logprobs."""
    async with fleet_at() as (fleet, _):
        nlls = []
        for context in ("", HELPS):
            request = Request(PROMPT.messages(QUESTION, context), {}, scored=QUESTION.answer)
            scored = await fleet.complete(request, [])
            nlls.append(-mean(scored.logprobs))
        found = await Gain(PROMPT, 256).measure(ScoringClient(fleet, fleet.models[0]), QUESTION, HELPS)

    assert nlls[0] - nlls[1] == pytest.approx(found["context_gain"], abs=1e-4)
    assert (nlls[1], nlls[0]) == pytest.approx((found["nll_with"], found["nll_without"]), abs=1e-4)
    assert -(-len(QUESTION.answer) // 4) == found["scored_tokens"]


async def test_a_context_that_holds_the_answer_gains_more() -> None:
    """A context with the answer against a context without it."""
    async with fleet_at() as (fleet, _):
        gain, client = Gain(PROMPT, 256), ScoringClient(fleet, fleet.models[0])
        helps = await gain.measure(client, QUESTION, HELPS)
        unrelated = await gain.measure(client, QUESTION, UNRELATED)

    assert helps["context_gain"] > 0.5
    assert unrelated["context_gain"] < 0.2


async def test_only_the_first_tokens_of_a_long_answer_count() -> None:
    """`scoring.answer_tokens` bounds what is scored."""
    question = Question("What is it?", "word " * 400, "govreport")
    async with fleet_at() as (fleet, _):
        found = await Gain(PROMPT, 16).measure(ScoringClient(fleet, fleet.models[0]), question, HELPS)

    assert 16 == found["scored_tokens"]


async def test_the_answer_without_context_is_scored_once_per_question() -> None:
    """Eight concurrent drafts of one seed: eight requests with a context, one without."""
    async with fleet_at() as (fleet, server):
        gain = Gain(PROMPT, 256)
        clients = [ScoringClient(fleet, fleet.models[0]) for _ in range(8)]
        async with asyncio.TaskGroup() as group:
            for number, client in enumerate(clients):
                group.create_task(gain.measure(client, QUESTION, f"{number}. {HELPS}"))
        other = Question(QUESTION.instruction, "Nobody.", QUESTION.task)
        await gain.measure(clients[0], other, HELPS)

        assert 9 + 2 == server.simulation.stats.by_route["/generate"]
        assert sum(client.prompt_tokens for client in clients) == server.simulation.stats.prompt_tokens


async def test_a_failure_only_reaches_its_caller() -> None:
    """A waiting caller computes again after a failure or a cancellation."""
    flights: SingleFlight[int] = SingleFlight(max_results=2)
    begun, turns = asyncio.Event(), iter(["hang", "fail", "good"])
    asked: list[str] = []

    async def work() -> int:
        asked.append(turn := next(turns))
        if turn == "hang":
            begun.set()
            await asyncio.Event().wait()
        if turn == "fail":
            raise ServerError("no answer")
        return 7

    async with asyncio.timeout(5):
        first = asyncio.create_task(flights.get(b"k", work))
        await begun.wait()
        waiting = [asyncio.create_task(flights.get(b"k", work)) for _ in range(3)]
        await asyncio.sleep(0)
        first.cancel()
        results = await asyncio.gather(first, *waiting, return_exceptions=True)

    assert ["hang", "fail", "good"] == asked
    assert isinstance(results[0], asyncio.CancelledError)
    assert 1 == sum(isinstance(result, ServerError) for result in results)
    assert [7, 7] == [result for result in results if isinstance(result, int)]
    assert 7 == await flights.get(b"k", work)


async def test_the_cache_is_bounded() -> None:
    """The least recently used results are computed again."""
    flights: SingleFlight[int] = SingleFlight(max_results=2)
    worked: list[int] = []

    async def get(number: int) -> int:
        async def work() -> int:
            worked.append(number)
            return number

        return await flights.get(b"%d" % number, work)

    for number in (1, 2, 1, 3, 1, 2):
        assert number == await get(number)

    assert [1, 2, 3, 2] == worked


async def test_the_context_is_a_prefix_that_all_requests_about_it_share() -> None:
    """A second request about a context finds it in the server's cache."""
    long = HELPS * 20
    [given], [bare] = PROMPT.messages(QUESTION, long), PROMPT.messages(QUESTION)
    assert given["content"] == f"{long}\n\n{bare['content']}"

    async with fleet_at() as (fleet, _):
        gain, client = Gain(PROMPT, 256), ScoringClient(fleet, fleet.models[0])
        await gain.likelihood(client, QUESTION, long)
        assert 0 == client.cached_tokens
        await gain.likelihood(client, QUESTION, long)

    assert client.cached_tokens > 0.4 * client.prompt_tokens


async def test_retries_are_counted_apart() -> None:
    """Failed attempts of scoring are not those of writing."""
    async with fleet_at([Fault.HTTP_500]) as (fleet, _):
        client = ScoringClient(fleet, fleet.models[0])
        await Gain(PROMPT, 256).measure(client, QUESTION, HELPS)

    assert 1 == client.retries
