"""Every mode on a tiny model: quality rises, zeros stay, and plain libraries load the result."""

import itertools
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import prunus
from prunus.calibration.training_text import training_text as windows
from prunus.calibration.windows import WindowRequest
from prunus.evaluation.inspection import inspect
from prunus.model.loading import load_model
from prunus.pruning.manifest import Manifest
from prunus.recovery import training
from prunus.recovery.record import RecoveryRecord
from recovery_cases import SHORT, dense_checkpoint, pruned_checkpoint, recover, shards
from tiny import weights
from tiny_tokenizer import byte_tokenizer

# --- masked ---


def test_masked_training_wins_quality_and_keeps_every_zero(pruned, text, tmp_path):
    before = shards(pruned)
    record = recover(pruned, tmp_path / "out", "masked", text, weight_decay=0.1)
    assert shards(pruned) == before, "the pruned model is not changed"
    totals = record.totals
    assert totals["held_out_perplexity_after"] < 0.5 * totals["held_out_perplexity_before"]
    assert set(record.linears) == {linear.name for linear in inspect(pruned).linears}
    old, new = weights(pruned), weights(tmp_path / "out")
    for name, entry in record.linears.items():
        was, now = old[f"{name}.weight"] == 0, new[f"{name}.weight"] == 0
        assert int(was.sum()) == entry.zeros_before > 0
        assert bool(now[was].all())
        assert not torch.equal(old[f"{name}.weight"], new[f"{name}.weight"])
    assert not torch.equal(old["model.embed_tokens.weight"], new["model.embed_tokens.weight"])
    assert totals["zeros"] == sum(
        int((new[f"{name}.weight"] == 0).sum()) for name in record.linears
    )


def test_the_record_is_what_was_measured(pruned, text, tmp_path):
    out = tmp_path / "out"
    record = recover(pruned, out, "masked", text)
    assert json.loads((out / RecoveryRecord.FILE).read_text()) == record.model_dump(mode="json")
    # 640 tokens in steps of 32, evaluated at the start and four times more.
    assert [entry.step for entry in record.evaluations] == [0, 5, 10, 15, 20]
    assert record.totals["tokens"] == 640
    best = min(record.evaluations, key=lambda entry: entry.held_out_loss)
    assert record.evaluations[record.best] == best
    # The figure is the perplexity of what was written, on windows that plain torch can score.
    ids = windows(str(text), WindowRequest(seqlen=16, tokenizer=byte_tokenizer), 2).held_out
    with torch.no_grad():
        loss = load_model(out)(input_ids=ids, labels=ids).loss
    assert float(loss) == pytest.approx(best.held_out_loss, rel=1e-4)


def test_patterns_survive_bfloat16(tmp_path, text):
    dense = dense_checkpoint(tmp_path / "dense", dtype=torch.bfloat16)
    pruned = pruned_checkpoint(tmp_path / "pruned", dense, pattern="2:4")
    recover(pruned, tmp_path / "out", "masked", text, dtype="bfloat16", weight_decay=0.5)
    found = inspect(tmp_path / "out")
    assert all("2:4" in linear.patterns for linear in found.linears)
    assert {linear.dtype for linear in found.linears} == {"bfloat16"}


def test_an_untied_head_that_was_pruned_is_kept_too(tmp_path, text):
    dense = dense_checkpoint(tmp_path / "dense", tie_word_embeddings=False)
    pruned = pruned_checkpoint(tmp_path / "pruned", dense, head=True)
    record = recover(pruned, tmp_path / "masked", "masked", text)
    assert record.linears["lm_head"].zeros_after >= record.linears["lm_head"].zeros_before > 0
    again = recover(tmp_path / "masked", tmp_path / "again", "masked", text)
    assert again.linears["lm_head"].zeros_before == record.linears["lm_head"].zeros_before


