"""README, guides and package READMEs name only what exists, and the README names every command."""

import ast
import re
from pathlib import Path

import pytest

import streamsyn
from streamsyn.cli.main import cli
from streamsyn.config.loading import known_keys, load
from streamsyn.simulator.timeline import load_timeline
from tests.examples import in_turn

ROOT = Path(streamsyn.__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
PAGES = [
    ROOT / "README.md",
    *sorted(
        page for folder in ("streamsyn", "deploy", "benchmarks") for page in (ROOT / folder).rglob("*.md")
    ),
]
TEXTS = {str(page.relative_to(ROOT)): page.read_text("utf-8") for page in PAGES}
FOLDERS = ("streamsyn", "deploy", "benchmarks", "tests")
FILES = (".js", ".toml", ".py", ".md", ".json", ".jsonl")

every_page = in_turn("page", TEXTS)


def without_code(page: str) -> str:
    """The text of a page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", TEXTS[page], flags=re.MULTILINE | re.DOTALL)


@in_turn("name", sorted(cli.commands))
def test_every_command_is_in_the_readme_and_has_help(name: str) -> None:
    """Each command is named as `streamsyn NAME`."""
    assert f"`streamsyn {name}`" in README
    assert cli.commands[name].help


@in_turn("code", [0, 1, 2, 3, 75])
def test_every_exit_code_is_in_the_readme(code: int) -> None:
    """The table of exit codes has a row for each."""
    assert re.search(rf"^\| {code} \|", README, re.MULTILINE)


@every_page
def test_every_command_on_a_page_exists(page: str) -> None:
    """Commands in backquotes, and at the start of a line of a block."""
    blocks = "".join(re.findall(r"^```sh\n.*?^```$", TEXTS[page], re.MULTILINE | re.DOTALL))
    named = re.findall(r"`streamsyn ([a-z]+)", TEXTS[page]) + re.findall(
        r"^streamsyn ([a-z]+)", blocks, re.MULTILINE
    )

    assert set(named) <= set(cli.commands)


@every_page
def test_every_key_on_a_page_exists(page: str) -> None:
    """Keys written as `section.name` and keys after `--set`; names of log events are allowed."""
    named = set(re.findall(r"`([a-z_]+\.[a-z_.]+)(?: = [^`]*)?`", TEXTS[page]))
    named |= set(re.findall(r"--set '?([a-z_]+\.[a-z_.]+)=", TEXTS[page]))
    sections = {key.split(".")[0] for key in known_keys()}
    unknown = {key for key in named - set(known_keys()) if key.split(".")[0] in sections}

    assert [] == sorted(key for key in unknown - logged_events() if not key.endswith(FILES))


def logged_events() -> set[str]:
    """Dotted names of log events, such as `run.done`."""
    sources = (path.read_text("utf-8") for path in (ROOT / "streamsyn").rglob("*.py"))
    return {event for text in sources for event in re.findall(r'"([a-z_]+\.[a-z_.]+)"', text)}


@every_page
def test_every_path_on_a_page_exists(page: str) -> None:
    """Paths that begin with a folder of the repository, and modules that a package's page names."""
    text, folder = without_code(page), (ROOT / page).parent
    named = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+)(?:::\w+)?`", text)
    missing = [path for path in named if not (ROOT / path).exists()]
    if folder.is_relative_to(ROOT / "streamsyn"):
        modules = re.findall(r"`([\w/]+\.py)`", text)
        places = (folder, ROOT / "streamsyn", ROOT)
        missing += [path for path in modules if not any((place / path).exists() for place in places)]

    assert [] == missing


@pytest.mark.parametrize("folder", sorted((ROOT / "streamsyn").glob("*/")), ids=lambda folder: folder.name)
def test_a_package_that_lists_its_modules_names_each_of_them(folder: Path) -> None:
    """The list in the docstring of its `__init__.py`: names, two spaces, a text; sentences may name more."""
    source = folder / "__init__.py"
    text = (ast.get_docstring(ast.parse(source.read_text("utf-8"))) if source.exists() else None) or ""
    rows = re.findall(r"^ {4}((?:\w+, )*\w+)  +\S", text, re.MULTILINE)
    listed = {name for row in rows for name in row.split(", ")}
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}

    assert set() == listed - modules - {path.name for path in folder.iterdir()}
    assert not listed or set() == modules - listed - set(re.findall(r"`(\w+)`", text))


def test_the_map_names_every_package_and_module_beside_them() -> None:
    """The tables of streamsyn/README.md."""
    folder = ROOT / "streamsyn"
    names = {f"{one.parent.name}/" for one in folder.glob("*/__init__.py")}
    names |= {one.name for one in folder.glob("[a-z]*.py")}

    assert set() == {name for name in names if f"`{name}`" not in TEXTS["streamsyn/README.md"]}


@every_page
def test_every_relative_link_resolves(page: str) -> None:
    """Links to files and folders, and to headings in pages."""
    broken = []
    for link, heading in re.findall(r"\]\(([^)#\s]*)(?:#([\w-]*))?\)", without_code(page)):
        target = (ROOT / page).parent / link if link else ROOT / page
        if "://" not in link and not (target.exists() and (not heading or heading in headings(target))):
            broken.append(f"{link}#{heading}")

    assert [] == broken


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@every_page
def test_every_toml_block_is_a_configuration(page: str, tmp_path: Path) -> None:
    """Blocks of TOML load as a configuration; those with events are timelines of the simulator."""
    for block in re.findall(r"^```toml\n(.*?)^```$", TEXTS[page], re.MULTILINE | re.DOTALL):
        path = tmp_path / "block.toml"
        path.write_text(block)
        if "[[event]]" in block:
            load_timeline(path)
        else:
            load(path)


@every_page
def test_every_target_on_a_page_exists(page: str) -> None:
    """`make demo` and others are targets of the Makefile."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = re.findall(r"(?:`|^)make ([a-z][\w-]*)", TEXTS[page], re.MULTILINE)

    assert [] == [name for name in targets if not re.search(rf"^{name}:", makefile, re.MULTILINE)]


def test_the_readme_links_every_guide_and_package_page() -> None:
    """A page that nothing links is not found; a link to a folder shows its README."""
    linked = {
        (ROOT / link).resolve() for link in re.findall(r"\]\(([^)#\s]+)\)", README) if "://" not in link
    }
    pages = {page for page in PAGES if (ROOT / "streamsyn") in page.parents or page.parent.name == "guides"}

    assert [] == sorted(str(page) for page in pages if not {page, page.parent} & linked)
