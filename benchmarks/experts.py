"""A mixture of experts, dense and packed at 50 % sparsity: file size, memory and speed.

    python benchmarks/experts.py FOLDER [--threads 1] [--new-tokens 32] [--rounds 3]

Creates a Qwen3-MoE with 0.69 billion random weights in FOLDER: 8 layers of 32 experts, of which
each token chooses 4. Prunes it by magnitude, packs it, and measures both with `prunus bench`. With
random weights a token reads as many weights as in a trained model, so the speed is realistic,
although the text is not.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import prunus
from prunus import pack


def make(folder: Path) -> None:
    """Create the dense, the pruned and the packed checkpoint."""
    config = Qwen3MoeConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2048,
        moe_intermediate_size=768,
        num_hidden_layers=8,
        num_experts=32,
        num_experts_per_tok=4,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "dense")
    prunus.prune(folder / "dense", folder / "pruned", "magnitude")
    pack(folder / "pruned", folder / "packed")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", default="1")
    parser.add_argument("--new-tokens", default="32")
    parser.add_argument("--rounds", default="3")
    options = parser.parse_args()
    if not (options.folder / "packed" / "config.json").exists():
        make(options.folder)
    models = [str(options.folder / name) for name in ("pruned", "packed")]
    how = [
        "--threads",
        options.threads,
        "--new-tokens",
        options.new_tokens,
        "--rounds",
        options.rounds,
    ]
    subprocess.run([sys.executable, "-m", "prunus", "bench", *models, *how], check=True)


if __name__ == "__main__":
    main()
