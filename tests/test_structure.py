"""The structure of the package: which room imports which, its size, its examples, its promises."""

import ast
import doctest
import re
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from importlib import import_module, util
from pathlib import Path

import pytest

import prunus

#: The most lines of code in a file, without its docstrings, comments and blank lines.
FILE_LINES = 400

ROOT = Path(prunus.__file__).parent
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.rglob("*.py"))}

#: Name of a module -> its file.
MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in TREES
}

#: The rooms from the bottom to the top. A room may import only from rooms before it in this list.
ROOMS = [
    "words", "document", "kernels", "hardware", "distributed", "model", "options", "methods",
    "calibration", "engine", "training", "rounding", "formats", "pruning", "compression",
    "structure", "recovery", "evaluation", "sweeping", "reporting", "cli", "__main__", "__init__",
]  # fmt: skip

#: Library -> the only rooms that may import it. What is not here may be imported by all.
LIBRARIES = {
    "typer": {"cli"},
    "rich": {"reporting", "cli", "engine"},
    "greenlet": {"engine"},
    "huggingface_hub": {"model"},
    "transformers": {"model", "calibration", "formats", "evaluation", "cli"},
    "torch": set(ROOMS) - {"options", "cli", "reporting", "__init__", "__main__"},
}

#: Libraries that an extra installs: each is imported in one file, inside a function.
OPTIONAL = [
    "datasets", "gguf", "accelerate", "peft", "lm_eval", "PIL",
    "matplotlib", "pandas",
]  # fmt: skip

#: What must be read without torch: the recipe of each verb, its record, and reports of results.
WITHOUT_TORCH = [
    "prunus.pruning.recipe", "prunus.pruning.manifest",
    "prunus.rounding.compression_recipe", "prunus.rounding.compression_record",
    "prunus.structure.structure_record", "prunus.engine.run_record", "prunus.sweeping.results",
    "prunus.evaluation.eval_options", "prunus.evaluation.eval_records",
    "prunus.reporting.write",
]  # fmt: skip

#: Public verbs: the only functions with more than eight parameters.
VERBS = {
    "calibration.training_text.training_text",
    "cli.plan.plan",
    "recovery.recover.recover",
}


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(node: ast.AST) -> Iterator[str]:
    """Full names of all that is imported below a node, also in functions and for types alone."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"relative import of {child.module}"
            # `from prunus.cli import arguments` imports a module of that package.
            for full in (f"{child.module}.{alias.name}" for alias in child.names):
                module = str(child.module)
                yield full if full in MODULES or module == "prunus" else module


def libraries(node: ast.AST) -> set[str]:
    return {name.partition(".")[0] for name in imports(node)}


def width(line: str) -> int:
    """Columns of a line, without directives for tools and without combining marks such as in X̂."""
    code = line.partition("  # type: ")[0].partition("  # noqa")[0]
    return sum(not unicodedata.combining(letter) for letter in code) if " " in code.strip() else 0


def test_rooms_import_downwards_without_circles():
    """The list of rooms is complete, and `from x import y` runs down it wherever it is written."""
    found = {path.name.removesuffix(".py") for path in ROOT.iterdir()}
    assert found - {"__pycache__", "py.typed"} == {*ROOMS}
    inside = {name: {*imports(TREES[path])} & {*MODULES} for name, path in MODULES.items()}
    for path, tree in TREES.items():
        here = room(path)
        parts = [name.split(".") for name in imports(tree)]
        rooms = {
            part[1] if len(part) > 1 and part[1] in ROOMS else "__init__"
            for part in parts
            if part[0] == "prunus"
        }
        above = rooms - {here, *ROOMS[: ROOMS.index(here)]}
        assert not above, f"{path} may not import {above}"
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"circle: {' -> '.join((*above, name))}"
        if name not in done:
            for other in sorted(inside[name]):
                visit(other, (*above, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def test_libraries_are_imported_where_they_belong():
    for path, tree in TREES.items():
        for library in libraries(tree) & set(LIBRARIES):
            assert room(path) in LIBRARIES[library], f"{path} may not import {library}"
        loaded = [
            node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)
        ]
        at_once = set().union(*map(libraries, loaded)) & set(OPTIONAL)
        assert not at_once, f"{path} imports {at_once} outside a function"
    for library in OPTIONAL:
        users = [path for path, tree in TREES.items() if library in libraries(tree)]
        assert len(users) <= 1, f"{library} is imported in {users}"
    code = f"import sys, {', '.join(WITHOUT_TORCH)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_one_module_knows_which_weight_is_the_head():
    asking = {path.stem for path, tree in TREES.items() if "get_output_embed" in ast.dump(tree)}
    # An import ties the weights of a model that transformers has loaded.
    assert asking == {"vocabulary_weights", "import_checkpoint"}


def test_a_format_is_eight_methods_and_no_class_has_more_than_thirty():
    from prunus.formats.codec import Codec

    methods = [name for name in dir(Codec) if name.islower() and not name.startswith("_")]
    assert len(methods) <= 8, methods
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                count = sum(isinstance(each, ast.FunctionDef) for each in node.body)
                assert count <= 30, f"{path}: {node.name} has {count} methods"


def test_the_engine_loads_no_command_pruning_no_format_and_a_folder_of_mlx_no_gguf():
    """In one new interpreter, one after the other."""
    steps = (
        "import prunus.engine.linear_command, prunus.engine.forecast",
        "prunus.prune",
        "prunus.compress; prunus.model.formats.format_named('mlx').load_codec()",
    )
    code = "; ".join(f"{step}; print(*sys.modules)" for step in ("import sys, prunus", *steps))
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    _, engine, pruning, mlx = (set(line.split()) for line in done.stdout.splitlines())
    assert not {"prunus.pruning", "prunus.rounding", "prunus.compression"} & engine
    assert not {"prunus.compression", "prunus.formats.codec", "prunus.formats.gguf"} & pruning
    assert "prunus.formats.gguf" not in mlx


def test_nothing_is_unpickled_or_executed():
    for path, tree in TREES.items():
        assert not libraries(tree) & {
            "pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"
        }  # fmt: skip
        for node in ast.walk(tree):
            at = f"{path}:{getattr(node, 'lineno', '')}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                name = f"{node.value.id}.{node.attr}"
                assert name not in {"torch.load", "np.load", "numpy.load"}, at
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec"}, at
            if isinstance(node, ast.keyword):
                assert node.arg not in {"allow_pickle", "shell"}, at
                trusts = isinstance(node.value, ast.Constant) and node.value.value is True
                assert not (node.arg == "trust_remote_code" and trusts), at
        if path.parent != ROOT / "engine" / "block":
            text = path.read_text(encoding="utf-8")
            assert "register_forward" not in text, f"{path}: forward hooks are the block walk's"


def docstrings(tree: ast.AST) -> set[ast.stmt]:
    """The statements below a node that are the docstring of something."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    return {
        node.body[0]
        for node in ast.walk(tree)
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None
    }


