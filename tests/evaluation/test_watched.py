"""A checkpoint that changes while it is scored ends the work with an error that names it."""

import os
import shutil
from importlib.util import find_spec

import pytest

import prunus
from tiny_tokenizer import dense_checkpoint
from zeroshot_rows import write_local_datasets


def cut_short(folder):
    """A page that a mapped file has no more would kill the process."""
    for path in folder.glob("*.safetensors"):
        os.truncate(path, min(path.stat().st_size, 4096))


def change(folder):
    """Write other bytes over the last weights in a file, as a second program would do."""
    path = max(folder.glob("*.safetensors"))
    with path.open("r+b") as file:
        file.seek(-8, 2)
        file.write(bytes(8))


@pytest.fixture
def copies(folders, tmp_path):
    for name in ("dense", "pruned"):
        shutil.copytree(folders / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    ("model", "changed", "stream"),
    [
        ("pruned", "pruned", False),
        ("pruned", "pruned", True),
        ("pruned", "dense", False),
        ("pruned", "dense", True),
    ],
)
@pytest.mark.parametrize("how", [change, cut_short])
def test_perplexity(model, changed, stream, how, copies, folders):
    seen = []

    def progress(done, of):
        if not seen:
            how(copies / changed)
        seen.append(done)

    reference = copies / "dense" if changed == "dense" else None
    with pytest.raises(ValueError, match=rf"{changed}/.*\.safetensors was changed"):
        prunus.perplexity(
            copies / model,
            str(folders / "ids.safetensors"),
            reference=reference,
            seqlen=24,
            device="cpu",
            stream=stream,
            progress=progress,
        )
    assert seen


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs the extra eval")
@pytest.mark.filterwarnings("ignore")
def test_tasks(tmp_path):
    dense = dense_checkpoint(tmp_path / "m", max_position_embeddings=1024)
    data = write_local_datasets(tmp_path / "data")
    with pytest.raises(ValueError, match=r"m/model\.safetensors was changed"):
        prunus.evaluate(dense, "rte,boolq", data=data, limit=2, progress=lambda _: change(dense))
