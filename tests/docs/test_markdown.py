"""The Markdown of the repository: width, links, and names that exist."""

import pkgutil
import re
from pathlib import Path

from command_line import PROGRAM
from documentation import blocks, pages, prose
from places import REPOSITORY
from prunus.pruning.recipe import Recipe

PAGES = pages()
#: Pages that tell of earlier versions, so their names need not exist any more.
HISTORY = {REPOSITORY / "CHANGELOG.md", *(REPOSITORY / "docs" / "notes").glob("*.md")}
CURRENT = [page for page in PAGES if page not in HISTORY]
#: Options of other programs that the pages name.
FOREIGN = {
    "--kl-divergence", "--kl-divergence-base", "--llama-bench", "--gguf", "--master-addr",
    "--master-port", "--nnodes",
    "--node-rank", "--nproc-per-node", "--training-memory", "--others", "--windows", "--take",
    "--eager", "--enable-lora",
    "--tensor-parallel-size", "--outfile", "--outtype", "--temp", "--chunks", "--build",
    "--user-repo", "--copy", "--no-compile", "--tensor-type-file", "--port", "--json",
}  # fmt: skip
LINK = re.compile(r"\]\(([^)\s]+)\)")
ROOMS = {path.name for path in (REPOSITORY / "src" / "prunus").iterdir() if path.is_dir()}


def name_of(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def test_lines_are_short_and_links_lead_somewhere():
    """In tables, fenced blocks and the targets of links, lines may be wide."""
    for page in PAGES:
        for number, line in prose(page):
            where = f"{name_of(page)}, line {number}"
            table = line.lstrip().startswith("|")
            assert table or len(LINK.sub("]()", line)) <= 100, f"{where} is wide"
            for target in LINK.findall(line):
                path = target.partition("#")[0]
                exists = not path or "://" in path or (page.parent / path).exists()
                assert exists, f"{where} links to {target}"


def test_options_and_files_exist():
    """`methods/wanda.py` stands for src/prunus/methods/wanda.py; tests/... for itself."""
    parameters = [p for each in (PROGRAM, *PROGRAM.commands.values()) for p in each.params]
    known = {option for p in parameters for option in [*p.opts, *p.secondary_opts]}
    known |= FOREIGN | {"--help", "--no-deps"}
    for page in CURRENT:
        text = page.read_text(encoding="utf-8")
        unknown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - known
        assert not unknown, f"{name_of(page)} names options that do not exist: {unknown}"
        for name in re.findall(r"`([\w./-]+\.(?:py|toml|json|md|sh))`", text):
            first = name.split("/")[0]
            if "/" in name and "NAME" not in name and (REPOSITORY / first).is_dir():
                assert (REPOSITORY / name).exists(), f"{name_of(page)} names {name}"
            elif "/" in name and "NAME" not in name and first in ROOMS:
                found = REPOSITORY / "src" / "prunus" / name
                assert found.exists(), f"{name_of(page)} names {name}"
        for block in blocks(page):
            if block.language == "toml" and "[" not in block.text:
                fields = set(re.findall(r"^(\w+) =", block.text, re.MULTILINE))
                assert fields <= set(Recipe.model_fields), name_of(page)


def test_the_architecture_page_lists_all_rooms():
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^  (\w+)/ ", text, re.MULTILINE))
    assert listed == ROOMS - {"__pycache__"}


def test_the_reference_names_objects_that_exist():
    for page in CURRENT:
        for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE):
            pkgutil.resolve_name(name)
