"""Headers of GGUF files: the bytes that llama.cpp's package writes, and back."""

import gguf
import numpy as np

from prunus.formats.gguf.file import new_fields
from prunus.formats.gguf.header import ListedTensor, StoredTensor, header_of, read_header


def test_a_header_has_the_bytes_that_the_package_writes_and_is_read_back(tmp_path):
    kinds = gguf.GGUFValueType
    scalars = {kind: kind.value for kind in kinds if kind not in (kinds.STRING, kinds.ARRAY)}
    values = [
        *(("one", value, kind) for kind, value in scalars.items()),
        *(("list", [value, 1], kinds.ARRAY, kind) for kind, value in scalars.items()),
        ("text", "ä \u2581", kinds.STRING),
        ("texts", ["a", "", "\u2581b"], kinds.ARRAY),
        ("numbers", [1, -2], kinds.ARRAY),
        ("floats", [0.1, 3.0], kinds.ARRAY),
        ("flags", [True, False], kinds.ARRAY),
        ("bytes", b"\0\xff", kinds.ARRAY),
    ]
    path = tmp_path / "x.gguf"
    theirs, ours = gguf.GGUFWriter(path, "llama"), new_fields("llama")
    for number, (name, *given) in enumerate(values):
        theirs.add_key_value(f"{name}.{number}", *given)
        ours.add_key_value(f"{name}.{number}", *given)
    for name, shape in {"a.weight": (2, 3), "b": (5,)}.items():
        theirs.add_tensor(name, np.zeros(shape, np.float32))
    theirs.write_header_to_file()
    theirs.write_kv_data_to_file()
    theirs.write_tensors_to_file()
    theirs.close()
    stored = [StoredTensor("a.weight", (2, 3), 0, 24, None), StoredTensor("b", (5,), 0, 20, None)]
    header = header_of(ours.fields, stored)
    assert path.read_bytes() == header + bytes(64)
    with path.open("rb") as file:
        found = read_header(file)
    assert found.size == len(header)
    assert found.tensors == [ListedTensor("a.weight", (3, 2), 0, 0), ListedTensor("b", (5,), 0, 32)]
    # Floats are rounded to float32, and bytes are read as numbers.
    assert header_of(found.fields, stored) == header
    assert {key: field.type for key, field in found.fields.items()} == {
        key: field.type for key, field in ours.fields.items()
    }
