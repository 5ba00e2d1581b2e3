"""The pages: what scripts make for them, their links and names, and the site that they become."""

import importlib.util
import os
import pkgutil
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from command_line import PROGRAM
from documentation import blocks, pages, prose
from places import REPOSITORY
from prunus.pruning.recipe import Recipe


def loaded(folder: str, name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / folder)
        return import_module(name)


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    return loaded("docs/tools", "generate_reference")


@pytest.fixture(scope="module")
def plots() -> ModuleType:
    return loaded("benchmarks", "plots")


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    return loaded("benchmarks", "figures")


def test_every_command_and_option_is_in_the_reference(reference):
    text = reference.command_reference()
    for line in text.splitlines():
        assert not line.startswith("|") or len(re.split(r"(?<!\\)\|", line)) == 5, line
    for name, command in PROGRAM.commands.items():
        section = re.search(rf"^## prunus {name}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
        assert section, name
        for parameter in command.params:
            if parameter.param_type_name == "option" and not parameter.hidden:
                assert all(f"`{option}`" in section[1] for option in parameter.opts)


def test_every_option_is_in_the_reference(reference):
    text = reference.option_table(Recipe)
    for name in Recipe.model_fields:
        assert f"| `{name}` |" in text
    options = set(re.findall(r"`(--[a-z-]+)`", text))
    commands = PROGRAM.commands
    parameters = [*commands["prune"].params, *commands["compress"].params]
    assert options <= {option for parameter in parameters for option in parameter.opts}


def test_the_architecture_lists_files_that_exist():
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    lists = re.findall(r"```text\n(.*?)```", text, re.DOTALL)[:2]
    named = re.findall(r"[\w/]+\.py", "".join(lists))
    known = {path.as_posix() for path in (REPOSITORY / "src" / "prunus").rglob("*.py")}
    for name in named:
        assert any(path.endswith(f"/{name}") for path in known), name


def test_pages_of_the_root_have_links_that_work_in_the_site(reference):
    text = reference.root_file("README.md")
    assert "](docs/" not in text
    assert 'src="docs/' not in text
    assert "](CONTRIBUTING.md)" not in text


def test_tables_of_the_pages_are_those_of_the_figures(plots):
    """After new figures: python benchmarks/plots.py."""
    for path in plots.WITH_TABLES:
        text = path.read_text(encoding="utf-8")
        assert plots.with_tables(text) == text, f"{path.name} is out of date"


def test_the_first_command_of_the_readme_and_what_it_prints_are_those_of_a_run(plots):
    """The run had fewer windows, which change nothing of the size."""
    run = plots.read("readme")["cells"]["SmolLM2-135M"]["small.gguf"][""]
    first, shown, *_ = (block.text for block in blocks(REPOSITORY / "README.md"))
    size, before = (run[name] / 1e6 for name in ("bytes", "dense_bytes"))
    names = {"MODEL": "HuggingFaceTB/SmolLM2-135M-Instruct", "OUT.gguf": "small.gguf"}
    words = run["command"].removesuffix(" --samples 64").split()
    assert " ".join(names.get(word, word) for word in words) in first.splitlines()
    said = f"The result takes {size:.1f} MB, and the model took {before:.1f} MB:"
    assert shown.startswith(said)


FIGURES = sorted((REPOSITORY / "docs" / "results").glob("*.json"))


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.stem)
def test_committed_figures_say_where_they_come_from_and_name_no_paths(path, figures):
    found = figures.read(path.stem)
    assert {"version", "date", "hardware", "command"} <= found.keys()
    assert {"processor", "cores", "threads"} <= found["hardware"].keys()
    assert not re.search(r'"/\w+/', path.read_text(encoding="utf-8"))


def test_results_on_pages_are_of_this_version_or_said_to_wait(figures):
    """A release has none that wait."""
    fresh = {path.stem for path in FIGURES if figures.is_fresh(figures.read(path.stem))}
    shown = {name for name, result in figures.LIST["results"].items() if result["pages"]}
    assert shown - fresh == set(figures.LIST["waiting"])
    assert {path.stem for path in FIGURES} <= shown
    for result, name in ((figures.LIST["results"][name], name) for name in shown & fresh):
        if "rows" in result:
            measured = [(model, list(rows)) for model, rows in figures.read(name)["cells"].items()]
            assert measured == [(model, list(result["rows"])) for model in result["models"]], name


#: Page -> its tables of numbers that are no measurements: bits of types, windows of presets, and
#: examples of what is printed.
OTHER_NUMBERS = {"docs/reference/gguf.md": 1, "docs/how-to/compress.md": 1}
OTHER_NUMBERS["docs/how-to/compare-gguf.md"] = 2


