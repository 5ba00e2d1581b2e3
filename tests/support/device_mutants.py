"""Faults of device code, put into copies of prunus one at a time: do the tests of devices fail?

    python device_mutants.py SCRATCH NAME…     the named faults, or `all`; prints one JSON line

Every fault is one that hides on a processor: a tensor without a device, a missing `.to`, a copy
that nobody waits for. The process forks for each fault, so that torch is imported once.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pretend_cuda
from places import REPOSITORY

__all__ = ["MUTANTS", "Mutant"]

_SOURCE = REPOSITORY / "src" / "prunus"


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        file: below `src/prunus`.
        old: a text that occurs in the file; every occurrence is replaced.
        new: what replaces it.
        tests: a file of tests below `tests`, and what `pytest -k` selects of it.
    """

    file: str
    old: str
    new: str
    tests: tuple[str, str]


_ENGINE = "pruning/test_devices.py"
MUTANTS: dict[str, Mutant] = {
    # Must not be caught: it shows that the tests pass on a copy without a fault.
    "none": Mutant("__init__.py", "__all__", "__all__", (_ENGINE, "every_method and wanda")),
    # Tensors made on the processor.
    "sums of squares": Mutant(
        "methods/input_sums.py",
        "dtype=torch.float64, device=X_TI.device)",
        "dtype=torch.float64)",
        (_ENGINE, "every_method and wanda"),
    ),
    "Gram matrix": Mutant(
        "methods/statistics.py",
        "torch.zeros(in_features, in_features, device=device)",
        "torch.zeros(in_features, in_features)",
        (_ENGINE, "every_method and sparsegpt"),
    ),
    "mask": Mutant(
        "methods/patterns.py",
        "dtype=torch.bool, device=score_GC.device)",
        "dtype=torch.bool)",
        (_ENGINE, "every_method and wanda"),
    ),
    "places of ties": Mutant(
        "methods/patterns.py",
        "torch.arange(len(row_K), device=row_K.device)",
        "torch.arange(len(row_K))",
        (_ENGINE, "ties"),
    ),
    "mask of a sweep": Mutant(
        "methods/solvers/obs.py",
        "dtype=torch.bool, device=weight_IO.device)",
        "dtype=torch.bool)",
        (_ENGINE, "every_method and sparsegpt"),
    ),
    "rows of swaps": Mutant(
        "methods/refine/swaps.py",
        "torch.arange(len(keep_OI), device=keep_OI.device)",
        "torch.arange(len(keep_OI))",
        (_ENGINE, "swaps"),
    ),
    "masks of trained biases": Mutant(
        "pruning/reconstruction/schedule.py",
        "dtype=torch.bool, device=device)",
        "dtype=torch.bool)",
        (_ENGINE, "families and gpt_neo"),
    ),
    "sums of the logit loss": Mutant(
        "pruning/reconstruction/kl_loss.py",
        "dtype=torch.float64, device=device)",
        "dtype=torch.float64)",
        (_ENGINE, "every_method and last"),
    ),
    "validation error": Mutant(
        "pruning/reconstruction/train.py",
        "torch.zeros(2, device=self.device)",
        "torch.zeros(2)",
        (_ENGINE, "reconstructed"),
    ),
    "integers": Mutant(
        "methods/rate_distortion.py",
        "dtype=torch.int8, device=weight_IO.device)",
        "dtype=torch.int8)",
        (_ENGINE, "compression_gives"),
    ),
    "sensitivity of outputs": Mutant(
        "pruning/loss_sensitivity.py",
        "1e-12, device=weight_OI.device)",
        "1e-12)",
        (_ENGINE, "no_token"),
    ),
    "decoded integers": Mutant(
        "packed/planes.py",
        "dtype=torch.int8, device=weight.data.device)",
        "dtype=torch.int8)",
        ("packed/test_devices.py", "planes"),
    ),
    "loss of recovery": Mutant(
        "recovery/loss.py",
        "dtype=torch.float64, device=logits_WSV.device)",
        "dtype=torch.float64)",
        ("recovery/test_devices.py", "masked"),
    ),
    # Tensors that stay where they are.
    "start of the eigenvectors": Mutant(
        "methods/solvers/admm_operator.py",
        "start_IR.to(matrix_II.device)",
        "start_IR",
        (_ENGINE, "few_tokens"),
    ),
    "buffers": Mutant(
        "model/placement.py",
        "module._buffers[name] = buffer.to(device)",
        "pass",
        (_ENGINE, "families and gpt_neo"),
    ),
    "token ids": Mutant(
        "model/stream.py",
        "self.skeleton.record(ids.to(self.device))",
        "self.skeleton.record(ids)",
        (_ENGINE, "every_method and wanda"),
    ),
    "hidden states": Mutant(
        "model/hidden_states.py",
        "tensor.to(self._device, non_blocking=True)",
        "tensor",
        (_ENGINE, "hidden_states_wait and host"),
    ),
    "targets of the perplexity": Mutant(
        "evaluation/window_scores.py",
        "ids_S[first + 1 : stop + 1].to(model_TV.device)",
        "ids_S[first + 1 : stop + 1]",
        ("evaluation/test_devices.py", "perplexity"),
    ),
    # The wrong one of two devices, and a generator of the processor.
    "the first device instead of the given one": Mutant(
        "pruning/block/prune_block.py",
        "InputStatistics(in_features, spec, self.settings.device)",
        'InputStatistics(in_features, spec, torch.device("cuda", 0))',
        (_ENGINE, "given_number"),
    ),
    "generator": Mutant(
        "methods/solvers/admm_operator.py",
        "generator=torch.Generator().manual_seed(0))",
        "generator=torch.Generator().manual_seed(0), device=matrix_II.device)",
        (_ENGINE, "few_tokens"),
    ),
    # Copies: more than there need be, from pageable memory, and not waited for.
    "a weight that is sent again": Mutant(
        "pruning/block/linear.py",
        "    if stored_OI.dtype == current_OI.dtype:\n        return current_OI\n",
        "",
        (_ENGINE, "budget"),
    ),
    "masks in parts of the processor's size": Mutant(
        "methods/patterns.py",
        "(_SCORES_AT_A_TIME if on_cpu else _SCORES_AT_A_TIME_ON_GPU)",
        "_SCORES_AT_A_TIME",
        (_ENGINE, "budget"),
    ),
    "hidden states in pageable memory": Mutant(
        "model/hidden_states.py",
        "dtype=tensor.dtype, pin_memory=True)",
        "dtype=tensor.dtype)",
        (_ENGINE, "pinned"),
    ),
    "integers that nobody waits for": Mutant(
        "pruning/block/linear.py",
        "part.cpu() for part in pruned.quantized",
        'part.to("cpu", non_blocking=True) for part in pruned.quantized',
        (_ENGINE, "compression_gives"),
    ),
    "packed weights that are expanded at every call": Mutant(
        "packed/linear.py",
        "if self._kept is None or self._kept.dtype != dtype:",
        "if True:",
        ("packed/test_devices.py", "reference_path"),
    ),
}


