"""`prunus compress --template`: a file in full precision says what the GGUF file holds."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("gguf")
pytest.importorskip("accelerate")

from changes import edit_tensors
from command_line import call
from gguf_cases import (
    WIDE,
    compress,
    gguf_checkpoint,
    known_layout,
    known_tensors,
    write_container,
)
from prunus.formats.gguf import template as gguf_template
from prunus.formats.gguf.file import GgufFile
from prunus.formats.gguf.result import read_record
from quantized import FUSED, quantize
from refusals import assert_refused
from stopping import interrupt

MOE = {"intermediate_size": 64, "num_local_experts": 2, "num_experts_per_tok": 1}


def full_file(dense: Path, path: Path, **options) -> Path:
    fields = known_layout(dense)[0].fields
    # The converter does not write which blocks of Gemma 3 have a window.
    fields.pop("gemma3.attention.sliding_window_pattern", None)
    return write_container(path, known_tensors(dense), fields, **options)


def contents(path: Path) -> dict[str, torch.Tensor]:
    file = GgufFile.open(path)
    return {name: file.read(name) for name in file.tensors}


def assert_same(path: Path, other: Path) -> None:
    ours, theirs = contents(path), contents(other)
    assert [*ours] == [*theirs]
    assert {name for name in ours if not torch.equal(ours[name], theirs[name])} == set()


def assert_close(path: Path, others: dict[str, torch.Tensor]) -> None:
    for name, content in contents(path).items():
        error = (content - others[name].float()).norm() / others[name].float().norm()
        assert float(error) < 0.45, name


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return gguf_checkpoint(tmp_path_factory.mktemp("template") / "dense")


@pytest.fixture(scope="module")
def container(dense) -> Path:
    return full_file(dense, dense.parent / "dense.gguf")


@pytest.mark.parametrize(
    ("family", "stored", "dtype"),
    [
        ("llama", torch.bfloat16, torch.bfloat16),
        ("llama", torch.bfloat16, torch.float16),
        ("llama", torch.float32, torch.bfloat16),
        ("llama", torch.float32, torch.float16),
        ("gemma3_text", torch.bfloat16, torch.float32),
        ("phi3", torch.bfloat16, torch.bfloat16),
        ("mixtral", torch.bfloat16, torch.bfloat16),
    ],
)
def test_a_template_gives_what_is_known_of_its_family(family, stored, dtype, tmp_path):
    # Gemma 3 has two kinds of blocks.
    options = {"num_hidden_layers": 2 if family == "gemma3_text" else 1}
    options |= MOE if family == "mixtral" else {}
    dense = gguf_checkpoint(tmp_path / "dense", family, dtype=stored, **options)
    # Where the numbers of the template are rounded, the types need not be chosen as well.
    asked = {"bits": 4.5} if stored == dtype else {"type": "Q4_K"}
    asked["rounding"] = "feedback" if family == "llama" else "nearest"
    template = full_file(dense, tmp_path / "full.gguf", dtype=dtype)
    known, out = tmp_path / "known.gguf", tmp_path / "x.gguf"
    compress(dense, known, **asked)
    compress(dense, out, **asked, template=template)
    assert_same(out, known)
    assert GgufFile.open(out).fields() == GgufFile.open(known).fields()
    # The file names its template without the folders that it was in.
    assert read_record(out).recipe.template == Path("full.gguf")
    moved = template.rename(dense / "full.gguf")
    assert compress(dense, out, **asked, template=moved).state == "finished"


@pytest.mark.parametrize("rounding", ["feedback", "nearest"])
def test_rows_and_columns_have_the_order_of_the_template(rounding, dense, tmp_path):
    changed = {
        name: x.flip(0) if x.dim() > 1 else x + 1 for name, x in known_tensors(dense).items()
    }
    columns = {name: x.rot90(2) for name, x in changed.items() if "attn_output" in name}
    template = write_container(tmp_path / "full.gguf", changed | columns)
    options = {"type": "Q4_K", "rounding": rounding}
    compress(dense, tmp_path / "known.gguf", **options)
    compress(dense, tmp_path / "x.gguf", **options, template=template)
    ours, theirs = contents(tmp_path / "x.gguf"), contents(tmp_path / "known.gguf")
    for name in (f"blk.0.attn_{x}.weight" for x in "qkv"):  # what follows sees their errors
        assert torch.equal(ours[name], theirs[name].flip(0)), name
    assert torch.equal(ours["output_norm.weight"], changed["output_norm.weight"])
    assert_close(tmp_path / "x.gguf", changed | columns)
    # Other columns share a scale.
    assert {GgufFile.open(tmp_path / "x.gguf").tensors[x].tensor_type.name for x in columns} == {
        "Q4_K"
    }


def test_parts_of_one_weight_are_found_and_have_one_type(tmp_path):
    dense = gguf_checkpoint(tmp_path / "dense", "phi3")
    changed = known_tensors(dense)
    for name in [name for name in changed if "attn_qkv" in name]:
        parts = changed.pop(name).split([256, 128, 128])
        changed |= {name.replace("qkv", x): y for x, y in zip("qkv", parts, strict=True)}
    template = write_container(tmp_path / "full.gguf", changed)
    record = compress(dense, tmp_path / "x.gguf", bits=4.5, template=template)
    assert_close(tmp_path / "x.gguf", changed)
    file = GgufFile.open(tmp_path / "x.gguf")
    kinds = {file.tensors[f"blk.0.attn_{x}.weight"].tensor_type.name for x in "qkv"}
    assert kinds == {record.types["model.layers.0.self_attn.qkv_proj"]}
    assert (tmp_path / "x.gguf").stat().st_size == record.size.after


@pytest.mark.filterwarnings("default:.* has blk.1.conv:RuntimeWarning")
def test_what_the_model_lacks_is_copied(dense, tmp_path):
    folder = shutil.copytree(dense, tmp_path / "more")
    draft, rotary = torch.randn(256, 256).bfloat16(), "model.layers.1.rotary.inv_freq"
    edit_tensors(folder, lambda x: x.update({"mtp.fc.weight": draft, rotary: torch.rand(4)}))
    more = {"blk.1.nextn.eh_proj.weight": draft.float(), "blk.1.conv": torch.randn(4, 1, 3)}
    template = write_container(tmp_path / "full.gguf", known_tensors(dense) | more)
    with pytest.warns(RuntimeWarning, match="blk.1.conv, which .*more lacks"):
        compress(folder, tmp_path / "x.gguf", type="Q4_K", template=template)
    written = GgufFile.open(tmp_path / "x.gguf")
    for name in more:
        assert torch.equal(written.raw(name), GgufFile.open(template).raw(name))
        assert written.tensors[name].tensor_type.name == "BF16"
    # Record and plan name what only one of the two has. Whoever downloads a file has no template.
    lists = {"the template": ["blk.1.conv"], "the checkpoint": ["model.layers.N.rotary.inv_freq"]}
    # Of a kind that nothing is known of, nothing says how it is computed.
    lists["config.json"] = ["hidden_act", "rope_parameters"]
    assert read_record(tmp_path / "x.gguf").unmatched == lists
    card = (tmp_path / "x.README.md").read_text()
    assert "llama.cpp computes: hidden_act, rope_parameters of config.json." in card
    assert "it lacks: model.layers.N.rotary.inv_freq." in card and "template has" not in card
    asked = (folder, tmp_path / "y.gguf", "--type", "Q4_K", "--template", template, "--seqlen", 16)
    said = " ".join(call("plan", *asked).output.split())
    assert "computes: hidden_act, rope_parameters of config.json." in said
    assert "Only the template has blk.1.conv." in said and "blk.1.conv, which" in said


def test_equal_blocks_and_equal_experts_keep_their_places(tmp_path):
    dense = gguf_checkpoint(tmp_path / "dense", "mixtral", **MOE)

    def repeat(weights: dict[str, torch.Tensor]) -> None:
        for name in list(weights):
            if "layers.1." in name or "experts.1." in name:
                first = name.replace("layers.1.", "layers.0.").replace("experts.1.", "experts.0.")
                weights[name] = weights[first].clone()
            if name.endswith("proj.weight"):
                weights[name][:3] = 0

    edit_tensors(dense, repeat)
    template = full_file(dense, tmp_path / "full.gguf")
    compress(dense, tmp_path / "known.gguf", type="Q3_K")
    compress(dense, tmp_path / "x.gguf", type="Q3_K", template=template)
    assert_same(tmp_path / "x.gguf", tmp_path / "known.gguf")


def gpt_oss(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of llama.cpp's names: gate and up alternate in the checkpoint, and are transposed."""
    if not folder.exists():
        gguf_checkpoint(folder, "gpt_oss", intermediate_size=64)
    known, tensors = load_file(folder / "model.safetensors"), {}
    for name, ours in (("token_embd", "model.embed_tokens"), ("output", "lm_head")):
        tensors[f"{name}.weight"] = known[f"{ours}.weight"]
    for block in range(2):
        ours, theirs = f"model.layers.{block}", f"blk.{block}"
        both = known[f"{ours}.mlp.experts.gate_up_proj"].transpose(1, 2)
        down = known[f"{ours}.mlp.experts.down_proj"].transpose(1, 2)
        experts = {"gate": both[:, ::2], "up": both[:, 1::2], "down": down}
        tensors |= {f"{theirs}.ffn_{x}_exps.weight": y for x, y in experts.items()}
        tensors[f"{theirs}.ffn_gate_inp.weight"] = known[f"{ours}.mlp.router.weight"]
        for x, y in zip("qkvo", ("q", "k", "v", "output"), strict=True):
            tensors[f"{theirs}.attn_{y}.weight"] = known[f"{ours}.self_attn.{x}_proj.weight"]
        others = [x for x in known if x.startswith(ours) and x.endswith(("bias", "norm.weight"))]
        others += [x for x in known if x.startswith(ours) and x.endswith(("sinks", "_proj_bias"))]
        tensors |= {f"{theirs}.{x.removeprefix(ours + '.')}": known[x] for x in others}
    return tensors | {"output_norm.weight": known["model.norm.weight"]}


