"""The fields and tensors of GGUF files: those that llama.cpp's own converter writes.

The converter runs where LLAMA_CPP names a folder with llama.cpp's source. Elsewhere the fields are
compared with digests of what was equal to its files then.
"""

import hashlib
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("gguf")

from gguf_cases import FAMILIES, gguf_checkpoint, known_layout, known_tensors, shape
from prunus.formats.gguf.file import GgufFile
from prunus.formats.gguf.layout import GgufLayout

#: Digests of the fields and of the shapes of the tensors.
DIGESTS = {
    "llama": "3916c5e518fe28f1",
    "mistral": "3916c5e518fe28f1",
    "qwen2": "94884d2c2a6823a2",
    "qwen3": "7eed0fce293f600b",
    "gemma3_text": "e46eca94b7a794a9",
    "phi": "7970a295c953665e",
    "phi3": "059062b90f671cc6",
    "mixtral": "d2cab6fbc508e8ba",
    "qwen2_moe": "4b0904abe01f6aab",
    "qwen3_moe": "9ec3705da42c5e81",
    "olmoe": "cd3aa7f726197402",
}
# The converter knows splitting rules by the tokens of a text, and the tokenizer here is not listed.
CONVERT = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
from conversion.base import TextModel
split = sys.argv[4]
TextModel.get_vocab_base_pre = lambda self, tokenizer: split
import convert_hf_to_gguf
sys.argv = ["convert", sys.argv[2], "--outfile", sys.argv[3], "--outtype", "bf16"]
convert_hf_to_gguf.main()
"""


def close(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(close, ours, theirs))
    return ours == pytest.approx(theirs, rel=1e-6) if isinstance(theirs, float) else ours == theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_and_tensors_are_those_of_the_converter(family, tmp_path):
    folder = gguf_checkpoint(tmp_path / "tiny-1B", family, **FAMILIES[family])
    found, _ = known_layout(folder)
    llama_cpp = os.environ.get("LLAMA_CPP")
    if llama_cpp is None:
        assert digest(found) == DIGESTS[family]
        return
    split = found.fields["tokenizer.ggml.pre"].value
    arguments = [llama_cpp, str(folder), str(tmp_path / "theirs.gguf"), split]
    subprocess.run([sys.executable, "-c", CONVERT, *arguments], check=True)
    theirs = GgufFile.open(tmp_path / "theirs.gguf")
    ours = {key: each.value for key, each in found.fields.items()}
    other = {key: theirs.get(key) for key in theirs.header.fields}
    del other["general.file_type"]
    assert ours.keys() == other.keys()
    assert {key for key in ours if not close(ours[key], other[key])} == set()
    assert {tensor.name: tensor.shape for tensor in found.tensors} == {
        name: shape(theirs, name) for name in theirs.tensors
    }
    for name, values in known_tensors(folder).items():
        assert torch.equal(values, theirs.read(name)), name
    assert digest(found) == DIGESTS[family]


def digest(found: GgufLayout) -> str:
    content = {key: each.value for key, each in found.fields.items()}
    content |= {tensor.name: tensor.shape for tensor in found.tensors}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
