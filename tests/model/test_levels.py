"""Whether a checkpoint's weights are known to have been rounded before."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import prunus
from prunus.compression.compress import Compression
from prunus.engine.run_options import RunOptions
from prunus.formats.gguf.types import TYPES
from prunus.model.checkpoint.tensor_files import Checkpoint
from prunus.model.levels import value_bits
from prunus.pruning.manifest import Manifest
from prunus.reporting.tables import plan_facts
from prunus.rounding.compression_recipe import CompressionRecipe
from prunus.rounding.group_fits import round_to_nearest
from tiny import token_ids
from tiny_tokenizer import dense_checkpoint

ROWS, COLUMNS = 64, 512


def weights(kind: str = "normal") -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(ROWS, COLUMNS, generator=generator)
    uniform = torch.rand(ROWS, COLUMNS, generator=generator)
    return {
        "normal": normal * 0.02,
        "tiny": normal * 1e-6,
        "heavy tails": normal / normal.roll(1, 0).abs().clamp_min(0.1),
        "uniform": uniform - 0.5,
        "two sides": normal.sign() * (1 + 0.1 * normal.roll(1, 0)),
        "rows of many sizes": normal * 10 ** (4 * uniform[:, :1]),
        "of low rank": normal[:, :4] @ normal[:4],
    }[kind]


def pruned(weight: torch.Tensor, sparsity: float) -> torch.Tensor:
    size = weight.abs()
    return weight * (size > size.flatten().quantile(sparsity))


def bits_of(matrix: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> int | None:
    return value_bits(matrix.to(dtype).flatten())


def unpacked(kind: str, weight: torch.Tensor) -> torch.Tensor:
    return round_to_nearest(weight, TYPES[kind], None).dense().reshape(weight.shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("kind", "bits"),
    [("Q4_0", 4), ("Q4_1", 4), ("Q4_K", 4), ("IQ4_NL", 4), ("IQ4_XS", 4), ("Q5_0", 5),
     ("Q5_1", 5), ("Q5_K", 5), ("Q2_K", 3), ("Q3_K", 4)],
)  # fmt: skip
def test_weights_of_few_bits_are_known_in_every_dtype(kind, bits, dtype):
    for shape in ("normal", "uniform", "rows of many sizes"):
        weight = unpacked(kind, weights(shape) / weights(shape).abs().max())
        assert bits_of(weight, dtype=dtype) == bits
        # Zeros that a mask adds neither hide a grid nor make one.
        assert bits_of(pruned(weight, 0.5), dtype=dtype) in (bits - 1, bits)


def test_one_scale_for_more_weights_or_for_all_is_known_too():
    weight = weights()
    groups = weight.reshape(-1, 128)
    scales = groups.abs().amax(dim=1, keepdim=True) / 7
    assert bits_of(((groups / scales).round() * scales).reshape(weight.shape)) == 4
    assert bits_of(weight.sign() * (weight.abs() > 0.01)) == 1


@pytest.mark.parametrize("kind", ["normal", "tiny", "heavy tails", "uniform", "two sides",
                                  "rows of many sizes", "of low rank"])  # fmt: skip
def test_ordinary_weights_lie_on_no_grid(kind):
    weight = weights(kind)
    # With sharp edges, the few that are left have nearly one size, as if on a grid.
    most = [] if kind in ("uniform", "two sides") else [0.8, 0.95, 0.999]
    for sparsity in (0.0, 0.5, *most):
        assert bits_of(pruned(weight, sparsity)) is None


@pytest.mark.parametrize("kind", ["Q6_K", "Q8_0"])
def test_grids_of_many_bits_and_few_weights_are_not_told_from_ordinary_weights(kind):
    assert bits_of(unpacked(kind, weights())) is None
    assert bits_of(unpacked("Q4_0", weights())[0, :31]) is None


# --- what a user sees ---


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A model of three blocks, of which one or two are in 4 bits and unpacked: most decide."""
    folder = tmp_path_factory.mktemp("levels")
    options: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 3}
    models = {name: folder / name for name in ("ordinary", "rounded")}
    for name, path in models.items():
        dense_checkpoint(path, dtype=torch.bfloat16, **options)
        tensors = load_file(path / "model.safetensors")
        for key, tensor in tensors.items():
            blocks = (".layers.0.", ".layers.2.") if name == "rounded" else (".layers.1.",)
            if any(block in key for block in blocks) and tensor.dim() == 2:
                tensors[key] = unpacked("Q4_1", tensor.float()).bfloat16()
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return models


@pytest.mark.parametrize(("name", "bits"), [("rounded", 4), ("ordinary", None)])
def test_runs_and_plans_say_once_that_the_weights_were_rounded_before(name, bits, models, tmp_path):
    said: list[str] = []
    options: dict[str, Any] = {"calibration": token_ids(2), "announce": said.append}
    small = prunus.compress(models[name], tmp_path / "small", 4, **options)
    pruned = prunus.prune(models[name], tmp_path / "pruned", "magnitude", 0.5, **options)
    plan = Compression(
        models[name],
        None,
        CompressionRecipe(bits=4, calibration="python-docs", seqlen=32),
        RunOptions(),
    ).plan()
    assert small.grid_bits == pruned.grid_bits == plan.grid_bits == bits
    assert Manifest.load(tmp_path / "pruned").grid_bits == bits
    sentence = "come from a file of about 4 bits"
    for folder, record in (("small", small), ("pruned", pruned)):
        card = (tmp_path / folder / "README.md").read_text()
        texts = [*map(str, said), str(record.table()), card]
        assert sum(text.count(sentence) for text in texts) == (1 if bits else 0)
    said_before = dict(plan_facts(plan.describe()).items).get("weights before")
    assert said_before == ("rounded to about 4 bits" if bits else None)


def test_the_card_says_size_and_command(models, tmp_path):
    prunus.prune(models["ordinary"], tmp_path / "out", "magnitude", 0.5, calibration=token_ids(2))
    card = (tmp_path / "out" / "README.md").read_text()
    nbytes = sum(x.nbytes for x in Checkpoint(tmp_path / "out").tensors.values())
    assert f"The files with the weights take {nbytes / 1e3:.1f} kB" in card
    assert "The command was `prunus prune ordinary OUTPUT` with these options:" in card
