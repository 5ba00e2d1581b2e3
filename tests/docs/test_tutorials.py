"""The commands of README, Start, tutorials and notebooks, run on a tiny model: they cannot rot.

The blocks of a page run in order, in one folder, with a tiny checkpoint under every name that its
comment `models:` lists. Windows are made few and short; everything else is as written. Blocks under
`<!-- parse only: … -->` need other hardware: their options are checked and nothing is run.
"""

import gzip
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from command_line import PROGRAM
from documentation import Block, blocks, models
from gguf_cases import gguf_checkpoint
from places import REPOSITORY
from prunus.calibration import corpora
from prunus.formats.gguf.file import check_extra

DOCS = REPOSITORY / "docs"
OWN_METHOD = DOCS / "how-to" / "add-a-method.md"
INSTALL = DOCS / "start" / "install.md"
START = [REPOSITORY / "README.md", *sorted(INSTALL.parent.glob("*.md"))]
TUTORIALS = [*START, *sorted((DOCS / "tutorials").glob("*.md")), OWN_METHOD]
OTHERS = sorted({*(DOCS / "how-to").glob("*.md")} - {OWN_METHOD})
#: Pages that say how prunus is extended, each with a test of what it adds.
EXTENDING = [page for page in OTHERS if "\n<!-- write: tests/" in page.read_text(encoding="utf-8")]
#: Extra of the package -> the module that shows whether it is installed.
EXTRAS = {
    "data": "datasets", "eval": "lm_eval", "gguf": "gguf", "adapters": "peft", "vision": "PIL",
}  # fmt: skip
#: Options that make a command take seconds; they replace what the page says.
SMALL = {
    "prune": {"--samples": "4", "--seqlen": "16"},
    "plan": {"--samples": "4", "--seqlen": "16"},
    "compress": {"--bits": "5", "--samples": "4", "--seqlen": "16"},
    "eval": {"--seqlen": "16", "--samples": "2"},
    "recover": {"--tokens": "1024", "--seqlen": "16", "--held-out": "2", "--evaluations": "1"},
    "generate": {"--max-new-tokens": "4"},
}
#: Programs that are no command of prunus; its own options, such as --version, do nothing.
OTHER_PROGRAMS = {
    "pip", "make", "curl", "export", "mlx_lm.generate", "mlx_lm.server", "python", "python3",
    "vllm", "transformers", "ollama", "lms", "lm_eval", "prunus",
}  # fmt: skip
SMALL_PYTHON = {"samples": 4, "seqlen": 16, "tokens": 1024}
SENTENCE = "The quick brown fox jumps over the lazy dog number {}. "


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny checkpoint with a tokenizer, wide enough for 2:4."""
    folder = tmp_path_factory.mktemp("tutorial") / "model"
    return gguf_checkpoint(folder, hidden_size=32, intermediate_size=64)


@pytest.fixture
def place(model, tmp_path, monkeypatch) -> Path:
    """A folder with texts and a mirror of the corpora, where commands run."""
    text = "\n\n".join(SENTENCE.format(number) * 4 for number in range(60))
    mirror = tmp_path / "mirror"
    (mirror / "wikitext2").mkdir(parents=True)
    for split in ("train", "valid", "test"):
        (mirror / "wikitext2" / f"wiki.{split}.raw").write_text(text)
    (mirror / "c4").mkdir()
    with gzip.open(mirror / "c4" / "c4_en_train_shard0_first1000.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": SENTENCE.format(n) * 8}) + "\n" for n in range(100))
    (tmp_path / "my-text.txt").write_text(text)
    (tmp_path / "held-out.txt").write_text(text)
    monkeypatch.setenv("PRUNUS_DATA", str(mirror))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def hide_extras(page: Path, monkeypatch) -> None:
    """Hide the extras that neither a page of Start nor the install page installs."""
    text = (page if page.name == "README.md" else INSTALL).read_text(encoding="utf-8")
    given = ",".join(re.findall(r"pip install (?:-e )?'\.\[(.+?)\]'", text)).split(",")
    hidden = {module for extra, module in EXTRAS.items() if extra not in given}
    find_spec, data_folder = importlib.util.find_spec, corpora.data_folder

    def as_the_hub(data: Path | None) -> Path | None:
        """The corpora of `place`, which stand for those of the hub."""
        corpora.require_library("datasets", "loading from the hub", "data")
        return data_folder(data)

    monkeypatch.setattr(corpora, "data_folder", as_the_hub)
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: None if name in hidden else find_spec(name, *rest),
    )


def verb_and_arguments(words: list[str]) -> tuple[str, list[str]] | None:
    """Command and arguments of `prunus …` or `torchrun … -m prunus …`; None without a command."""
    if words[0] == "torchrun":
        words = words[words.index("-m") + 1 :]
    return (words[1], words[2:]) if words[0] == "prunus" and words[1][0] != "-" else None


def smaller(verb: str, arguments: list[str]) -> list[str]:
    options = dict(SMALL.get(verb, {}))
    kept = list(arguments)
    if verb == "compress" and Path(kept[1]).suffix != ".gguf" and "mlx" not in kept:
        options["--bits"] = "4"  # A folder has 4 or 8.
    if "--type" in kept:
        options.pop("--bits", None)  # the one replaces the other
    if verb == "compress" and "--size" in kept:
        kept[kept.index("--size")] = "--bits"  # a tiny model has other sizes
    if "--memory" in kept:
        # Whatever ran in this process before counts against the budget.
        options["--memory"] = "64GB"
    if verb == "recover" and "--minutes" in kept:
        place = kept.index("--minutes")
        del kept[place : place + 2]
    for option, value in options.items():
        if option in kept:
            kept[kept.index(option) + 1] = value
        else:
            kept += [option, value]
    return kept


def check_options(words: list[str]) -> None:
    found = verb_and_arguments(words)
    if found is not None:
        verb, arguments = found
        commands = PROGRAM.commands
        assert verb in commands, f"there is no command {verb}"
        commands[verb].make_context(verb, list(arguments))
    elif words[0] == "python" and words[1][0] not in "-$":
        assert (REPOSITORY / words[1]).exists(), f"there is no script {words[1]}"
        if words[1] == "benchmarks/fetch_model.py":
            check_extra()
    else:
        program = Path(words[0]).name
        assert program in OTHER_PROGRAMS or program.startswith("llama-"), f"what is {program}?"


def run_block(block: Block, where: str) -> None:
    if block.language == "python" and (file := re.match(r"# (\w+\.py)\n", block.text)):
        Path(file[1]).write_text(block.text)
    elif block.language == "python":
        text = re.sub(
            r"(samples|seqlen|tokens)=\d+", lambda m: f"{m[1]}={SMALL_PYTHON[m[1]]}", block.text
        )
        exec(compile(text, where, "exec"), {})
    if block.language == "toml" and block.text.startswith("# "):
        name, _, text = block.text[2:].partition("\n")
        text = text.replace("samples = 32", "samples = 4").replace("seqlen = 1024", "seqlen = 16")
        Path(name.strip()).write_text(text)
        return
    for words in block.commands() if block.language == "sh" else []:
        check_options(words)
        found = verb_and_arguments(words)
        if found is not None:
            result = CliRunner().invoke(PROGRAM, [found[0], *smaller(*found)])
            assert result.exit_code == 0, f"{where}: {' '.join(words)}\n{result.output}"


@pytest.mark.usefixtures("short_python_texts")
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_commands_of_a_tutorial_run(page, place, model, monkeypatch):
    if page in START:
        hide_extras(page, monkeypatch)
    for name in models(page):
        shutil.copytree(model, place / name)
    for block in blocks(page):
        where = f"{page.name}, line {block.line}"
        if block.runs:
            run_block(block, where)
        else:
            for words in block.commands() if block.language == "sh" else []:
                check_options(words)


@pytest.mark.parametrize("page", OTHERS, ids=lambda page: page.stem)
def test_commands_of_other_pages_are_understood(page):
    for block in blocks(page):
        for words in block.commands() if block.language == "sh" else []:
            check_options(words)


@pytest.mark.parametrize("page", EXTENDING, ids=lambda page: page.stem)
def test_what_a_page_adds_passes_the_tests_that_it_adds(page, tmp_path):
    """In a copy of the package, which has the files and lines of the page."""
    for folder in ("src/prunus", "tests/support"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=ignored)
    for name in ("pyproject.toml", "tests/conftest.py"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    written = [block.enter(tmp_path) for block in blocks(page)]
    tests = [str(path) for path in written if path and path.name.startswith("test_")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests]
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


# --- notebooks ---

NOTEBOOKS = sorted((REPOSITORY / "examples").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@every_notebook
def test_a_notebook_is_small_python_with_outputs_and_names_no_folder(path):
    text = path.read_text(encoding="utf-8")
    assert len(text) < 60_000
    assert not re.search(r"[\"' ]/(home|root|tmp|work|Users)/", text)
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert all(output["output_type"] != "error" for cell in cells for output in cell["outputs"])
    assert any(cell["outputs"] for cell in cells)


@pytest.mark.slow
@pytest.mark.usefixtures("short_python_texts")
@pytest.mark.filterwarnings("ignore:.*non-interactive", "ignore:mix. C4 cannot be loaded")
@every_notebook
def test_a_notebook_runs(path, tmp_path, monkeypatch, capsys):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    if any("matplotlib" in source for source in sources):
        pytest.importorskip("matplotlib")
    if "PRUNUS_MODEL" not in os.environ:
        model = gguf_checkpoint(tmp_path / "model", max_position_embeddings=512)
        for file in model.glob("tokenizer*.json"):
            # The name that the import of a GGUF file gives its last token.
            file.write_text(file.read_text().replace("</s>", "<|endoftext|>"))
        template = "{% for each in messages %}{{ each.content }}{% endfor %}"
        (model / "chat_template.jinja").write_text(template)
        monkeypatch.setenv("PRUNUS_MODEL", str(model))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for source in sources:
        exec(compile(source, path.name, "exec"), names)
    assert "KL divergence" in capsys.readouterr().out
