"""The structure of the package: which room imports which, and what stands nowhere."""

from __future__ import annotations

import ast
import subprocess
import sys
import unicodedata
from importlib import import_module
from pathlib import Path

import pytest
import transformers.quantizers.auto  # noqa: F401 (prunus.packed.quantizer comes after it)

import prunus

ROOT = Path(prunus.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}

#: Name of a module -> its file.
MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in FILES
}

#: The rooms from the bottom to the top. A room may import only from rooms before it in this list.
ROOMS = [
    "hardware",
    "distributed",
    "model",
    "options",
    "methods",
    "calibration",
    "packed",
    "runs",
    "pruning",
    "compression",
    "structure",
    "recovery",
    "evaluation",
    "sweeping",
    "reporting",
    "serving",
    "cli",
    "__main__",
    "__init__",
]

#: Library -> the only rooms that may import it. What is not here may be imported by all.
LIBRARIES: dict[str, set[str]] = {
    "typer": {"cli"},
    "rich": {"reporting", "cli", "runs"},
    "greenlet": {"pruning"},
    "pydantic": {
        "methods",
        "model",
        "pruning",
        "recovery",
        "structure",
        "evaluation",
        "sweeping",
        "packed",
        "options",
        "runs",
        "compression",
        "serving",
    },
    "huggingface_hub": {"model"},
    "transformers": {
        "cli",
        "model",
        "pruning",
        "runs",
        "calibration",
        "evaluation",
        "packed",
        "serving",
    },
    "torch": set(ROOMS) - {"cli", "reporting", "__init__", "__main__"},
}

#: Files that must not import torch, whatever their room: a recipe and a report are read without it.
WITHOUT_TORCH = {
    "evaluation/comparison.py",
    "evaluation/lm_eval_results.py",
    "evaluation/records.py",
    "evaluation/task_scores.py",
    "hardware/sizes.py",
    "methods/options.py",
    "methods/own_method.py",
    "model/checkpoint/atomic_files.py",
    "model/checkpoint/records.py",
    "compression/recipe.py",
    "compression/record.py",
    "options/declaration.py",
    "options/ranges.py",
    "options/signatures.py",
    "options/toml.py",
    "runs/batch_size.py",
    "runs/options.py",
    "runs/record.py",
    "runs/block_memory.py",
    "pruning/options.py",
    "pruning/presets.py",
    "runs/progress.py",
    "runs/progress_bar.py",
    "pruning/recipe.py",
    "pruning/records.py",
    "sweeping/grid.py",
    "sweeping/results.py",
}

#: Libraries that an extra installs: each is imported in one file, inside a function.
OPTIONAL = {
    "datasets",
    "gguf",
    "pyarrow",
    "accelerate",
    "peft",
    "lm_eval",
    "plotly",
    "PIL",
    "fastapi",
    "uvicorn",
    "openai",
    "IPython",
    "vllm",
}


