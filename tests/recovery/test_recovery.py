"""Every mode on a tiny model: quality rises, zeros stay, and plain libraries load the result.

Also mixtures of experts, and what the command line shows.
"""

import copy
import io
import itertools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import prunus
from changes import edit_tensors
from command_line import call
from prunus.calibration.training_text import training_text as windows
from prunus.calibration.windows import WindowRequest
from prunus.evaluation.inspection import inspect
from prunus.model.adapter import merge_adapter
from prunus.model.checkpoint.files import holds_figures
from prunus.model.experts import Experts, find_fused_experts, split_loaded_experts
from prunus.model.loading import load_model
from prunus.model.open_folder import OpenFolder
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource
from prunus.pruning.manifest import Manifest
from prunus.recovery import training
from prunus.recovery.recovery_record import RecoveryRecord
from prunus.recovery.training import Step
from prunus.reporting.console import show_recovery
from prunus.structure.shrink import shrink
from prunus.structure.structure_record import StructureRecord
from recovery_cases import SHORT, dense_checkpoint, pruned_checkpoint, recover, shards, stop_at
from stopping import assert_resumes
from tiny import EXPERT_FAMILIES, stored, tiny_model, token_ids, weights
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
        loss = load_model(OpenFolder(out))(input_ids=ids, labels=ids).loss
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
    model = load_model(OpenFolder(pruned))
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
    merge_adapter(tmp_path / "lora", pruned, tmp_path / "merged")
    for folder in (tmp_path / "masked", tmp_path / "merged"):
        logits = load_model(OpenFolder(folder))(input_ids=torch.arange(3, 11)[None]).logits
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
    added = sum(p.numel() for name, p in adapted.named_parameters() if "lora" in name)
    assert totals["added_parameters"] == added
    assert totals["added_share"] == pytest.approx(added / (totals["parameters"]))


# --- the rate ---


def test_the_rate_of_masked_training_is_relative_to_the_weights(dense, text, tmp_path):
    rates = []
    for factor in (1.0, 0.125):
        small = shutil.copytree(dense, tmp_path / f"dense-{factor}")
        for name in (name for name in stored(small) if name.endswith("_proj.weight")):
            edit_tensors(small, lambda tensors: tensors[name].mul_(factor))  # noqa: B023
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


# --- full ---