def code_lines(tree: ast.AST, lines: list[str]) -> int:
    """The number of lines of a file that hold code."""
    explained = {
        number
        for node in docstrings(tree)
        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    return sum(
        number not in explained and not line.lstrip().startswith("#") and bool(line.strip())
        for number, line in enumerate(lines, 1)
    )


def test_files_and_functions_are_short_and_say_what_they_are():
    for name, path in MODULES.items():
        assert path.stem not in {"utils", "util", "helpers", "common", "misc"}
        lines = path.read_text(encoding="utf-8").splitlines()
        length = code_lines(TREES[path], lines)
        assert length <= FILE_LINES, f"{path} has {length} lines of code"
        wide = [number for number, line in enumerate(lines, 1) if width(line) > 100]
        assert not wide, f"{path} has lines of more than 100 columns: {wide}"
        assert not lines or ast.get_docstring(TREES[path]), f"{path} has no docstring"
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                few = len([a for a in given if a.arg not in {"self", "cls"}]) <= 8
                full = f"{name}.{node.name}".removeprefix("prunus.")
                assert few or full in VERBS, f"{full} has more than 8 parameters"
        if path.name != "__main__.py":
            module = import_module(name)
            public = getattr(module, "__all__", [])
            assert len(set(public)) == len(public), path
            assert all(hasattr(module, each) for each in public), path
            for node in TREES[path].body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in public:
                    assert ast.get_docstring(node), f"{name}.{node.name} has no docstring"


@pytest.mark.parametrize(
    "name", [name for name, path in MODULES.items() if ">>> " in path.read_text(encoding="utf-8")]
)
def test_examples_of_docstrings_run_and_print_what_they_say(name):
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.testmod(import_module(name), optionflags=options)
    assert result.attempted > 0
    assert result.failed == 0


def test_scripts_import_names_that_exist():
    """Those of benchmarks and docs, which most tests do not run."""
    repository = ROOT.parent.parent
    for path in [*repository.glob("benchmarks/*.py"), *repository.glob("docs/tools/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("prunus."):
                module = import_module(node.module)
                for alias in node.names:
                    # A module in a room is no attribute of it before something imported it.
                    assert hasattr(module, alias.name) or util.find_spec(
                        f"{node.module}.{alias.name}"
                    ), f"{path.name}: {node.module}.{alias.name}"


def test_a_room_that_lists_its_files_lists_all_of_them():
    """The public package lists its functions instead."""
    for path in ROOT.glob("*/**/__init__.py"):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        listed = set(re.findall(r"^ *(\w+)(?:\.\w+|/)? {2,}\S", text, re.MULTILINE))
        names = {each.name.partition(".")[0] for each in path.parent.iterdir()} - {"assets"}
        own = {name for name in names if name and not name.startswith("_")}
        assert not listed or listed == own, path


def test_no_module_hides_a_public_name():
    """`prunus.prune` is a function. A module of that name would replace it when it is imported."""
    assert not set(ROOMS[:-1]) & set(prunus.__all__)
    verbs = "compress evaluate prune recover report shrink sweep"
    assert set(verbs.split()) <= set(prunus.__all__) <= set(dir(prunus))
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        prunus.prun  # noqa: B018
