"""Time and memory of compress by the size of a model, for docs/results/sizes.json.

    python benchmarks/sizes.py WORK --json FILE [--sizes 0.1B,7B] [--run 0.1B:fast,7B:fast]

The checkpoints have random weights in the shapes of real models, and the windows have random
tokens: neither changes how long a run takes. `prunus plan` forecasts each preset, and `--run` names
the runs that are measured too, each a process of its own on one thread. What is in FILE is not
measured again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from figures import load, save
from results import run
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen2Config

from prunus.model.checkpoint.files import remove

#: Width, MLP, blocks, heads, heads of keys and values, tokens of the vocabulary, one weight for
#: embedding and head: SmolLM2-135M, and Qwen2.5 of three sizes.
SHAPES = {
    "0.1B": (576, 1536, 30, 9, 3, 49152, True),
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
}
PRESETS = ("fast", "balanced", "best")
COMMON = ["--bits", "4", "--memory", "12GB"]


def random_checkpoint(size: str, folder: Path) -> Path:
    """A checkpoint in bfloat16 with a shard for each block, all of which have the same weights."""
    width, mlp, blocks, heads, shared, vocabulary, tied = SHAPES[size]
    config = Qwen2Config(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    first = "model.layers.0."
    tensors = {name: x.detach() for name, x in model.named_parameters()}
    block = {name: x for name, x in tensors.items() if name.startswith(first)}
    outside = {name: x for name, x in tensors.items() if name not in block}
    folder.mkdir(parents=True)
    weights: dict[str, str] = {}
    for number in range(blocks):
        shard = {name.replace(first, f"model.layers.{number}."): x for name, x in block.items()}
        save_file(shard, folder / f"block-{number}.safetensors")
        weights |= dict.fromkeys(shard, f"block-{number}.safetensors")
    save_file(outside, folder / "outside.safetensors")
    weights |= dict.fromkeys(outside, "outside.safetensors")
    index = {"metadata": {}, "weight_map": weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config.num_hidden_layers = blocks
    config.layer_types = ["full_attention"] * blocks
    config.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--sizes", default=",".join(SHAPES))
    parser.add_argument("--run", default="", help="SIZE:PRESET of runs that are measured")
    options = parser.parse_args()
    figures = load(options.json)
    cells: dict[str, Any] = figures.setdefault("cells", {})
    runs = [tuple(each.split(":")) for each in options.run.split(",") if each]
    options.work.mkdir(parents=True, exist_ok=True)
    for size in options.sizes.split(","):
        presets = cells.get(size, {}).get("presets", {})
        due = [x for of, x in runs if of == size and "core_minutes" not in presets.get(x, {})]
        if presets and not due:
            continue
        model, ids = options.work / size, options.work / f"{size}-ids.safetensors"
        plan, out, log = (options.work / f"{size}-{x}" for x in ("plan.json", "out", "log.txt"))
        remove(model)
        random_checkpoint(size, model)
        windows = torch.randint(SHAPES[size][5], (1024, 256))
        save_file({"input_ids": windows}, ids)
        common = [*COMMON, "--calibration", str(ids)]
        run(["plan", str(model), str(out), *common, "--json", str(plan)], log)
        planned = json.loads(plan.read_text(encoding="utf-8"))
        for preset in PRESETS:
            minutes = round(planned["preset_seconds"][preset] / 60, 1)
            presets.setdefault(preset, {})["forecast_minutes"] = minutes
        cells[size] = {"presets": presets, "forecast_memory": planned["peak_memory_bytes"]}
        save(options.json, figures, "make results RESULTS=sizes")
        for preset in due:
            command = ["compress", str(model), str(out), *common, "--preset", preset]
            minutes, memory = run([*command, "--overwrite"], log)
            presets[preset] |= {"core_minutes": minutes, "peak_memory": memory}
            remove(out)
            save(options.json, figures, "make results RESULTS=sizes")
        remove(model)


if __name__ == "__main__":
    main()
