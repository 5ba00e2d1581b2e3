"""`plan --fits`: cache and buffers are as llama.cpp prints them, and the size leaves room."""

import json
import re

import pytest

pytest.importorskip("gguf")
pytest.importorskip("accelerate")

from command_line import call
from gguf_cases import gguf_checkpoint, known_tensors
from prunus.formats.gguf.context_memory import buffer_bytes, cache_bytes
from prunus.words import in_bytes

SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152,
    "num_attention_heads": 9, "num_key_value_heads": 3,
}  # fmt: skip
GEMMA_3 = {
    "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18, "vocab_size": 262144,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512,
    "model_type": "gemma3_text",
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
}  # fmt: skip
SMALL = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 8192,
    "num_attention_heads": 8, "num_key_value_heads": 4,
}  # fmt: skip
QWEN = {
    "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "vocab_size": 151936,
    "num_attention_heads": 12, "num_key_value_heads": 2, "head_dim": 128,
}  # fmt: skip
SHORT = ["--context", "64", "--samples", "4", "--seqlen", "16"]


@pytest.mark.parametrize(
    ("options", "context", "cache", "buffers"),
    [
        (SMOLLM2, 2048, 45.0, 102.51),
        (SMOLLM2, 8192, 180.0, 98.25),
        (GEMMA_3, 512, 9.0, 514.5),
        (GEMMA_3, 8192, 39.0, 514.5),
        (SMALL, 2048, 16.0, 18.0),
        (SMALL, 8192, 64.0, 21.01),
        (SMALL, 32768, 256.0, 45.01),
        (QWEN, 8192, 224.0, 302.75),
    ],
)
def test_cache_and_buffers_are_what_llama_cpp_says(options, context, cache, buffers):
    """In MiB, as llama-completion -v prints them, version 0.5.0 on a processor."""
    assert cache_bytes(options, context) / 2**20 == cache
    assert buffer_bytes(options, context) / 2**20 == pytest.approx(buffers, rel=0.05)


def test_the_size_leaves_room_for_cache_and_buffers(tmp_path):
    dense = gguf_checkpoint(tmp_path / "dense")
    figures = tmp_path / "plan.json"

    def planned(*options: str) -> tuple[dict, str]:
        output = call("plan", dense, *options, *SHORT, "--json", figures).output
        return json.loads(figures.read_text())["needs"], output

    wide, output = planned("--fits", "1GB")
    assert "of Q8_0" in output
    rest = wide["cache"] + wide["buffers"]
    memory = rest + wide["weights"] - 20_000
    narrow, output = planned("--fits", str(memory))
    assert wide["weights"] - 30_000 < narrow["weights"] <= memory - rest
    size = output[output.index("--size ") :].split()[1]
    call("plan", dense, tmp_path / "x.gguf", "--size", size, *SHORT[2:])
    # The file as it is fits in the first memory, and does not in the second.
    assert narrow["room"] < narrow["dense"] == wide["dense"] < wide["room"]
    assert "as it is" not in output
    for memory, words in ((100_000, "shorter --context$"), (rest + 20_000, "For the rest, 20.0 k")):
        message = call("plan", dense, "--fits", str(memory), *SHORT, status=2).output
        message = " ".join(message.split())
        assert "do not hold this model with a context of 64 tokens: KV cache and compute" in message
        assert f"buffers take {in_bytes(rest)}, less with a shorter --context" in message
        assert re.search(words, message) and " 0.0 kB" not in message


def test_a_model_that_fits_as_it_is_needs_no_compression(tmp_path):
    dense = gguf_checkpoint(tmp_path / "dense")
    output = " ".join(call("plan", dense, "--fits", "1GB", *SHORT).output.replace("│", " ").split())
    nbytes = sum(x.nbytes for x in known_tensors(dense).values()) // 2  # float32 to bfloat16
    said = re.search(r"nothing: the model as it is takes ([\d.]+) MB and fits too", output)
    assert said is not None and "--size" not in output
    assert nbytes < float(said[1]) * 1e6 < 1.2 * nbytes


def test_a_family_without_a_layout_is_refused(tmp_path):
    other = gguf_checkpoint(tmp_path / "olmo2", "olmo2")
    message = call("plan", other, "--fits", "8GB", *SHORT, status=2).output
    assert "Olmo2ForCausalLM has no known layout in GGUF files" in " ".join(message.split())
