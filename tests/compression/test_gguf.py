"""`prunus compress` to a GGUF file: what is in it, and that it is a whole run like every other."""

import itertools
import json
import math
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

pytest.importorskip("gguf")
pytest.importorskip("accelerate")


import prunus
from command_line import call
from gguf_cases import compress, gguf_checkpoint, shape
from prunus.compression.type_rounding import type_losses
from prunus.engine.block import change_block
from prunus.engine.progress import Progress, pruning_step
from prunus.evaluation.eval_records import ModelSize
from prunus.evaluation.generation import generate
from prunus.evaluation.inspection import stored_size
from prunus.formats.gguf import file as gguf_file
from prunus.formats.gguf import result as gguf_result
from prunus.formats.gguf import speeds
from prunus.formats.gguf.file import GgufFile
from prunus.formats.gguf.import_checkpoint import import_gguf
from prunus.formats.gguf.result import read_record
from prunus.formats.gguf.types import TYPES
from prunus.model.checkpoint import lock
from prunus.model.checkpoint.files import move_file
from prunus.model.open_folder import OpenFolder
from prunus.rounding import llama_cpp
from prunus.rounding.group_fits import round_to_nearest
from prunus.rounding.loss_sensitivity import LinearSensitivity
from prunus.rounding.type_choice import Choice, choose_types
from refusals import assert_refused
from scripts import run_script
from sensitivity_cases import IDS, whole_model
from stopping import assert_all_resumed, interrupt
from tiny import tiny_checkpoint, token_ids, tree

#: Options of mixtures of experts. Other widths make larger files.
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 64, "num_local_experts": 2, "num_experts_per_tok": 1},
    "qwen2_moe": {"moe_intermediate_size": 64, "head_dim": 64, "num_experts": 4},
    "qwen3_moe": {"moe_intermediate_size": 64, "norm_topk_prob": True, "num_experts": 4},
}


#: The file, and what lies beside it.
RESULT = ["x.Modelfile", "x.README.md", "x.gguf"]


def imported(path: Path, folder: Path) -> dict[str, torch.Tensor]:
    import_gguf(path, folder, dtype="float32")
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return gguf_checkpoint(tmp_path_factory.mktemp("gguf") / "dense")