def test_a_smaller_model_learns_from_the_dense_one(dense, text, tmp_path):
    recover(dense, tmp_path / "teacher", "full", text, tokens=6400)
    teacher = tmp_path / "teacher"
    small = tmp_path / "small"
    options = {"blocks": 1, "repair": False}
    shrink(dense, small, calibration=token_ids(), dtype="float32", **options)
    before = shards(small)
    record = recover(small, tmp_path / "out", None, text, teacher=teacher)
    assert record.recipe.mode == "full"
    assert shards(small) == before
    first, best = record.evaluations[0], record.evaluations[record.best]
    assert best.held_out_loss < 0.8 * first.held_out_loss
    assert record.linears == {}
    assert record.totals["trained_parameters"] == record.totals["parameters"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    old = AutoModelForCausalLM.from_pretrained(small).state_dict()
    assert all(not torch.equal(x, old[name]) for name, x in model.state_dict().items())
    assert model.config.num_hidden_layers == 1
    assert "Trained: all its weights" in (tmp_path / "out" / "README.md").read_text()
    kept = json.loads((tmp_path / "out" / StructureRecord.FILE).read_text())
    assert kept["config"]["num_hidden_layers"] == [2, 1]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_killed_training_goes_on_to_the_same_bytes(family, text, tmp_path):
    dense = dense_checkpoint(tmp_path / "dense", family)
    assert_resumes(lambda out, **o: recover(dense, out, "full", text, **o), tmp_path, stop_at(0.6))


# --- mixtures of experts ---

#: One by one or fused in the file; with and without biases, shared experts, dense blocks.
FAMILIES = ["deepseek_v3", "gpt_oss", "granitemoe", "mixtral", "qwen3_moe"]


@pytest.mark.parametrize("family", sorted(EXPERT_FAMILIES))
def test_a_loaded_model_with_single_experts_computes_what_the_fused_one_does(family):
    model, ids = tiny_model(family), token_ids(2, 8)
    single = copy.deepcopy(model)
    split_loaded_experts(single)
    assert find_fused_experts(model)
    assert not find_fused_experts(single)
    assert any(isinstance(module, Experts) for module in single.modules())
    assert not single.training
    with torch.no_grad():
        expected, found = (m(ids, use_cache=False).logits for m in (model, single))
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert sum(p.numel() for p in single.parameters()) == sum(p.numel() for p in model.parameters())


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the blocks, with one linear per expert."""
    source = CheckpointSource(OpenFolder(folder))
    skeleton = Skeleton(source.config, source.stored_dtype)
    source.bind(skeleton)
    return {
        f"{index}.{name}": x
        for index in range(len(skeleton))
        for name, x in source.block(index).items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_all_experts_and_routers_of_a_smaller_mixture_learn(family, text, tmp_path):
    teacher = dense_checkpoint(tmp_path / "teacher", family)
    small = tmp_path / "small"
    shrink(teacher, small, experts=0.5, repair=False, calibration=token_ids(), dtype="float32")
    record = recover(small, tmp_path / "out", "full", text)
    assert record.best > 0
    before, after = tensors(small), tensors(tmp_path / "out")
    assert {k: (x.shape, x.dtype) for k, x in before.items()} == {
        k: (x.shape, x.dtype) for k, x in after.items()
    }
    same = {key for key, x in before.items() if torch.equal(x, after[key])}
    # The bias by which DeepSeek-V3 corrects its router's choice is no parameter.
    assert not {key for key in same if "correction_bias" not in key}
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_zeros_of_experts_stay(text, tmp_path):
    dense = dense_checkpoint(tmp_path / "dense", "qwen3_moe")
    pruned = pruned_checkpoint(tmp_path / "pruned", dense, sparsity=0.5)
    record = recover(pruned, tmp_path / "out", "masked", text)
    before, after = tensors(pruned), tensors(tmp_path / "out")
    experts = [key for key in before if ".experts." in key]
    assert len(experts) == 2 * 8 * 3
    for key in experts:
        assert torch.equal(before[key] == 0, after[key] == 0), key
    assert sum(not torch.equal(before[key], after[key]) for key in experts) > len(experts) // 2
    assert len(record.linears) == len(experts) + 2 * 4


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_shrink_prune_and_recover_follow_each_other(family, text, tmp_path):
    """The recipe of the page about smaller models, with its record of what was removed."""
    teacher = tmp_path / "teacher"
    dense_checkpoint(teacher, family, torch.bfloat16)
    folders = [tmp_path / name for name in ("a", "b", "c", "d")]
    small, better, sparse, recovered = folders
    what = {"experts": 4} if family == "qwen3_moe" else {"blocks": 1}
    shrink(teacher, small, calibration=token_ids(), dtype="float32", **what)
    recover(small, better, "full", text, teacher=teacher, tokens=160)
    pruned_checkpoint(sparse, better, sparsity=0.5)
    recover(sparse, recovered, "masked", text, teacher=teacher, tokens=160)
    for folder in (better, sparse, recovered):
        assert (folder / "prunus-structure.json").exists()
    zeros = [float((x == 0).float().mean()) for k, x in tensors(recovered).items() if "proj" in k]
    assert all(share == pytest.approx(0.5, abs=0.01) for share in zeros)
    AutoModelForCausalLM.from_pretrained(recovered)


# --- the command line ---

SHORT_RUN = ["--tokens", "320", "--seqlen", "16", "--batch", "1", "--held-out", "2"]
SHORT_RUN += ["--learning-rate", "0.01"]


def test_recover_shows_its_figures_and_writes_them_as_json(dense, pruned, text, tmp_path):
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    result = call(
        "recover", pruned, out, "--text", text, *SHORT_RUN,
        "--teacher", dense, "--evaluations", 2, "--json", figures,
    )  # fmt: skip
    assert "the result" in result.stdout
    shown = " ".join(result.stdout.split())  # the lines below a table are wrapped to its width
    assert "compared weight by weight" in shown
    assert holds_figures(figures) and not holds_figures(out / RecoveryRecord.FILE)
    record = json.loads(figures.read_text())
    assert record == json.loads((out / RecoveryRecord.FILE).read_text())
    assert f"{record['totals']['zeros']:,} of {record['totals']['weights']:,}" in shown
    lines = [line for line in result.stderr.splitlines() if "held-out perplexity" in line]
    assert len(lines) == 3, "before, half way and at the end"
    assert "100% 320 tokens" in lines[2]
    call("inspect", out)


def test_lora_shows_the_parameters_it_adds(pruned, text, tmp_path):
    out = tmp_path / "lora"
    lora = ("--mode", "lora", "--target-modules", "k_proj, q_proj")
    result = call("recover", pruned, out, "--text", text, *SHORT_RUN, *lora)
    assert "parameters added" in " ".join(result.stdout.split())
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k_proj", "q_proj"]


def test_a_recovery_that_won_nothing_says_so(pruned, text, tmp_path):
    out = tmp_path / "out"
    absurd = [*SHORT_RUN, "--learning-rate", "1"]
    result = call("recover", pruned, out, "--mode", "masked", "--text", text, *absurd)
    assert "no evaluation was better than the start" in " ".join(result.stdout.split())
    weights = load_model(OpenFolder(pruned)).state_dict()
    assert all(
        torch.equal(weights[name], x)
        for name, x in load_model(OpenFolder(out)).state_dict().items()
    )


def test_a_terminal_shows_every_step_and_plain_lines_show_measurements():
    shown = {}
    for is_terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=is_terminal, width=120)
        with show_recovery("masked out", console) as progress:
            for step in range(50):
                progress(Step(step / 50, step, 0.0, f"loss {step}", loss=float(step)))
            progress(Step(0.75, 50, 0.0, "held-out perplexity 3.000", loss=1.0, perplexity=3.0))
        shown[is_terminal] = console.file.getvalue()
    assert "75%" in shown[True] and "held-out perplexity 3.000" in shown[True]
    lines = shown[False].splitlines()
    assert len(lines) == 2 and "held-out perplexity 3.000" in lines[1]