def test_experts_that_the_checkpoint_has_in_one_tensor_are_compressed(tmp_path):
    tensors = gpt_oss(tmp_path / "dense")
    template = write_container(tmp_path / "full.gguf", tensors)
    # Dense targets move the weights of a random model far.
    options = {"bits": 4.5, "dense_weight": 0.0, "template": template}
    record = compress(tmp_path / "dense", tmp_path / "x.gguf", **options)
    assert_close(tmp_path / "x.gguf", tensors)
    kinds = {x.tensor_type.name for x in GgufFile.open(tmp_path / "x.gguf").tensors.values()}
    assert kinds == {*record.types.values(), "F32", "BF16"}  # biases of all experts are a matrix


def test_experts_in_mxfp4_keep_their_values(tmp_path):
    few, dense = quantize(
        gguf_checkpoint(tmp_path / "source", "gpt_oss", intermediate_size=64), tmp_path, FUSED
    )
    template = write_container(tmp_path / "full.gguf", gpt_oss(dense))
    record = compress(few, tmp_path / "x.gguf", bits=6.0, dense_weight=0.0, template=template)
    ours, theirs = contents(tmp_path / "x.gguf"), contents(template)
    assert all(
        kind == "MXFP4" for name, kind in record.types.items() if ".experts." in name
    ) and all(torch.equal(ours[name], theirs[name]) for name in theirs if "_exps.weight" in name)


