"""Text of servers and seeds as it is shown and kept: visible, short, one line where it is a message."""

import io
import logging

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.errors import BrokenResponse, ConfigError, ServerUnavailable
from streamsyn.plain_text import (
    MAX_MESSAGE_BYTES,
    cut,
    message,
    short_repr,
    split_userinfo,
    visible,
    without_userinfo,
    without_userinfo_within,
)
from streamsyn.telemetry import configure_logs
from tests.examples import examples, in_turn

ANY_TEXT = st.text(st.characters(), max_size=80) | st.text(st.sampled_from("\x1b\r\n\t\u202e\ud800aé€😀"))


@in_turn(
    ("text", "expected"),
    [
        ("plain é 漢 😀\n\tnext\r\n", "plain é 漢 😀\n\tnext\r\n"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("a\rb", r"a\rb"),
        ("\x9b2J\x7f", r"\x9b2J\x7f"),
        ("abc\u202edef", r"abc\u202edef"),
        ("\ud800", r"\ud800"),
    ],
)
def test_control_characters_become_visible(text: str, expected: str) -> None:
    """Letters of any script, line ends and tabs stay."""
    assert expected == visible(text)


@given(text=ANY_TEXT, limit=st.integers(40, 200))
@examples(200)
def test_cut(text: str, limit: int) -> None:
    """Never longer than the limit; unchanged if it is short enough; else it says how long it was."""
    found, size = cut(text * 3, limit), len((text * 3).encode(errors="replace"))
    if size <= limit:
        assert text * 3 == found
    else:
        assert len(found.encode()) <= limit
        assert found.endswith(f"... (cut: {size:,} bytes)")


@given(text=ANY_TEXT, times=st.sampled_from([1, 1000]))
@examples(200)
def test_a_message_is_one_visible_line(text: str, times: int) -> None:
    """Of at most 2 KB."""
    found = message(text * times)
    assert len(found.encode()) <= MAX_MESSAGE_BYTES
    assert not {"\n", "\r", "\t", "\x1b"} & set(found)
    assert visible(found) == found


def test_errors_of_servers_are_messages() -> None:
    """Whatever they quote."""
    error = BrokenResponse("first\n\nsecond \x1b[2J" + "x" * 10_000_000)
    assert str(error).startswith(r"first second \x1b[2Jxxx")
    assert len(str(error)) <= MAX_MESSAGE_BYTES


def test_a_deep_value_has_a_short_repr() -> None:
    """`repr` itself fails there."""
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert len(short_repr(deep)) < 100
    assert len(short_repr({"a": "x" * 10_000, "b": list(range(10_000))})) < 300


@pytest.mark.parametrize("as_json", [False, True])
def test_nothing_in_a_log_line_controls_the_terminal(
    as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """In names and values, at any depth; long ones are cut."""
    before = structlog.get_config()
    try:
        configure_logs(as_json=as_json, level=logging.INFO)
        bad = "\x1b[2J\x9b2J\u202e"
        structlog.get_logger().warning(
            f"event{bad}", server=bad, more={bad: [bad, (bad,)]}, error="x" * 10_000_000
        )
    finally:
        structlog.configure(**before)
    err = capsys.readouterr().err
    assert 5 == err.count("x1b[2J")
    assert visible(err.replace("\x1b[0m", "")) == err
    assert len(err) < 3000


WORD = st.text(
    st.characters(codec="utf-8", exclude_characters="/?#@", exclude_categories=["Z", "C"]), min_size=1
)


@in_turn(
    ("url", "bare", "userinfo"),
    [
        ("http://host:1", "http://host:1", None),
        ("http://ada:secret@host:1/v1", "http://host:1/v1", "ada:secret"),
        ("HTTPS://ada@host", "HTTPS://host", "ada"),
        ("http://ada:a@b:c@host", "http://host", "ada:a@b:c"),
        ("http://host/path@version?at=a@b", "http://host/path@version?at=a@b", None),
        ("s3://key:secret@bucket/folder", "s3://bucket/folder", "key:secret"),
        ("ada:secret@host", "ada:secret@host", None),
        ("/a/folder@home", "/a/folder@home", None),
        ("", "", None),
    ],
)
def test_a_url(url: str, bare: str, userinfo: str | None) -> None:
    """The userinfo ends with the last `@` before the path."""
    assert (bare, userinfo) == split_userinfo(url)
    assert bare == without_userinfo(url)


@examples(200)
@given(user=WORD, password=WORD, before=st.text(), after=st.text())
def test_a_url_in_a_text(user: str, password: str, before: str, after: str) -> None:
    """Whatever the password is, a text with the URL in it is the text with the bare URL."""
    before, after = before.replace("@", ""), after.replace("@", "")
    text = f"{before} https://{user}:{password}@host/ {after}"
    assert f"{before} https://host/ {after}" == without_userinfo(text)


@in_turn(
    ("query", "shown"),
    [
        ("api_key=s3cret", "api_key=***"),
        ("api-version=2024-02-01&key=s3cret#end", "api-version=2024-02-01&key=***#end"),
        ("X-Amz-Signature=s&X-Amz-Security-Token=s3cret&X-Amz-Date=2", None),
        ("sv=2024&sig=s3cret%2F%3D&se=2", "sv=2024&sig=***&se=2"),
        ("accessToken=s3cret", "accessToken=***"),
        ("keys=5&tokens=3&empty_key=&authors=two", "keys=5&tokens=3&empty_key=&authors=two"),
        ("", ""),
    ],
)
def test_a_secret_in_a_query(query: str, shown: str | None) -> None:
    """It is hidden wherever URLs are shown and kept; other parameters and texts that are not URLs stay."""
    shown = "X-Amz-Signature=***&X-Amz-Security-Token=***&X-Amz-Date=2" if shown is None else shown

    assert f"see 'http://host/v1?{shown}' now" == without_userinfo(f"see 'http://host/v1?{query}' now")
    assert f"host/v1?{query}" == without_userinfo(f"host/v1?{query}")
    assert f"cannot open s3://bucket/x?{shown}" == str(ConfigError(f"cannot open s3://bucket/x?{query}"))


def test_a_json_value() -> None:
    """All strings in it are cut; keys and numbers stay."""
    value = {"servers": ["http://a:b@one", {"url": "http://a:b@two", "weight": 1.5}], "limit": None}
    bare = {"servers": ["http://one", {"url": "http://two", "weight": 1.5}], "limit": None}
    assert bare == without_userinfo_within(value)


@pytest.mark.parametrize("kind", [ConfigError, ServerUnavailable])
def test_an_error(kind: type[Exception]) -> None:
    """Errors have no passwords, whoever made their texts."""
    assert "cannot open s3://bucket/x" == str(kind("cannot open s3://key:secret@bucket/x"))


@pytest.mark.parametrize("as_json", [False, True])
def test_the_log(monkeypatch: pytest.MonkeyPatch, *, as_json: bool) -> None:
    """Values, lists and tracebacks are cut."""
    monkeypatch.setattr("sys.stderr", written := io.StringIO())
    try:
        configure_logs(as_json=as_json)
        try:
            raise ValueError("cannot open http://ada:secret@host")
        except ValueError:
            structlog.get_logger().exception("x", url="http://ada:secret@one", more=["http://ada:secret@two"])
    finally:
        structlog.reset_defaults()
    assert "http://one" in written.getvalue()
    assert "http://host" in written.getvalue()
    assert "secret@" not in written.getvalue()
