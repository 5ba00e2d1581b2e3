"""What cannot work is refused before any work; a training that fails later loses nothing."""

import itertools
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import save_file

import prunus
from changes import swap_two_tokens
from prunus import Manifest, StructureRecord
from prunus.model.checkpoint.tensor_files import INDEX_NAME
from prunus.model.loading import load_model
from prunus.model.open_folder import OpenFolder
from prunus.recovery import training
from prunus.recovery.recovery_plan import default_mode
from prunus.recovery.recovery_record import RecoveryRecord
from prunus.recovery.trainable import check_zeros
from recovery_cases import dense_checkpoint, recover, shards
from refusals import assert_refused
from tiny import tiny_checkpoint, weights
from tiny_tokenizer import VOCABULARY, byte_tokenizer


def refused(fault, words, model, output, mode, text, **options):
    """Check that the call raises with these words and writes nothing."""
    assert_refused(fault, words, recover, model, output, mode, text, **options)


@pytest.mark.parametrize(
    ("mode", "options", "words"),
    [
        ("masked", {"minutes": 1.0}, "in tokens or in minutes, not in both"),
        ("masked", {"rank": 4}, "rank has no meaning in mode masked; it belongs to lora"),
        ("masked", {"tokens": 0}, "tokens must be at least 1; got 0"),
        ("masked", {"tokens": 31}, r"31 is less than one step, .* on 32 tokens \(2 windows of 16"),
        ("masked", {"learning_rate": math.nan}, "learning_rate must lie in"),
        (
            "masked",
            {"lerning_rate": 1.0},
            "unknown option 'lerning_rate'; did you mean learning",
        ),
        ("masked", {"distill_weight": 0.5}, "give the dense model as `teacher`"),
        ("masked", {"seqlen": 65}, r"windows of 65 tokens do not fit: the model has 64 positions"),
        ("masked", {"device": "gpu"}, "device must be auto"),
        (
            "lora",
            {"target_modules": ("q_poj",)},
            r"'q_poj' names none of the linears; their names are down_proj, .*q_proj",
        ),
        (
            "lora",
            {"rank": 40},
            r"rank 40 is more than .*q_proj of shape \(32, 32\) can have: lower `rank` to 32",
        ),
    ],
)
def test_options_that_cannot_work(mode, options, words, pruned, text, tmp_path):
    refused(ValueError, words, pruned, tmp_path / "out", mode, text, **options)


def test_folders_that_are_something_else(dense, pruned, text, tmp_path):
    refused(ValueError, "has no pruned linears", dense, tmp_path / "out", "masked", text)
    refused(ValueError, "fill: choose mode masked", pruned, tmp_path / "out", "full", text)
    recover(pruned, tmp_path / "adapter", "lora", text, tokens=32, evaluations=1)
    refused(ValueError, "is an adapter", tmp_path / "adapter", tmp_path / "out", "masked", text)


@pytest.mark.parametrize("mode", [None, "lora"])
@pytest.mark.parametrize("name", ["a.gguf", "mlx"])
def test_compressed_models(name, mode, tmp_path, text):
    """Each is told by its name or its configuration, so that no weights are needed here."""
    folder = tmp_path / name
    if name == "a.gguf":
        folder.write_bytes(b"GGUF")
    else:
        folder.mkdir()
        described = {"model_type": "llama", "quantization": {"bits": 4, "group_size": 32}}
        (folder / "config.json").write_text(json.dumps(described))
    words = f"{name} is compressed, and recover takes dense and pruned models: give the one that"
    refused(ValueError, words, folder, tmp_path / "out", mode, text)


