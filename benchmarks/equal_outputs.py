"""Check that a change of the code does not change one byte of what users get.

    python benchmarks/equal_outputs.py record FILE.json     # before the change
    python benchmarks/equal_outputs.py compare FILE.json    # after it

The script prunes, packs and recovers small models, each in a process of its own on one thread. It
hashes every tensor file, every configuration and the figures of every linear in the manifest.
Prose (the model card, notes of a linear) and times are left out. `compare` lists what differs and
ends with exit status 1.

The two real blocks are read from `PRUNUS_SHARED` (default `../shared`); the tiny models are made by
the test suite's own helpers. The hashes depend on the processor and on the version of torch: record
and compare on the same machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("PRUNUS_SHARED", ROOT.parent / "shared"))
GOLDEN = SHARED / "golden" / "smollm2_two_blocks"
WINDOWS = [
    "--calibration",
    str(GOLDEN / "calibration.safetensors"),
    "--samples",
    "8",
    "--seqlen",
    "256",
]

#: Name of a run -> options of `prunus prune` on the two real blocks.
PRUNE: dict[str, list[str]] = {
    "magnitude": ["--method", "magnitude", "--sparsity", "0.5"],
    "wanda": ["--method", "wanda", "--sparsity", "0.5"],
    "wanda-2of4": ["--method", "wanda", "--pattern", "2:4"],
    "wanda-two-passes": ["--method", "wanda", "--sparsity", "0.5", "--propagate", "block"],
    "sparsegpt": ["--method", "sparsegpt", "--sparsity", "0.5"],
    "balanced": ["--preset", "balanced", "--sparsity", "0.5"],
    "balanced-2of4": ["--preset", "balanced", "--pattern", "2:4"],
    "best": ["--preset", "best", "--sparsity", "0.5"],
    "best-2of4": ["--preset", "best", "--pattern", "2:4"],
}


def prunus(*arguments: str) -> None:
    """Run one command in a process of its own, on one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PRUNUS_CACHE": "/nonexistent"}
    command = [sys.executable, "-m", "prunus", *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{' '.join(arguments)}\n{result.stderr[-2000:]}")


def numbers(value: Any) -> list[Any]:
    """Every number below a JSON value, in order, without times."""
    if isinstance(value, dict):
        kept = [each for key, each in value.items() if "seconds" not in key and key != "notes"]
        return [number for each in kept for number in numbers(each)]
    if isinstance(value, list):
        return [number for each in value for number in numbers(each)]
    return [value] if isinstance(value, int | float) else []


def hashes(folder: Path) -> dict[str, str]:
    """File name -> sha256 of everything in a result that no wording decides."""
    found = {}
    for path in sorted(folder.iterdir()):
        if (
            path.suffix == ".safetensors"
            or path.name.endswith("index.json")
            or path.name == "config.json"
        ):
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name == "prunus.json":
            manifest = json.loads(path.read_text())
            figures = [numbers(manifest.get("blocks")), numbers(manifest.get("head"))]
            figures.append(sorted(manifest.get("allocation", {}).items()))
            found["figures of prunus.json"] = hashlib.sha256(
                json.dumps(figures).encode()
            ).hexdigest()
    return found


def tiny_models(folder: Path) -> None:
    """A mixture of experts, an image classifier and a folder of pictures, all from fixed seeds."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import torch
    from safetensors.torch import save_file

    from pictures import pictures, save_classifier
    from tiny import tiny_checkpoint, token_ids

    torch.manual_seed(0)
    tiny_checkpoint(folder / "mixtral-dense", "mixtral")
    save_file({"input_ids": token_ids().to(torch.int32)}, folder / "ids.safetensors")
    save_classifier(folder / "vit-dense", "vit")
    pictures(folder / "pictures")


def run_all(folder: Path) -> dict[str, dict[str, str]]:
    """Run every case and return its hashes by name."""
    found: dict[str, dict[str, str]] = {}

    def keep(name: str) -> None:
        found[name] = hashes(folder / name)
        print(f"{name}: {len(found[name])} hashes", flush=True)

    for name, options in PRUNE.items():
        prunus("prune", str(GOLDEN), str(folder / name), *WINDOWS, *options)
        keep(name)
    for name, values in (
        ("packed-bf16", []),
        ("packed-int8", ["--values", "int8", "--perplexity", "none"]),
    ):
        prunus("pack", str(folder / "wanda"), str(folder / name), *values)
        keep(name)
    prunus("unpack", str(folder / "packed-bf16"), str(folder / "unpacked"))
    keep("unpacked")
    text = [
        "--text",
        str(GOLDEN / "calibration.safetensors"),
        "--seqlen",
        "256",
        "--tokens",
        "4096",
    ]
    recovery = [*text, "--batch", "1", "--held-out", "2", "--teacher", str(GOLDEN)]
    prunus(
        "recover", str(folder / "wanda"), str(folder / "recovered"), "--mode", "masked", *recovery
    )
    keep("recovered")
    tiny_models(folder)
    ids = ["--calibration", str(folder / "ids.safetensors"), "--samples", "6", "--seqlen", "16"]
    for name, options in (
        ("mixtral-wanda", []),
        ("mixtral-best", ["--preset", "best", "--batch", "1"]),
    ):
        prunus("prune", str(folder / "mixtral-dense"), str(folder / name), *ids, *options)
        keep(name)
    images = ["--calibration", str(folder / "pictures"), "--samples", "6", "--batch", "2"]
    for name, options in (("vit-wanda", []), ("vit-balanced", ["--preset", "balanced"])):
        prunus("prune", str(folder / "vit-dense"), str(folder / name), *images, *options)
        keep(name)
    return found


def main() -> None:
    if len(sys.argv) != 3 or sys.argv[1] not in ("record", "compare"):
        raise SystemExit(__doc__)
    if not GOLDEN.is_dir():
        raise SystemExit(f"there are no reference blocks at {GOLDEN}; set PRUNUS_SHARED")
    file = Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        found = run_all(Path(folder))
    if sys.argv[1] == "record":
        file.write_text(json.dumps(found, indent=1) + "\n")
        print(f"recorded {sum(map(len, found.values()))} hashes of {len(found)} runs")
        return
    known = json.loads(file.read_text())
    wrong = [
        f"{run}: {name}"
        for run in {**known, **found}
        for name in {**known.get(run, {}), **found.get(run, {})}
        if known.get(run, {}).get(name) != found.get(run, {}).get(name)
    ]
    print("\n".join(f"differs: {each}" for each in wrong))
    total = sum(map(len, known.values()))
    print(f"{total - len(wrong)} of {total} hashes of {len(known)} runs are equal")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
