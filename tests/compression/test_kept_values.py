"""compress keeps weights that have the values of a type already, and names what it leaves out."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("gguf")
pytest.importorskip("accelerate")

from gguf import GGMLQuantizationType, quants

import prunus
from changes import edit_tensors
from command_line import call
from gguf_cases import compress, gguf_checkpoint
from prunus.formats.gguf.codec import GgufCodec
from prunus.formats.gguf.file import GgufFile
from prunus.formats.gguf.result import read_record
from tiny import stored, token_ids


def unpacked(kind: str, weight_OI: torch.Tensor) -> torch.Tensor:
    """A weight as llama.cpp rounds it, in bfloat16."""
    number = GGMLQuantizationType[kind]
    data = quants.quantize(weight_OI.float().numpy(), number)
    return torch.from_numpy(quants.dequantize(data, number)).bfloat16()


def rounded_model(folder: Path, kind: str, ordinary: str = "") -> Path:
    """A model whose matrices lie on a type's values; one of them only in its upper half."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, weight in tensors.items():
            if weight.dim() == 2:
                rows = len(weight) // 2 if ordinary and ordinary in name else len(weight)
                weight[:rows] = unpacked(kind, weight[:rows])

    gguf_checkpoint(folder, "qwen2", num_hidden_layers=1)
    edit_tensors(folder, change)
    return folder


def weights_in(path: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a file as a checkpoint."""
    GgufCodec.unpack(path, folder)
    return stored(folder)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "MXFP4"])
def test_a_file_has_the_values_that_the_weights_had_and_is_no_larger_than_they_need(kind, tmp_path):
    dense = rounded_model(tmp_path / "dense", kind)
    # Tensors are padded, so 8.5 bits are a little less than Q8_0 takes.
    asked = {"type": kind} if kind == "Q8_0" else {"bits": 8.4}
    record = compress(dense, tmp_path / "x.gguf", **asked)
    assert set(record.types.values()) == {kind}
    file, before = GgufFile.open(tmp_path / "x.gguf"), stored(dense)
    assert set(file.types) == {kind, "F32"}
    after = weights_in(tmp_path / "x.gguf", tmp_path / "again")
    for name, weight in before.items():
        assert float((after[name] == weight).float().mean()) > 0.9999, name
    linears = [x for block in record.blocks for x in block.linears.values()]
    assert all(x.notes["kept_values"] for x in linears)
    assert f"{len(linears)} of {len(linears)} linears keep their values" in str(record.table())
    said = call("plan", dense, tmp_path / "y.gguf", "--bits", 8, "--seqlen", 16).output
    assert f"100% lie on {kind}'s grid" in " ".join(said.split())
    assert f"100% lie on {kind}'s grid" in (tmp_path / "x.README.md").read_text()


def test_a_file_that_is_as_large_as_the_weights_need_has_no_place_for_a_record(tmp_path):
    dense = rounded_model(tmp_path / "dense", "Q4_0")
    with_record = compress(dense, tmp_path / "x.gguf", bits=8.0).size.after
    record = compress(dense, tmp_path / "y.gguf", size=with_record - 1)
    assert set(record.types.values()) == {"Q4_0"}
    assert record.size.after == (tmp_path / "y.gguf").stat().st_size < with_record - 1
    assert read_record(tmp_path / "y.gguf") is None
    assert read_record(tmp_path / "x.gguf") is not None


def test_half_a_lattice_is_rounded_as_ordinary_weights_are(tmp_path):
    dense = rounded_model(tmp_path / "dense", "Q4_0", ordinary="down_proj")
    record = compress(dense, tmp_path / "x.gguf", bits=8.0)
    after = weights_in(tmp_path / "x.gguf", tmp_path / "again")
    for block in record.blocks:
        for name, linear in block.linears.items():
            assert ("kept_values" in linear.notes) is ("down_proj" not in name)
    for name, weight in stored(dense).items():
        error = float((after[name] - weight).float().norm() / weight.float().norm())
        assert error < 0.02 if "down_proj" in name else torch.equal(after[name], weight), name


def test_each_weight_by_itself_keeps_its_values_too(tmp_path):
    dense = rounded_model(tmp_path / "dense", "Q5_0")
    compress(dense, tmp_path / "x.gguf", type="Q5_0", head_bits="none", rounding="nearest")
    after = weights_in(tmp_path / "x.gguf", tmp_path / "again")
    assert all(torch.equal(after[name], weight) for name, weight in stored(dense).items())


# --- blocks for further tokens ---


@pytest.fixture
def with_more(tmp_path) -> Path:
    """A model of two blocks with one more that predicts a further token."""
    folder = gguf_checkpoint(tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text())
    blocks = config["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    names = f"model.layers.{blocks}.eh_proj.weight", "mtp.fc.weight"
    more = {name: torch.randn(64, 64).bfloat16() for name in names}
    more["mtp.norm.weight"] = torch.ones(64).bfloat16()
    edit_tensors(folder, lambda tensors: tensors.update(more))
    return folder


@pytest.mark.parametrize("bits", [None, 4])
def test_folders_keep_further_blocks_and_say_so(bits, with_more, tmp_path):
    options = {"calibration": token_ids(2), "progress": None}
    if bits is None:
        record = prunus.prune(with_more, tmp_path / "out", "magnitude", 0.5, **options)
    else:
        record = prunus.compress(with_more, tmp_path / "out", bits, **options)
        described = json.loads((tmp_path / "out" / "config.json").read_text())
        assert "mtp.fc" in described["quantization_config"]["ignore"]
    before, after = stored(with_more), stored(tmp_path / "out")
    names = [name for name in before if "mtp" in name or "eh_proj" in name]
    assert len(names) == 3 and all(torch.equal(before[name], after[name]) for name in names)
    kept = "though the model does not use it: model.layers.N.eh_proj.weight, mtp.fc.weight"
    assert kept in " ".join(str(record.table()).split())


@pytest.mark.parametrize("name", ["x.gguf", "mlx"])
def test_files_that_no_program_reads_them_from_lack_further_blocks_and_say_so(
    name, with_more, tmp_path
):
    options = {} if name == "x.gguf" else {"format": "mlx"}
    record = compress(with_more, tmp_path / name, bits=5, **options)
    absent = ["model.layers.N.eh_proj.weight", "mtp.fc.weight"]
    assert record.unmatched == {"the checkpoint": absent}
    if name == "x.gguf":
        assert read_record(tmp_path / name).unmatched == record.unmatched
        card = (tmp_path / "x.README.md").read_text()
    else:
        assert not any("mtp" in key for key in stored(tmp_path / name))
        card = (tmp_path / name / "README.md").read_text()
    assert "it lacks: model.layers.N.eh_proj.weight, mtp.fc.weight." in card
    assert "Only the checkpoint has" in str(record.table())
