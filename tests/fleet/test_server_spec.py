"""Servers in the configuration, and their keys in the environment."""

from base64 import b64decode

import pytest

from streamsyn.config.sections import FleetSection, ServerSection
from streamsyn.errors import ConfigError
from streamsyn.fleet.server_spec import ServerSpec, headers_of, server_specs
from streamsyn.fleet.transport import route
from tests.examples import in_turn


def section(*servers: str | dict[str, object], **given: object) -> FleetSection:
    return FleetSection.model_validate({"servers": servers, **given})


def test_urls_as_people_write_them() -> None:
    """A trailing slash, a trailing /v1 and duplicates give one server."""
    found = server_specs(section("http://one:1/", "http://one:1/v1", "http://one:1", "https://two:2/x/v1//"))

    assert [ServerSpec("http://one:1"), ServerSpec("https://two:2/x")] == found


def test_a_base_url_with_a_version_of_its_own() -> None:
    """It gets no /v1 in its routes; one that is given stays."""
    for url in ("http://one:1/api/paas/v4", "http://one:1/v1beta/openai", "http://one:1/x/v2/v1"):
        for more in ("", "/", "/chat/completions", "/models/"):
            assert [ServerSpec(url)] == server_specs(section(url + more))
        assert "/chat/completions" == route(url, "/v1/chat/completions")
    for url in ("http://one:1", "http://one:1/openai", "http://v4", "http://one:1/v4-large"):
        assert "/v1/chat/completions" == route(url, "/v1/chat/completions")


def test_a_host_called_v1() -> None:
    """Only a path loses its /v1."""
    assert [ServerSpec("http://v1")] == server_specs(section("http://v1/"))
    assert [ServerSpec("http://models")] == server_specs(section("http://models"))


@in_turn(
    "url",
    [
        "/v1/chat/completions",
        "/v1/chat/completions/",
        "/v1/completions",
        "/v1/models",
        "/chat/completions",
        "//",
        "/v1//",
        "/#top",
        "/v1#a?b",
    ],
)
def test_the_path_of_a_route_is_left_out(url: str) -> None:
    """People copy the URL of an example."""
    assert [ServerSpec("http://one:1")] == server_specs(section(f"http://one:1{url}"))
    assert [ServerSpec("http://one:1/x")] == server_specs(section(f"http://one:1/x{url}"))


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/chat/completions"])
def test_a_query_is_kept_apart(path: str) -> None:
    """It goes along with each request, and is not part of the name."""
    found = server_specs(section(f"http://one:1{path}?api-version=1&x=/v1#top"))
    assert [ServerSpec("http://one:1", query="api-version=1&x=/v1")] == found


def test_tables_have_weight_and_key() -> None:
    """A table has weight and key; the first entry of a URL counts."""
    found = server_specs(section({"url": "http://one:1/", "weight": 2, "key_env": "ONE_KEY"}, "http://one:1"))

    assert [ServerSpec("http://one:1", 2.0, "ONE_KEY")] == found


@pytest.mark.parametrize("given", [{"servers_file": "servers.txt"}, {"servers_dns": "http://sglang:30000"}])
def test_servers_may_be_found_elsewhere(given: dict[str, object]) -> None:
    """With a file or a name, `fleet.servers` may be empty."""
    assert [] == server_specs(section(**given))


def test_no_server_at_all() -> None:
    """The message says what to do."""
    with pytest.raises(
        ConfigError, match=r"no server: pass --server URL, set fleet\.servers, or use --launch"
    ):
        server_specs(FleetSection())


NO_URLS = [
    "one:30000",
    "http://",
    "http://one two",
    "http://:80",
    "http://h:99999",
    "http://[::",
    "http://a..b:1",
    "http://" + 64 * "a",
    "ftp://one",
]


