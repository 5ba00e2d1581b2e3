"""Hostile checkpoints: an error for people, never a crash, a hang, or memory without end.

Nor do they open files outside their folder, or run code.
"""

import contextlib
import json
import pickle
from pathlib import Path

import pytest

import prunus
from changes import edit_json
from scripts import fork_script
from tiny import ids_file, token_ids

resource = pytest.importorskip("resource")

#: Kind of input -> its cases, of which at least a share must be refused.
CASES = {
    "header": 160,
    "index": 120,
    "config": 40,
    "integers": 30,
    "gguf": 30,
    "architecture": 60,
    "template": 25,
    "generation": 10,
    "report": 50,
    "text": 475,
}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads its own memory from /proc")
@pytest.mark.parametrize("times", [0.25, pytest.param(10, marks=pytest.mark.slow)])
def test_hundreds_of_damaged_inputs(times, tmp_path):
    cases = [f"{kind}:{int(times * count + 0.5)}" for kind, count in CASES.items()]
    done = fork_script("hostile.py", tmp_path, 1, *cases)
    where = (tmp_path / "case").read_text() if (tmp_path / "case").exists() else "none"
    assert done.returncode == 0, f"at case {where}: {done.stderr[-3000:]}"
    outcomes = json.loads(done.stdout.splitlines()[-1])
    if len(outcomes) == len(CASES):  # without an extra there are fewer
        assert sum(sum(count.values()) for count in outcomes.values()) >= 1000 * times
    for kind, count in outcomes.items():
        refused = sum(number for name, number in count.items() if name != "fine")
        assert refused > times * CASES[kind] / 10, (kind, count)


class Bomb:
    """Creates the file `target` when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("alone", [True, False])
def test_no_pickle_is_ever_loaded(dense, alone, tmp_path):
    names = ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "training_args.bin"]
    for name in names:
        (dense / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    if alone:
        (dense / "model.safetensors").unlink()
    for work in (
        lambda: prunus.prune(dense, tmp_path / "out", calibration=token_ids()),
        lambda: prunus.inspect(dense),
        lambda: prunus.perplexity(dense, "python-docs", seqlen=16, samples=1, tokenizer=None),
    ):
        with contextlib.suppress(ValueError, FileNotFoundError):
            work()
    assert not (tmp_path / "exploded").exists()
    assert (tmp_path / "out" / "prunus.json").exists() != alone
    for name in names:
        assert not (tmp_path / "out" / name).exists(), "no pickle is copied to the result"


def test_code_of_a_checkpoint_runs_with_the_flag_only(dense, tmp_path):
    (dense / "configuration_own.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
        "from transformers import LlamaConfig\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    auto_map = {"AutoConfig": "configuration_own.OwnConfig"}
    edit_json(dense / "config.json", model_type="own", auto_map=auto_map)
    ids = ids_file(tmp_path / "ids.safetensors")
    for work in (
        lambda: prunus.prune(dense, tmp_path / "out", calibration=token_ids()),
        lambda: prunus.inspect(dense),
        lambda: prunus.perplexity(dense, str(ids), seqlen=16, samples=1),
    ):
        with pytest.raises(ValueError, match=r"own|custom code"):
            work()
        assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError):
        prunus.prune(dense, tmp_path / "out", calibration=token_ids(), trust_remote_code=True)
    assert (tmp_path / "ran").exists()


def test_weights_that_are_not_there_are_not_made_up(dense, tmp_path):
    """transformers would continue with random ones."""
    ids_file(tmp_path / "ids.safetensors")
    config = json.loads((dense / "config.json").read_text())
    for change, what in (
        ({"num_hidden_layers": 3}, "9 of its weights are not there"),
        ({"head_dim": 4}, ""),
    ):
        (dense / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=f"could not be loaded.*{what}"):
            prunus.perplexity(dense, str(tmp_path / "ids.safetensors"), seqlen=16, stream=False)
