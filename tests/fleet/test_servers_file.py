"""The lines of `fleet.servers_file`."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.errors import ConfigError
from streamsyn.fleet.server_spec import ServersFile, ServerSpec, parse_servers
from tests.examples import in_turn

TEXT = """\
# the first rack
http://one:1
  http://two:2/v1/  weight=2.5\tkey_env=TWO_KEY # the big one

https://three drain
http://one:1
"""

hosts = st.from_regex(r"[a-z][a-z0-9]{0,9}(:[1-9][0-9]{0,3})?", fullmatch=True)
servers = st.builds(
    ServerSpec,
    url=st.builds("{}://{}".format, st.sampled_from(["http", "https"]), hosts),
    weight=st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False),
    key_env=st.none() | st.from_regex(r"[A-Z_]{1,9}", fullmatch=True),
    draining=st.booleans(),
)
blanks = st.text(" \t", min_size=1, max_size=3)


@st.composite
def written(draw: st.DrawFn) -> tuple[list[ServerSpec], str]:
    """Servers, and a file that names them, as untidy as people write."""
    specs = draw(st.lists(servers, unique_by=lambda spec: spec.url, max_size=6))
    return specs, draw(st.sampled_from(["\n", "\r\n"])).join(_lines(draw, specs))


def _lines(draw: st.DrawFn, specs: list[ServerSpec]) -> Iterator[str]:
    for spec in specs:
        words = [f"weight={spec.weight!r}"] if spec.weight != 1 or draw(st.booleans()) else []
        words += [f"key_env={spec.key_env}"] if spec.key_env else []
        words += ["drain"] if spec.draining else []
        words = [spec.url, *draw(st.permutations(words))]
        yield draw(st.sampled_from(["", " "])) + "".join(word + draw(blanks) for word in words)
        yield from draw(st.lists(st.sampled_from(["", "  ", "# http://no:1", "\t#weight=2"]), max_size=2))


def test_lines_as_people_write_them() -> None:
    """Comments, blank lines, extra blanks and duplicates are accepted."""
    assert parse_servers(TEXT, "servers.txt") == [
        ServerSpec("http://one:1"),
        ServerSpec("http://two:2", 2.5, "TWO_KEY"),
        ServerSpec("https://three", draining=True),
    ]


@given(written())
def test_what_is_written_is_read(case: tuple[list[ServerSpec], str]) -> None:
    """Servers come in the order of their lines."""
    specs, text = case

    assert specs == parse_servers(text, "servers.txt")


@given(st.text() | st.text("htp:/1 \n#=weightdrain_"))
def test_any_text_is_read_or_refused(text: str) -> None:
    """Any text gives valid servers, or a one-line ConfigError with the line number."""
    try:
        found = parse_servers(text, "servers.txt")
    except ConfigError as error:
        said = str(error)
    else:
        assert len(found) == len({spec.url for spec in found})
        return
    where, number, _ = said.split(":", 2)
    assert "servers.txt" == where
    assert 1 <= int(number) <= text.count("\n") + 1
    assert 1 == len(said.splitlines())


@in_turn(
    ("line", "said"),
    [
        ("one:30000", "one:30000 is not a valid URL"),
        ("http://one wieght=2", r"invalid option 'wieght=2'; a line is URL \[weight=W\]"),
        ("http://one http://two", "invalid option 'http://two'"),
        ("http://one weight", "invalid option 'weight'"),
        ("http://one drain=1", "invalid option 'drain=1'"),
        ("http://one weight=1 weight=2", "invalid option 'weight=2'"),
        ("http://one key_env=", "key_env= needs the name"),
        *(
            (f"http://one weight={weight}", "weight= must be a number above 0")
            for weight in ("", "a", "0", "-1")
        ),
        *(
            (f"http://one weight={weight}", "weight= must be a number above 0")
            for weight in ("inf", "nan", "1e999")
        ),
        ("http://zero drain", "http://zero is already listed"),
    ],
)
def test_wrong_lines(line: str, said: str) -> None:
    """The file and the line are named."""
    with pytest.raises(ConfigError, match=f"^servers.txt:3: {said}"):
        parse_servers(f"http://zero\n\n{line}\nand more", "servers.txt")


def test_a_file_that_has_not_changed_is_not_read(tmp_path: Path) -> None:
    """An unchanged file is not read again, once it has settled."""
    path = tmp_path / "servers.txt"
    path.write_text("http://one:1")
    file = ServersFile(path, settled_s=0)
    first = file.read()

    assert file.read() is first
    path.chmod(0o600)  # its times say that it has changed
    assert file.read() is not first
    assert file.read() == first