@in_turn("url", NO_URLS)
def test_invalid_urls(url: str) -> None:
    """The message names the key and the entry."""
    with pytest.raises(ConfigError) as raised:
        server_specs(section("http://one:1", url))
    assert f"fleet.servers: {url} is not a valid URL; it must start with http:// or https://" == str(
        raised.value
    )
    with pytest.raises(ConfigError) as raised:
        server_specs(FleetSection(servers=(ServerSection(url=url),)))
    assert str(raised.value).startswith(f"fleet.servers: {url} is not a valid URL")
    with pytest.raises(ConfigError) as raised:
        server_specs(section("http://one:1", servers_dns=url))
    assert str(raised.value).startswith(f"fleet.servers_dns: {url} is not a valid URL")


def test_a_message_is_one_line() -> None:
    """A message has no line breaks, even if the entry has."""
    with pytest.raises(ConfigError, match=r"fleet.servers: 'http://one\\n:1' is not a valid URL"):
        server_specs(section("http://one\n:1"))


@pytest.mark.parametrize(
    "url", ["http://[::1]:30000", "http://host.", "http://my_service:1/a/b", "http://ü:1"]
)
def test_valid_urls(url: str) -> None:
    """Valid URLs are unchanged."""
    assert [url] == [spec.url for spec in server_specs(section(url))]


SPEC = ServerSpec("http://one:1")
NAMED = ServerSpec("http://one:1", key_env="ONE_KEY")


@pytest.mark.parametrize(
    ("spec", "environ", "key"),
    [
        (SPEC, {}, None),
        (SPEC, {"STREAMSYN_API_KEY": ""}, None),
        (SPEC, {"STREAMSYN_API_KEY": "all"}, "all"),
        (NAMED, {"STREAMSYN_API_KEY": "all", "ONE_KEY": "one"}, "one"),
    ],
)
def test_keys(spec: ServerSpec, environ: dict[str, str], key: str | None) -> None:
    """A server has its own key, else the default one, else none."""
    assert headers_of(spec, environ) == ({} if key is None else {"Authorization": f"Bearer {key}"})


@pytest.mark.parametrize("environ", [{"STREAMSYN_API_KEY": "all"}, {"ONE_KEY": ""}])
def test_a_named_key_that_is_not_set(environ: dict[str, str]) -> None:
    """No other key is sent instead; the message names the server and the variable."""
    with pytest.raises(ConfigError, match=r"key_env of http://one:1: .* ONE_KEY is not set"):
        headers_of(NAMED, environ)


@pytest.mark.parametrize(("spec", "name"), [(SPEC, "STREAMSYN_API_KEY"), (NAMED, "ONE_KEY")])
def test_a_key_that_no_header_can_hold(spec: ServerSpec, name: str) -> None:
    """ConfigError names the variable and does not show the key."""
    with pytest.raises(ConfigError, match=f"{name} holds characters") as raised:
        headers_of(spec, {name: "secret\n"})
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("http://ada:secret@one:1/v1", "ada:secret"),
        ("http://ada@one:1", "ada:"),
        ("http://a%40b:p%3Aw%C3%A9@one:1", "a@b:p:wé"),
    ],
)
def test_a_password_in_a_url(url: str, sent: str) -> None:
    """It is sent as Basic credentials, percent-decoded, and is not in the server's URL or representation."""
    (spec,) = server_specs(section(url))
    assert "http://one:1" == spec.url
    assert "ada" not in repr(spec)
    authorization = headers_of(spec, {"STREAMSYN_API_KEY": "all"})["Authorization"]
    scheme, _, token = authorization.partition(" ")
    assert ("Basic", sent) == (scheme, b64decode(token).decode())


def test_a_password_and_a_key() -> None:
    """One of them has to go; the message does not show the password."""
    (spec,) = server_specs(section({"url": "http://ada:secret@one:1", "key_env": "ONE_KEY"}))
    with pytest.raises(
        ConfigError, match="http://one:1 has a user in its URL and key_env = ONE_KEY"
    ) as raised:
        headers_of(spec, {"ONE_KEY": "one"})
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("url", ["http://ada:sec ret@one:1", "http://ada:sec/ret@one:1", "ada:secret@one:1"])
def test_an_invalid_url_with_a_password(url: str) -> None:
    """The message shows only what stands behind it."""
    with pytest.raises(ConfigError, match=r"fleet\.servers: one:1 is not a valid URL"):
        server_specs(section(url))
