"""What `inspect` says of a GGUF file: what it holds, whatever its name says."""

import json
from pathlib import Path

import pytest
import torch

import prunus
from command_line import call
from gguf_cases import compress, gguf_checkpoint, write_container
from prunus.formats.gguf.audit import FileAudit
from prunus.formats.gguf.file import new_fields
from prunus.formats.gguf.types import TYPES, type_for
from tiny_gguf import tiny_llama, write_gguf


def narrow(folder: Path, name: str, kind: str, **facts: int) -> Path:
    """A file whose widths 256 does not divide, with all matrices in one type."""
    write_gguf(tiny_llama(), folder / name, kind, facts=facts)
    return folder / name


@pytest.mark.parametrize(
    ("preset", "wanted"), [("Q2_K", "Q2_K"), ("Q4_K_M", "Q4_K"), ("Q6_K", "Q6_K")]
)
def test_types_that_a_width_forced_on_a_preset_are_named(preset, wanted, tmp_path):
    """llama-quantize took `type_for` of the preset's type; the bytes are those of one more type."""
    kind = type_for(wanted, 32).name
    path = narrow(tmp_path, f"tiny.{preset.lower()}.gguf", kind, file_type=7)
    audit = FileAudit.of(path)
    assert audit.presets == {"name": preset, "general.file_type": "Q8_0"}
    assert audit.bits == dict.fromkeys(("linears", "embedding", "head"), TYPES[kind].bits)
    matrices = {each["tensor"]: each for each in audit.replaced}
    assert len(matrices) == audit.types[kind]["tensors"] == 2 * 7 + 2
    assert all(wanted in each["in_place_of"] for each in audit.replaced)
    down = matrices["blk.1.ffn_down.weight"]
    most = max(TYPES[x].bits for x in down["in_place_of"])
    assert (down["columns"], down["type"]) == (64, kind)
    assert down["more_bytes"] == round((TYPES[kind].bits - most) * 32 * 64 / 8)
    assert audit.other_types == {} and sum(x["bytes"] for x in audit.types.values()) < audit.bytes


def test_types_that_no_width_explains_are_only_counted(tmp_path):
    """Q5_1 takes the place of Q5_K, which Q2_K never has; Q8_0 is what its name says."""
    for name, kind, others in (("Q2_K", "Q5_1", {"Q5_1": 16}), ("Q8_0", "Q8_0", {})):
        audit = FileAudit.of(narrow(tmp_path, f"tiny-{name}.gguf", kind))
        assert (audit.replaced, audit.other_types) == ([], others)


@pytest.mark.parametrize(
    ("kind", "grid"),
    [("F16", "Q4_0's grid"), ("Q8_0", "a grid of 4 bits"), ("Q5_1", "a grid of 4 bits")],
)
def test_linears_that_were_rounded_before_are_counted(kind, grid, tmp_path):
    """Only weights that had been in Q4_0 have four bits; those of any type have its own."""
    model = tiny_llama()
    write_gguf(model, tmp_path / "fresh.gguf", kind)
    model.load_state_dict(write_gguf(model, tmp_path / "first.gguf", "Q4_0"))
    write_gguf(model, tmp_path / "again.gguf", kind)
    for name, found in {"fresh": {}, "first": {}, "again": {grid: 14}}.items():
        assert FileAudit.of(tmp_path / f"{name}.gguf", reads_weights=True).coarser == found
    printed = call("inspect", tmp_path / "again.gguf", tmp_path / "first.gguf").stdout
    assert f"14 on {grid}" in printed


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("Llama-3.2-1B.i1-Q3_K.gguf", "Q3_K_M"),
        ("x-f32-to-iq2_xxs.gguf", "IQ2_XXS"),
        ("x-UD-Q4_K_XL.gguf", None),
        ("xQ4_0.gguf", None),
    ],
)
def test_the_preset_is_the_last_one_in_the_name(name, preset, tmp_path):
    assert FileAudit.of(narrow(tmp_path, name, "Q8_0")).presets.get("name") == preset


def test_a_file_of_prunus_is_judged_by_no_preset(tmp_path):
    dense = gguf_checkpoint(tmp_path / "dense", num_hidden_layers=1)
    compress(dense, tmp_path / "x-Q2_K.gguf", type="Q5_K", rounding="nearest")
    found = prunus.inspect(tmp_path / "x-Q2_K.gguf")
    (audit,) = found.audits
    assert audit.by_prunus and not audit.replaced and not audit.other_types
    assert audit.bits["linears"] == found.bits == 5.5 and found.unread is None
    assert next(iter(found.tables())).title == "What the file is"


def test_two_files_stand_side_by_side_and_for_programs_as_numbers(tmp_path):
    one = narrow(tmp_path, "a-Q2_K.gguf", "Q4_0")
    other = narrow(tmp_path, "b.gguf", "Q8_0")
    printed = call("inspect", one, other, "--json", tmp_path / "out.json").stdout
    assert "a-Q2_K.gguf" in printed and "16 tensors" in printed
    assert "blk.*.attn_q.weight" in printed and "Q2_K or Q3_K" in printed
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["linears"] == [] and content["blocks"] == 2
    assert [each["bits"]["linears"] for each in content["audits"]] == [4.5, 8.5]
    assert content == json.loads(json.dumps(prunus.inspect(one, other).as_dict()))


def test_a_file_that_transformers_does_not_read_is_described_without_its_linears(tmp_path):
    fields = new_fields("unheard-of")
    fields.add_uint32("unheard-of.block_count", 1)
    fields.add_string("quantize.imatrix.file", "imatrix.gguf")
    fields.add_uint32("quantize.imatrix.chunks_count", 7)
    contents = {"blk.0.ffn_up.weight": torch.ones(8, 4), "blk.0.ffn_norm.weight": torch.ones(4)}
    path = write_container(tmp_path / "x.gguf", contents, fields.fields)
    found = prunus.inspect(path)
    assert found.linears == () and "transformers cannot import this file" in found.unread
    assert found.audits[0].importances == {"file": "imatrix.gguf", "chunks_count": 7}
    assert found.audits[0].bits == {"linears": 16}
    printed = call("inspect", path).stdout
    assert "imatrix.gguf, 7 chunks" in printed and "not import this file" in printed.replace(
        "\n", " "
    )
    with pytest.raises(ValueError, match="cannot import"):
        prunus.inspect(path, tmp_path)


def test_a_damaged_file_is_refused_in_one_sentence(tmp_path):
    path = narrow(tmp_path, "x.gguf", "Q8_0")
    path.write_bytes(path.read_bytes()[:-9000])
    assert "x.gguf: the GGUF file is truncated or damaged" in call("inspect", path, status=2).stderr
    path.write_bytes(b"no file of llama.cpp")
    assert "x.gguf: " in call("inspect", path, status=2).stderr
