"""`prunus compress` to a GGUF file: what is in it, and that it is a whole run like every other."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

pytest.importorskip("gguf")
pytest.importorskip("accelerate")

import prunus
from gguf_cases import gguf_checkpoint, shape
from prunus.compression.gguf_output import read_record
from prunus.compression.records import CompressionRecord
from prunus.compression.type_choice import Choice, choose_types
from prunus.evaluation.inspection import stored_size
from prunus.evaluation.records import ModelSize
from prunus.model.checkpoint.gguf import import_gguf
from prunus.model.checkpoint.gguf_file import GgufFile
from stopping import StopError, stop_after
from tiny import token_ids

#: Options of mixtures of experts. Other widths make larger files.
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 64, "num_local_experts": 2, "num_experts_per_tok": 1},
    "qwen2_moe": {"moe_intermediate_size": 64, "head_dim": 64},
    "qwen3_moe": {"moe_intermediate_size": 64, "norm_topk_prob": True},
}


def compress(dense: Path, out: Path, **options) -> CompressionRecord:
    return prunus.compress(dense, out, **{"calibration": token_ids(), "batch": 2, **options})


def imported(path: Path, folder: Path) -> dict[str, torch.Tensor]:
    import_gguf(path, folder, dtype="float32")
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return gguf_checkpoint(tmp_path_factory.mktemp("gguf") / "dense")


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> Path:
    return gguf_checkpoint(
        tmp_path_factory.mktemp("gguf") / "experts", "mixtral", **EXPERTS["mixtral"]
    )


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text", *EXPERTS])
def test_the_file_reads_as_the_weights_that_the_run_computed(family, tmp_path):
    dense = gguf_checkpoint(tmp_path / "dense", family, **EXPERTS.get(family, {}))
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
    fewer = {"blocks": 2, "experts": 5} if family in EXPERTS else {"blocks": 2}
    prunus.shrink(dense, tmp_path / "small", **fewer, repair=False, calibration=token_ids())
    compress(tmp_path / "small", tmp_path / "x.gguf", type="Q8_0")
    config, file = (
        AutoConfig.from_pretrained(tmp_path / "small"),
        GgufFile.open(tmp_path / "x.gguf"),
    )
    assert file.get(f"{file.architecture}.block_count") == 2
    if family in EXPERTS:
        assert file.get("qwen3moe.expert_count") == 5
        assert shape(file, "blk.1.ffn_down_exps.weight") == (5, 256, 64)
    if family == "gemma3_text":
        # llama.cpp would take every sixth block for one of full attention.
        sliding = [kind == "sliding_attention" for kind in config.layer_types]
        assert file.get("gemma3.attention.sliding_window_pattern") == sliding


@pytest.mark.parametrize("options", [{"type": "Q4_K"}, {"bits": 4.5}])
def test_a_killed_run_continues_to_the_same_bytes(options, dense, experts, tmp_path):
    dense = experts if "type" in options else dense
    compress(dense, tmp_path / "whole.gguf", **options)
    out = tmp_path / "x.gguf"
    with pytest.raises(StopError):
        compress(dense, out, **options, progress=stop_after(1))
    assert not out.exists()
    compress(dense, out, **options)
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    # A finished file is found as it is, also if the folder of the run was not removed yet.
    (tmp_path / "x.gguf.part").mkdir()
    assert compress(dense, out, **options).state == "finished"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole.gguf", "x.gguf"]
    with pytest.raises(FileExistsError, match="another"):
        compress(dense, out, type="Q3_K")


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_template_gives_fields_tokens_and_the_order_of_rows(family, tmp_path):
    dense, template = gguf_checkpoint(tmp_path / "dense", family), tmp_path / "known.gguf"
    compress(dense, template, type="Q8_0")
    again = compress(dense, tmp_path / "x.gguf", type="Q8_0", template=template)
    first, second = (GgufFile.open(tmp_path / name) for name in ("known.gguf", "x.gguf"))
    assert {**first.fields()} == {**second.fields()}
    assert [*first.tensors] == [*second.tensors]
    for name in first.tensors:
        assert torch.equal(first.read(name), second.read(name)), name
    assert again.recipe.template == template
    # The file names its template without the folders that it was in.
    assert read_record(tmp_path / "x.gguf").recipe.template == Path("known.gguf")
    moved = template.rename(tmp_path / "dense" / "known.gguf")
    assert compress(dense, tmp_path / "x.gguf", type="Q8_0", template=moved).state == "finished"


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
    dense = gguf_checkpoint(tmp_path / "dense", family)
    compress(dense, tmp_path / "full.gguf", type="Q8_0")
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
    templates = {
        "longer": gguf_checkpoint(tmp_path / "longer", num_hidden_layers=3),
        "other tokens": shutil.copytree(dense, tmp_path / "other tokens"),
    }
    path = templates["other tokens"] / "tokenizer.json"
    path.write_text(path.read_text().replace('"ab"', '"bc"').replace('"a","b"', '"b","c"'))
    for name, folder in templates.items():
        compress(folder, tmp_path / f"{name}.gguf", type="Q8_0")
    before = sorted(tmp_path.iterdir())
    for model, out, options, message in (
        (dense, "x.gguf", {"type": "Q9_K"}, "Q9_K is not a type"),
        (dense, "x.gguf", {"type": "Q4_K", "sparsity": 0.5}, "stores zeros"),
        (dense, "folder", {"type": "Q4_K"}, ".gguf"),
        (dense, "mine.gguf", {"type": "Q4_K"}, "GGUF"),
        (dense, "x.gguf", {"bits": 1.5}, "1.5 bits is not possible .* 2.6. to 8.50 bits"),
        (dense, "x.gguf", {"size": 1000}, "1.0 kB is not possible .* files .* kB to .* MB"),
        (dense, "x.gguf", {"size": 10**9}, "1.0 GB is not possible"),
        (dense, "folder", {"bits": 3, "template": tmp_path / "longer.gguf"}, ".gguf"),
        (dense, "x.gguf", {"bits": 4, "template": tmp_path / "longer.gguf"}, "blk.2.* is None"),
        (dense, "x.gguf", {"bits": 4, "template": tmp_path / "other tokens.gguf"}, "token .* ab"),
        (narrow, "x.gguf", {"type": "Q4_K"}, "80 columns"),
        (gpt, "x.gguf", {"type": "Q4_K"}, "no known layout"),
        (shares, "x.gguf", {"type": "Q4_K"}, "norm_topk_prob = True, and this model has False"),
        (experts, "x.gguf", {"type": "Q4_K", "ignore": ["*experts.0.*"]}, "all other experts"),
        (dense, "x.gguf", {"bits": 4, "format": "compressed-tensors"}, "format of a folder"),
    ):
        with pytest.raises((ValueError, NotImplementedError), match=message):
            compress(model, tmp_path / out, **options)
        assert sorted(tmp_path.iterdir()) == before


def test_the_types_of_least_loss_meet_the_size(tmp_path):
    dense = gguf_checkpoint(tmp_path / "dense", tie_word_embeddings=True, num_hidden_layers=2)
    said: list[str] = []
    record = compress(dense, tmp_path / "x.gguf", size=700_000, announce=said.append)
    nbytes = (tmp_path / "x.gguf").stat().st_size
    assert 0.995 * 700_000 <= nbytes == record.size.after <= 700_000
    assert len(set(record.types.values())) > 1
    assert any("MB in Q" in line or "kB in Q" in line for line in said)
    given = compress(dense, tmp_path / "y.gguf", bits=4.5, head_bits=8)
    file = GgufFile.open(tmp_path / "y.gguf")
    weights = [each for each in file.tensors.values() if len(each.shape) > 1]
    mean = 8 * sum(int(x.n_bytes) for x in weights) / sum(int(x.n_elements) for x in weights)
    assert 0.995 * 4.5 <= mean <= 4.5
    assert given.types["model.embed_tokens"] == "Q8_0"


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
        chosen = choose_types(choices, budget)
        taken = [next(x for x in choices[name] if x.kind == kind) for name, kind in chosen.items()]
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


def test_other_verbs_read_the_file(dense, tmp_path):
    out = tmp_path / "x.gguf"
    record = compress(dense, out, type="Q4_K")
    found = prunus.inspect(out)
    assert {linear.dtype for linear in found.linears} == {"Q4_K"}
    assert found.bits == 4.5
    assert "Q4_K" in prunus.report(out)._repr_html_()
    (tmp_path / "text.txt").write_text("A text to score, letter by letter. " * 9)
    import_gguf(out, tmp_path / "back")
    scores = [
        prunus.perplexity(model, str(tmp_path / "text.txt"), seqlen=32).perplexity
        for model in (out, tmp_path / "back")
    ]
    assert scores[0] == scores[1]
    assert stored_size(out) == ModelSize(out.stat().st_size, None)
    assert record.totals["bits"] == 4.5
