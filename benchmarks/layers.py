"""Measure the output error of every method on single linears, on calibration and held-out windows.

    python benchmarks/layers.py MODEL WINDOWS.safetensors [--linears o_proj,down_proj]
        [--block 1] [--held-out 2] [--json FILE]

The script prints one Markdown table per linear; --json writes the same figures. WINDOWS holds
`input_ids` (windows, tokens). The model runs dense. The linears of one block are pruned one by one,
each on the inputs of the dense model, so that only the methods differ. Figures are relative output
errors in per cent.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from prunus.methods import METHODS, MethodOptions, check_options, compose
from prunus.methods.patterns import Pattern
from prunus.methods.statistics import InputStatistics

_CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in METHODS),
    ("wanda", {"weight_update": "least-squares"}),
]


def inputs_of(
    model: Any, block: int, endings: list[str], windows: Tensor
) -> dict[str, tuple[Tensor, list[Tensor]]]:
    """Name -> weight (O, I) and the inputs (tokens, in) of each window."""
    found: dict[str, tuple[Tensor, list[Tensor]]] = {}
    for name, module in model.named_modules():
        if (
            isinstance(module, torch.nn.Linear)
            and f".{block}." in name
            and name.endswith(tuple(endings))
        ):
            found[name] = (module.weight.detach().float(), [])

            def keep(seen: list[Tensor], _module: Any, args: tuple[Tensor, ...]) -> None:
                seen.append(args[0].reshape(-1, args[0].shape[-1]).float())

            module.register_forward_pre_hook(partial(keep, found[name][1]))
    for window in windows:
        model(input_ids=window[None], use_cache=False)
    return found


def error(weight_OI: Tensor, pruned_OI: Tensor, X_TI: Tensor) -> float:
    """‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖² of a pruned weight Ŵ."""
    return float(
        (X_TI @ (weight_OI - pruned_OI).T).square().sum() / (X_TI @ weight_OI.T).square().sum()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("windows", type=Path)
    parser.add_argument("--linears", default="o_proj,down_proj")
    parser.add_argument("--block", type=int, default=1)
    parser.add_argument("--held-out", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    windows = load_file(options.windows)["input_ids"].long()
    layers: list[dict[str, Any]] = []
    protocol: dict[str, Any] = {"model": options.model, "block": options.block}
    with torch.no_grad():
        for name, (weight_OI, seen) in inputs_of(
            model, options.block, options.linears.split(","), windows
        ).items():
            X_TI, unseen_TI = (
                torch.cat(seen[: -options.held_out]),
                torch.cat(seen[-options.held_out :]),
            )
            statistics = InputStatistics(weight_OI.shape[1], "gram")
            statistics.add(X_TI)
            layers.append({"name": name, "methods": []})
            protocol |= {"tokens": len(X_TI), "tokens held out": len(unseen_TI)}
            print(f"\n{name}, {len(X_TI)} tokens and {len(unseen_TI)} held out\n")
            print(f"| {'method':40} | 50 % | held out | 2:4 | held out |")
            print(f"| {'-' * 40} | ---: | ---: | ---: | ---: |")
            for method, extra in _CASES:
                cells: list[str] = []
                errors: dict[str, tuple[float, float] | None] = {}
                for text, title in (("unstructured", "50 %"), ("2:4", "2:4")):
                    errors[title] = None
                    chosen = MethodOptions(**extra)
                    group = METHODS[method].with_options(chosen).default_group
                    pattern = Pattern.parse(text, group)
                    try:
                        check_options(METHODS[method], pattern, 0.5, chosen)
                    except ValueError:
                        cells += ["", ""]
                        continue
                    pruned = compose(METHODS[method], chosen).prune(
                        weight_OI, statistics, pattern, 0.5, chosen
                    )
                    seen_error, unseen_error = (
                        error(weight_OI, pruned.weight_OI, x) for x in (X_TI, unseen_TI)
                    )
                    errors[title] = seen_error, unseen_error
                    cells += [f"{100 * seen_error:.3f}", f"{100 * unseen_error:.3f}"]
                label = " ".join([method, *(f"--{key} {value}" for key, value in extra.items())])
                layers[-1]["methods"].append({"method": label, "errors": errors})
                print(f"| {label:40} | {' | '.join(cells)} |")
    if options.json:
        options.json.write_text(json.dumps({"layers": layers, "protocol": protocol}, indent=2))


if __name__ == "__main__":
    main()
