"""Programs that never import prunus, and what its entry points do for them."""

import os
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from packed_reference import pruned_checkpoint
from places import REPOSITORY
from prunus import pack

#: A program that has nothing to do with packed models.
DENSE = """
import io, pickle
import torch, transformers.quantizers.auto
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.model import LoraModel

config = LoraConfig(target_modules=["0"])
pickle.dumps(config)
torch.save(get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config), io.BytesIO())
print(LoraConfig.__post_init__.__globals__["__name__"])
print(LoraModel._create_new_module.__globals__["__name__"])
"""
LOAD = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(model)
"""


def installation(folder: Path) -> Path:
    """A folder with the entry points of pyproject.toml, as an installation writes them."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    home = folder / "installed" / "prunus-0.dist-info"
    home.mkdir(parents=True)
    (home / "METADATA").write_text("Metadata-Version: 2.1\nName: prunus\nVersion: 0\n")
    (home / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return home.parent


@pytest.fixture
def installed(tmp_path) -> Path:
    return installation(tmp_path)


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("entry points")
    pack(pruned_checkpoint(folder / "pruned"), folder / "packed")
    return folder / "packed"


def run(code: str, installed: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    path = [str(installed), str(REPOSITORY / "src")]
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(path), "TORCH_DEVICE_BACKEND_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def transformers_first(packed, tmp_path_factory) -> subprocess.CompletedProcess[str]:
    """A program that imports transformers, and then loads a packed model."""
    code = f"import transformers.quantizers.auto\n{LOAD}"
    return run(code, installation(tmp_path_factory.mktemp("transformers")), packed)


@pytest.fixture(scope="module")
def peft_first(packed, tmp_path_factory) -> subprocess.CompletedProcess[str]:
    """A program that adapts a model of its own with peft, and then loads a packed one."""
    pytest.importorskip("peft")
    code = f"import peft\n{DENSE}{LOAD}"
    return run(code, installation(tmp_path_factory.mktemp("peft")), packed)


@pytest.mark.parametrize("program", ["transformers_first", "peft_first"])
def test_a_packed_checkpoint_loads_without_an_import_of_prunus(program, request):
    """Its first module leads to the import of torch, and is then half imported."""
    done = request.getfixturevalue(program)
    assert done.returncode == 0, done.stderr
    assert "PackedLinear" in done.stdout


def test_programs_that_use_peft_find_nothing_of_prunus_in_it(peft_first):
    names = peft_first.stdout.split()[:2]
    assert names == ["peft.tuners.lora.config", "peft.tuners.lora.model"], peft_first.stderr


#: What torch does with its group of entry points when it is imported.
TORCH = """
from importlib.metadata import entry_points

for point in entry_points(group="torch.backends"):
    try:
        point.load()()
    except Exception as fault:
        raise RuntimeError(f"Failed to load the backend extension: {point.name}") from fault
"""
BROKEN = {
    "gone": {},
    "half removed": {"prunus/__init__.py": ""},
    "its import fails": {"prunus/__init__.py": "raise RuntimeError('broken')"},
    "another program": {"prunus.py": "answer = 42"},
}


@pytest.mark.parametrize("options", [[], ["-W", "error"]])
@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_prunus_ends_no_import(broken, options, installed):
    """Of torch, or of transformers, of any version: the stand-ins have neither a table nor a part
    that prunus needs."""
    files = {
        "torch/__init__.py": TORCH,
        "transformers/__init__.py": "",
        "transformers/quantizers/__init__.py": "",
        "transformers/quantizers/auto.py": "",
        "prunus_autoload.py": (REPOSITORY / "src" / "prunus_autoload.py").read_text(),
        **BROKEN[broken],
    }
    for name, text in files.items():
        path = installed / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    code = (
        "import torch, sys; assert 'prunus' not in sys.modules; import transformers.quantizers.auto"
    )
    done = subprocess.run(
        [sys.executable, "-S", *options, "-c", code],
        cwd=installed,
        env={"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("prunus is installed") == (not options)


def test_a_broken_prunus_ends_no_program_that_uses_peft(installed):
    pytest.importorskip("peft")
    (installed / "prunus").mkdir()
    (installed / "prunus" / "__init__.py").write_text("raise RuntimeError('broken')")
    done = run(DENSE, installed)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("prunus is installed, and cannot be used: broken") == 1


def test_an_editable_install_leaves_nothing_that_torch_would_call():
    """Its metadata would stay in the environment when the clone is moved."""
    pytest.importorskip("setuptools", minversion="77")
    backend = runpy.run_path(str(REPOSITORY / "build_backend.py"))
    groups = [
        "[console_scripts]\na = b:c",
        "[torch.backends]\nd = e:f",
        "[other.plugins]\ng = h:i",
    ]
    assert backend["without_group"]("\n\n".join(groups)) == f"{groups[0]}\n\n{groups[2]}"