def test_without_a_manifest_linears_with_many_zeros_count_as_pruned(pruned, text, tmp_path):
    model = load_model(pruned)
    with torch.no_grad():
        dense_one = model.model.layers[0].mlp.up_proj.weight
        dense_one.copy_(torch.randn_like(dense_one))
        dense_one[0, 0] = 0
    model.save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other" / Manifest.FILE).exists()
    record = recover(tmp_path / "other", tmp_path / "out", "masked", text)
    assert "model.layers.0.mlp.up_proj" not in record.linears
    assert len(record.linears) == len(inspect(pruned).linears) - 1
    assert float(weights(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"][0, 0]) != 0


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma2", "phi3", "codegen"])
def test_other_families(family, tmp_path, text):
    dense = dense_checkpoint(tmp_path / "dense", family)
    pruned = pruned_checkpoint(tmp_path / "pruned", dense)
    for mode in ("masked", "lora"):
        totals = recover(pruned, tmp_path / mode, mode, text).totals
        assert totals["held_out_perplexity_after"] < totals["held_out_perplexity_before"]
        logits = load_model(tmp_path / mode)(input_ids=torch.arange(3, 11)[None]).logits
        assert bool(logits.isfinite().all())
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    fused = {"gpt2": ["c_attn"], "phi3": ["qkv_proj"], "codegen": ["qkv_proj"]}
    assert config["target_modules"] == fused.get(family, ["q_proj", "v_proj"])


# --- lora ---


def test_the_adapter_is_an_ordinary_one(pruned, text, tmp_path):
    import peft

    record = recover(pruned, tmp_path / "out", "lora", text)
    totals = record.totals
    assert totals["held_out_perplexity_after"] < totals["held_out_perplexity_before"]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    base = AutoModelForCausalLM.from_pretrained(pruned)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        theirs = adapted(input_ids=ids).logits
        ours = load_model(tmp_path / "out")(input_ids=ids).logits
    torch.testing.assert_close(theirs, ours)
    added = sum(p.numel() for name, p in adapted.named_parameters() if "lora" in name)
    assert totals["added_parameters"] == added
    assert totals["added_share"] == pytest.approx(added / (totals["parameters"]))
    assert prunus.perplexity(tmp_path / "out", str(text), seqlen=16, samples=2).perplexity > 0


# --- the rate ---


def test_the_rate_of_masked_training_is_relative_to_the_weights(dense, text, tmp_path):
    rates = []
    for factor in (1.0, 0.125):
        small = shutil.copytree(dense, tmp_path / f"dense-{factor}")
        tensors = load_file(small / "model.safetensors")
        for name, tensor in tensors.items():
            if name.endswith("_proj.weight"):
                tensors[name] = tensor * factor
        save_file(tensors, small / "model.safetensors", metadata={"format": "pt"})
        pruned = pruned_checkpoint(tmp_path / f"pruned-{factor}", small)
        record = recover(
            pruned, tmp_path / f"out-{factor}", "masked", text, tokens=64, learning_rate=None
        )
        kept = [x for n, x in weights(pruned).items() if n.endswith("_proj.weight")]
        size = math.sqrt(
            sum(float(x.square().sum()) for x in kept) / sum(int((x != 0).sum()) for x in kept)
        )
        rates.append(record.totals["peak_learning_rate"] / size)
    assert rates[0] == pytest.approx(rates[1], rel=1e-5)
    assert rates[0] * 0.26 == pytest.approx(2e-4, rel=0.02), "SmolLM2's"
    given = recover(pruned, tmp_path / "given", "masked", text, tokens=64, learning_rate=2e-5)
    assert given.totals["peak_learning_rate"] == 2e-5


# --- a teacher ---


def test_learning_from_the_dense_model_alone_brings_logits_closer(dense, pruned, text, tmp_path):
    record = recover(pruned, tmp_path / "out", "masked", text, teacher=dense)
    assert record.inputs.teacher is not None
    losses = [entry.training_loss for entry in record.evaluations[1:]]
    assert losses[-1] < 0.5 * losses[0]
    mixed = recover(pruned, tmp_path / "mix", "masked", text, teacher=dense, distill_weight=0.25)
    assert mixed.evaluations[1].training_loss > losses[0], "the text's cross entropy counts too"
    still = {"tokens": 64, "learning_rate": 1e-6}
    same = recover(pruned, tmp_path / "same", "masked", text, teacher=pruned, **still)
    assert same.evaluations[1].training_loss == pytest.approx(0, abs=1e-6), "nothing to learn"


# --- budgets ---


def test_a_budget_in_minutes_ends(pruned, text, tmp_path, monkeypatch):
    """By a clock that advances 50 ms whenever it is read."""
    seconds = itertools.count(step=0.05)
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    short = {key: value for key, value in SHORT.items() if key != "tokens"}
    out = tmp_path / "out"
    record = prunus.recover(pruned, out, "lora", text=str(text), minutes=0.1, **short)
    assert record.state == "finished"
    assert record.totals["tokens"] > 0
    assert 6 <= record.totals["seconds"] < 7
    assert len(record.evaluations) == 5


def test_the_result_has_the_weights_of_the_best_evaluation(pruned, text, tmp_path, monkeypatch):
    losses = iter([3.0, 3.5, 2.9, 3.3, 3.2])
    monkeypatch.setattr(training.Training, "held_out_loss", lambda _: next(losses))
    out, kept = tmp_path / "out", {}

    def keep(_):
        """The file of the best weights so far, as each evaluation leaves it."""
        for path in out.glob("best-*"):
            kept.update(load_file(path))

    assert recover(pruned, out, "masked", text, progress=keep).best == 2
    found = weights(out)
    assert kept and all(torch.equal(found[name], tensor) for name, tensor in kept.items())
    assert not list(out.glob("best-*"))
    assert not (out / "training.safetensors").exists()
