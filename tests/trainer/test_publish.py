"""Weights for the servers: written whole, kept while somebody reads them, loaded beside the training."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from structlog.testing import capture_logs
from transformers import AutoModelForCausalLM

from streamsyn.config.command_sections import PublishSection
from streamsyn.config.sections import FleetSection
from streamsyn.errors import ConfigError
from streamsyn.simulator.app import RunningSimulator, running
from streamsyn.simulator.settings import SimulatorConfig
from streamsyn.trainer.model.placed import Placed
from streamsyn.trainer.model.pretrained import merged
from streamsyn.trainer.saving import publish as servers_module
from streamsyn.trainer.saving.publish import Publisher, Servers
from tests.trainer import tiny
from tests.trainer.by_hand import fresh, placed_model, section


def folders(tmp_path: Path, *steps: int) -> list[Path]:
    """Directories that look like models."""
    made = [tmp_path / f"step_{step}" for step in steps]
    for folder in made:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    return made


@asynccontextmanager
async def publishing(*there: RunningSimulator, **keys: Any) -> AsyncIterator[Servers]:
    """The servers to update; the simulators run in this thread, the updates in a different one."""
    urls = tuple(keys.pop("more", ())) + tuple(one.url for one in there)
    opened = Servers(PublishSection(servers=urls, **keys), FleetSection(connect_timeout_s=1), {})
    await asyncio.to_thread(opened.__enter__)
    try:
        yield opened
    finally:
        await asyncio.to_thread(opened.__exit__)


async def loading(server: RunningSimulator) -> None:
    """Wait until the server has been asked to load; the simulator has no event for it."""
    async with asyncio.timeout(5):
        while not server.simulation.stats.by_route["/update_weights_from_disk"]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def finished(servers: Servers, offered: Path | None = None) -> list[dict[str, Any]]:
    """The log lines until the last offer is loaded."""
    with capture_logs() as logs:
        if offered is not None:
            servers.offer(offered)
        async with asyncio.timeout(20):
            await asyncio.to_thread(servers.finish)
    return [dict(line) for line in logs if line["event"].startswith("train.")]


async def test_all_servers_load_what_is_offered(tmp_path: Path) -> None:
    """Each is paused, loads the weights under their name, and works again."""
    (folder,) = await asyncio.to_thread(folders, tmp_path, 1)
    async with running(SimulatorConfig()) as one, running(SimulatorConfig()) as other:
        async with publishing(one, other) as servers:
            logged = await finished(servers, folder)
        weights = [server.simulation.weights for server in (one, other)]

    assert ["train.published"] * 2 == [line["event"] for line in logged]
    assert [(str(folder), folder.name, None)] * 2 == [(w.path, w.version, w.mode) for w in weights]


async def test_a_newer_offer_replaces_the_one_that_waits(tmp_path: Path) -> None:
    """Never two updates at once on a server, and never more than one that waits."""
    made = await asyncio.to_thread(folders, tmp_path, 1, 2, 3)
    async with running(SimulatorConfig(load_s=1.5)) as server, publishing(server) as servers:
        servers.offer(made[0])
        await loading(server)
        servers.offer(made[1])
        servers.offer(made[2])
        async with asyncio.timeout(5):
            while servers.in_use != {made[0], made[2]}:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        logged = await finished(servers)

    assert [made[0].name, made[2].name] == [line["version"] for line in logged]
    assert made[2].name == server.simulation.weights.version
    assert set() == servers.in_use


async def test_a_server_that_does_not_load_holds_up_nobody(tmp_path: Path) -> None:
    """Dead, slow or with a different key: one line each; the others have the weights, and all of them serve
    again.
    """
    (folder,) = await asyncio.to_thread(folders, tmp_path, 1)
    async with (
        running(SimulatorConfig()) as good,
        running(SimulatorConfig(load_s=60)) as slow,
        running(SimulatorConfig(api_key="secret")) as locked,
        publishing(good, slow, locked, more=["http://127.0.0.1:9"], timeout_s=2) as servers,
    ):
        logged = await finished(servers, folder)
        modes = {server.simulation.weights.mode for server in (good, slow, locked)}

    assert {None} == modes
    events = {line["server"]: line["event"] for line in logged if line["event"] != "train.still_paused"}
    assert {
        good.url: "train.published",
        slow.url: "train.not_published",
        locked.url: "train.not_published",
        "http://127.0.0.1:9": "train.not_published",
    } == events


async def test_a_server_that_was_left_paused_is_resumed(tmp_path: Path) -> None:
    """Paused by a training that was killed; and by weights that it refuses."""
    async with running(SimulatorConfig()) as server:
        server.simulation.weights.pause("retract")
        async with publishing(server) as servers:
            logged = await finished(servers, tmp_path / "nothing")
        weights = server.simulation.weights

    assert ["train.not_published"] == [line["event"] for line in logged]
    assert "is not a model directory" in logged[0]["error"]
    assert (None, "default") == (weights.mode, weights.version)


async def test_a_stop_limits_the_time_of_an_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that is stopped does not wait for a server, nor leave it paused."""
    made = await asyncio.to_thread(folders, tmp_path, 1, 2)
    monkeypatch.setattr(servers_module, "HURRY_S", 0.1)
    async with running(SimulatorConfig(load_s=60)) as server, publishing(server) as servers:
        servers.offer(made[0])
        await loading(server)
        servers.offer(made[1])
        began = time.monotonic()
        servers.hurry()
        logged = await finished(servers)

    assert time.monotonic() - began < 5
    assert [made[0].name] == [line["version"] for line in logged]
    assert server.simulation.weights.mode is None