def test_text_that_is_not_there_or_too_short(pruned, tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    foreign = {"input_ids": torch.full((9, 16), VOCABULARY)}
    save_file(foreign, tmp_path / "foreign.safetensors")
    for name, error, words in (
        ("no.txt", FileNotFoundError, "no such file"),
        ("short.txt", ValueError, r"the text has 0 windows, too few to hold 2 out"),
        ("foreign.safetensors", ValueError, "but the model's embedding has "),
    ):
        refused(error, words, pruned, tmp_path / "out", "masked", tmp_path / name)


def test_a_teacher_with_another_vocabulary(dense, pruned, text, tmp_path):
    larger = tiny_checkpoint(tmp_path / "larger", vocab_size=VOCABULARY + 6)
    words = f"has a vocabulary of {VOCABULARY + 6} tokens, .* one of {VOCABULARY}"
    refused(ValueError, words, pruned, tmp_path / "out", "masked", text, teacher=larger)
    other = dense_checkpoint(tmp_path / "other")
    swap_two_tokens(other)
    words = "the tokenizers .* differ, at 'a'"
    refused(ValueError, words, pruned, tmp_path / "out", "lora", text, teacher=other)


def test_peft_that_is_not_installed_is_named_with_its_extra(pruned, text, tmp_path, uninstalled):
    uninstalled("peft")
    refused(ModuleNotFoundError, r"pip install '\.\[", pruned, tmp_path / "out", "lora", text)


# --- losses that are not finite ---


def nan_after(monkeypatch, calls):
    """Make the training loss NaN after some calls; calls for held-out windows do not count."""
    real, seen = training.next_token_loss, itertools.count()

    def loss(*arguments):
        ends = torch.is_grad_enabled() and next(seen) >= calls
        return real(*arguments) * (math.nan if ends else 1)

    monkeypatch.setattr(training, "next_token_loss", loss)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_best_checkpoint(
    pruned, text, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    nan_after(monkeypatch, calls=12)
    words = r"loss was not finite at step 13.* holds the weights of step 10"
    with pytest.raises(ValueError, match=words):
        recover(pruned, out, "masked", text)
    record = RecoveryRecord.load(out)
    assert record.state == "finished"
    assert record.evaluations[record.best].step == 10
    assert all(bool(tensor.isfinite().all()) for tensor in weights(out).values())
    after, before = (
        prunus.perplexity(folder, str(text), seqlen=16, samples=2).loss for folder in (out, pruned)
    )
    assert after < before
    nan_after(monkeypatch, calls=2)
    with pytest.raises(ValueError, match="holds no result; lower `learning_rate`"):
        recover(pruned, tmp_path / "early", "masked", text)
    assert not (tmp_path / "early" / INDEX_NAME).exists()
    assert RecoveryRecord.load(tmp_path / "early").state == "running"


def test_a_model_without_a_finite_loss(pruned, text, tmp_path):
    broken = tmp_path / "broken"
    model = load_model(OpenFolder(pruned))
    with torch.no_grad():
        model.model.norm.weight.fill_(1e38)
        model.lm_head.weight.mul_(1e5)
    model.save_pretrained(broken)
    byte_tokenizer().save_pretrained(broken)
    with pytest.raises(ValueError, match="before any training"):
        recover(broken, tmp_path / "out", "lora", text)


def test_a_step_that_would_not_be_finite_changes_nothing(pruned, text, tmp_path):
    """With a rate that no weight survives, no weight that is not finite is ever written."""
    with pytest.raises(ValueError, match="training stopped"):
        recover(pruned, tmp_path / "out", "masked", text, learning_rate=1e30)
    for tensors in shards(tmp_path / "out"):
        assert tensors.startswith(("training", "best", "model-0"))


def test_a_pruned_weight_that_is_not_zero_is_never_written():
    before = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    with pytest.raises(RuntimeError, match=r"x: 1 pruned weights are not zero"):
        check_zeros("x", (2, 2), before, before + torch.tensor([[0.0, 0.0], [0.0, 1e-30]]))
    kept = check_zeros("x", (2, 2), before, before * torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    assert (kept.zeros_before, kept.zeros_after) == (2, 3)


def test_a_mode_follows_from_the_record_of_a_model(dense, text, tmp_path):
    refused(ValueError, "no mode follows from it: give", dense, tmp_path / "out", None, text)
    for record in (Manifest, StructureRecord):
        folder = tmp_path / record.FILE
        shutil.copytree(dense, folder)
        (folder / record.FILE).touch()
        assert default_mode(folder) == ("full" if record is StructureRecord else "masked")
    (folder / Manifest.FILE).touch()
    assert default_mode(folder) == "masked", "a smaller model that is pruned"


@pytest.mark.parametrize("options", [7, None, [], {"mode": "masked", "seqlen": "many"}])
def test_a_record_with_damaged_options_is_refused(options, tmp_path):
    (tmp_path / RecoveryRecord.FILE).write_text(json.dumps({"recipe": options}))
    assert_refused(ValueError, RecoveryRecord.FILE, RecoveryRecord.load, tmp_path)