def test_what_has_no_type_has_the_numbers_of_the_checkpoint_in_the_order_of_the_template(tmp_path):
    tensors = gpt_oss(tmp_path / "dense")
    tensors |= {x: y.rot90(2) for x, y in tensors.items() if "attn_output.weight" in x}
    template = write_container(tmp_path / "full.gguf", tensors)
    options = {"type": "Q4_K", "dense_weight": 0.0, "template": template, "head_bits": "none"}
    compress(tmp_path / "dense", tmp_path / "x.gguf", **options, ignore=("*layers.1*",))
    ours, theirs = contents(tmp_path / "x.gguf"), contents(template)
    equal = {name for name in theirs if torch.equal(ours[name], theirs[name])}
    assert equal >= {name for name in theirs if not name.startswith("blk.0.")}
    assert equal.isdisjoint(f"blk.0.attn_{x}.weight" for x in "qkv")


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_a_killed_run_with_a_template_continues_without_matching(
    family, dense, container, tmp_path, monkeypatch
):
    options = {"type": "Q4_K", "template": container, "rounding": "nearest"}
    if family == "gpt_oss":
        dense = tmp_path / "dense"
        options["template"] = write_container(tmp_path / "full.gguf", gpt_oss(dense))
        options["rounding"] = "feedback"
    compress(dense, tmp_path / "whole.gguf", **options)
    interrupt(compress, dense, tmp_path / "x.gguf", **options)
    with monkeypatch.context() as changed:
        changed.delattr(gguf_template, "placements_in")
        compress(dense, tmp_path / "x.gguf", **options)
    assert (tmp_path / "x.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


@pytest.mark.parametrize("name", ["blk.1.attn_norm.weight", "blk.1.ffn_gate_inp.weight"])
@pytest.mark.parametrize("is_killed", [True, False])
def test_a_template_that_changes_during_the_run_is_refused(name, is_killed, tmp_path):
    """Norms and routers, which have no type, are copied from it at the end."""
    dense = gguf_checkpoint(tmp_path / "dense", "mixtral", **MOE)
    template, other = (full_file(dense, tmp_path / x) for x in ("full.gguf", "other.gguf"))
    # What is copied does not depend on how the rest is rounded.
    whole, options = template.read_bytes(), {"type": "Q4_K", "rounding": "nearest"}
    options["template"] = template
    compress(dense, tmp_path / "whole.gguf", **options)
    tensors = known_tensors(dense)
    write_container(other, tensors | {name: tensors[name] + 1}, known_layout(dense)[0].fields)

    def change(*_: object) -> None:
        template.write_bytes(other.read_bytes())

    if is_killed:
        interrupt(compress, dense, tmp_path / "x.gguf", **options)
        change()
        with pytest.raises(FileExistsError, match="not the file that this run began with"):
            compress(dense, tmp_path / "x.gguf", **options)
    else:
        with pytest.raises(ValueError, match=f"changed since the run began: {name}"):
            compress(dense, tmp_path / "x.gguf", **options, progress=change)
    assert not (tmp_path / "x.gguf").exists()
    template.write_bytes(whole)
    compress(dense, tmp_path / "x.gguf", **options)
    assert (tmp_path / "x.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_a_template_that_is_cut_short_during_the_run_ends_it_with_an_error(dense, tmp_path):
    template = full_file(dense, tmp_path / "full.gguf")
    whole, options = template.read_bytes(), {"type": "Q4_K", "template": template}
    with pytest.raises(ValueError, match=r"full\.gguf was cut short while it was read"):
        compress(
            dense,
            tmp_path / "x.gguf",
            **options,
            progress=lambda *_: template.write_bytes(whole[:4096]),
        )
    template.write_bytes(whole)
    compress(dense, tmp_path / "x.gguf", **options)
    assert_close(tmp_path / "x.gguf", known_tensors(dense))


def swapped(name: str, other: str):
    return lambda x: x | {name: x[other], other: x[name]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {k: v for k, v in x.items() if "blk.1" not in k}, "it lacks .*layers.1.* more"),
        (lambda x: {k: v for k, v in x.items() if k != "output.weight"}, "it lacks .*lm_head"),
        (lambda x: {k: v for k, v in x.items() if k != "blk.0.ffn_up.weight"}, "0.mlp.up_proj"),
        (lambda x: {k: v for k, v in x.items() if k != "output_norm.weight"}, "model.norm.weight"),
        (lambda x: x | {"output.weight": x["token_embd.weight"]}, "it lacks .*lm_head.weight"),
        (lambda x: x | {"blk.0.attn_k.weight": torch.randn(128, 256)}, "0.self_attn.k_proj"),
        (lambda x: x | {"rope_freqs.weight": torch.ones(4) * 2}, "freqs.* None by config.json"),
        (lambda x: x | {"blk.0.attn_norm.weight": torch.rand(256)}, "0.input_layernorm.weight"),
        (lambda x: x | {"blk.0.attn_norm.weight": x["blk.0.attn_norm.weight"].flip(0)}, "input_la"),
        (lambda x: x | {"blk.0.attn_k.weight": x["blk.0.attn_v.weight"]}, "k_proj"),
        (swapped("blk.0.attn_q.weight", "blk.1.attn_q.weight"), "layers.1.self_attn.q_proj"),
        (swapped("blk.0.ffn_up.weight", "blk.0.ffn_gate.weight"), "which belong to blk.0.ffn_"),
        (swapped("blk.0.attn_norm.weight", "blk.1.attn_norm.weight"), "it lacks .*input_layernorm"),
        (swapped("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"), "which belong to blk.0."),
    ],
)  # fmt: skip
def test_a_template_that_lacks_a_weight_or_has_it_elsewhere_is_refused(change, message, tmp_path):
    dense = gguf_checkpoint(tmp_path / "dense", vocab_size=4 * WIDE["vocab_size"])
    fields = dict(known_layout(dense)[0].fields)
    tensors = change(known_tensors(dense))
    if not any(name.startswith("blk.1") for name in tensors):
        fields["llama.block_count"] = fields["llama.block_count"]._replace(value=1)
    template = write_container(tmp_path / "full.gguf", tensors, fields)
    assert_refused(
        ValueError, message, compress, dense, tmp_path / "x.gguf", type="Q4_K", template=template
    )
    assert sorted(x.name for x in tmp_path.iterdir()) == ["dense", "full.gguf"]


