"""A child of the soak test: many small runs in one process through the Python API.

    python soak.py SCRATCH RUNS

It prints one JSON line: resident bytes, open files and threads, after every tenth of the runs.
"""

import ctypes
import gc
import json
import os
import shutil
import sys
import threading
from pathlib import Path

import torch
from safetensors.torch import save_file

torch.set_num_threads(1)

import prunus  # noqa: E402
from prunus.hardware.machine import process_memory  # noqa: E402
from recovery_cases import dense_checkpoint, recover, training_text  # noqa: E402
from tiny import tiny_model, token_ids  # noqa: E402


def main() -> None:
    scratch, runs = Path(sys.argv[1]), int(sys.argv[2])
    dense = dense_checkpoint(scratch / "dense", dtype=torch.bfloat16)
    text, ids = training_text(scratch), token_ids()
    save_file({"input_ids": ids}, scratch / "ids.safetensors")
    scored = str(scratch / "ids.safetensors")
    model = tiny_model()
    pruned, small = scratch / "pruned", scratch / "small"
    prunus.prune(dense, pruned, calibration=ids)
    prunus.compress(dense, small, 8, calibration=ids)
    out = scratch / "out"

    def refused() -> None:
        try:
            prunus.prune(dense, out, calibration=ids + 10_000)
        except ValueError:
            return
        raise AssertionError

    verbs = [
        lambda: prunus.prune(dense, out, calibration=ids),
        lambda: prunus.prune(dense, out, "sparsegpt", pattern="2:4", calibration=ids),
        lambda: prunus.prune(model, calibration=ids),
        lambda: prunus.perplexity(dense, scored, seqlen=16),
        lambda: prunus.perplexity(dense, scored, seqlen=16, stream=True),
        lambda: prunus.perplexity(small, scored, seqlen=16),
        lambda: prunus.compress(dense, out, 4, calibration=ids),
        lambda: prunus.inspect(pruned),
        lambda: recover(pruned, out, "masked", text, tokens=64, evaluations=1),
        refused,
    ]
    found = []
    for run in range(1, runs + 1):
        shutil.rmtree(out, ignore_errors=True)
        verbs[run % len(verbs)]()
        if run % (runs // 10) == 0:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            files = len(os.listdir("/proc/self/fd"))
            found.append(
                {"resident": process_memory(), "files": files, "threads": threading.active_count()}
            )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