def test_every_table_of_figures_is_that_of_a_listed_result(plots):
    marked = set()
    for page in CURRENT:
        text = page.read_text(encoding="utf-8")
        marked |= {(name, name_of(page)) for name in re.findall(r"<!-- table: (\S+) -->", text)}
        rest = re.sub(r"<!-- table: .*?<!-- end -->", "", text, flags=re.DOTALL)
        others = len(re.findall(r"^\|.*-:", rest, re.MULTILINE))
        assert others == OTHER_NUMBERS.get(name_of(page), 0), name_of(page)
    results = plots.LIST["results"]
    listed = {name: results[result]["pages"] for name, result in plots.RESULT_OF.items()}
    assert {name for name, _ in marked} == {name for name, pages in listed.items() if pages}
    assert all(page in listed[name] for name, page in marked)


def test_every_listed_result_can_be_run_and_names_rooms_that_exist(plots):
    for name, result in plots.LIST["results"].items():
        for use in result["uses"]:
            found = list((REPOSITORY / "src" / "prunus").glob(f"{use}*"))
            assert use.startswith("--") or found, f"{name} uses {use}"
        assert set(result["models"]) <= set(plots.LIST["models"])
        words = [
            row.format(**plots.LIST["words"]).split() for row in result.get("rows", {}).values()
        ]
        assert bool(words) != ("script" in result)
        for verb, *arguments in words:
            if not (REPOSITORY / "benchmarks" / verb).exists():
                PROGRAM.commands[verb].make_context(verb, arguments)


def test_pictures_are_those_of_the_script_and_are_small():
    """After a change: python docs/tools/drawings.py."""
    drawings = loaded("docs/tools", "drawings")
    stored = {path.stem: path for path in drawings.FOLDER.glob("*.svg")}
    assert stored.keys() == drawings.DRAWINGS.keys()
    for name, make in drawings.DRAWINGS.items():
        picture = make().svg()
        assert stored[name].read_text(encoding="utf-8") == picture, f"{name}.svg is out of date"
        assert len(picture.encode()) <= 20_000, name
        source = ElementTree.fromstring(picture).findall(".//{*}text[@class='code']")[0].text
        for path in source.split(", "):
            assert (REPOSITORY / path).exists(), f"{name} names {path}"


def test_the_citation_names_the_last_release():
    """Between releases the package has the version of the next one, such as 0.5.0.dev0."""
    cited, current = (
        re.search(r"^version\W+([\w.]+)", (REPOSITORY / name).read_text(), re.MULTILINE)[1]
        for name in ("CITATION.cff", "pyproject.toml")
    )
    assert f"\n## {cited} " in (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    assert cited == current or current.endswith(".dev0")


# --- the Markdown of the repository ---

PAGES = pages()
#: Pages that tell of earlier versions, so their names need not exist any more.
HISTORY = {REPOSITORY / "CHANGELOG.md", *(REPOSITORY / "docs" / "notes").glob("*.md")}
CURRENT = [page for page in PAGES if page not in HISTORY]
#: Options that the pages name: of other programs, and the one that "Add an option" adds.
FOREIGN = {
    "--keep-first", "--kl-divergence", "--kl-divergence-base", "--llama-bench", "--gguf",
    "--master-addr", "--master-port", "--nnodes",
    "--node-rank", "--nproc-per-node", "--training-memory", "--others", "--windows", "--take",
    "--eager", "--enable-lora",
    "--tensor-parallel-size", "--outfile", "--outtype", "--temp", "--chunks", "--build",
    "--user-repo", "--copy", "--no-compile", "--tensor-type-file", "--port", "--json",
    "--presets", "--rows", "--rounds", "--speeds", "--texts", "--quant-predicate",
}  # fmt: skip
LINK = re.compile(r"\]\(([^)\s]+)\)")
ROOMS = {
    path.stem
    for path in (REPOSITORY / "src" / "prunus").iterdir()
    if not path.name.startswith("_") and path.name != "py.typed"
}


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
    tree = text.partition("```text\nsrc/prunus/\n")[2].partition("tests/ ")[0]
    listed = set(re.findall(r"^  ([a-z]+)(?:/|\.py) ", tree, re.MULTILINE))
    assert listed == ROOMS


def test_the_reference_names_objects_that_exist():
    for page in CURRENT:
        for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE):
            pkgutil.resolve_name(name)


# --- the site as `make docs` builds it, opened as files in a real browser ---

CUT = """[...document.querySelectorAll("pre > code")]
    .filter(code => code.scrollWidth > code.clientWidth + 1).map(code => code.innerText)"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra docs")
def test_the_site_needs_no_server_and_no_network(browser, tmp_path):
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    subprocess.run(build, cwd=REPOSITORY, env=environment, check=True)
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    wrong: list[str] = []
    page.on("request", lambda request: wrong.append(request.url) if "//" in request.url else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    for path in sorted(tmp_path.rglob("*.html")):
        page.goto(path.as_uri())
        assert page.evaluate(CUT) == [], path
        links = page.evaluate("[...document.links].map(link => link.href.split('#')[0])")
        assert not [link for link in links if link.startswith("file:") and link.endswith("/")], path
    page.goto((tmp_path / "start" / "install.html").as_uri())
    page.locator(".md-search__input").fill("lockstep")
    page.locator(".md-search-result__item", has_text="Lockstep").first.wait_for()
    assert not [url for url in wrong if not url.startswith(("file:", "data:", "blob:"))]
