"""Weights in dtypes that are no plain numbers, and numbers that no computation bears."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("gguf")

import prunus
from changes import edit_tensors
from gguf_cases import gguf_checkpoint
from tiny import token_ids

KEY = "model.layers.1.mlp.down_proj.weight"
OPENED: dict[str, Callable[[Path, Path], object]] = {
    "prune": lambda model, out: prunus.prune(model, out, calibration=token_ids()),
    "compress": lambda model, out: prunus.compress(model, out, 4, calibration=token_ids()),
    "shrink": lambda model, out: prunus.shrink(model, out, blocks=1, calibration=token_ids()),
    "perplexity": lambda model, out: prunus.perplexity(model, seqlen=8),
    "inspect": lambda model, out: prunus.inspect(model),
    "load": lambda model, out: prunus.load(model),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dtypes") / "dense"
    return gguf_checkpoint(folder, hidden_size=32, intermediate_size=64)


def with_weight(dense: Path, folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    shutil.copytree(dense, folder)
    edit_tensors(folder, lambda tensors: tensors.update({KEY: change(tensors[KEY])}))
    return folder


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.bool])
@pytest.mark.parametrize("command", OPENED)
def test_codes_that_no_configuration_explains_are_refused_by_name(command, dtype, dense, tmp_path):
    model = with_weight(dense, tmp_path / "model", lambda weight: weight.to(dtype))
    with pytest.raises(ValueError, match=rf"{KEY} as {str(dtype)[6:]}, and its config.json has no"):
        OPENED[command](model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("code", ["F4", "C64"])
def test_a_dtype_of_other_programs_is_refused_with_what_to_give(code, dense, tmp_path):
    model = with_weight(dense, tmp_path / "model", lambda weight: weight.to(torch.float8_e5m2))
    path = model / "model.safetensors"
    content = path.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:end])
    header[KEY] |= {"dtype": code, "shape": [{"F4": 4096, "C64": 256}.get(code, 2048)]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[end:])
    with pytest.raises(ValueError, match=f"dtype {code}, which is not supported; give the model"):
        prunus.inspect(model)


@pytest.mark.parametrize("value", [1e30, -1e16, torch.inf, torch.nan])
@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4, "format": "compressed-tensors"},
        {"bits": 6, "format": "mlx"},
        *({"bits": 6, "rounding": x} for x in ("feedback", "nearest")),
        {"type": "Q4_0"},
    ],
    ids=str,
)
def test_a_weight_beyond_all_numbers_is_refused_by_name(options, value, dense, tmp_path):
    name = "out" if "format" in options else "out.gguf"

    def change(weight: torch.Tensor) -> torch.Tensor:
        weight[0, 0] = value
        return weight

    model = with_weight(dense, tmp_path / "model", change)
    module = KEY.removesuffix(".weight")
    message = rf"({KEY} holds weights that are not finite|{module}: its weights are too large for)"
    with pytest.raises(ValueError, match=message):
        prunus.compress(model, tmp_path / name, calibration=token_ids(), **options)
