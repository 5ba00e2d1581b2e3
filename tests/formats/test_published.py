"""What is published of a run: a card whose options can be read back, and no folder of this host."""

import re
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("gguf")

import prunus
from gguf_cases import gguf_checkpoint, known_layout, known_tensors, write_container
from prunus.pruning.recipe import Recipe
from prunus.recovery.recovery_options import RecoveryOptions
from prunus.rounding.compression_recipe import CompressionRecipe
from prunus.structure.structure_record import StructureRecipe

FOLDER = '/home/some one/secret "place"'
RECIPES = [
    Recipe(calibration=f"{FOLDER}/a.txt", method=f"{FOLDER}/own.py:prune", sparsity=0.5),
    CompressionRecipe(
        calibration=f"{FOLDER}/a.txt",
        types_from=f"{FOLDER}/types.txt",
        template=f"{FOLDER}/full.gguf",
    ),
    CompressionRecipe(size="900MB", fast_on=f"{FOLDER}/times.json", ignore=("*\\n", "b"), seed=3),
    RecoveryOptions(text=f"{FOLDER}/a.txt", mode="masked"),
    StructureRecipe(calibration=f"{FOLDER}/a.txt", blocks=1),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: type(recipe).__name__)
def test_the_toml_of_a_recipe_is_the_recipe(recipe, tmp_path):
    for each in (recipe, recipe.without_folders()):
        (tmp_path / "recipe.toml").write_text(each.to_toml())
        values = tomllib.loads(each.to_toml())
        assert values == {
            name: list(x) if isinstance(x, tuple) else str(x) if isinstance(x, Path) else x
            for name, x in each.model_dump().items()
            if x is not None
        }
        assert type(each).read(tmp_path / "recipe.toml", {}) == each
    assert "secret" not in each.to_toml()


@pytest.fixture(scope="module")
def secret(tmp_path_factory) -> Path:
    """A folder with a model, a text and a template, whose name nothing may tell."""
    folder = tmp_path_factory.mktemp("secret")
    dense = gguf_checkpoint(folder / "dense", hidden_size=32, intermediate_size=64)
    (folder / "text.txt").write_text("Some words, again and again. " * 200)
    write_container(folder / "full.gguf", known_tensors(dense), known_layout(dense)[0].fields)
    return folder


@pytest.mark.parametrize(
    ("command", "name", "options"),
    [
        ("compress", "x.gguf", {"type": "Q4_0", "template": "full.gguf"}),
        ("compress", "x", {"bits": 6, "format": "mlx"}),
        ("compress", "x", {"bits": 4, "format": "compressed-tensors"}),
        ("prune", "x", {"sparsity": 0.5}),
        ("shrink", "x", {"blocks": 1}),
    ],
)
def test_no_published_file_names_a_folder_of_the_host(command, name, options, secret, tmp_path):
    options = {key: secret / x if key == "template" else x for key, x in options.items()}
    text = {"calibration": str(secret / "text.txt"), "samples": 8, "seqlen": 16}
    record = getattr(prunus, command)(secret / "dense", tmp_path / name, **text, **options)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    # The record beside a folder's weights is what a later run goes on with.
    published = [path for path in files if not path.name.startswith("prunus")]
    assert len(published) > 2
    assert [path.name for path in published if b"secret" in path.read_bytes()] == []
    [card] = [path.read_text() for path in published if path.name.endswith("README.md")]
    assert "text.txt" in card
    toml = re.search(r"```toml\n(.*?)```", card, re.DOTALL)
    expected = record.recipe.without_folders().to_toml()
    assert tomllib.loads(toml[1]) == tomllib.loads(expected)