def test_a_template_has_as_many_tokens_as_rows_and_may_leave_out_rows_without_a_token(tmp_path):
    dense = gguf_checkpoint(tmp_path / "dense", vocab_size=WIDE["vocab_size"] + 5)
    fields, tensors = dict(known_layout(dense)[0].fields), known_tensors(dense)
    for count, rows, message in (
        (
            WIDE["vocab_size"] + 4,
            WIDE["vocab_size"] + 5,
            "the number of tokens is 264 .* 263 there",
        ),
        (WIDE["vocab_size"] - 1, WIDE["vocab_size"] - 1, "it lacks .*embed_tokens"),
        (WIDE["vocab_size"] + 2, WIDE["vocab_size"] + 2, None),
    ):
        fewer = {
            key: x._replace(value=x.value[:count]) if key.endswith(("tokens", "token_type")) else x
            for key, x in fields.items()
        }
        cut = {
            x: y[:rows] if x in ("token_embd.weight", "output.weight") else y
            for x, y in tensors.items()
        }
        template = write_container(tmp_path / "full.gguf", cut, fewer)
        options = {"type": "Q4_K", "template": template}
        if message:
            assert_refused(ValueError, message, compress, dense, tmp_path / "x.gguf", **options)
        else:
            compress(dense, tmp_path / "x.gguf", **options)
            assert_close(tmp_path / "x.gguf", cut)