def room(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(node: ast.AST) -> list[str]:
    """Full names of all modules that are imported below a node, wherever the statement stands."""
    found = []
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            found += [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"relative import of {child.module}"
            assert child.module is not None
            # `from prunus import run` names a room too.
            names = [alias.name for alias in child.names] if child.module == "prunus" else []
            found += [f"prunus.{name}" for name in names] or [child.module]
    return found


def parametrize_files(files: list[Path]):
    return pytest.mark.parametrize("path", files, ids=name_of)


def file_imports(path: Path) -> set[str]:
    """The modules of the package that a file imports when it is loaded."""
    found: set[str] = set()
    for node in TREES[path].body:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # `from prunus.cli import arguments` loads a module of that package.
            found.update(
                full if (full := f"{node.module}.{alias.name}") in MODULES else str(node.module)
                for alias in node.names
            )
    return found & set(MODULES)


def test_files_import_each_other_without_circles():
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"circle: {' -> '.join((*above, name))}"
        if name in done:
            return
        for other in sorted(file_imports(MODULES[name])):
            visit(other, (*above, name))
        done.add(name)

    for name in MODULES:
        visit(name, ())


def test_the_list_of_rooms_is_complete():
    assert {room(path) for path in FILES} <= set(ROOMS)


@parametrize_files(FILES)
def test_imports_run_downwards(path):
    here = room(path)
    modules = [name.split(".") for name in imports(TREES[path])]
    rooms = {
        parts[1] if len(parts) > 1 else "__init__" for parts in modules if parts[0] == "prunus"
    }
    above = rooms - {here} - set(ROOMS[: ROOMS.index(here)])
    assert not above, f"{name_of(path)} may not import {above}"
    assert "torch" not in {parts[0] for parts in modules} or name_of(path) not in WITHOUT_TORCH
    for library in {parts[0] for parts in modules} & set(LIBRARIES):
        assert here in LIBRARIES[library], f"{name_of(path)} may not import {library}"


@pytest.mark.parametrize("library", sorted(OPTIONAL))
def test_optional_libraries_are_imported_in_one_file_inside_a_function(library):
    users = [
        path for path in FILES if library in {name.split(".")[0] for name in imports(TREES[path])}
    ]
    assert len(users) <= 1, f"{library} is imported in {[name_of(path) for path in users]}"
    for path in users:
        outside = [
            node
            for node in TREES[path].body
            if not isinstance(node, ast.FunctionDef | ast.ClassDef)
        ]
        assert all(
            library not in {name.split(".")[0] for name in imports(node)} for node in outside
        )


@parametrize_files(FILES)
def test_nothing_is_unpickled_or_executed(path):
    modules = {name.split(".")[0] for name in imports(TREES[path])}
    assert not modules & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {
                ("torch", "load"),
                ("np", "load"),
                ("numpy", "load"),
            }
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"eval", "exec"}
        if isinstance(node, ast.keyword):
            assert node.arg not in {"allow_pickle", "shell"}
            trusts = isinstance(node.value, ast.Constant) and node.value.value is True
            assert not (node.arg == "trust_remote_code" and trusts)


def width(line: str) -> int:
    """Columns of a line, without directives for tools and without combining marks such as in X̂."""
    code = line.partition("  # type: ")[0].partition("  # noqa")[0]
    return sum(not unicodedata.combining(letter) for letter in code) if " " in code.strip() else 0


@parametrize_files(FILES)
def test_files_are_short_and_say_what_they_are(path):
    assert path.stem not in {"utils", "util", "helpers", "common", "misc"}
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 400, f"{name_of(path)} has {len(lines)} lines"
    wide = [number for number, line in enumerate(lines, 1) if width(line) > 100]
    assert not wide, f"{name_of(path)} has lines of more than 100 columns: {wide}"
    assert not lines or ast.get_docstring(TREES[path]), f"{name_of(path)} has no docstring"


def test_the_package_has_few_rooms():
    """Few rooms and __init__.py; __main__.py and py.typed are for Python's tools."""
    found = {path.name for path in ROOT.iterdir()} - {"__pycache__", "__main__.py", "py.typed"}
    assert len(found) <= 18, sorted(found)
    assert all(name == "__init__.py" or (ROOT / name).is_dir() for name in found)


def test_a_recipe_is_read_without_torch():
    code = "import sys, prunus.pruning.recipe, prunus.sweeping; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_report_is_read_without_torch():
    code = "import sys, prunus.reporting.sources; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@parametrize_files([path for path in FILES if path.name != "__main__.py"])
def test_public_names_exist_and_are_explained(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    module = import_module(".".join(parts).removesuffix(".__init__"))
    public = getattr(module, "__all__", [])
    assert len(set(public)) == len(public)
    defined = {
        node.name: node
        for node in TREES[path].body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    for name in public:
        assert hasattr(module, name), f"{module.__name__} has no {name}"
        if name in defined:
            assert ast.get_docstring(defined[name]), f"{module.__name__}.{name} has no docstring"


def test_forward_hooks_are_the_block_walks_alone():
    for path in FILES:
        if path.parent != ROOT / "pruning" / "block":
            assert "register_forward" not in path.read_text(encoding="utf-8"), name_of(path)


def test_no_module_hides_a_public_name():
    """`prunus.prune` is a function. A module of that name would replace it when it is imported."""
    modules = {path.stem for path in ROOT.iterdir()} - {"__init__"}
    assert not modules & set(prunus.__all__)
    assert {"compress", "evaluate", "pack", "prune", "recover", "report", "sweep", "unpack"} <= set(
        prunus.__all__
    )
    assert set(prunus.__all__) <= set(dir(prunus))
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        prunus.prun  # noqa: B018