def test_an_invalid_url_is_refused() -> None:
    """Before anything is trained."""
    with pytest.raises(ConfigError, match=r"train\.publish\.servers: localhost:30000 is not a valid URL"):
        Servers(PublishSection(servers=("localhost:30000",)), FleetSection(), {})


async def test_the_key_is_the_fleets(tmp_path: Path) -> None:
    """From the variable that the server's table names, or the default one."""
    (folder,) = await asyncio.to_thread(folders, tmp_path, 1)
    async with running(SimulatorConfig(api_key="one")) as one, running(SimulatorConfig(api_key="two")) as two:
        fleet = FleetSection.model_validate({"servers": [{"url": f"{one.url}/v1", "key_env": "ONE"}]})
        keys = {"ONE": "one", "STREAMSYN_API_KEY": "two"}
        opened = Servers(PublishSection(servers=(one.url, two.url)), fleet, keys)
        servers = await asyncio.to_thread(opened.__enter__)
        await finished(servers, folder)

    assert [folder.name] * 2 == [server.simulation.weights.version for server in (one, two)]


@contextmanager
def a_model(tmp_path: Path, dtype: torch.dtype = torch.float32, **keys: Any) -> Iterator[Placed]:
    """A tiny model, placed for training."""
    tiny.write_model(tmp_path / "base", dtype)
    with fresh():
        yield placed_model(tmp_path / "base", section(**keys))


def test_weights_are_written_whole_and_the_newest_stay(tmp_path: Path) -> None:
    """In the model's precision, named by step; LATEST names the last; old ones are removed."""
    root = tmp_path / "weights"
    with a_model(tmp_path, torch.bfloat16) as placed:
        publisher = Publisher(tmp_path, PublishSection(), FleetSection(), tiny.tokenizer(), 0)
        (root / "step_1.tmp").mkdir(parents=True)  # as a kill leaves it
        for step in (1, 2, 3):
            publisher.publish(placed, step)
    tensors = load_file(root / "step_3/model.safetensors")

    assert ["LATEST", "step_2", "step_3"] == sorted(path.name for path in root.iterdir())
    assert {torch.bfloat16} == {one.dtype for one in tensors.values()}
    assert "step_3\n" == (root / "LATEST").read_text()
    assert AutoModelForCausalLM.from_pretrained(root / "step_3").dtype == torch.bfloat16


