"""The Markdown of the repository: width, links, and names that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

from documentation import blocks, pages, prose
from places import REPOSITORY
from prunus.cli import app
from prunus.pruning.recipe import Recipe

PAGES = pages()
#: Pages that tell of earlier versions, so their names need not exist any more.
HISTORY = {"CHANGELOG.md"} | {path.name for path in (REPOSITORY / "docs" / "notes").glob("*.md")}
CURRENT = [page for page in PAGES if page.name not in HISTORY]
#: Options of other programs that the pages name.
FOREIGN = {
    "--kl-divergence",
    "--llama-bench",
    "--gguf",
    "--master-addr",
    "--master-port",
    "--nnodes",
    "--node-rank",
    "--nproc-per-node",
    "--training-memory",
    "--take",
    "--eager",
    "--enable-lora",
    "--tensor-parallel-size",
    "--outfile",
    "--outtype",
    "--temp",
    "--chunks",
    "--build",
}
LINK = re.compile(r"\]\(([^)\s]+)\)")
ROOMS = {path.name for path in (REPOSITORY / "src" / "prunus").iterdir() if path.is_dir()}


def name_of(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def each(found: list[Path]):
    return pytest.mark.parametrize("page", found, ids=name_of)


@each(PAGES)
def test_no_line_is_wider_than_100_columns(page):
    """Tables, fenced blocks and the targets of links do not count."""
    wide = [
        number
        for number, line in prose(page)
        if not line.lstrip().startswith("|") and len(LINK.sub("]()", line)) > 100
    ]
    assert not wide, f"{name_of(page)} has wide lines: {wide}"


@each(PAGES)
def test_links_to_files_lead_somewhere(page):
    for _, line in prose(page):
        for target in LINK.findall(line):
            path = target.partition("#")[0]
            if path and "://" not in path:
                assert (page.parent / path).exists(), f"{name_of(page)} links to {target}"


@each(CURRENT)
def test_options_exist(page):
    commands = get_command(app).commands
    known = {
        option
        for command in commands.values()
        for parameter in command.params
        for option in [*parameter.opts, *parameter.secondary_opts]
    }
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page.read_text(encoding="utf-8")))
    named -= FOREIGN | {"--help", "--no-deps"}
    assert named <= known, f"{name_of(page)} names options that do not exist: {named - known}"


@each(CURRENT)
def test_files_exist(page):
    """`methods/wanda.py` stands for src/prunus/methods/wanda.py; tests/... for itself."""
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`([\w./-]+\.(?:py|toml|json|md|sh))`", text):
        first = name.split("/")[0]
        if "/" not in name or first == "OUT":
            continue
        base = REPOSITORY / "src" / "prunus" if first in ROOMS else REPOSITORY
        if first in ROOMS or (REPOSITORY / first).is_dir():
            places = [base / name, REPOSITORY / name]
            assert any(place.exists() for place in places) or "NAME" in name, (
                f"{name_of(page)} names {name}, which does not exist"
            )


@each(CURRENT)
def test_the_fields_of_recipes_exist(page):
    for block in blocks(page):
        if block.language == "toml" and "[" not in block.text:
            fields = set(re.findall(r"^(\w+) =", block.text, re.MULTILINE))
            assert fields <= set(Recipe.model_fields)


def test_the_architecture_page_lists_all_rooms():
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^  (\w+)/ ", text, re.MULTILINE))
    assert listed == ROOMS - {"__pycache__"}