def _mutated(mutant: Mutant, folder: Path) -> Path:
    """A copy of the package with the fault, made of links but for one file."""
    copy = folder / "prunus"
    shutil.copytree(
        _SOURCE, copy, copy_function=os.symlink, ignore=shutil.ignore_patterns("__pycache__")
    )
    text = (_SOURCE / mutant.file).read_text()
    assert mutant.old in text, f"{mutant.file} has no {mutant.old!r} any more"
    (copy / mutant.file).unlink()
    (copy / mutant.file).write_text(text.replace(mutant.old, mutant.new))
    return folder


def _is_caught(mutant: Mutant, folder: Path) -> bool:
    """Fork, run the tests on the faulty copy there, and say whether one of them failed."""
    folder.mkdir(parents=True)
    child = os.fork()
    if child == 0:
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.path.insert(0, str(_mutated(mutant, folder)))
        import pytest

        file, chosen = mutant.tests
        options = ["-x", "-m", "", "-p", "no:cacheprovider", "--rootdir", str(REPOSITORY)]
        # What is imported already is no plugin that matters here.
        options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
        status = pytest.main([*options, str(REPOSITORY / "tests" / file), "-k", chosen])
        # Anything but failed and passed tests would look like a fault that was caught.
        loaded = Path(sys.modules["prunus"].__file__ or "").is_relative_to(folder)
        os._exit(int(status) if loaded else 9)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 1), (folder / "log").read_text()[-3000:]
    return status == 1


def main(scratch: Path, names: list[str]) -> None:
    """Print which of the named faults are caught."""
    # An installed prunus would be imported with torch, before its faulty copy.
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    pretend_cuda.load()
    import torch

    pretend_cuda.install()
    torch.set_num_threads(1)
    # What every child needs, so that none of them imports it again.
    from transformers.models.llama import modeling_llama  # noqa: F401

    os.environ[pretend_cuda.INSTALLED] = "1"
    os.chdir(REPOSITORY)
    chosen = MUTANTS if names == ["all"] else {name: MUTANTS[name] for name in names}
    print(
        json.dumps(
            {
                name: _is_caught(mutant, scratch / str(number))
                for number, (name, mutant) in enumerate(chosen.items())
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
