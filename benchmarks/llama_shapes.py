"""Wanda on a checkpoint with the shapes of LLaMA-7B: peak memory, and time per block over depth.

    python benchmarks/llama_shapes.py FOLDER [--blocks 32] [--hidden 4096] [--samples 4] \\
        [--seqlen 512] [--json FILE]

Writes random bfloat16 weights (13.5 GB for 32 blocks, and the same for the result) and prunes them
in a separate process. The weights are meaningless, but shapes, bytes and arithmetic are those of
the real model.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

VOCABULARY = 32000


def write_checkpoint(
    folder: Path,
    blocks: int,
    hidden: int,
    intermediate: int | None = None,
    key_heads: int | None = None,
) -> None:
    """Write one shard per block. What is not given has the proportions of LLaMA-7B.

    Args:
        folder: of the checkpoint.
        blocks: their number.
        hidden: width of a hidden state, a multiple of 128.
        intermediate: width inside the MLP.
        key_heads: number of heads of keys and values, of 128 features each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    intermediate = intermediate or hidden * 11008 // 4096
    heads = hidden // 128
    key_heads = key_heads or heads
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        num_hidden_layers=blocks,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).bfloat16()

    weight_map: dict[str, str] = {}

    def save(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    save(
        "outer.safetensors",
        {
            "model.embed_tokens.weight": random(VOCABULARY, hidden),
            "lm_head.weight": random(VOCABULARY, hidden),
            "model.norm.weight": torch.ones(hidden).bfloat16(),
        },
    )
    for index in range(blocks):
        prefix = f"model.layers.{index}"
        tensors = {f"{prefix}.self_attn.{n}_proj.weight": random(hidden, hidden) for n in "qo"}
        tensors |= {
            f"{prefix}.self_attn.{n}_proj.weight": random(128 * key_heads, hidden) for n in "kv"
        }
        tensors |= {
            f"{prefix}.mlp.{n}_proj.weight": random(intermediate, hidden) for n in ("gate", "up")
        }
        tensors[f"{prefix}.mlp.down_proj.weight"] = random(hidden, intermediate)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = torch.ones(hidden).bfloat16()
        save(f"block-{index:05d}.safetensors", tensors)
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    dense, out = options.folder / "dense", options.folder / "pruned"
    if not (dense / "model.safetensors.index.json").exists():
        write_checkpoint(dense, options.blocks, options.hidden)
    ids = torch.randint(0, VOCABULARY, (options.samples, options.seqlen), dtype=torch.int32)
    save_file({"input_ids": ids}, options.folder / "ids.safetensors")
    shutil.rmtree(out, ignore_errors=True)
    report = options.folder / "report.json"
    command = [
        sys.executable,
        "-m",
        "prunus",
        "prune",
        str(dense),
        str(out),
        "--method",
        options.method,
    ]
    command += [
        "--calibration",
        str(options.folder / "ids.safetensors"),
        "--samples",
        str(options.samples),
    ]
    command += ["--seqlen", str(options.seqlen), "--json", str(report)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    manifest = json.loads(report.read_text())
    seconds = [block["seconds"] for block in manifest["blocks"]]
    third = max(1, len(seconds) // 3)
    summary = {
        "blocks": len(seconds),
        "peak_memory_gb": manifest["totals"]["peak_memory_bytes"] / 1e9,
        "seconds": manifest["totals"]["seconds"],
        "seconds_per_block_first_third": sum(sorted(seconds[:third])[third // 2 :][:1]),
        "seconds_per_block_last_third": sum(sorted(seconds[-third:])[third // 2 :][:1]),
        "block_seconds": sum(seconds),
        "dtype": manifest["inputs"]["dtype"],
        "walks": sorted({block["walk"] for block in manifest["blocks"]}),
    }
    for name, value in summary.items():
        print(f"{name:32} {value if not isinstance(value, float) else round(value, 2)}")
    if options.json:
        options.json.write_text(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
