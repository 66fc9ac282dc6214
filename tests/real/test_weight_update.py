"""Trained weights go to a real SGLang while it writes. Runs last: the server keeps the new weights."""

import asyncio
from pathlib import Path

import pytest
import torch

from streamsyn.config.command_sections import PublishSection, TrainSection
from streamsyn.config.sections import FleetSection
from streamsyn.fleet.fleet import open_fleet
from streamsyn.fleet.launch import find_packaged_model
from streamsyn.records import Request
from streamsyn.scoring.suites.needle_suite import needle_questions
from streamsyn.trainer.evaluation.eval_servers import EvalServers, ServerEvaluation
from streamsyn.trainer.evaluation.exam import Chat
from streamsyn.trainer.examples import Example
from streamsyn.trainer.model.loss import make_batch, token_losses
from streamsyn.trainer.model.placed import Placed
from streamsyn.trainer.model.pretrained import read_tokenizer
from streamsyn.trainer.saving.publish import Publisher
from tests.real.conftest import RealServer
from tests.trainer import tiny
from tests.trainer.by_hand import fresh, placed_model, section

pytestmark = [pytest.mark.real_sglang, pytest.mark.timeout(600)]

IN_FLIGHT = 4
TOKENS = 100  # several times as long as publishing takes
LONG = "Write a long text about rivers, their fish and their bridges. " * 8


def request(tokens: int, text: str = LONG, group: str = "") -> Request:
    """A greedy answer of so many tokens."""
    sampling = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return Request(messages=[{"role": "user", "content": text}], sampling=sampling, group=group)


def trained(model: Path) -> Placed:
    """The model after a real step, and a large one."""
    with fresh():
        placed = placed_model(model, section(learning_rate=0.001))
    example: Example = tiny.example(40, 20)
    batch = make_batch((example,), [1 / 20], torch.device("cpu"))
    losses = token_losses(placed.model(**batch.forward_arguments()).logits, batch.labels)
    placed.accelerator.backward((losses * batch.weights).sum())
    placed.optimizer.step()
    return placed


async def test_trained_weights_reach_a_server_that_writes(real_server: RealServer, tmp_path: Path) -> None:
    """Requests in flight are answered, begun by the old weights and ended by the new; what comes later is
    written by the new ones alone, on an empty prefix cache; the server is still known by its name.
    """
    model = await asyncio.to_thread(find_packaged_model)
    placed = await asyncio.to_thread(trained, model)
    tokenizer = await asyncio.to_thread(read_tokenizer, str(model))
    publishing = PublishSection(servers=(real_server.url,))
    fleet_section = FleetSection(servers=(real_server.url,), concurrency=IN_FLIGHT, load_interval_s=0.1)

    def publish() -> None:
        publisher = Publisher(tmp_path, publishing, FleetSection(), tokenizer, 0)
        with publisher.servers as servers:
            publisher.publish(placed, 1)
            servers.finish()

    async with open_fleet(fleet_section, lambda _: None) as fleet, asyncio.TaskGroup() as group:
        await fleet.ask_models()
        before = await fleet.complete(request(8), [])
        again = await fleet.complete(request(8), [])
        asking = [
            group.create_task(fleet.complete(request(TOKENS, f"{n}: {LONG}"), [])) for n in range(IN_FLIGHT)
        ]
        (there,) = fleet.servers
        while not (there.load and there.load.running == IN_FLIGHT):  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.05)
        await asyncio.to_thread(publish)
        after = await fleet.complete(request(8), [])
        streamed = await fleet.complete(request(8, group="g"), [])
    async with open_fleet(fleet_section, lambda _: None) as fleet:
        await fleet.ask_models()
        models = fleet.models

    version = "step_1"
    assert ["default"] * 2 == [before.weight_version, again.weight_version]
    assert again.cached_tokens > 100
    assert before.text == again.text
    assert {f"default+{version}"} == {task.result().weight_version for task in asking}
    assert {TOKENS} == {task.result().completion_tokens for task in asking}
    assert [version] * 2 == [after.weight_version, streamed.weight_version]
    assert after.cached_tokens < before.prompt_tokens // 2
    assert after.text != before.text
    assert ["SmolLM2-135M-Instruct"] == models


async def test_a_real_server_is_asked_about_published_weights(
    real_server: RealServer, tmp_path: Path
) -> None:
    """It loads them beside the training, and its answers are written by them."""
    model = await asyncio.to_thread(find_packaged_model)
    placed = await asyncio.to_thread(trained, model)
    tokenizer = await asyncio.to_thread(read_tokenizer, str(model))
    needles = {"lengths": [512], "kinds": ["single", "multi_key"], "samples": 1}
    keys = {"eval_servers": [real_server.url], "publish": {}, "needles": needles}
    settings = TrainSection.model_validate(keys)
    assert settings.needles is not None
    asked = settings.needles

    def publish() -> list[ServerEvaluation]:
        questions = list(needle_questions(asked, 0, Chat(tokenizer)))
        publisher = Publisher(tmp_path, PublishSection(), FleetSection(), tokenizer, 0)
        with EvalServers(settings, FleetSection(), questions, tmp_path) as servers:
            publisher.receivers.append(servers)
            publisher.publish(placed, 2)
            servers.finish()
            return servers.results()

    (result,) = await asyncio.to_thread(publish)

    assert (2, "step_2") == (result.step, result.found["version"])
    assert (1, 2, 2) == tuple(result.found[name] for name in ("servers", "questions", "answered"))
    assert {"needle_single_512", "needle_multi_key_512", "needles"} <= result.found.keys()