def test_weights_of_an_abandoned_course_are_removed(tmp_path: Path) -> None:
    """A training that was killed and resumed from before them writes its own, which stay, however few."""
    root = tmp_path / "weights"
    with a_model(tmp_path) as placed:
        for step in (280, 290, 210):
            publisher = Publisher(tmp_path, PublishSection(), FleetSection(), tiny.tokenizer(), 0)
            publisher.publish(placed, step)

    assert ["LATEST", "step_210"] == sorted(path.name for path in root.iterdir())
    assert "step_210\n" == (root / "LATEST").read_text()


async def test_weights_that_are_being_loaded_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the ones waiting to be loaded, however many newer ones there are."""
    monkeypatch.setattr(servers_module, "HURRY_S", 0.1)
    async with running(SimulatorConfig(load_s=60)) as server:
        publishing = PublishSection(keep=1, servers=(server.url,))

        def published() -> list[str]:
            with a_model(tmp_path) as placed:
                publisher = Publisher(tmp_path, publishing, FleetSection(), tiny.tokenizer(), 0)
                with publisher.servers as servers:
                    publisher.publish(placed, 1)
                    while not server.simulation.stats.by_route["/update_weights_from_disk"]:
                        time.sleep(0.01)
                    for step in (2, 3, 4):
                        publisher.publish(placed, step)
                        while not any(path.name == f"step_{step}" for path in servers.in_use):
                            time.sleep(0.001)
            return sorted(path.name for path in (tmp_path / "weights").glob("step_*"))

        async with asyncio.timeout(20):
            found = await asyncio.to_thread(published)

    assert ["step_1", "step_3", "step_4"] == found


def test_weights_that_cannot_be_written_end_nothing(tmp_path: Path) -> None:
    """One line, and no server is updated."""
    (tmp_path / "weights").write_text("in the way")
    with a_model(tmp_path) as placed, capture_logs() as logs:
        publisher = Publisher(tmp_path, PublishSection(), FleetSection(), tiny.tokenizer(), 0)
        publisher.publish(placed, 1)

    assert ["train.not_published"] == [line["event"] for line in logs]


def test_adapters_are_merged_beside_a_model_that_trains_on(tmp_path: Path) -> None:
    """The file computes what the model computes, as with peft's own merging; the model keeps its adapters,
    and they keep learning.
    """
    ids = torch.arange(40)[None]

    def logits(model: Any) -> torch.Tensor:
        model.set_attn_implementation("sdpa")
        found: torch.Tensor = model(input_ids=ids, use_cache=False).logits.detach()
        return found

    with a_model(tmp_path, lora={"rank": 4}) as placed:
        with torch.no_grad():
            for name, parameter in placed.plain.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
        placed.plain.eval()
        names = [name for name, _ in placed.plain.named_parameters()]
        before = logits(placed.plain.get_base_model())
        Publisher(tmp_path, PublishSection(), FleetSection(), tiny.tokenizer(), 0).publish(placed, 1)

        written = AutoModelForCausalLM.from_pretrained(tmp_path / "weights/step_1", dtype=torch.float32)
        assert names == [name for name, _ in placed.plain.named_parameters()]
        assert torch.equal(before, logits(placed.plain.get_base_model()))
        _, whole = merged(placed, placed.accelerator.get_state_dict(placed.model))
        by_peft = placed.plain.merge_and_unload()

    assert (logits(written.eval()) - before).abs().max() < 1e-3
    assert (
        tiny.furthest(
            {name: one.detach() for name, one in by_peft.named_parameters()},
            {name: whole[name].detach() for name, _ in by_peft.named_parameters()},
        )
        < 1e-6
    )