def test_a_template_that_does_not_fit_is_refused_before_any_work(dense, container, tmp_path):
    other = gguf_checkpoint(tmp_path / "other", initializer_range=0.03)
    tokens = shutil.copytree(dense, tmp_path / "tokens")
    path = tokens / "tokenizer.json"
    path.write_text(path.read_text().replace('"ab"', '"bc"').replace('"a","b"', '"b","c"'))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    compress(dense, tmp_path / "few.gguf", type="Q4_K")
    (tmp_path / "cut.gguf").write_bytes(container.read_bytes()[:-5000])
    less = {
        name: torch.randn_like(x) if "blk.0.attn" in name and x.dim() > 1 else x
        for name, x in known_tensors(dense).items()
    }
    write_container(tmp_path / "less.gguf", less, known_layout(dense)[0].fields)
    os.mkfifo(tmp_path / "pipe.gguf")
    before = sorted(tmp_path.iterdir())
    for model, template, message in (
        (other, container, "not a file of this model: .*% .* blk.0.attn_q.weight"),
        (dense, tmp_path / "less.gguf", "and not those of blk.0.attn_q.weight, .* and 1 more"),
        (dense, tmp_path / "few.gguf", "few.gguf has weights in Q4_K, .*F32, F16 or BF16"),
        (dense, tmp_path / "cut.gguf", "truncated or damaged"),
        (dense, tmp_path / "absent.gguf", "No such file .*absent.gguf"),
        (dense, tmp_path / "pipe.gguf", "pipe.gguf is a FIFO; expected a regular file"),
        (dense, tmp_path / "other", "other is a folder, and a template is a GGUF file: give FILE"),
        (tokens, container, "token .* is bc in the model and ab there"),
        (adapter, container, "holds an adapter"),
    ):
        with pytest.raises((ValueError, NotImplementedError, FileNotFoundError), match=message):
            compress(model, tmp_path / "x.gguf", type="Q4_K", template=template)
        assert sorted(tmp_path.iterdir()) == before
