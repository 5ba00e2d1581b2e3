"""Find from how many tokens on an expert's own statistics are better than those of all tokens.

    python benchmarks/few_tokens.py MODEL TEXT [--experts 16] [--json FILE]

No mixture of experts is small enough for every computer, so a dense model stands in. The tokens
that reach the MLP of three of its layers are sorted into clusters by direction, as a router would
do. Each cluster counts as the tokens of one expert. The gate and down projections are pruned to 50
% from n of these tokens and, for comparison, from 8192 tokens of all clusters. The figure is the
ratio of the output errors on 512 other tokens of the cluster. It takes about five minutes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)

from prunus.methods import METHODS, MethodOptions  # noqa: E402
from prunus.methods.patterns import Pattern  # noqa: E402
from prunus.methods.statistics import InputStatistics  # noqa: E402

TOKENS = (8, 16, 32, 64, 128, 256, 512, 1024)
WINDOWS, LENGTH, OF_ALL, HELD_OUT = 72, 512, 8192, 512
ROUNDS, EXPERTS_PER_LAYER = 15, 4


def mlp_inputs(model: Any, ids_WS: Tensor, layers: list[int]) -> dict[int, Tensor]:
    """Layer -> the inputs of its MLP, (tokens, hidden)."""
    seen: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    hooks = [
        model.model.layers[layer].mlp.register_forward_pre_hook(
            lambda _module, args, layer=layer: seen[layer].append(args[0].flatten(0, 1))
        )
        for layer in layers
    ]
    for part in ids_WS.split(4):
        model.model(part, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {layer: torch.cat(parts) for layer, parts in seen.items()}


def clusters(X_TI: Tensor, count: int) -> Tensor:
    """The cluster of each token, by spherical k-means that starts from random tokens."""
    X_TI = torch.nn.functional.normalize(X_TI, dim=1)
    C_EI = X_TI[torch.randperm(len(X_TI))[:count]]
    for _ in range(ROUNDS):
        nearest_T = (X_TI @ C_EI.T).argmax(dim=1)
        sums_EI = torch.zeros_like(C_EI).index_add_(0, nearest_T, X_TI)
        C_EI = torch.nn.functional.normalize(sums_EI, dim=1)
    return (X_TI @ C_EI.T).argmax(dim=1)


def pruned_by(method: str, weight_OI: Tensor, X_TI: Tensor) -> Tensor:
    """The weight pruned to 50 %, with the statistics of X_TI."""
    statistics = InputStatistics(X_TI.shape[1], METHODS[method].needs)
    statistics.add(X_TI)
    return METHODS[method].prune(weight_OI, statistics, Pattern(), 0.5, MethodOptions()).weight_OI


def output_error(weight_OI: Tensor, after_OI: Tensor, X_TI: Tensor) -> float:
    """‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖² of a pruned weight Ŵ."""
    return float(
        (X_TI @ (weight_OI - after_OI).T).square().sum() / (X_TI @ weight_OI.T).square().sum()
    )


@torch.no_grad()
def measure(folder: Path, text: Path, experts: int) -> dict[str, float]:
    """Keys "method linear tokens" -> mean ratio of the errors, own tokens over all tokens."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)(text.read_text(encoding="utf-8")).input_ids
    ids_WS = torch.tensor(ids[: WINDOWS * LENGTH]).view(-1, LENGTH)
    blocks = len(model.model.layers)
    layers = [blocks // 8, blocks // 2, blocks * 4 // 5]
    ratios: dict[str, list[float]] = {}
    for layer, X_TI in mlp_inputs(model, ids_WS, layers).items():
        mlp = model.model.layers[layer].mlp
        inner_TI = mlp.act_fn(mlp.gate_proj(X_TI)) * mlp.up_proj(X_TI)
        nearest_T = clusters(X_TI, experts)
        sizes = torch.bincount(nearest_T, minlength=experts)
        large = [e for e in range(experts) if sizes[e] >= HELD_OUT + TOKENS[-1]][:EXPERTS_PER_LAYER]
        for expert in large:
            rows = (nearest_T == expert).nonzero().flatten()
            rows = rows[torch.randperm(len(rows))]
            evaluated, own = rows[:HELD_OUT], rows[HELD_OUT:]
            all_tokens = torch.randperm(len(X_TI))[:OF_ALL]
            for name, inputs_TI, linear in (
                ("gate", X_TI, mlp.gate_proj),
                ("down", inner_TI, mlp.down_proj),
            ):
                weight_OI = linear.weight.detach()
                for method in ("wanda", "sparsegpt"):
                    by_all = pruned_by(method, weight_OI, inputs_TI[all_tokens])
                    base = output_error(weight_OI, by_all, inputs_TI[evaluated])
                    for tokens in TOKENS:
                        after = pruned_by(method, weight_OI, inputs_TI[own[:tokens]])
                        ratio = output_error(weight_OI, after, inputs_TI[evaluated]) / base
                        ratios.setdefault(f"{method} {name} {tokens}", []).append(ratio)
    return {name: round(mean(found), 3) for name, found in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path, help="a UTF-8 file")
    parser.add_argument("--experts", type=int, default=16, help="clusters per layer")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measure(options.model, options.text, options.experts)
    print("tokens".ljust(18), *(f"{tokens:>6}" for tokens in TOKENS))
    for case in ("wanda gate", "wanda down", "sparsegpt gate", "sparsegpt down"):
        print(case.ljust(18), *(f"{found[f'{case} {tokens}']:6.2f}" for tokens in TOKENS))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
