"""What the README and the pages in docs/ point at is there: files, headings, commands, options."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from adapt_pruner.cli.main import Program
from adapt_pruner.methods import settings_fields

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"^(?:src|docs|tests|recipes|benchmarks|scripts)/[\w./-]*\w(?:\.\w+)?$")
PLACES = [ROOT, ROOT / "src" / "adapt_pruner"]
FOLDERS = {path.name for path in PLACES[1].iterdir() if path.is_dir()}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


def headings(page: Path) -> set[str]:
    """Anchors as the pages' readers make them of headings."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    kept = [re.sub(r"[^\w\- ]", "", title.lower()).strip() for title in titles]
    return {title.replace(" ", "-") for title in kept}


def calls(page: Path) -> list[str]:
    """Calls of the command line in blocks of code, and in the text."""
    found = []
    for language, code in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "bash":
            lines = code.replace("\\\n", " ").splitlines()
            found += [line.split(" #")[0].strip() for line in lines]
    found += INLINE.findall(prose(page))
    return [call for call in found if call.startswith("adapt-pruner ")]


@pages
def test_links_lead_somewhere(page):
    for link in LINK.findall(prose(page)):
        if link.startswith(("http:", "https:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in headings(target), f"{link}: no such heading"


@pages
def test_files_that_are_named_exist(page):
    for name in INLINE.findall(prose(page)):
        is_inside = name.split("/")[0] in FOLDERS and name.endswith(".py")
        if FILE.match(name) or is_inside:
            assert any((place / name).exists() for place in PLACES), f"there is no {name}"


@pages
def test_commands_and_options_exist(page):
    program = Program("adapt-pruner")
    with click.Context(program) as context:
        for call in calls(page):
            name, *arguments = [word for word in call.split()[1:] if word != "adapt-pruner"]
            if not re.fullmatch("[a-z]+", name):
                continue  # COMMAND, --help, ...
            command = program.get_command(context, name)
            assert command is not None, f"{call}: there is no command {name}"
            if name != "with":
                check_options(command, call, arguments)


def check_options(command: click.Command, call: str, arguments: list[str]) -> None:
    known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    known |= {"--" + setting.replace("_", "-") for setting in settings_fields()}
    for word in arguments:
        option = word.split("=")[0]
        assert not option.startswith("--") or option in known, f"{call}: there is no {option}"


def test_calls_can_be_pasted_into_a_shell():
    for page in PAGES:
        for call in calls(page):
            assert shlex.split(call), call


def test_every_command_has_a_page():
    files = {page.stem for page in (ROOT / "docs" / "commands").glob("*.md")}
    assert files == set(Program.commands_in)


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    linked = {(ROOT / "docs" / link.split("#")[0]).resolve() for link in LINK.findall(index)}
    assert linked == {page for page in PAGES if page.is_relative_to(ROOT / "docs")} - {
        ROOT / "docs" / "index.md"
    }


def test_the_tree_in_the_readme_is_the_tree():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = text.split("## Where things are")[1].split("```")[1]
    names = set(re.findall(r"(?<![\w/.])([a-z_]+/|[a-z_]+\.py)", tree))
    for name in names - {"src/"}:
        assert any((place / name).exists() for place in PLACES), f"there is no {name}"
    assert {f"{name}/" for name in FOLDERS} <= names | {"__pycache__/", "demo_model/"}
