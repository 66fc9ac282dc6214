"""What a start of the packaged server and model is like, looked at from several sides."""

import aiohttp
import pytest

from streamsyn.fleet.wire import Features, parse_features
from tests.real.conftest import RealServer

pytestmark = [pytest.mark.real_sglang, pytest.mark.timeout(600)]


async def test_it_is_healthy_after_a_start_that_was_reported(real_server: RealServer) -> None:
    """A line of its log about once a second."""
    async with aiohttp.ClientSession(real_server.url) as session, session.get("/health") as response:
        assert 200 == response.status
    assert len(real_server.waits) > 3
    assert real_server.waits[-1][1]


async def test_its_model_is_named_after_its_directory(real_server: RealServer) -> None:
    """Not after the link through which it was given."""
    async with aiohttp.ClientSession(real_server.url) as session, session.get("/v1/models") as response:
        models = await response.json()

    assert ["SmolLM2-135M-Instruct"] == [model["id"] for model in models["data"]]


async def test_it_chats_and_reports_cached_tokens(real_server: RealServer) -> None:
    """The chat route needs the template that the installer wrote."""
    question = [{"role": "user", "content": "Name a colour."}]
    body = {"model": real_server.model, "messages": question, "max_tokens": 16, "temperature": 0}
    body |= {"return_cached_tokens_details": True}
    async with aiohttp.ClientSession(real_server.url) as session:
        for _ in range(2):
            async with session.post("/v1/chat/completions", json=body) as response:
                chat = await response.json()
        async with session.get("/server_info") as response:
            features = parse_features(await response.read())

    assert chat["choices"][0]["message"]["content"].strip()
    assert chat["usage"]["prompt_tokens"] > 5
    cached = chat["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached > 0
    assert {"device": cached, "host": 0} == chat["sglext"]["cached_tokens_details"]
    assert Features(has_details=False, ranks=1) == features
