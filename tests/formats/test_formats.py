"""The table of the formats: one entry opens the models of a further format."""

import shutil
from types import SimpleNamespace

import prunus
from prunus.formats.codec import Codec
from prunus.model import formats
from tiny_tokenizer import dense_checkpoint


class ZipFormat(Codec):
    """A checkpoint folder as one zip file."""

    @staticmethod
    def unpack(path, dest, *, overwrite=False, dtype="bfloat16", progress=None):
        shutil.unpack_archive(path, dest, "zip")
        return {"bytes": path.stat().st_size}

    @staticmethod
    def read_record(path):
        return SimpleNamespace(stored_types={"model.layers.0.self_attn.q_proj": ("Z", 3.0)})


def test_one_entry_lets_load_and_inspect_open_a_file_of_a_new_format(tmp_path, monkeypatch):
    dense = dense_checkpoint(tmp_path / "dense")
    file = shutil.make_archive(str(tmp_path / "model"), "zip", dense)
    entry = formats.FormatEntry("zip", lambda: ZipFormat, ".zip")
    monkeypatch.setattr(formats, "FORMATS", [*formats.FORMATS, entry])
    expected = prunus.load(dense).model.state_dict()
    opened = prunus.load(file).model.state_dict()
    assert all(opened[name].equal(tensor) for name, tensor in expected.items())
    linears = {linear.name: linear for linear in prunus.inspect(file).linears}
    q, k = (linears[f"model.layers.0.self_attn.{name}_proj"] for name in "qk")
    assert (q.dtype, q.bits, k.bits) == ("Z", 3.0, None)
