"""`tune` trains the scales of a rounded model. Its integers and its bytes stay as many."""

import json

import pytest
import torch
from torch.nn.functional import kl_div

import prunus
from gguf_cases import gguf_checkpoint
from prunus.compression import tuning
from prunus.model.checkpoint.resolve import open_folder
from prunus.model.loading import load_model
from prunus.rounding import loss_sensitivity
from prunus.training.checkpoints import TrainingState
from prunus.training.evaluation import Evaluation
from scripts import run_script
from stopping import assert_all_resumed
from tiny import token_ids

IDS = token_ids(96)
FORMATS = {
    "integers": ("out", {"bits": 3.0}),
    "mlx": ("out", {"bits": 3.0, "format": "mlx"}),
    "q2_k": ("out.gguf", {"type": "Q2_K"}),
    "q4_0": ("out.gguf", {"type": "Q4_0"}),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuning") / "dense"
    return gguf_checkpoint(folder)


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """A random model has nearly equal logits, so its divergence says too little of the rate."""
    monkeypatch.setattr(tuning, "_RATE", 2.0)


def compress(dense, output, tokens, options):
    return prunus.compress(dense, output, calibration=IDS, batch=32, tune=tokens, **options)


def dense_weights(result):
    model = load_model(open_folder(result), torch.float32)
    return {name: x.detach() for name, x in model.named_parameters()}


@pytest.mark.parametrize("format", FORMATS)
def test_training_lowers_the_divergence_by_factors_alone(format, dense, tmp_path):
    name, options = FORMATS[format]
    rounded, tuned = tmp_path / f"plain-{name}", tmp_path / name
    compress(dense, rounded, 0, options)
    record = compress(dense, tuned, 4096, options)
    losses = [x.held_out_loss for x in record.tuning.evaluations]
    assert record.tuning.helps and record.tuning.stored_loss < losses[0], losses
    assert record.tuning.sentence() in record.table().note
    before, after = dense_weights(rounded), dense_weights(tuned)
    changed = 0
    for key, weight in before.items():
        if weight.dim() == 2 and ".layers." in key:
            # 256 columns have one factor, but for what its rounding adds.
            old_OFC, new_OFC = (x.unflatten(1, (-1, 256)) for x in (weight, after[key]))
            factor_OF1 = (old_OFC * new_OFC).sum(-1, True) / old_OFC.square().sum(-1, True)
            error = (new_OFC - factor_OF1 * old_OFC).abs().amax() / weight.abs().max()
            assert error < 0.02, (key, error)
            changed += int((factor_OF1 - 1).abs().max() > 0.001)
        elif weight.dim() == 2:
            assert torch.equal(weight, after[key])
    assert changed == 14


def test_losses_and_gradients_are_those_of_the_whole_model(dense, tmp_path, monkeypatch):
    """By the models that transformers runs, and by differences along the gradient."""
    seen = {}

    class Spy:
        peak_rate = 0.0

        def __init__(self, learner, schedule, checkpoints, report):
            self.learner = learner

        def run(self):
            learner = self.learner
            seen["ids"] = learner.text.windows(0, learner.batch)
            seen["loss"] = learner.add_gradients(0)
            gradients = {k: x.grad.clone() for k, x in learner.parameters.items()}
            square = float(sum(x.square().sum() for x in gradients.values()))
            around = []
            for size in (-0.05, 0.05):
                for key, parameter in learner.parameters.items():
                    parameter.data = size / square**0.5 * gradients[key]
                with torch.no_grad():
                    around.append(learner._pass(0, learns=False))
            seen["slope"] = (around[1] - around[0]) / 0.1
            seen["norm"] = square**0.5
            entry = {"step": 0, "tokens": 0, "seconds": 0.0, "training_loss": None}
            return TrainingState(evaluations=[Evaluation(**entry, held_out_loss=0.1)])

    monkeypatch.setattr(tuning, "Training", Spy)
    monkeypatch.setattr(loss_sensitivity, "multiplies_bfloat16", lambda device: False)
    record = compress(dense, tmp_path / "out", 8192, {"bits": 3.0, "dtype": "float32"})
    assert not record.tuning.helps
    with torch.no_grad():
        logits = [
            load_model(open_folder(x), torch.float32)(seen["ids"]).logits[:, :-1].log_softmax(-1)
            for x in (dense, tmp_path / "out")
        ]
    expected = kl_div(logits[1], logits[0], reduction="sum", log_target=True)
    count = logits[0].shape[:2].numel()
    assert seen["loss"] == pytest.approx(float(expected) / count, rel=1e-3)
    assert seen["slope"] == pytest.approx(seen["norm"], rel=0.02)


def test_a_training_that_does_harm_leaves_the_weights(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "_RATE", 1e5)
    record = compress(dense, tmp_path / "tuned", 2048, {"bits": 3.0})
    assert not record.tuning.helps and "stay as they were rounded" in record.tuning.sentence()
    compress(dense, tmp_path / "plain", 0, {"bits": 3.0})
    before, after = dense_weights(tmp_path / "plain"), dense_weights(tmp_path / "tuned")
    assert all(torch.equal(x, after[key]) for key, x in before.items())


@pytest.mark.slow
def test_a_kill_at_any_rename_resumes_to_the_same_bytes(dense, tmp_path):
    options = json.dumps({"bits": 3.0, "tune": 1024})
    results = run_script("kill_points.py", dense, tmp_path, options, "before")
    assert_all_resumed(results)
    assert any("tuned.safetensors" in result["found"] for result in results)
