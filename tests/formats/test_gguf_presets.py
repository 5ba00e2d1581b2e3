"""The sizes of llama-quantize's files, and the losses of formats as the results page has them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gguf_cases import gguf_checkpoint, known_layout
from prunus.cli.plan import plan
from prunus.formats.gguf.presets import preset_bytes
from prunus.formats.gguf.types import TYPES
from prunus.reporting.tables import plan_facts
from prunus.rounding.llama_cpp import TYPE_NAMES
from prunus.rounding.llama_cpp_losses import LOSSES

RESULTS = Path(__file__).parents[2] / "docs" / "results"
PRESETS = (
    "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "IQ3_M", "IQ4_XS", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K",
)  # fmt: skip
#: Family -> its options, and the bytes of the files that llama-quantize of llama.cpp 0.3.36 (the
#: version of llama-cpp-python) makes with `PRESETS`.
FILES = {
    "llama": (
        {"num_hidden_layers": 16, "num_key_value_heads": 1, "head_dim": 64},
        [2290176, 2608224, 2933856, 3216480, 2799712, 3262112, 3407552, 3551936, 4199200, 4886912],
    ),
    "mixtral": (  # eight experts
        {"num_hidden_layers": 8, "num_local_experts": 8, "num_experts": 8},
        [
            5813376,
            6725344,
            7282400,
            7671520,
            7003872,
            8145184,
            8540480,
            9015616,
            10400160,
            11940864,
        ],
    ),
    "qwen2": (  # a width that 256 does not divide, and a tied head
        {
            **{"num_hidden_layers": 9, "hidden_size": 288, "intermediate_size": 544},
            **{"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
        },
        [3628416, 3628416, 3932544, 4079424, 3772416, 3657792, 4422720, 4751616, 5082816, 6738816],
    ),
}


@pytest.mark.parametrize("family", FILES)
def test_the_size_of_a_preset_is_that_of_the_file_of_llama_quantize(family, tmp_path):
    options, sizes = FILES[family]
    tied = {"tie_word_embeddings": False} | options
    dense = gguf_checkpoint(tmp_path / "dense", family, **tied)
    found = preset_bytes(known_layout(dense)[0])
    assert {preset: found[preset] for preset in PRESETS} == dict(zip(PRESETS, sizes, strict=True))
    assert {*TYPE_NAMES} == {*TYPES}


def test_a_preset_is_a_size_and_plan_says_how_large_presets_are(tmp_path):
    dense = gguf_checkpoint(tmp_path / "dense", head_dim=64)
    described = plan(dense, tmp_path / "x.gguf", size="q4_k", seqlen=16, samples=2)
    most = described["presets"]["Q4_K_M"]
    assert 0.98 * most < described["file"]["after"] <= most
    facts = plan_facts(described)
    assert facts.title == "Plan of prunus compress"
    assert f"Q4_K_M {most / 1e3:.1f} kB" in dict(facts.items)["presets of llama.cpp"]


def test_losses_of_formats_are_those_of_the_results():
    files = [json.loads((RESULTS / f"{x}.json").read_text()) for x in ("proof", "proof-windows")]
    texts = {"prose": "WikiText-2", "code": "Python"}
    for model, losses in LOSSES.values():
        for kind, of_kind in losses.items():
            for preset, loss in of_kind.items():
                rows = [x["models"].get(model, {"rows": {}})["rows"].get(preset) for x in files]
                row = next(x for x in rows if x is not None)
                assert loss == float(f"{row['preset']['scores'][texts[kind]]['kl']:.2g}")


WRONG = (
    "prune a b --sparsity 2", "compress a b.gguf --bits 20", "compress a b.gguf --type Q9_Z",
    "compress a b.gguf --bits 4 --fast-on gpu", "compress dense b.gguf --size 1kB",
    "plan dense --size 1kB", "plan a --bits 20", "shrink a b --blocks 1 --seqlen 0",
    "recover a b --tokens -1", "eval a --samples 0", "generate a -p b --temperature -1",
    "sweep a.toml b",
)  # fmt: skip
_CALLS = """
import sys
from prunus.cli.program import app
for line in sys.argv[1:]:
    try:
        app(line.split())
    except SystemExit as end:
        assert end.code == 2
        assert "torch" not in sys.modules, line
    else:
        raise AssertionError(line)
"""


def test_values_are_refused_before_torch_is_imported(tmp_path):
    gguf_checkpoint(tmp_path / "dense")
    subprocess.run([sys.executable, "-c", _CALLS, *WRONG], cwd=tmp_path, check=True)
