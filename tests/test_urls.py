"""Userinfo is cut from URLs, wherever they stand, and from nothing else."""

import io

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.errors import ConfigError, ServerUnavailable
from streamsyn.telemetry import configure_logs
from streamsyn.urls import split_userinfo, without_userinfo, without_userinfo_within
from tests.examples import examples

WORD = st.text(
    st.characters(codec="utf-8", exclude_characters="/?#@", exclude_categories=["Z", "C"]), min_size=1
)


@pytest.mark.parametrize(
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
