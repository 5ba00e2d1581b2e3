"""vLLM with results for it. `make vllm-test` builds its environment."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import prunus
import vllm_tokens
from tiny import tiny_checkpoint, token_ids

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="vLLM is not installed; `make vllm-test` builds an environment that has it",
)

PROMPTS = [[5, 17, 90], [64, 3, 3, 8, 101, 9, 11], [40]]
NEW_TOKENS = 12
#: vLLM's attention on CPUs needs heads of at least 32 features.
SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4}


SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def vllm_greedy(folder: Path, *options: str) -> list[list[int]]:
    script, prompts = str(vllm_tokens.__file__), json.dumps(PROMPTS)
    done = subprocess.run(
        [sys.executable, script, str(folder), prompts, str(NEW_TOKENS), *options],
        env=os.environ | SETTINGS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    tokens: list[list[int]] = json.loads(done.stdout.splitlines()[-1])
    return tokens


def transformers_greedy(folder: Path) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for ids in PROMPTS:
        tokens = list(ids)
        for _ in range(NEW_TOKENS):
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        found.append(tokens[len(ids) :])
    return found


def test_fewer_blocks_need_nothing_of_prunus(tmp_path):
    source = tiny_checkpoint(tmp_path / "dense", "llama", torch.bfloat16, **SIZES)
    smaller = tmp_path / "smaller"
    prunus.shrink(source, smaller, calibration=token_ids(), blocks=1, repair=False)
    assert json.loads((smaller / "config.json").read_text())["num_hidden_layers"] == 1
    assert vllm_greedy(smaller) == transformers_greedy(smaller)


@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="vLLM needs AVX-512 for 4 bits")
def test_compressed_tensors_give_the_tokens_of_transformers(tmp_path):
    source = tiny_checkpoint(tmp_path / "dense", "llama", torch.float16, **SIZES)
    out = tmp_path / "out"
    prunus.compress(source, out, 4, calibration=token_ids())
    # vLLM's kernels for CPUs have no float32, and in bfloat16 they round activations to 8 bits.
    assert vllm_greedy(out, "float16") == transformers_greedy(out)
