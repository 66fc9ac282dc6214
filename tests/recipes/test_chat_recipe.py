"""The recipe `chat`: request lines go to the servers as they are, and whole answers come back."""

import asyncio
from pathlib import Path
from random import Random
from typing import Any

import orjson
import pytest

from streamsyn.config.loading import load
from streamsyn.config.sections import ChecksSection, FieldsSection, FleetSection, RecipeSection
from streamsyn.errors import BrokenResponse, ConfigError, RequestRefused
from streamsyn.fleet.fleet import open_fleet
from streamsyn.fleet.transport import Reply
from streamsyn.pipeline.request import RunRequest
from streamsyn.pipeline.run import run
from streamsyn.recipes.chat_recipe import request_of
from streamsyn.recipes.recipe import RejectedDraft
from streamsyn.recipes.registry import load_recipe
from streamsyn.records import BadSeed, Completion, Draft, Seed
from streamsyn.seeds.parse import SeedParser
from streamsyn.simulator.in_process import InProcessServers
from streamsyn.simulator.settings import Fault, SimulatorConfig
from streamsyn.simulator.simulation import Simulation
from tests.builders import rows
from tests.examples import in_turn
from tests.fleet.scripted import ScriptedServers

URL = "http://one"
TOOL_ANSWER = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "call-1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
                ],
            },
            "logprobs": {"content": [{"token": "a", "logprob": -0.5, "bytes": None, "top_logprobs": []}]},
            "finish_reason": "tool_calls",
        },
        {"index": 1, "message": {"role": "assistant", "content": "two"}, "finish_reason": "stop"},
    ],
    "usage": {"prompt_tokens": 7, "completion_tokens": 9, "total_tokens": 16},
    "system_fingerprint": "kept as well",
}


def line(number: int = 0, **body: Any) -> dict[str, Any]:
    """A request line."""
    asked = {"model": "simulated", "messages": [{"role": "user", "content": f"What is {number}?"}]}
    return {
        "custom_id": f"r-{number}",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": asked | body,
    }


def parsed(row: dict[str, Any]) -> Seed | BadSeed:
    """What a row becomes with `seeds.format = "request"`."""
    entry = SeedParser(FieldsSection(), form="request").row(row, "in.jsonl:1", "in", b"raw", is_plain=True)
    assert entry is not None
    return entry


def test_a_run_keeps_requests_and_whole_answers(tmp_path: Path) -> None:
    """What was in a body reaches the server, a thought stays in its text, and a refusal is a reject."""
    lines = [
        line(0, temperature=0.25, max_tokens=40, response_format={"type": "json_object"}, stream=False),
        line(1, max_completion_tokens=5, tools=[{"type": "function", "function": {"name": "f"}}]),
        line(2, user="refuse me"),
        line(3, model="other"),
        line(4, stream=True),
    ]
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\n".join(map(orjson.dumps, lines)))
    received: dict[str, dict[str, Any]] = {}

    def script(_: int, body: dict[str, Any]) -> Fault | None:
        received[body["messages"][-1]["content"]] = body
        return Fault.REFUSE if body.get("user") == "refuse me" else None

    servers = InProcessServers({URL: Simulation(SimulatorConfig(), script)})
    settings = [
        ("seeds.sources", [{"path": str(source)}]),
        ("seeds.format", "request"),
        ("recipe.use", "chat"),
        ("assembly.write", False),
        ("fleet.servers", [URL]),
    ]
    summary = run(
        RunRequest(
            config=load(None, settings),
            out=tmp_path / "out",
            connect=servers.connect,
            runner=servers.run,
            rng=Random(0),
            show_progress=False,
            preflight=False,
        )
    )

    assert (2, 3, None) == (summary.contexts, summary.rejects, summary.stopped)
    kept = {row["id"]: row for row in rows(tmp_path / "out", "contexts")}
    for number in (0, 1):
        row, sent = kept[f"r-{number}"], received[f"What is {number}?"]
        assert lines[number]["body"] == row["metadata"]["body"]
        assert {name: one for name, one in lines[number]["body"].items() if name != "stream"} == {
            name: one for name, one in sent.items() if name != "rid"
        }
        body = row["steps"][0]["body"]
        assert body["choices"][0]["message"]["content"] == row["context"]
        assert ("chat.completion", sent["rid"]) == (body["object"], body["id"])
        assert body["usage"]["completion_tokens"] == row["completion_tokens"]
    assert "length" == kept["r-1"]["finish_reason"]
    rejects = {row["id"] or row["origin"]: row for row in rows(tmp_path / "out", "rejects")}
    assert ("request_refused", "request_refused") == tuple(rejects[name]["reason"] for name in ("r-2", "r-3"))
    assert "no server serves other; served: simulated" == rejects["r-3"]["detail"]
    assert lines[2]["body"] == rejects["r-2"]["metadata"]["body"]  # so that a retry can ask it again
    assert ("not_a_seed", "Answers of a batch are not streamed.") == tuple(
        rejects[f"{source}:5"][name] for name in ("reason", "detail")
    )


