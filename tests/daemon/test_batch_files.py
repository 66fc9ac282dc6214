"""The ends of a batch: the check of its input, and its output and error files."""

import itertools
from pathlib import Path
from typing import Any

import orjson
import pytest

from streamsyn.config.sections import SeedsSection
from streamsyn.daemon import batch_files
from streamsyn.daemon.batch_files import CANCELLED, EXPIRED, BatchOutput, InputCheck, custom_ids, submit
from streamsyn.records import Reject, RejectReason, draft_key
from streamsyn.seeds.inbox import Inbox
from tests.builders import context, opened, sink

LIMIT = 10_000


def line(number: int, **given: Any) -> dict[str, Any]:
    """A request line."""
    body = {"model": "m", "messages": [{"role": "user", "content": f"What is {number}?"}]}
    fields = {"custom_id": f"r-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
    return fields | given


def written(path: Path, *lines: bytes | dict[str, Any]) -> Path:
    """A file of lines."""
    path.write_bytes(b"\n".join(one if isinstance(one, bytes) else orjson.dumps(one) for one in lines))
    return path


def test_a_valid_input(tmp_path: Path) -> None:
    """Blank lines do not count, and a last line needs no end; its requests go into an inbox once."""
    path = written(tmp_path / "in.jsonl", line(0), b"", b"  \r", line(1), line(2))
    check = InputCheck().run(path, LIMIT)
    assert (3, "m", []) == (check.total, check.model, check.errors)
    assert ["r-0", "r-1", "r-2"] == list(custom_ids(path))
    with Inbox(tmp_path / "run", SeedsSection(format="request")) as inbox:
        submit(path, inbox)
        submit(path, inbox)  # a kill came in between
        assert 3 == inbox.accepted


@pytest.mark.parametrize(
    ("bad", "code", "param"),
    [
        (b'{"custom_id": "r', "invalid_json_line", None),
        (b"[1]", "invalid_json_line", None),
        (b"\xff", "invalid_json_line", None),
        (b"[" * 5000, "invalid_json_line", None),
        (b'{"a":' * 1900, "invalid_json_line", None),
        (orjson.dumps(line(1)).replace(b"r-1", b"\\ud800"), "invalid_type", "custom_id"),
        (line(0), "duplicate_custom_id", "custom_id"),
        (line(1, url="/v1/embeddings"), "url_mismatch", "url"),
        (line(1, method="GET"), "invalid_method", "method"),
        (line(1, body={"model": "m"}), "missing_required_parameter", "body.messages"),
        (line(1, body={"messages": [{}]}), "missing_required_parameter", "body.model"),
        (line(1, body={"messages": [{}], "model": "other"}), "model_mismatch", "body.model"),
        (orjson.dumps(line(1)).replace(b"What is 1?", b"\\ud800"), "invalid_value", "body"),
        (
            orjson.dumps(line(1)).replace(b'"m"', b'"m", "seed": 99999999999999999999'),
            "invalid_value",
            "body",
        ),
        (b"x" * (LIMIT + 1), "line_too_long", None),
    ],
)
def test_each_bad_line_is_named(
    tmp_path: Path, bad: bytes | dict[str, Any], code: str, param: str | None
) -> None:
    """By its number, with a code and the field, as OpenAI's batches have them."""
    check = InputCheck().run(written(tmp_path / "in.jsonl", line(0), bad, line(7)), LIMIT)
    (error,) = check.errors
    assert (code, 2, param) == (error["code"], error["line"], error["param"])
    assert error["message"]


def test_an_input_without_requests_or_with_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is a batch. Of many errors the first are listed."""
    path = tmp_path / "in.jsonl"
    assert "empty_file" == InputCheck().run(written(path, b"\n\n"), LIMIT).errors[0]["code"]
    assert 100 == len(InputCheck().run(written(path, *[b"{}"] * 200), LIMIT).errors)
    monkeypatch.setattr(batch_files, "MAX_REQUESTS", 2)
    assert "too_many_tasks" == InputCheck().run(written(path, *map(line, range(5))), LIMIT).errors[0]["code"]


def answered(number: int) -> Any:
    """The context of request `number`."""
    body = {"id": f"chat-{number}", "choices": [{"message": {"content": f"It is {number}."}}]}
    return context(number, seed_id=f"r-{number}", steps=[{"body": body}])


def refused(number: int) -> Reject:
    """The reject of request `number`."""
    seed_id = f"r-{number}"
    key, reason = draft_key(seed_id, 0), RejectReason.REQUEST_REFUSED
    return Reject(key=key, reason=reason, detail="too long", origin="o", id=seed_id, seed_id=seed_id, draft=0)


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a file."""
    return [orjson.loads(one) for one in path.read_bytes().splitlines()]


def paths(folder: Path) -> tuple[Path, Path]:
    """An output file and an error file, which exist."""
    both = folder / "output", folder / "errors"
    for path in both:
        path.touch()
    return both


def reopened(root: Path, both: tuple[Path, Path]) -> BatchOutput:
    """The files of a run directory, taken up again."""
    output = BatchOutput(root)
    output.open_output(both[0])
    output.open_errors(both[1])
    return output


def test_outcomes_are_lines_in_openais_form(tmp_path: Path) -> None:
    """An answer is whole; a failure is in both files, and no field of it looks like an answer."""
    both = paths(tmp_path)
    with opened(tmp_path / "run", sink()) as log:
        log.contexts.append([answered(0)])
        log.rejects.append([refused(1)])
        output = reopened(tmp_path / "run", both)
        output.catch_up(1, 1)
        output.close()
    answer, failure = lines_of(both[0])
    assert {
        "custom_id": "r-0",
        "response": {
            "status_code": 200,
            "request_id": "chat-0",
            "body": {"id": "chat-0", "choices": [{"message": {"content": "It is 0."}}]},
        },
        "error": None,
    }.items() <= answer.items()
    assert answer["id"].startswith("batch_req_")
    assert "r-1" == failure["custom_id"]
    assert {"code": "request_refused", "message": "too long"} == failure["error"]
    assert 400 == failure["response"]["status_code"]
    assert "too long" == failure["response"]["body"]["error"]["message"]
    assert [failure] == lines_of(both[1])


def test_files_grow_and_are_continued_from_any_cut(tmp_path: Path) -> None:
    """After a kill each outcome is there once, wherever each file was cut; what is behind the rows waits."""
    both = paths(tmp_path)
    with opened(tmp_path / "run", sink()) as log:
        log.contexts.append([answered(n) for n in range(6)])
        log.rejects.append([refused(n) for n in range(6, 9)])
        output = reopened(tmp_path / "run", both)
        output.catch_up(2, 1)
        assert (2, 1) == (output.answers, output.failures)
        assert {"contexts": 6, "rejects": 3} == output.rows_in_log()
        output.close()
        whole = both[0].read_bytes()
        for cut, cut_errors in itertools.product((0, 1, len(whole) // 2, len(whole) - 1, len(whole)), (0, 7)):
            both[0].write_bytes(whole[:cut])
            both[1].write_bytes(whole[:cut_errors])
            output = reopened(tmp_path / "run", both)
            output.catch_up(6, 3)
            assert (6, 3) == (output.answers, output.failures)
            assert (output.output_bytes, output.error_bytes) == tuple(path.stat().st_size for path in both)
            output.close()
            assert {f"r-{n}" for n in range(9)} == {one["custom_id"] for one in lines_of(both[0])}
            assert 9 == len(lines_of(both[0]))
            assert ["r-6", "r-7", "r-8"] == [one["custom_id"] for one in lines_of(both[1])]


@pytest.mark.parametrize("code", [CANCELLED, EXPIRED])
def test_requests_that_were_not_sent_are_errors(tmp_path: Path, code: str) -> None:
    """They are in the error file alone, behind the failures, and once, even if a kill came in between."""
    both, source = paths(tmp_path), written(tmp_path / "in.jsonl", *map(line, range(5)))
    with opened(tmp_path / "run", sink()) as log:
        log.contexts.append([answered(3)])
        log.rejects.append([refused(1)])
        for _ in range(2):
            output = reopened(tmp_path / "run", both)
            output.catch_up(1, 1)
            output.add_never_sent(source, code)
            output.close()
    assert ["r-3", "r-1"] == [one["custom_id"] for one in lines_of(both[0])]
    failed, *unsent = lines_of(both[1])
    assert "r-1" == failed["custom_id"]
    assert ["r-0", "r-2", "r-4"] == [one["custom_id"] for one in unsent]
    assert {(None, code)} == {(one["response"], one["error"]["code"]) for one in unsent}
