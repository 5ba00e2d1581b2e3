"""What mlx_lm.convert and prunus lose at the same size, as MLX checkpoints.

    python benchmarks/mlx_convert.py WORK NAME=DENSE … --mlx VENV --data DIR --json FILE
        [--bits 4] [--group 64] [--peers convert,gptq,awq,dynamic_quant]

VENV is a virtual environment with mlx-lm (`pip install 'mlx[cpu]' mlx-lm`), which need not be that
of prunus. `mlx_lm.convert -q` makes a folder, and `prunus compress --format mlx` makes another one
of the same bytes, calibrated on 64 windows of 256 tokens of `mix`. The other programs of mlx-lm get
the same tokens as their calibration text, and embeddings in the bits and groups of the linears,
which makes their folders as large as that of `convert`. (dynamic_quant keeps its default, 4 or 5
bits, 5 in the mean with those of scales; a folder of prunus of its size stands beside it.) All are
unpacked and scored by prunus against the dense model, on 6 windows of 512 tokens of each text.
mlx-lm computes the perplexity of the first window of prose too, with the weights that it unpacks
itself, as a check that folders mean what is said. (On processors its products take minutes per
window.) It gets the keys for positions that `convert` leaves out. Folders that are there are
not made again.

The file is not named mlx.py: transformers would take it for the package.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from figures import load, save, weight_bytes
from proof import once, write_calibration
from safetensors.torch import save_file
from transformers import AutoTokenizer

import prunus
from prunus.evaluation.eval_options import TextOptions
from prunus.evaluation.perplexity import scoring_windows
from prunus.formats.mlx import rope_keys

TEXTS = ("wikitext2", "python-code")
#: Program of mlx-lm -> its options, where {bits} and {group} are those of the linears.
PEERS = {
    "convert": "-q --q-bits {bits} --q-group-size {group}",
    "gptq": "--bits {bits} --group-size {group} --fallback-bits {bits} "
    "--fallback-group-size {group}",
    "awq": "--bits {bits} --group-size {group} --embed-bits {bits} --embed-group-size {group}",
    "dynamic_quant": "",
}
# Arguments: a folder in the format of MLX, a file with input_ids, and keys of config.json.
MLX_PERPLEXITY = """
import json
import pathlib
import sys
import mlx.core as mx
from mlx_lm.perplexity import eval_ppl
from mlx_lm.utils import dequantize_model, load_model
ids = mx.load(sys.argv[2])["input_ids"].astype(mx.int32)[:1]
keys = json.loads(sys.argv[3])
model = dequantize_model(load_model(pathlib.Path(sys.argv[1]), model_config=keys)[0])
model.set_dtype(mx.float32)
print(eval_ppl(model, ids, 1)[0])
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("models", nargs="+", metavar="NAME=DENSE")
    parser.add_argument("--mlx", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--peers", default="convert")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    results = load(options.json)
    command = f"--bits {options.bits} --group {options.group} --peers {options.peers}"
    command = f"python benchmarks/mlx_convert.py WORK NAME=DENSE … --mlx VENV {command}"
    for given in options.models:
        name, _, dense = given.partition("=")
        if name not in results.setdefault("cells", {}):
            work = options.work.resolve() / name
            results["cells"][name] = measure(Path(dense).resolve(), work, options)
            save(options.json, results, command)


def measure(dense: Path, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The folders of a model: their bytes, and their scores by text."""
    programs = options.mlx.resolve() / "bin"
    # Programs of mlx-lm look for their calibration text below the home folder.
    home = work / "home"
    calibration_text = home / ".cache/mlx-lm/calibration_v5.txt"
    calibration_text.parent.mkdir(parents=True, exist_ok=True)
    once(calibration_text, lambda path: write_calibration(path, dense, 64, options.data))
    cells: dict[Path, dict[str, Any]] = {}
    for peer in options.peers.split(","):
        made = work / peer
        if not (made / "config.json").exists():
            where = "--hf-path" if peer == "convert" else "--model"
            command = [str(programs / f"mlx_lm.{peer}"), where, str(dense), "--mlx-path", str(made)]
            command += PEERS[peer].format(bits=options.bits, group=options.group).split()
            subprocess.run(command, check=True, cwd=work, env=os.environ | {"HOME": str(home)})
        size = weight_bytes(made)
        folders = [made]
        if not any(abs(cell["bytes"] / size - 1) < 1e-3 for cell in cells.values()):
            folders.append(made.with_name("prunus" if peer == "convert" else f"prunus-{peer}"))
            calibration = {"calibration": "mix", "samples": 64, "seqlen": 256, "data": options.data}
            prunus.compress(
                dense, folders[1], size=size, format="mlx", progress=False, **calibration
            )
        cells |= {folder: {"bytes": weight_bytes(folder), "texts": {}} for folder in folders}

    rope = json.dumps(rope_keys(json.loads((dense / "config.json").read_text("utf-8"))))
    scoring = TextOptions(samples=6, seqlen=512, data=options.data)
    for text in TEXTS:
        windows = scoring_windows(text, lambda: AutoTokenizer.from_pretrained(dense), 512, scoring)
        ids = work / f"{text}.safetensors"
        save_file({"input_ids": windows.ids.contiguous()}, ids)
        for folder, cell in cells.items():
            scored = prunus.perplexity(
                folder, str(ids), reference=dense, seqlen=512, progress=False
            )
            divergence = scored.divergence
            assert divergence is not None
            cell["texts"][text] = {
                "perplexity": scored.perplexity,
                "kl": divergence.kl,
                "kl_stderr": divergence.kl_stderr,
                "reference_perplexity": divergence.reference_perplexity,
            }
            if text == TEXTS[0]:
                first = prunus.perplexity(folder, str(ids), seqlen=512, samples=1, progress=False)
                python = [programs / "python", "-I", "-c", MLX_PERPLEXITY, folder, ids, rope]
                done = subprocess.run(
                    [str(part) for part in python], check=True, capture_output=True, text=True
                )
                cell["perplexity of the first window"] = first.perplexity
                cell["the same by mlx-lm"] = float(done.stdout.split()[-1])
            print(text, folder.name, json.dumps(cell), flush=True)
    names = {"convert": "mlx-lm"}
    return {names.get(folder.name, folder.name): {"": cell} for folder, cell in cells.items()}


if __name__ == "__main__":
    main()