@pytest.fixture(scope="module")
def one_block(tmp_path_factory) -> Path:
    """For tests in which no block follows another: each takes as long as the first."""
    return gguf_checkpoint(tmp_path_factory.mktemp("gguf") / "one", num_hidden_layers=1)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A model too narrow for the types of 256 columns, for tests that do not look at weights."""
    folder = tmp_path_factory.mktemp("gguf") / "small"
    return gguf_checkpoint(folder, hidden_size=32, intermediate_size=64)


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> Path:
    return gguf_checkpoint(
        tmp_path_factory.mktemp("gguf") / "experts", "mixtral", **EXPERTS["mixtral"]
    )


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text", *EXPERTS])
def test_the_file_reads_as_the_weights_that_the_run_computed(family, tmp_path):
    # Gemma 3 has two kinds of blocks.
    blocks = 2 if family == "gemma3_text" else 1
    options = {"num_hidden_layers": blocks, **EXPERTS.get(family, {})}
    dense = gguf_checkpoint(tmp_path / "dense", family, **options)
    record = compress(dense, tmp_path / "x.gguf", type="Q3_K")
    found = imported(tmp_path / "x.gguf", tmp_path / "back")
    before = load_file(dense / "model.safetensors")
    assert found.keys() == before.keys()
    for name, weight in before.items():
        module = name.removesuffix(".weight").replace("block_sparse_moe", "mlp")
        kind = record.types.get(module)
        error = float((found[name] - weight.float()).norm() / weight.float().norm())
        limit = {None: 1e-6, "Q6_K": 0.02}.get(kind, 0.3)
        assert error < limit, (name, kind, error)
    assert (tmp_path / "x.gguf").stat().st_size == record.size.after
    assert not (tmp_path / "x.gguf.part").exists()
    if family == "gemma3_text":
        return  # its own tokenizer is of another kind
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (dense, tmp_path / "back"))
    assert ours("Hello ab")["input_ids"] == theirs("Hello ab")["input_ids"]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe"])
def test_a_model_without_some_of_its_parts_is_written(family, tmp_path):
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    options = {"layer_types": kinds} if family == "gemma3_text" else EXPERTS.get(family, {})
    dense = gguf_checkpoint(tmp_path / "dense", family, num_hidden_layers=3, **options)
    fewer = {"blocks": 2, "experts": 3} if family in EXPERTS else {"blocks": 2}
    prunus.shrink(dense, tmp_path / "small", **fewer, repair=False, calibration=token_ids())
    compress(tmp_path / "small", tmp_path / "x.gguf", type="Q8_0")
    config, file = (
        AutoConfig.from_pretrained(tmp_path / "small"),
        GgufFile.open(tmp_path / "x.gguf"),
    )
    assert file.get(f"{file.architecture}.block_count") == 2
    if family in EXPERTS:
        assert file.get("qwen3moe.expert_count") == 3
        assert shape(file, "blk.1.ffn_down_exps.weight") == (3, 256, 64)
    if family == "gemma3_text":
        # llama.cpp would take every sixth block for one of full attention.
        sliding = [kind == "sliding_attention" for kind in config.layer_types]
        assert file.get("gemma3.attention.sliding_window_pattern") == sliding


@pytest.mark.parametrize(
    "options", [{"type": "Q4_K"}, {"bits": 4.5}, {"bits": 4.5, "rounding": "nearest"}]
)
def test_a_killed_run_continues_to_the_same_bytes(options, dense, experts, tmp_path):
    dense = experts if "type" in options else dense
    compress(dense, tmp_path / "whole.gguf", **options)
    out = tmp_path / "x.gguf"
    interrupt(compress, dense, out, **options)
    assert not out.exists()
    compress(dense, out, **options)
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    # A finished file is found as it is, also if the folder of the run was not removed yet.
    (tmp_path / "x.gguf.part").mkdir()
    assert compress(dense, out, **options).state == "finished"
    assert sorted(path.name for path in tmp_path.glob("x*")) == RESULT
    assert_refused(FileExistsError, "another", compress, dense, out, type="Q3_K")


def test_the_experts_of_a_stack_have_one_type_that_suits_them_together(experts, tmp_path):
    record = compress(experts, tmp_path / "x.gguf", bits=4.0, min_expert_tokens=0)
    file = GgufFile.open(tmp_path / "x.gguf")
    for place, name in itertools.product(range(2), ("w1", "w2", "w3")):
        stack = f"model.layers.{place}.mlp.experts"
        kinds = {record.types[f"{stack}.{number}.{name}"] for number in range(2)}
        leaf = {"w1": "gate", "w2": "down", "w3": "up"}[name]
        assert kinds == {file.tensors[f"blk.{place}.ffn_{leaf}_exps.weight"].tensor_type.name}
    assert file.tensors["blk.0.ffn_gate_inp.weight"].tensor_type.name == "F32"
    found = prunus.inspect(tmp_path / "x.gguf")
    assert {linear.name: linear.dtype for linear in found.linears}.items() <= record.types.items()
    linears = record.blocks[0].linears
    tokens = [linears[f"mlp.experts.{number}.w2"].tokens for number in range(2)]
    assert sum(tokens) == linears["self_attn.q_proj"].tokens > max(tokens)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_gguf_file_in_full_precision_is_compressed_like_its_checkpoint(family, tmp_path):
    blocks = 2 if family == "gemma3_text" else 1
    dense = gguf_checkpoint(tmp_path / "dense", family, num_hidden_layers=blocks)
    compress(dense, tmp_path / "full.gguf", type="Q8_0", rounding="nearest")
    record = compress(tmp_path / "full.gguf", tmp_path / "x.gguf", type="Q4_K")
    assert record.source == str(tmp_path / "full.gguf")
    compress(dense, tmp_path / "y.gguf", type="Q4_K")
    ours, theirs = (GgufFile.open(tmp_path / name) for name in ("x.gguf", "y.gguf"))
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name in ours.tensors:
        first, second = ours.read(name), theirs.read(name)
        assert float((first - second).norm() / second.norm()) < 0.2, name


def test_what_cannot_be_written_is_refused_before_any_work(dense, experts, tmp_path):
    narrow = gguf_checkpoint(tmp_path / "narrow", intermediate_size=80)
    (tmp_path / "mine.gguf").write_bytes(b"something else")
    gpt = gguf_checkpoint(tmp_path / "gpt", "gpt_neox")
    shares = gguf_checkpoint(tmp_path / "shares", "qwen3_moe", moe_intermediate_size=64)
    before = sorted(tmp_path.iterdir())
    for model, out, options, message in (
        (dense, "x.gguf", {"type": "Q9_K"}, "Q9_K is not a type"),
        (dense, "x.gguf", {"type": "Q4_K", "sparsity": 0.5}, "sparsity is not an option here"),
        (dense, "folder", {"type": "Q4_K"}, ".gguf"),
        (dense, "mine.gguf", {"type": "Q4_K"}, "GGUF"),
        (dense, "x.gguf", {"bits": 1.5}, "1.5 bits is not possible .* 2.06 to 8.50 bits"),
        (dense, "x.gguf", {"size": 1000}, "1.0 kB is not possible .* files .* kB to .* MB"),
        (dense, "x.gguf", {"size": 10**9}, "1.0 GB is not possible .* take 2.06 to 8.50 bits"),
        (dense, "folder", {"size": "Q4_K_M"}, "sizes of llama.cpp's presets .* belong to GGUF"),
        (dense, "folder", {"bits": 3, "template": tmp_path / "mine.gguf"}, ".gguf"),
        (narrow, "x.gguf", {"type": "Q4_K"}, "80 columns"),
        (gpt, "x.gguf", {"type": "Q4_K"}, "no known layout"),
        (shares, "x.gguf", {"type": "Q4_K"}, "norm_topk_prob = True, and this model has False"),
        (experts, "x.gguf", {"type": "Q4_K", "ignore": ["*experts.0.*"]}, "all other experts"),
        (dense, "x.gguf", {"bits": 4, "format": "compressed-tensors"}, "format of a folder"),
    ):
        assert_refused(
            (ValueError, NotImplementedError), message, compress, model, tmp_path / out, **options
        )
        assert sorted(tmp_path.iterdir()) == before


def test_the_types_of_least_loss_meet_the_size(tmp_path):
    dense = gguf_checkpoint(tmp_path / "dense", tie_word_embeddings=True, num_hidden_layers=2)
    said: list[str] = []
    record = compress(dense, tmp_path / "x.gguf", size=700_000, announce=said.append)
    nbytes = (tmp_path / "x.gguf").stat().st_size
    assert 0.995 * 700_000 <= nbytes == record.size.after <= 700_000
    assert len(set(record.types.values())) > 1
    assert any("MB in Q" in str(line) or "kB in Q" in str(line) for line in said)
    given = compress(dense, tmp_path / "y.gguf", bits=4.5, head_bits=8)
    file = GgufFile.open(tmp_path / "y.gguf")
    weights = [each for each in file.tensors.values() if len(each.shape) > 1]
    mean = 8 * sum(int(x.n_bytes) for x in weights) / sum(int(x.n_elements) for x in weights)
    assert 0.995 * 4.5 <= mean <= 4.5
    assert given.types["model.embed_tokens"] == "Q8_0"


def test_the_loss_of_a_type_is_more_than_the_sum_of_independent_errors_at_few_bits():
    torch.manual_seed(0)
    weight_OI, loss_O, importance_I = torch.randn(16, 512), torch.rand(16), torch.rand(512)
    use = LinearSensitivity(loss_O, importance_I=importance_I)
    quantizers = [TYPES[name] for name in ("Q2_K", "Q4_K", "Q8_0")]
    for quantizer, loss in zip(quantizers, type_losses(weight_OI, [use], quantizers), strict=True):
        error_OI = round_to_nearest(weight_OI, quantizer, importance_I).dense() - weight_OI
        independent = error_OI.square() @ importance_I @ loss_O
        lost_share = independent / (weight_OI.square() @ importance_I @ loss_O)
        assert loss == pytest.approx(float(independent / (1 - 8 * lost_share)), rel=1e-3)


@pytest.mark.parametrize("kind", ["Q2_K", "Q4_0", "IQ3_S"])
def test_few_rows_tell_the_loss_of_all_however_much_rows_differ(kind):
    """Rows differ by a factor of e in their size and in what their errors cost, as in real models.

    A tied embedding has two uses, whose sensitivities have nothing to do with each other.
    """
    for seed in range(5):
        torch.manual_seed(seed)
        weight_OI = torch.randn(2000, 512) * torch.randn(2000, 1).exp()
        uses = [
            LinearSensitivity(torch.randn(2000).exp(), importance_I=torch.rand(512) + 0.1)
            for _ in range(2)
        ]
        all_rows_OI = round_to_nearest(weight_OI, TYPES[kind], sum(x.importance_I for x in uses))
        (loss,) = type_losses(weight_OI, uses, [TYPES[kind]])
        (few,) = type_losses(weight_OI, uses, [TYPES[kind]], stacked=100)
        costs = [
            sum(x_OI.square() @ use.importance_I @ use.loss_O for use in uses)
            for x_OI in (all_rows_OI.dense() - weight_OI, weight_OI)
        ]
        expected = costs[0] / (1 - 8 * costs[0] / costs[1]).clamp_min(0.2)
        assert loss == pytest.approx(float(expected), rel=0.15)
        assert few == pytest.approx(float(expected), rel=0.3)


def test_two_bits_at_widths_of_64_are_taken_where_a_file_must_be_smaller(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 1}
    dense = gguf_checkpoint(tmp_path / "dense", **sizes)
    kinds = {}
    for bits in (2.5, 4.6, 5.0):
        out = tmp_path / f"{bits}.gguf"
        kinds[bits] = set(compress(dense, out, bits=bits).types.values())
    assert "Q2_0" in kinds[2.5] - kinds[4.6] - kinds[5.0]
    record = compress(dense, tmp_path / "x.gguf", type="Q2_0")
    weights, before = (
        imported(tmp_path / "x.gguf", tmp_path / "back"),
        load_file(dense / "model.safetensors"),
    )
    for name in (f"{x}.weight" for x, kind in record.types.items() if kind == "Q2_0"):
        assert (weights[name] - before[name]).norm() < 0.6 * before[name].norm()
        # A span of 64 has one scale, and so at most four values.
        assert all(len(span.unique()) <= 4 for span in weights[name].view(-1, 64))


@pytest.mark.parametrize("rounding", ["feedback", "nearest"])
def test_scales_that_are_powers_of_two_are_written_and_read(rounding, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    dense, out = gguf_checkpoint(tmp_path / "dense", **sizes), tmp_path / "x.gguf"
    record = compress(dense, out, type="MXFP4", rounding=rounding)
    weights, before = imported(out, tmp_path / "back"), load_file(dense / "model.safetensors")
    assert {"MXFP4"} == {record.types[x] for x in record.types if "layers" in x}
    for name in (f"{x}.weight" for x, kind in record.types.items() if kind == "MXFP4"):
        assert (weights[name] - before[name]).norm() < 0.25 * before[name].norm()
        # They are values of the type, so rounding finds them again.
        assert torch.equal(round_to_nearest(weights[name], TYPES["MXFP4"]).dense(), weights[name])
    again = compress(dense, tmp_path / "y.gguf", types_from=out, rounding=rounding)
    assert again.types == record.types


@pytest.mark.parametrize(("bits", "rounding"), [(2.1, "feedback"), (2.5, "nearest")])
def test_codebooks_make_files_that_other_types_cannot_make_as_small(bits, rounding, tmp_path):
    dense, out = gguf_checkpoint(tmp_path / "dense", num_hidden_layers=1), tmp_path / "x.gguf"
    kinds = compress(dense, out, bits=bits, rounding=rounding).types
    assert {x[:3] for x in kinds.values()} & {"IQ2", "IQ3"}
    before, weights = load_file(dense / "model.safetensors"), imported(out, tmp_path / "back")
    for name in (f"{x}.weight" for x in kinds):
        # Feedback changes weights more, and outputs less.
        assert (weights[name] - before[name]).norm() < 0.6 * before[name].float().norm(), name
    with pytest.raises(ValueError, match=r"2 bits is not possible .* take 2\.06 to"):
        compress(dense, out, bits=2.0, rounding=rounding, overwrite=True)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 99), min_size=3, max_size=3), min_size=1, max_size=4))
def test_no_other_choice_with_as_many_bytes_loses_less_on_the_hull(losses):
    choices = {
        str(place): [
            Choice("abc"[rank], nbytes, float(loss))
            for rank, (nbytes, loss) in enumerate(zip((2, 3, 5), each, strict=True))
        ]
        for place, each in enumerate(losses)
    }
    for budget in range(2 * len(losses), 5 * len(losses) + 1):
        taken = choose_types(choices, budget).values()
        spent, lost = sum(x.nbytes for x in taken), sum(x.loss for x in taken)
        assert spent <= budget
        best = min(
            sum(x.loss for x in each)
            for each in itertools.product(*choices.values())
            if sum(x.nbytes for x in each) <= budget
        )
        # One step that does not fit any more separates a greedy choice from the best.
        assert lost - best <= max(
            abs(x.loss - y.loss) for each in choices.values() for x in each for y in each
        )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 99), min_size=6, max_size=6), min_size=1, max_size=4))
def test_fast_types_keep_a_bound_of_time_that_can_be_kept(losses):
    """Each size has a slow type and a fast one, so that any size can be had in any time."""
    choices = {
        str(number): [
            Choice(f"{nbytes}{speed}", nbytes, float(loss), time)
            for (nbytes, (speed, time)), loss in zip(
                itertools.product((2, 3, 5), (("slow", 9.0), ("fast", 4.0))), each, strict=True
            )
        ]
        for number, each in enumerate(losses)
    }
    for nbytes in range(2 * len(losses), 5 * len(losses) + 1):
        for time in (4 * len(losses), 7 * len(losses), 9 * len(losses)):
            taken = choose_types(choices, nbytes, time).values()
            assert sum(x.nbytes for x in taken) <= nbytes
            assert sum(x.time for x in taken) <= time
    assert choose_types(choices, nbytes, 1e9) == choose_types(choices, nbytes)


def test_a_type_that_decodes_slowly_is_left_out_where_time_counts(one_block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    times = {kind: {"decode": 1.0, "prompt": 1.0} for kind in TYPES}
    times["IQ4_XS"]["decode"] = 100.0
    Path("times.json").write_text(json.dumps({"nanoseconds per weight": times}))
    said: list[Any] = []
    any_time = compress(one_block, "any.gguf", bits=4.5, announce=said.append)
    fast = compress(one_block, "fast.gguf", bits=4.5, fast_on="times.json", announce=said.append)
    assert "IQ4_XS" in {*any_time.types.values()} - {*fast.types.values()}
    assert sum("processors decode it about" in str(line) for line in said) == 2
    slow = {kind: 1.0 if kind[0] == "Q" and "K" in kind else 100.0 for kind in TYPES}
    monkeypatch.setitem(llama_cpp.SPEEDS, "cpu", slow | {"IQ2_XS": 1.0, "IQ2_S": 1.0, "IQ3_S": 1.0})
    assert re.search(r"at about 0\.\d of the speed .* --fast-on cpu", speeds.advice(any_time))
    assert speeds.advice(fast) == speeds.advice(compress(one_block, "q.gguf", type="IQ4_XS")) == ""
    asked = ("--bits", 4.5, "--samples", 2, "--seqlen", 16, "--calibration", "python-docs")
    assert "with --fast-on cpu" in call("compress", one_block, "any2.gguf", *asked).output
    plan = ("plan", one_block, "x.gguf", "--bits", 4.5, "--fast-on", "times.json", "--seqlen", 16)
    assert "times as fast as Q4_K_M on processors" in " ".join(call(*plan).output.split())
    refused = []
    for number, time in enumerate((math.inf, -math.inf, math.nan, -0.01, 0.0, 1e308)):
        odd = {"nanoseconds per weight": times | {"IQ2_S": {"decode": time}}}
        Path(f"odd{number}.json").write_text(json.dumps(odd))
        message = f"odd{number}.json says that a weight of IQ2_S takes {time:g} nanoseconds"
        refused.append(({"fast_on": f"odd{number}.json", "bits": 4.5}, re.escape(message)))
    Path("deep.json").write_text("[" * 100_000 + "]" * 100_000)
    del times["Q4_K"]
    Path("less.json").write_text(json.dumps({"nanoseconds per weight": times}))
    os.mkfifo("pipe.json")
    for options, message in (
        *refused,
        ({"fast_on": "deep.json", "bits": 4.5}, "`fast_on` must be one of .*not deep.json"),
        ({"type": "q3_k_l"}, "q3_k_l is a preset of several types: give `size` q3_k_l"),
        ({"type": "Q4_K_M"}, "Q4_K_M is a preset of several types"),
        ({"type": "q4_k"}, "q4_k is not a type .* did you mean Q4_K"),
        ({"fast_on": "avx3", "bits": 4.5}, "one of avx2, avx512, cpu, or a file"),
        ({"fast_on": "gpu", "bits": 4.5}, "not gpu. GPUs need no .* file is the fastest$"),
        ({"size": "IQ1_S"}, "the size of IQ1_S is not known: give one of Q4_0, .*, or a size such"),
        ({"fast_on": "less.json", "bits": 4.5}, "less.json has no time of Q4_K"),
        ({"fast_on": "pipe.json", "bits": 4.5}, "type_speeds.py wrote, not pipe.json"),
        ({"fast_on": "avx512", "type": "Q4_K"}, "drop one of the two"),
    ):
        assert_refused(ValueError, message, compress, one_block, "no.gguf", **options)
    with pytest.raises(ValueError, match=r"`fast_on`.*belong to GGUF files"):
        compress(one_block, "folder", bits=4, fast_on="avx512", format="mlx")
    with pytest.raises(ValueError, match=r"`fast_on`.*belong to GGUF files"):
        compress(one_block, "folder", bits=4, fast_on="avx512", format="compressed-tensors")
    with pytest.raises(ValueError, match="are for compressed-tensors too"):
        compress(one_block, "folder", bits=4, rounding="nearest", format="mlx")
    assert not [*tmp_path.glob("no.gguf*"), *tmp_path.glob("folder*")]


def test_other_verbs_read_the_file(one_block, tmp_path):
    out = tmp_path / "x.gguf"
    record = compress(one_block, out, type="Q4_K")
    found = prunus.inspect(out)
    assert {linear.dtype for linear in found.linears} == {"Q4_K"}
    assert found.bits == 4.5
    shown = prunus.report(out)._repr_html_()
    assert "Q4_K" in shown and "0.0 s" not in shown and "seconds" not in shown
    (tmp_path / "text.txt").write_text("A text to score, letter by letter. " * 9)
    import_gguf(out, tmp_path / "back")
    scores = [
        prunus.perplexity(model, str(tmp_path / "text.txt"), seqlen=32).perplexity
        for model in (out, tmp_path / "back")
    ]
    assert scores[0] == scores[1]
    assert stored_size(OpenFolder(out)) == ModelSize(out.stat().st_size, 4.5)
    assert record.totals["bits"] == 4.5


# --- whose the folder of a run and the file are ---


@pytest.mark.parametrize("state", ["new", "finished", "overwrite"])
def test_a_folder_of_somebody_else_is_refused_and_left_as_it_is(state, small, tmp_path):
    out, folder = tmp_path / "x.gguf", tmp_path / "x.gguf.part"
    if state != "new":
        compress(small, out, type="Q8_0")
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    before = tree(tmp_path)
    with pytest.raises(FileExistsError, match=r"x\.gguf\.part exists and holds no result"):
        compress(small, out, type="Q8_0", overwrite=state == "overwrite")
    assert tree(tmp_path) == before


def test_what_somebody_put_into_a_folder_below_that_of_the_run_stays(small, tmp_path):
    out, folder = tmp_path / "x.gguf", tmp_path / "x.gguf.part"
    interrupt(compress, small, out, type="Q8_0")
    (folder / "notes").mkdir()
    (folder / "notes" / "thesis.txt").write_text("years of work")
    compress(small, out, type="Q8_0")
    assert tree(folder) == {"notes": None, "notes/thesis.txt": b"years of work"}


def test_the_folder_of_a_run_in_progress_is_left_alone(small, tmp_path):
    """Also by a command that finds its file finished: the run is one with --overwrite."""
    out, folder = tmp_path / "x.gguf", tmp_path / "x.gguf.part"
    compress(small, out, type="Q8_0")
    refused = []

    def meanwhile(step: Any) -> None:
        before = {name for name in os.listdir(folder) if not name.endswith(".partial")}
        for options in ({}, {"overwrite": True}):
            with pytest.raises(FileExistsError, match="being written by another run") as error:
                compress(small, out, type="Q8_0", **options)
            refused.append(str(error.value))
        # The run itself writes on in the background.
        assert before <= set(os.listdir(folder))

    compress(small, out, type="Q8_0", overwrite=True, progress=meanwhile)
    assert len(refused) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == RESULT


def test_a_killed_run_that_overwrites_is_not_lost(small, tmp_path):
    """Without --overwrite it continues, as in a folder, and its file replaces the earlier one."""
    out = tmp_path / "x.gguf"
    compress(small, out, type="Q8_0")
    before = out.stat().st_ino
    interrupt(compress, small, out, type="Q8_0", overwrite=True)
    messages: list[str] = []
    compress(small, out, type="Q8_0", progress=lambda step: messages.append(step.message))
    assert "earlier run" in messages[0]
    assert out.stat().st_ino != before
    assert sorted(path.name for path in tmp_path.iterdir()) == RESULT


@pytest.mark.parametrize("made", ["of another recipe", "of somebody else", "a link to nothing"])
def test_a_file_that_appears_during_a_run_is_not_replaced(made, small, tmp_path):
    out, whole = tmp_path / "x.gguf", tmp_path / "whole.gguf"
    compress(small, whole, type="Q8_0")
    compress(small, tmp_path / "other.gguf", type="Q4_0")

    def appear(step: Any) -> None:
        if step.done == step.total:
            if made == "of another recipe":
                shutil.copy(tmp_path / "other.gguf", out)
            elif made == "of somebody else":
                out.write_text("years of work")
            else:
                out.symlink_to("nowhere")

    with pytest.raises((FileExistsError, ValueError), match=r"x\.gguf|another type"):
        compress(small, out, type="Q8_0", progress=appear)
    content = None if made == "a link to nothing" else out.read_bytes()
    assert content in (None, b"years of work", (tmp_path / "other.gguf").read_bytes())
    out.rename(tmp_path / "moved") if content else out.unlink()
    compress(small, out, type="Q8_0")
    assert out.read_bytes() == whole.read_bytes()


def test_a_file_that_another_run_finished_before_the_lock_is_not_replaced(
    small, monkeypatch, tmp_path
):
    out, acquire = tmp_path / "x.gguf", lock._acquire

    def acquire_later(folder: Path) -> int:
        monkeypatch.setattr(lock, "_acquire", acquire)
        compress(small, out, type="Q4_0")
        return acquire(folder)

    monkeypatch.setattr(lock, "_acquire", acquire_later)
    with pytest.raises(FileExistsError, match="another type"):
        compress(small, out, type="Q8_0")
    assert read_record(out).recipe.type == "Q4_0"
    assert sorted(path.name for path in tmp_path.iterdir()) == RESULT


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_at_the_last_moment_is_not_replaced(links, monkeypatch, tmp_path):
    (tmp_path / "part").write_text("new")
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError()))
    move_file(tmp_path / "part", tmp_path / "x.gguf", replaces=False)
    (tmp_path / "part").write_text("newer")
    with pytest.raises(FileExistsError, match="move that file away, and the same command"):
        move_file(tmp_path / "part", tmp_path / "x.gguf", replaces=False)
    assert (tmp_path / "x.gguf").read_text() == "new"
    move_file(tmp_path / "part", tmp_path / "x.gguf", replaces=True)
    assert (tmp_path / "x.gguf").read_text() == "newer"
    assert not (tmp_path / "part").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_run_killed_wherever_a_file_gets_its_name_ends_in_the_same_file(small, tmp_path):
    """Before the file nothing is next to the folder of the run; at the end nothing is missing."""
    results = run_script("kill_points.py", small, tmp_path, json.dumps({"type": "Q4_0"}))
    assert len(results) >= 14
    assert_all_resumed(results)
    for result in results:
        assert result["beside"] == ["killed.gguf.part"] or "killed.gguf" in result["beside"], result
    partial = [name for result in results for name in result["found"] if "model.gguf." in name]
    assert partial, "one was killed while the file was written"


def test_names_that_cannot_be_written_are_refused_before_any_work(small, tmp_path):
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link.gguf.part").symlink_to("elsewhere")
    (tmp_path / "theirs.gguf").write_bytes(b"GGUF" + bytes(60))
    before = tree(tmp_path)
    for name, message in (
        ("folder.gguf", "folder.gguf is a folder"),
        ("link.gguf", "link.gguf.part is a link"),
        ("n" * 248 + ".gguf", "at most 255 bytes, and .* has 258"),
        ("theirs.gguf", "theirs.gguf(: the GGUF file is truncated| exists and was not written)"),
    ):
        for overwrite in (False, True):
            with pytest.raises((FileExistsError, ValueError), match=message):
                compress(small, tmp_path / name, type="Q8_0", overwrite=overwrite)
    compress(small, tmp_path / "full.gguf", type="Q8_0")
    with pytest.raises(ValueError, match="overlap"):
        compress(tmp_path / "full.gguf", tmp_path / "full.gguf", type="Q4_0", overwrite=True)
    for path in tmp_path.glob("full.*"):
        path.unlink()
    assert tree(tmp_path) == before
    long = tmp_path / ("n" * 240 + ".gguf")
    assert compress(small, long, type="Q8_0").state == "finished"
    assert long.is_file()


# --- what a file cannot hold ---


def scaled(dense: Path, folder: Path, part: str, factor: float) -> Path:
    """A copy of a checkpoint in which the matrices with `part` in their names are multiplied."""
    shutil.copytree(dense, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if part in name and tensor.dim() == 2:
            tensor.view(-1)[::7] = 0
            tensor *= factor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("magnitude", [10.0**power for power in (-44, -40, -39, -38, -30, 0, 4)])
def test_weights_of_any_size_that_fits_are_rounded_to_finite_ones(magnitude):
    weight_OI = torch.randn(8, 256, generator=torch.Generator().manual_seed(0)) * magnitude
    weight_OI[:, ::5] = 0
    for grid in TYPES.values():
        for share in (1.0, 0.3):
            dense_OI = round_to_nearest(weight_OI * share, grid).dense()
            assert dense_OI.isfinite().all(), grid.name
            assert (dense_OI - weight_OI * share).abs().max() <= max(4 * magnitude, 1e-7)


@pytest.mark.parametrize("magnitude", [1e9, 1e30, 1e38])
def test_weights_that_no_scale_of_a_type_reaches_are_an_error(magnitude):
    weight_OI = torch.randn(8, 256, generator=torch.Generator().manual_seed(0)) * magnitude
    # Only a scale that is a power of two of eight bits reaches 1e9.
    for grid in (x for x in TYPES.values() if not x.has_coarse_scale or magnitude > 1e9):
        with pytest.raises(ValueError, match=f"too large for {grid.name}, which reaches"):
            round_to_nearest(weight_OI, grid)


def test_models_of_denormal_weights_are_written(one_block, tmp_path):
    model = scaled(one_block, tmp_path / "model", "layers", 1e-37)
    for name, options in (("x.gguf", {"type": "Q4_K"}), ("y.gguf", {"bits": 4.5})):
        assert compress(model, tmp_path / name, **options).state == "finished"
    assert compress(model, tmp_path / "out", bits=4).state == "finished"


def test_embeddings_that_are_too_large_are_named_before_the_first_block(dense, tmp_path):
    model, steps = scaled(dense, tmp_path / "model", "embed_tokens", 1e30), []
    for name, options, why in (
        ("x.gguf", {"type": "Q4_K"}, "too large for Q6_K"),
        ("y.gguf", {"bits": 4.5}, "too large for Q8_0"),
    ):
        with pytest.raises(ValueError, match=rf"^model\.embed_tokens.*: its weights are {why}"):
            compress(model, tmp_path / name, **options, progress=steps.append)
    assert not steps


def test_a_tokenizer_of_bytes_without_merges_is_refused_before_any_work(dense, tmp_path):
    model = shutil.copytree(dense, tmp_path / "model")
    path = model / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = []
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tokenizer\.json has no merges, and llama\.cpp needs"):
        compress(model, tmp_path / "x.gguf", type="Q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# --- what is said of the work ---


def test_the_measurement_is_announced_with_the_time_that_is_left(dense, monkeypatch, tmp_path):
    said: list[Any] = []
    blocks: list[Any] = []
    compress(dense, tmp_path / "x.gguf", bits=4.5, announce=said.append, progress=blocks.append)
    assert {step.unit for step in blocks} == {"blocks"}
    steps = [each for each in said if isinstance(each, Progress)]
    for what in ("measuring what errors of each linear cost", "rounding some rows of each weight"):
        own = [step for step in steps if step.message.startswith(what)]
        assert any(isinstance(each, str) and each.startswith(what) for each in said)
        assert [step.done for step in own] == sorted({step.done for step in own})
        assert own[-1].done == own[-1].total >= 8
        assert f"steps of {what}" in pruning_step(own[-1]).state
    said.clear()
    options = {"allocation": "fisher", "calibration": token_ids(), "announce": said.append}
    prunus.prune(dense, tmp_path / "out", sparsity=0.5, **options)
    last = [each for each in said if isinstance(each, Progress)][-1]
    assert last.message == "measuring what errors of each linear cost"
    assert last.done == last.total


def test_a_gguf_file_that_is_read_is_named_and_its_header_read_once(small, monkeypatch, tmp_path):
    compress(small, tmp_path / "x.gguf", type="Q8_0")
    said: list[str] = []
    read: list[object] = []
    read_header = gguf_file.read_header
    monkeypatch.setattr(
        gguf_file, "read_header", lambda file: (read.append(file), read_header(file))[1]
    )
    "".join(generate(tmp_path / "x.gguf", "ab", max_new_tokens=2, progress=said.append))
    assert said[0] == "reading x.gguf" and said[-1] == f"loading {tmp_path / 'x.gguf'}"
    assert any(line.startswith("unpacking") for line in said)
    assert len(read) == 1


# --- each weight by itself, and the types of other files ---


def contents(path: Path) -> dict[str, tuple[str, bytes]]:
    """Name of a tensor that is no norm -> its type and its bytes."""
    file = GgufFile.open(path)
    kinds = {name: tensor.tensor_type.name for name, tensor in file.tensors.items()}
    # bytes() of a tensor makes a tensor of each byte, which takes seconds.
    return {x: (kinds[x], file.raw(x).numpy().tobytes()) for x in kinds if kinds[x] != "F32"}


@pytest.fixture
def no_walk(monkeypatch) -> None:
    """No window may run through the blocks on its way to a linear."""
    monkeypatch.setattr(change_block, "WALKS", {})


@pytest.mark.parametrize("options", [{"bits": 4.5}, {"type": "Q3_K"}])
def test_each_weight_is_rounded_by_itself_with_the_mean_squares_of_its_inputs(
    options, dense, exact_products, no_walk, tmp_path
):
    more = {"rounding": "nearest", "calibration": IDS, "dtype": "float32"}
    record = compress(dense, tmp_path / "x.gguf", **options, **more)
    rounded, inputs = imported(tmp_path / "x.gguf", tmp_path / "back"), whole_model(dense)
    for name in (x for x in record.types if "layers" in x):
        weight_OI, _, X_TI = inputs[name]
        expected = round_to_nearest(weight_OI, TYPES[record.types[name]], X_TI.square().mean(0))
        # Sums in another order move a weight where two values are as near.
        assert (rounded[f"{name}.weight"] != expected.dense()).float().mean() < 0.01, name
    linear = record.blocks[0].linears["mlp.up_proj"]
    assert (linear.tokens, linear.relative_output_error) == (0, None)


def test_the_types_are_those_of_least_loss_with_this_rounding(exact_products, tmp_path):
    """The smallest model that has one weight to choose for, and 64 rows: all of them count."""
    dense = gguf_checkpoint(tmp_path / "dense", num_hidden_layers=1, intermediate_size=64)
    options = {"only": ["*.up_proj"], "head_bits": "none", "calibration": IDS, "dtype": "float32"}
    weight_OI, squares_O, X_TI = whole_model(dense)["model.layers.0.mlp.up_proj"]
    importance_I, loss_O = X_TI.square().mean(0), squares_O + 0.1 * squares_O.mean()
    losses = {}
    for kind in (x for x in TYPES if TYPES[x].span == 256 or x == "Q8_0"):
        error_OI = round_to_nearest(weight_OI, TYPES[kind], importance_I).dense() - weight_OI
        loss = float(loss_O @ error_OI.square() @ importance_I)
        losses[kind] = loss / (1 - 4 * loss / float(loss_O @ weight_OI.square() @ importance_I))
    for bits in (3.0, 4.3, 5.0, 6.0):
        record = compress(
            dense, tmp_path / f"{bits}.gguf", bits=bits, rounding="nearest", **options
        )
        best = min((x for x in losses if TYPES[x].bits <= bits), key=losses.__getitem__)
        assert [*record.types.values()] == [best]


def test_a_pruning_by_weights_alone_that_measures_walks_no_window(dense, no_walk, tmp_path):
    options = {"method": "magnitude", "group": "row", "allocation": "fisher", "sparsity": 0.5}
    manifest = prunus.prune(dense, tmp_path / "out", calibration=IDS, **options)
    assert manifest.totals["sparsity"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_are_rounded_by_themselves_too(bits, no_walk, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", "llama", torch.bfloat16, hidden_size=128)
    options = {"bits": bits, "format": "compressed-tensors", "rounding": "nearest"}
    assert compress(dense, tmp_path / "out", **options).state == "finished"
    assert 'rounding = "nearest"' in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(("rounding", "name"), [("feedback", "dense"), ("nearest", "experts")])
def test_a_file_with_the_types_of_another_has_the_same_bytes(rounding, name, request, tmp_path):
    """Also where a run was killed in between, and where a list names the types."""
    model = request.getfixturevalue(name)
    first, again, last = (tmp_path / f"{x}.gguf" for x in (1, 2, 3))
    record = compress(model, first, bits=4.5, rounding=rounding)
    interrupt(compress, model, again, types_from=first, rounding=rounding)
    compress(model, again, types_from=first, rounding=rounding)
    kinds = {name: kind.lower() for name, (kind, _) in contents(first).items()}
    lines = [f"^{name}$={kind}".replace(".", r"\.") for name, kind in kinds.items()]
    (tmp_path / "types").write_text("\n".join(lines))
    named = compress(model, last, types_from=tmp_path / "types", rounding=rounding)
    assert contents(first) == contents(again) == contents(last)
    assert named.types == record.types
    # The file names the list without the folder that it was in.
    assert prunus.inspect(last).linears and b'"types_from":"types"' in last.read_bytes()


def test_types_of_another_model_or_that_prunus_does_not_write_are_refused(
    dense, one_block, tmp_path
):
    for name, model in (("short.gguf", one_block), ("longer.gguf", dense)):
        compress(model, tmp_path / name, type="Q8_0", rounding="nearest")
    lines = [rf"^{name}$=q8_0" for name in contents(tmp_path / "short.gguf")]
    texts = {
        "short": lines[:-1],
        "foreign": [*lines, r"^blk\.7\.attn_q\.weight$=q8_0"],
        "iq": [lines[0].replace("q8_0", "IQ1_S"), *lines],
        "pattern": ["attn_.*=q8_0", *lines],
        "no list": ["something else"],
    }
    for name, text in texts.items():
        (tmp_path / name).write_text("\n".join(text))
    before = sorted(tmp_path.iterdir())
    for kind, message in (
        ("longer.gguf", r"longer\.gguf is not a file of this model: blk\.1\..* is None"),
        ("short", rf"short has no type for {re.escape(lines[-1][1:].partition('$')[0])}"),
        ("foreign", r"no tensor 'blk\.7\.attn_q\.weight'"),
        ("iq", r"IQ1_S for .*, and prunus writes Q4_0"),
        ("pattern", r"no tensor 'attn_\.\*'"),
        ("no list", "no tensor ''"),
        ("missing", "No such file or directory: .*missing"),
    ):
        fault = FileNotFoundError if kind == "missing" else ValueError
        asked = {"types_from": tmp_path / kind}
        assert_refused(fault, message, compress, one_block, tmp_path / "x.gguf", **asked)
        assert sorted(tmp_path.iterdir()) == before
    old_form, message = (
        str(tmp_path / "short.gguf"),
        "short.gguf is not a type .* or as `types_from`",
    )
    assert_refused(ValueError, message, compress, one_block, tmp_path / "x.gguf", type=old_form)
    # The head has the type that its own option names.
    kinds = tmp_path / "short.gguf"
    given = compress(one_block, tmp_path / "x.gguf", types_from=kinds, head_bits=4)
    assert given.types["lm_head"] == "Q4_K"


def test_a_list_that_was_changed_since_a_run_was_killed_is_refused(small, tmp_path):
    options = {"types_from": tmp_path / "types.gguf"}
    compress(small, tmp_path / "types.gguf", type="Q4_0")
    interrupt(compress, small, tmp_path / "x.gguf", **options)
    compress(small, tmp_path / "types.gguf", type="Q8_0", overwrite=True)
    with pytest.raises(FileExistsError, match=r"types\.gguf has other types than the finished"):
        compress(small, tmp_path / "x.gguf", **options)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_plan_writes_the_types_and_importances_that_llama_quantize_takes(
    family, exact_products, tmp_path
):
    options = {"num_hidden_layers": 1, **EXPERTS.get(family, {})}
    model, text = gguf_checkpoint(tmp_path / "model", family, **options), tmp_path / "text.txt"
    text.write_text("ab, letter by letter: a text to calibrate on. " * 20)
    out, types, matrix = (tmp_path / x for x in ("x.gguf", "new/types.txt", "new/im.gguf"))
    windows = ["--calibration", text, "--samples", 6, "--seqlen", 16, "--dtype", "float32"]
    asked, lists = [model, out, "--bits", 4.5, *windows], ["--tensor-types", types]
    said = call("plan", *asked, *lists, "--imatrix", matrix, "--json", "-")
    plan = json.loads(said.stdout)
    assert plan["written"] == [str(types), str(matrix)] and str(types) in said.stderr
    assert not out.exists()
    call("compress", *asked, "--rounding", "nearest")
    assert plan["file_bytes"] == out.stat().st_size
    entries = [line.split("=") for line in types.read_text().split()]
    kinds, file = contents(out), GgufFile.open(matrix)
    for name, (kind, _) in kinds.items():
        # The first expression that is found in the name counts.
        found = next((x for regex, x in entries if re.search(regex, name)), None)
        assert found == kind.lower(), name
    fields = ("general.type", *(f"imatrix.{x}" for x in ("chunk_count", "chunk_size", "datasets")))
    assert [file.get(field) for field in fields] == ["imatrix", 6, 16, [text.name]]
    assert file.tensors.keys() == {f"{x}.{part}" for x in kinds for part in ("in_sum2", "counts")}
    for name in kinds:
        count, width = (2 if "_exps" in name else 1), int(GgufFile.open(out).tensors[name].shape[0])
        assert shape(file, f"{name}.in_sum2") == (count, width)
        assert file.read(f"{name}.counts").tolist() == [[96.0]] * count
    # What a norm with weights of 1 gives has a mean square of nearly 1.
    assert file.read("blk.0.attn_q.weight.in_sum2").mean() == pytest.approx(96, rel=0.1)
    # Files that the command wrote are replaced, and a list leads to the same weights.
    call("plan", *asked, *lists, "--imatrix", matrix)
    call(
        "compress",
        model,
        tmp_path / "y.gguf",
        "--types-from",
        types,
        "--rounding",
        "nearest",
        *windows,
    )
    assert contents(out) == contents(tmp_path / "y.gguf")


def test_lists_that_cannot_be_written_are_refused_before_any_work(small, monkeypatch, tmp_path):
    monkeypatch.setattr("prunus.compression.type_rounding.measure_loss", None)
    (tmp_path / "mine.txt").write_text("years of work")
    compress(small, tmp_path / "model.gguf", type="Q8_0")
    (tmp_path / "link").symlink_to("nowhere")
    before = tree(tmp_path)
    for arguments, message in (
        (["out", "--tensor-types", "new"], "name OUT ends in .gguf"),
        (["x.gguf", "--tensor-types", "mine.txt"], "mine.txt exists and was not written by this"),
        (["x.gguf", "--imatrix", "model.gguf"], "model.gguf exists and was not"),
        (["x.gguf", "--imatrix", "link"], "link exists and was not"),
        (["x.gguf", "--imatrix", "new", "--tensor-types", "new"], "new is named twice"),
        (["x.gguf", "--imatrix", "new", "--rounding", "feedback"], "leave --rounding feedback out"),
    ):
        out, *more = (
            x if x.startswith("--") or x == "feedback" else tmp_path / x for x in arguments
        )
        asked = [small, out, *more, "--bits", 4.5, "--calibration", tmp_path / "mine.txt"]
        [line] = call("plan", *asked, "--seqlen", 16, status=2).stderr.splitlines()
        assert re.search(message, line), line
        assert tree(tmp_path) == before


def test_nearest_rounding_refuses_options_of_feedback(dense, tmp_path):
    for out, options, message in (
        ("x.gguf", {"calibration": IDS.repeat(1, 9)}, "windows of 144 tokens do not fit"),
        ("x.gguf", {"dense_weight": 0.5}, "dense_weight would change .* nearest there is none"),
    ):
        with pytest.raises(ValueError, match=message):
            compress(dense, tmp_path / out, bits=4, rounding="nearest", **options)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "value", ["5", "[]", '"record"', "{", '{"format": 2}', "null", 5, 0, 1.5, True, [1, 2]]
)
def test_a_record_of_another_form_is_named(value, monkeypatch):
    monkeypatch.setattr(
        gguf_result, "open_gguf", lambda path: SimpleNamespace(get=lambda name: value)
    )
    with pytest.raises(ValueError, match=r"x\.gguf is damaged"):
        read_record(Path("x.gguf"))
