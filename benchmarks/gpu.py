"""What a run takes on a GPU, block by block, and what the result gives there. One command.

    python benchmarks/gpu.py SCRATCH [--device cuda] [--json FILE]

SCRATCH needs 8 GB. Models have random weights in the shapes of LLaMA-7B, LLaMA-13B and LLaMA-2-70B,
two blocks each, and 128 windows of 2048 random tokens. The tables at the end are Markdown.

- Seconds of a block by method, and of Wanda in lockstep and in two passes.
- Device memory beside what the plan says.
- Products of 2:4 linears on sparse tensor cores, which torch calls, and dense ones.
- Decoding with a pruned model.

`--hidden 256 --windows 4 --seqlen 64 --device cpu` tries the script on any machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from figures import save
from safetensors.torch import save_file
from torch.sparse import to_sparse_semi_structured
from transformers import AutoModelForCausalLM, LlamaConfig

import prunus
from prunus.hardware.machine import peak_memory

BLOCKS = 2
# Name -> width, width inside the MLP, heads of keys and values.
SHAPES = {
    "LLaMA-7B": (4096, 11008, 32),
    "LLaMA-13B": (5120, 13824, 40),
    "LLaMA-2-70B": (8192, 28672, 8),
}
RECIPES: dict[str, dict[str, Any]] = {
    "Wanda": {"method": "wanda"},
    "Wanda, two passes": {"method": "wanda", "propagate": "block"},
    "SparseGPT": {"method": "sparsegpt"},
    "balanced": {"preset": "balanced"},
    "best": {"preset": "best", "allocation": "uniform"},
}
# The larger models run with these only: a block of 70B trains for too long.
LARGE = ("Wanda", "SparseGPT")
VOCABULARY = 32000


def write_checkpoint(folder: Path, hidden: int, intermediate: int, key_heads: int) -> None:
    """Write a model of random weights.

    Args:
        folder: of the checkpoint.
        hidden: width of a hidden state, a multiple of 128.
        intermediate: width inside the MLP.
        key_heads: number of heads of keys and values, of 128 features each.
    """
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=hidden // 128,
        num_key_value_heads=key_heads,
        num_hidden_layers=BLOCKS,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def prune(model: Path, result: Path, ids: Path, device: torch.device, **recipe: Any) -> Any:
    """Prune twice and measure the second run; seconds are per block."""
    options = {"calibration": str(ids), "device": str(device), "overwrite": True, **recipe}
    prunus.prune(model, result, **options)  # everything is loaded and compiled now
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    prunus.prune(model, result, **options)
    seconds = (time.perf_counter() - started) / BLOCKS
    words = [f"--{name}={value}" for name, value in options.items() if name != "overwrite"]
    command = [sys.executable, "-m", "prunus", "plan", str(model), f"{result}-planned", *words]
    file = model.with_suffix(".json")
    subprocess.run([*command, f"--json={file}"], check=True, stdout=subprocess.DEVNULL)
    planned = json.loads(file.read_text())["peak_memory_bytes"]
    return {"seconds": seconds, "peak_bytes": peak_memory(device), "planned_bytes": planned}


@torch.no_grad()
def sparse_products(folder: Path, device: torch.device) -> list[dict[str, Any]]:
    """Speed-up of the linears of a block on 2:4 sparse tensor cores, for one token and for many."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device)
    found = []
    for name, linear in model.model.layers[0].named_modules():
        if not isinstance(linear, torch.nn.Linear):
            continue
        sparse = to_sparse_semi_structured(linear.weight.detach())
        for tokens in (1, 2048):
            x = torch.randn(tokens, linear.in_features, dtype=torch.bfloat16, device=device)
            dense, fast = (seconds_of_product(x, weight) for weight in (linear.weight, sparse))
            found.append({"linear": name, "tokens": tokens, "speedup": dense / fast})
    return found


def seconds_of_product(x: torch.Tensor, weight: torch.Tensor, rounds: int = 20) -> float:
    """The median time of a product on the device."""
    found = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.nn.functional.linear(x, weight)
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / 1e3)
    return statistics.median(found)


@torch.no_grad()
def decode(folder: Path, device: torch.device, tokens: int = 64) -> float:
    """Tokens per second of greedy decoding, one at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device)
    ids = torch.zeros(1, 16, dtype=torch.int64, device=device)
    given = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    model.generate(ids, max_new_tokens=4, **given)
    started = time.perf_counter()
    made = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **given)
    made.cpu()
    return tokens / (time.perf_counter() - started)


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def show(results: dict[str, Any]) -> str:
    rows = []
    for name, run in results["runs"].items():
        memory = [f"{run[key] / 1e9:.1f}" for key in ("peak_bytes", "planned_bytes")]
        rows.append([name, f"{run['seconds']:.2f}", *memory])
    text = table(["", "seconds per block", "peak, GB", "planned, GB"], rows)
    text += f"\nDecoding, one token at a time: {results['decode']:.1f} tokens per second\n"
    products = [[x["linear"], str(x["tokens"]), f"{x['speedup']:.2f}"] for x in results["sparse"]]
    return text + "\n" + table(["2:4 linear", "tokens", "speed-up"], products)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--hidden", type=int, help="one small model instead of the three")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu with a small --hidden tries the script")

    shapes = SHAPES
    if options.hidden:
        shapes = {"small": (options.hidden, 2 * options.hidden, options.hidden // 128)}
    first = next(iter(shapes))
    generator = torch.Generator().manual_seed(0)
    shape = (options.windows, options.seqlen)
    options.scratch.mkdir(parents=True, exist_ok=True)
    ids = options.scratch / "ids.safetensors"
    save_file({"input_ids": torch.randint(0, VOCABULARY, shape, generator=generator)}, ids)
    size = {"samples": options.windows, "seqlen": options.seqlen}
    results: dict[str, Any] = {
        "what": "What runs take on a GPU, by benchmarks/gpu.py.",
        "windows": shape,
        "runs": {},
    }
    result = options.scratch / "result"
    for name, (hidden, intermediate, key_heads) in shapes.items():
        model = options.scratch / name
        write_checkpoint(model, hidden, intermediate, key_heads)
        for label, recipe in RECIPES.items():
            if name == first or label in LARGE:
                found = prune(model, result, ids, device, **size, **recipe)
                results["runs"][f"{name}, {label}"] = found
                print(f"{name}, {label}: {found['seconds']:.2f} s per block", flush=True)
        if name != first:
            shutil.rmtree(model)

    where = {"device": str(device), "overwrite": True}
    prunus.prune(
        options.scratch / first, result, pattern="2:4", calibration=str(ids), **size, **where
    )
    results["decode"] = decode(result, device)
    results["sparse"] = sparse_products(result, device) if device.type == "cuda" else []
    for folder in (result, options.scratch / first):
        shutil.rmtree(folder)
    print("\n" + show(results))
    if options.json:
        save(options.json, results, "python benchmarks/gpu.py SCRATCH", str(device))


if __name__ == "__main__":
    main()
