"""A run that is slow between its look at the output folder and its lock finds what happened there.

Each test runs a first command to its end in exactly that moment of a second command. What the
first command wrote must stay, byte for byte.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import prunus
from prunus.model.checkpoint import lock
from prunus.sweeping.grid import Sweep
from prunus.sweeping.run import sweep as run_sweep
from recovery_cases import dense_checkpoint, pruned_checkpoint, recover, training_text
from tiny import token_ids, tree


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    """A folder with checkpoints, text and token ids; no test writes to it."""
    folder = tmp_path_factory.mktemp("races")
    dense = dense_checkpoint(folder / "dense", dtype=torch.bfloat16)
    pruned_checkpoint(folder / "pruned", dense, sparsity=0.5)
    save_file({"input_ids": token_ids()}, folder / "ids.safetensors")
    training_text(folder)
    return folder


@pytest.fixture
def between_look_and_lock(monkeypatch):
    """A function that runs `work` on a folder in the moment before the next lock is taken.

    It returns what the folder holds after that, once it has happened.
    """
    acquire = lock._acquire
    left: dict[str, bytes] = {}

    def arrange(work: Callable[[Path], Any], out: Path) -> dict[str, bytes]:
        def acquire_later(folder: Path) -> int:
            monkeypatch.setattr(lock, "_acquire", acquire)
            work(out)
            left.update(tree(out))
            return acquire(folder)

        monkeypatch.setattr(lock, "_acquire", acquire_later)
        return left

    return arrange


def sweep_of(dense: Path, ids: Path, sparsity: float) -> Sweep:
    return Sweep.model_validate(
        {
            "title": "t",
            "models": [str(dense)],
            "recipe": {"calibration": str(ids), "samples": 3, "seqlen": 16, "dtype": "float32"},
            "scoring": {"texts": [str(ids)], "seqlen": 16, "samples": 2},
            "grid": [{"method": "magnitude", "sparsity": sparsity}],
            "keep_checkpoints": True,
        }
    )


def verbs(material: Path) -> dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]]:
    """Verb -> two commands that write different results."""
    dense, text = material / "dense", material / "text.txt"
    ids = material / "ids.safetensors"
    found: dict[str, Any] = {
        "prune": [
            lambda out, s=s: prunus.prune(dense, out, "magnitude", s, dtype="float32")
            for s in (0.3, 0.7)
        ],
        "compress": [
            lambda out, b=b: prunus.compress(
                dense, out, b, calibration=token_ids(), dtype="float32"
            )
            for b in (4, 8)
        ],
        "recover": [
            lambda out, n=n: recover(
                material / "pruned", out, "masked", text, evaluations=1, tokens=n
            )
            for n in (64, 128)
        ],
        "sweep": [lambda out, s=s: run_sweep(sweep_of(dense, ids, s), out) for s in (0.3, 0.7)],
    }
    return found


@pytest.mark.parametrize("verb", ["prune", "compress", "recover", "sweep"])
def test_what_another_run_finished_meanwhile_is_not_destroyed(
    verb, material, between_look_and_lock, tmp_path
):
    first, second = verbs(material)[verb]
    before = between_look_and_lock(first, tmp_path / "out")
    with pytest.raises(FileExistsError, match=r"another|set of cells"):
        second(tmp_path / "out")
    assert before
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("verb", ["prune", "compress", "recover"])
def test_the_same_command_twice_gives_one_result(verb, material, between_look_and_lock, tmp_path):
    """The second command finds the result of the first, and ends well without work."""
    first, _ = verbs(material)[verb]
    before = between_look_and_lock(first, tmp_path / "out")
    first(tmp_path / "out")
    assert tree(tmp_path / "out") == before


def test_an_import_replaces_what_another_run_finished_only_if_it_may(
    material, between_look_and_lock, tmp_path
):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    from prunus.formats.gguf.import_checkpoint import import_gguf
    from tiny_gguf import tiny_llama, write_gguf

    write_gguf(tiny_llama(), tmp_path / "tiny.gguf")
    out = tmp_path / "out"
    with lock.locked(out):
        for overwrite in (False, True):
            with pytest.raises(FileExistsError, match="being written"):
                import_gguf(tmp_path / "tiny.gguf", out, overwrite=overwrite)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny.gguf"]
    prune = verbs(material)["prune"][0]
    between_look_and_lock(prune, out)
    with pytest.raises(FileExistsError, match="not empty"):
        import_gguf(tmp_path / "tiny.gguf", out)
    assert (out / "prunus.json").exists()
    between_look_and_lock(prune, out)
    import_gguf(tmp_path / "tiny.gguf", out, overwrite=True)
    assert (out / "model.safetensors").exists()
    assert not (out / "prunus.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny.gguf"]
