"""A child process of the tests of ranks on pretend devices, which forks the ranks.

python device_ranks.py SCRATCH     prints one JSON line: the result of each case
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import pretend_cuda

pretend_cuda.load()

import torch  # noqa: E402

pretend_cuda.install()
torch.set_num_threads(1)

import prunus  # noqa: E402
from prunus.distributed import process_group, sum_floats  # noqa: E402
from ranks import answers, in_ranks  # noqa: E402
from tiny import tiny_checkpoint, token_ids  # noqa: E402

RUNS: dict[str, dict[str, Any]] = {
    "wanda": {},
    "alps, reconstructed": {
        "method": "alps",
        "dense_weight": 0.25,
        "reconstruct": "all",
        "reconstruct_epochs": 1,
        "batch": 2,
    },
}


def runs(scratch: Path) -> dict[str, list[int]]:
    """Exit statuses of two ranks with a device each, and the results in folders."""
    dense = tiny_checkpoint(scratch / "dense", "llama", torch.bfloat16)
    # Forks need not import again what this run imports.
    prunus.prune(dense, scratch / "alone", calibration=token_ids(), dtype="float32")
    statuses = {}
    for name, options in RUNS.items():
        for place in ("cpu", "cuda"):

            def work(
                _rank: int, place: str = place, name: str = name, options: Any = options
            ) -> None:
                prunus.prune(
                    dense,
                    scratch / f"{name} {place}",
                    device=place,
                    **({"calibration": token_ids(4, 12), "batch": 1, "dtype": "float32"} | options),
                )

            statuses[f"{name} {place}"] = in_ranks(2, work)
    return statuses


def messages(scratch: Path) -> list[dict[str, Any]]:
    def work(rank: int) -> dict[str, Any]:
        with process_group() as ranks:
            own = torch.full((2, 3), float(rank + 1), device="cuda")
            ranks.all_reduce(own)
            sent = torch.full((3,), rank, dtype=torch.bfloat16, device="cuda")
            ranks.broadcast(sent, 1)
            rows = torch.arange(rank + 1, device="cuda")
            gathered = ranks.all_gather(rows)
            host = torch.ones(2)
            ranks.all_reduce(host)
            return {
                "sum": own.tolist(),
                "sent": sent.tolist(),
                "rows": gathered.tolist(),
                "host": host.tolist(),
                "devices": sorted({str(x.device) for x in (own, sent, gathered)}),
                "texts": ranks.gather_text("x" * 300 * rank),
                "floats": sum_floats([0.5]),
            }

    return answers(2, work, scratch)


def refused(scratch: Path) -> dict[str, list[str]]:
    """The errors of runs whose ranks would share a device."""
    dense = tiny_checkpoint(scratch / "other", "llama")
    errors: dict[str, list[str]] = {}
    for name, size, device in (("too many", 3, "cuda"), ("one for all", 2, "cuda:0")):

        def work(_rank: int, name: str = name, device: str = device) -> str:
            with pytest.raises(Exception, match="device") as fault:
                prunus.prune(dense, scratch / name, calibration=token_ids(), device=device)
            return str(fault.value)

        errors[name] = answers(size, work, scratch)
        assert not (scratch / name).exists()
    return errors


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    cases = {case.__name__: case(folder) for case in (runs, messages, refused)}
    print(json.dumps(cases))