@pytest.mark.usefixtures("no_task_left")
async def test_every_kind_of_answer_is_kept() -> None:
    """Calls of tools, several choices and logprobs are answers; one that the server lost is asked again."""
    lost = {**TOOL_ANSWER, "choices": [{"message": {"content": "x"}, "finish_reason": "abort"}]}
    models = Reply(200, b'{"data":[{"id":"m"}]}')
    servers = ScriptedServers({URL: {"/v1/models": models}})
    section = FleetSection(servers=(URL,), max_attempts=1)
    async with open_fleet(section, lambda _: None, {}, servers.connect) as fleet:
        await fleet.ask_models()

        async def answer(whole: Any, **body: Any) -> Completion:
            servers.replies[URL]["/v1/chat/completions"] = Reply(200, orjson.dumps(whole))
            return await fleet.complete(request_of(line(model="m", **body)["body"]), [])

        completion = await answer(TOOL_ANSWER, tools=[])
        assert (TOOL_ANSWER, "", "tool_calls", 7, 9) == (
            completion.body,
            completion.text,
            completion.finish_reason,
            completion.prompt_tokens,
            completion.completion_tokens,
        )
        with pytest.raises(BrokenResponse, match="finish_reason 'abort'"):
            await answer(lost)
        with pytest.raises(BrokenResponse, match="invalid answer"):
            await answer({"choices": []})
        with pytest.raises(RequestRefused, match="no server serves other; served: m"):
            await fleet.complete(request_of({"messages": [{"role": "user"}], "model": "other"}), [])


@in_turn(
    ("changed", "why"),
    [
        ({"custom_id": None}, "Missing required parameter: 'custom_id'."),
        ({"custom_id": 7}, "custom_id must be a text of 1 to 512 characters, not 7."),
        ({"method": "GET"}, "method must be POST, not 'GET'."),
        ({"url": "/v1/embeddings"}, "url must be /v1/chat/completions, not '/v1/embeddings'."),
        ({"body": []}, "body must be an object, not []."),
        ({"body": {}}, "Missing required parameter: 'body.messages'."),
        ({"body": {"messages": ["hi"]}}, "body.messages must be a list of at least one message, not ['hi']."),
        ({"body": {"messages": [{}], "model": 1}}, "body.model must be the name of a model, not 1."),
        ({"body": {"messages": [{}], "seed": 2**64}}, "The body cannot be sent unchanged: it has a number"),
    ],
)
def test_a_bad_request_line_is_named(changed: dict[str, Any], why: str) -> None:
    """The detail says which field is wrong, with its value."""
    entry = parsed(line() | changed)
    assert isinstance(entry, BadSeed)
    assert entry.detail.startswith(why)


@pytest.mark.parametrize("other", [("seeds.format", "auto"), ("assembly.write", True)])
def test_the_settings_that_it_needs_are_named(tmp_path: Path, other: tuple[str, Any]) -> None:
    """Before anything is written, since every seed would be rejected, or samples be made of answers."""
    settings = [("seeds.format", "request"), ("assembly.write", False), other, ("recipe.use", "chat")]
    with pytest.raises(ConfigError, match=r'needs seeds\.format = "request" and assembly\.write = false'):
        run(RunRequest(config=load(None, [*settings, ("fleet.servers", [URL])]), out=tmp_path / "out"))


def test_a_request_is_read_in_its_own_form_alone() -> None:
    """The id is the custom_id, the instruction is the last message; `auto` does not take request lines."""
    content = [{"type": "image_url", "image_url": {"url": "data:,"}}, {"type": "text", "text": "What?"}]
    row = line(3, messages=[{"role": "user", "content": content}]) | {"id": "not this"}
    entry = parsed(row)
    assert isinstance(entry, Seed)
    assert ("r-3", "in", "What?", "") == (entry.id, entry.task, entry.instruction, entry.answer)
    assert row["body"] == entry.metadata["body"]
    other = SeedParser(FieldsSection()).row(row, "in.jsonl:1", "in", b"raw", is_plain=True)
    assert isinstance(other, BadSeed)


async def test_a_seed_without_a_request_is_rejected() -> None:
    """A pair is not a request: the reject names the setting."""
    made = await asyncio.to_thread(load_recipe, RecipeSection(use="chat"), ChecksSection())
    pair = Seed("s", "t", "What?", "That.", "pairs.jsonl:1")
    with pytest.raises(RejectedDraft, match=r'needs seeds\.format = "request"'):
        next(made.steps(Draft(pair)))
    assert "" == made.group(pair)


def messages(*contents: str) -> dict[str, Any]:
    """A body with a system message and turns."""
    roles = ["system", *["user", "assistant"] * len(contents)]
    return {
        "messages": [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    }


def test_prefix_groups() -> None:
    """Requests that share more than a system message form a group; only long prefixes are waited for."""
    long, other = "s" * 1000, "t" * 1000
    alone, turns = request_of(messages(long, "a")), request_of(messages(long, other, "b", "c"))
    same, short = request_of(messages(long, other, "b", "d")), request_of(messages("s", "a", "b", "c"))
    keyed = request_of({**messages("s", "a"), "prompt_cache_key": "k"})
    assert ("", 1) == (alone.group, len(alone.prefixes))
    assert turns.group == same.group != ""
    assert turns.prefixes == same.prefixes
    assert (alone.prefixes[0], 2) == (turns.prefixes[0], len(turns.prefixes))
    assert () == short.prefixes
    assert "" != short.group != turns.group
    assert "" != keyed.group == request_of({**messages("x", "y"), "prompt_cache_key": "k"}).group
