"""GGUF import: what arrives in the checkpoint, and how bad files are refused."""

import json
import struct
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import prunus
from command_line import call
from gguf_cases import FAMILIES, compress, gguf_checkpoint
from places import REPOSITORY
from prunus.evaluation.eval_records import ModelSize
from prunus.evaluation.inspection import stored_size
from prunus.formats.gguf.file import open_gguf
from prunus.formats.gguf.import_checkpoint import import_gguf
from prunus.model.checkpoint.files import holds_figures
from prunus.model.tokenizer import token_ids as token_ids_of
from refusals import assert_refused
from tiny import tree
from tiny_tokenizer import EOS, VOCABULARY, byte_tokenizer

pytest.importorskip("gguf")
pytest.importorskip("accelerate")

import gguf

from prunus.model.open_folder import OpenFolder
from tiny_gguf import TEMPLATE, TOKENS, tiny_llama, write_gguf


@pytest.fixture
def tiny_gguf(tmp_path) -> Path:
    path = tmp_path / "tiny.gguf"
    write_gguf(tiny_llama(), path)
    return path


# --- what comes out ---


def test_weights_config_and_tokenizer_arrive(tiny_gguf, tmp_path):
    model = tiny_llama()
    lines = []
    summary = import_gguf(
        tiny_gguf, tmp_path / "new" / "out", dtype="float32", progress=lines.append
    )
    out = tmp_path / "new" / "out"
    weights = load_file(out / "model.safetensors")
    expected = model.state_dict()
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(weights[name], weight), name
    loaded = AutoModelForCausalLM.from_pretrained(out).eval()
    ids = torch.randint(0, TOKENS, (1, 12))
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("Hello")["input_ids"] == byte_tokenizer()("Hello")["input_ids"]
    assert tokenizer("ab")["input_ids"] == [VOCABULARY]
    assert tokenizer.chat_template == TEMPLATE
    assert loaded.generation_config.eos_token_id == EOS
    assert (out / "generation_config.json").is_file()
    config = json.loads((out / "config.json").read_text())
    assert not {"_model_name_or_path", "_name_or_path", "quantization_config"} & config.keys()
    assert config["num_hidden_layers"] == 2
    assert summary == summary | {
        "architecture": "llama",
        "parameters": sum(weight.numel() for weight in expected.values()),
        "chat_template": True,
        "bytes": sum((out / name).stat().st_size for name in summary["files"]),
    }
    (tmp_path / "figures.json").write_text(json.dumps(summary))
    assert holds_figures(tmp_path / "figures.json")
    assert len(lines) == 4
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["out"]
    modes = {path.stat().st_mode for path in out.iterdir()}
    assert len(modes) == 1, "all files have the same permissions"


LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.5] * 4, "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 32,
}  # fmt: skip
#: Options that a file says in its own way, and transformers does not read of it.
SAID = {
    "llama": {"rope_parameters": LLAMA_3, "attention_bias": True, "mlp_bias": True},
    "llama, linear": {"rope_parameters": LINEAR},
    "qwen3, yarn": {"rope_parameters": YARN},
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention"],
        "final_logit_softcapping": 5.0,
        "rope_parameters": {
            "full_attention": LINEAR,
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
    },
    "phi3": {"rope_parameters": LONG, "original_max_position_embeddings": 32},
    "phi3, half": {
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5
        }
    },
    "mistral": {}, "mixtral": {}, "qwen2": {}, "qwen2_moe": {"head_dim": 8}, "qwen3": {},
    "qwen3_moe": {},
    "olmoe": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rms_norm_eps": 0.1
    },
    "phi": {
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25
        }
    },
}  # fmt: skip


@pytest.mark.parametrize("case", SAID)
def test_the_imported_model_computes_what_the_checkpoint_computes(case, tmp_path):
    family, small = case.partition(",")[0], {"hidden_size": 32, "intermediate_size": 64}
    options = FAMILIES[family] | small | SAID[case]
    options |= {"head_dim": None} if case == "llama" else {}
    dense = gguf_checkpoint(tmp_path / "dense", family, dtype=torch.float32, **options)
    compress(dense, tmp_path / "x.gguf", type="Q8_0", rounding="nearest")
    import_gguf(tmp_path / "x.gguf", tmp_path / "back", dtype="float32")
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / x) for x in ("dense", "back")]
    for name, parameter in models[0].named_parameters():
        stored = models[1].get_parameter(name)
        assert (stored - parameter).norm() <= 0.05 * parameter.norm(), name
        # Larger weights show the constants, and equal ones show nothing else.
        parameter.data.normal_(std=0.3)
        stored.data.copy_(parameter)
    ids = torch.arange(48)[None] % 200
    with torch.no_grad():
        ours, theirs = (model(ids).logits for model in models)
    assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_transformers_alone_reads_a_file_as_its_import(family, tmp_path):
    """Of these families it reads all that a file says, if no frequencies are scaled."""
    dense = gguf_checkpoint(tmp_path / "dense", family, num_hidden_layers=1)
    compress(dense, tmp_path / "x.gguf", type="Q4_K", rounding="nearest")
    import_gguf(tmp_path / "x.gguf", tmp_path / "back", dtype="float32")
    imported = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32)
    ids = torch.arange(48)[None]
    with torch.no_grad():
        assert torch.equal(alone(ids).logits, imported(ids).logits)


@pytest.mark.usefixtures("short_python_texts")
@pytest.mark.parametrize("family", ["llama", "qwen2", "olmoe"])
@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
def test_the_imported_tokenizer_has_the_tokens_of_the_file_alone(family, named, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 4}
    dense = gguf_checkpoint(tmp_path / "dense", family, **sizes)
    path = dense / "tokenizer_config.json"
    if not named:  # then classes of transformers add <|endoftext|>
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"unk_token": None, "pad_token": None}))
    out = tmp_path / "x.gguf"
    compress(dense, out, type="Q8_0", rounding="nearest")
    import_gguf(out, tmp_path / "back")
    ids = [token_ids_of(OpenFolder(folder)) for folder in (tmp_path / "back", dense)]
    assert ids[0] == ids[1]
    given = {"text": "python-docs", "seqlen": 16, "samples": 32}
    result = prunus.perplexity(out, reference=dense, **given)
    assert result.divergence.kl < 0.1


def test_quantised_weights_are_unpacked(tmp_path):
    kept = write_gguf(tiny_llama(), tmp_path / "q8.gguf", "Q8_0")
    import_gguf(tmp_path / "q8.gguf", tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights.keys() == kept.keys()
    for name, weight in kept.items():
        assert torch.equal(weights[name], weight.bfloat16()), name
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(weights[name], tiny_llama().state_dict()[name].bfloat16())


def test_an_embedding_that_is_stored_twice_is_tied(tmp_path):
    """As llama.cpp stores tied models: the second time as the head, in more bits."""
    model = tiny_llama()
    head, embedding = model.lm_head.weight.data, model.model.embed_tokens.weight.data
    embedding.copy_(head + 0.1 * head.std() * torch.randn_like(head))
    kept = write_gguf(model, tmp_path / "twice.gguf", "Q8_0")
    summary = import_gguf(tmp_path / "twice.gguf", tmp_path / "out", dtype="float32")
    assert summary["tied"]
    assert summary["parameters"] == sum(x.numel() for x in kept.values()) - head.numel()
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights.keys() == kept.keys() - {"lm_head.weight"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.model.embed_tokens.weight, kept["lm_head.weight"])
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_dithered_file_counts_the_weights_of_the_checkpoint(tmp_path, monkeypatch):
    """An embedding that is stored twice becomes one weight, which has its noise once."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    dither = import_module("dither").dither
    model = tiny_llama()
    write_gguf(model, tmp_path / "apart.gguf", "Q8_0")
    apart = dither(tmp_path / "apart.gguf", tmp_path / "apart")
    norms = sum(x.numel() for name, x in model.named_parameters() if "norm" in name)
    assert apart["dithered"] == apart["parameters"] - norms
    model.model.embed_tokens.weight.data.copy_(model.lm_head.weight.data)
    write_gguf(model, tmp_path / "twice.gguf", "Q8_0")
    twice = dither(tmp_path / "twice.gguf", tmp_path / "twice")
    assert twice["tied"] and not apart["tied"]
    assert twice["dithered"] == twice["parameters"] - norms
    assert twice["dithered"] == apart["dithered"] - model.lm_head.weight.numel()


@pytest.mark.parametrize(("kind", "change"), [("F32", 1.001), ("F16", 1.01), ("Q8_0", -1.0)])
def test_a_head_of_which_one_row_differs_is_no_copy_of_the_embedding(kind, change, tmp_path):
    model = tiny_llama()
    model.model.embed_tokens.weight.data.copy_(model.lm_head.weight.data)
    model.lm_head.weight.data[-1] *= change
    kept = write_gguf(model, tmp_path / "x.gguf", kind)
    assert not import_gguf(tmp_path / "x.gguf", tmp_path / "out", dtype="float32")["tied"]
    weights = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(weights[name], kept[name])


def test_a_file_that_is_cut_short_while_it_is_read_is_an_error(tmp_path):
    """It was mapped, and then touching it ends the process."""
    write_gguf(tiny_llama(), tmp_path / "x.gguf")
    file, whole = open_gguf(tmp_path / "x.gguf"), (tmp_path / "x.gguf").read_bytes()
    (tmp_path / "x.gguf").write_bytes(whole[:64])
    assert_refused(
        ValueError, r"x\.gguf was cut short while it was read", file.read, "token_embd.weight"
    )
    assert file.get("general.name") == "tiny"


def test_any_file_says_its_bits_per_weight_without_being_unpacked(tmp_path, monkeypatch):
    """Files of llama.cpp have no record, and norms and the embedding do not count."""
    for kind, bits in (("Q8_0", 8.5), ("F32", 32), ("F16", 16)):
        path = tmp_path / f"{kind}.gguf"
        write_gguf(tiny_llama(), path, kind)
        monkeypatch.setattr(gguf.quants, "dequantize", None)
        assert stored_size(OpenFolder(path)) == ModelSize(path.stat().st_size, bits)
        monkeypatch.undo()


def test_names_are_made_once_and_every_tensor_is_decoded_once(tmp_path, monkeypatch):
    """A table of names for every module took longer than all decoding."""
    write_gguf(tiny_llama(), tmp_path / "q8.gguf", "Q8_0")
    made, decoded = [], []
    name_map, dequantize = gguf.get_tensor_name_map, gguf.quants.dequantize
    monkeypatch.setattr(
        gguf, "get_tensor_name_map", lambda *args: made.append(args) or name_map(*args)
    )
    monkeypatch.setattr(
        gguf.quants, "dequantize", lambda *args: decoded.append(args) or dequantize(*args)
    )
    import_gguf(tmp_path / "q8.gguf", tmp_path / "out")
    assert len(made) == 1
    # Some rows of embedding and head are compared first.
    assert len(decoded) == len(gguf.GGUFReader(tmp_path / "q8.gguf").tensors) + 2
    assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2) is not None
    assert len(made) == 2, "the table of the package is back"


def test_overwrite_replaces_what_an_import_wrote_and_nothing_else(tiny_gguf, tmp_path):
    out = tmp_path / "out"
    import_gguf(tiny_gguf, out)
    expected = tree(out)
    assert_refused(FileExistsError, "holds a finished import", import_gguf, tiny_gguf, out)
    (out / "model.safetensors").write_bytes(b"damaged")
    import_gguf(tiny_gguf, out, overwrite=True)
    assert tree(out) == expected
    # A killed import goes on: some files have their names, and the record says so.
    record = json.loads((out / "prunus-import.json").read_text())
    (out / "prunus-import.json").write_text(json.dumps(record | {"state": "running"}))
    (out / "config.json").unlink()
    import_gguf(tiny_gguf, out)
    assert tree(out) == expected
    (out / "precious.txt").write_text("keep me")
    message = r"files that prunus import did not write \(precious\.txt\)"
    assert_refused(FileExistsError, message, import_gguf, tiny_gguf, out, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny.gguf"]


@pytest.mark.parametrize("folder", [".", "out/..", "../{name}"])
def test_an_import_into_the_folder_of_its_file_is_refused(tiny_gguf, tmp_path, folder):
    (tmp_path / "out").mkdir()
    dest, before = tmp_path / folder.format(name=tmp_path.name), tree(tmp_path)
    assert_refused(ValueError, "overlap", import_gguf, tiny_gguf, dest, overwrite=True)
    assert tree(tmp_path) == before


def test_a_plan_says_what_an_import_would_write(tiny_gguf, tmp_path):
    shown = call("plan", tiny_gguf, tmp_path / "out", "--command", "import", "--json", "-")
    plan = json.loads(shown.stdout)
    assert plan["architecture"] == "llama" and not (tmp_path / "out").exists()
    import_gguf(tiny_gguf, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors").values()
    assert plan["disk_bytes"] >= sum(tensor.nbytes for tensor in stored) > 0.9 * plan["disk_bytes"]
    assert "llama" in call("plan", tiny_gguf, "--command", "import").stdout
    refused = call("plan", tiny_gguf, tmp_path / "out", "--command", "import", status=2)
    assert "holds a finished import" in refused.stderr


def test_an_empty_folder_is_taken(tiny_gguf, tmp_path):
    (tmp_path / "out").mkdir()
    import_gguf(tiny_gguf, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


# --- bad input: an error that says what, and nothing has changed ---


@pytest.mark.parametrize(
    ("prepare", "arguments", "error", "message"),
    [
        (lambda p: p.write_bytes(b""), {}, ValueError, "not a GGUF file"),
        (
            lambda p: p.write_bytes(b"PK\x03\x04zip"),
            {},
            ValueError,
            "not a GGUF file; it starts with b'PK",
        ),
        (lambda p: p.write_bytes(p.read_bytes()[:-100]), {}, ValueError, "truncated or damaged"),
        (lambda p: p.write_bytes(p.read_bytes()[:700]), {}, ValueError, "truncated or damaged"),
        (lambda p: p.write_bytes(b"GGUF"), {}, ValueError, "truncated or damaged"),
        (
            lambda p: p.write_bytes(p.read_bytes().replace(b"llama", b"lhama")),
            {},
            ValueError,
            "transformers cannot import this file",
        ),
    ],
)
@pytest.mark.parametrize("there", [False, True])
def test_bad_files(tiny_gguf, tmp_path, prepare, arguments, error, message, there):
    prepare(tiny_gguf)
    out = tmp_path / "out"
    if there:
        out.mkdir()
        (out / "old.txt").write_text("of an earlier import")
        (out / "prunus-import.json").write_text('{"state": "finished", "files": ["old.txt"]}')
    before = tree(tmp_path)
    assert_refused(error, message, import_gguf, tiny_gguf, out, overwrite=there, **arguments)
    assert tree(tmp_path) == before
    assert out.exists() == there


def test_weights_that_do_not_make_a_whole_model(tmp_path):
    model = tiny_llama()
    del model.model.layers[1].mlp.up_proj
    write_gguf(model, tmp_path / "part.gguf")
    with pytest.raises(ValueError, match=r"missing tensors blk\.1\.ffn_up\.weight"):
        import_gguf(tmp_path / "part.gguf", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part.gguf"]


def test_destinations_that_are_taken(tiny_gguf, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("keep me")
    (tmp_path / "file").write_text("keep me")
    before = tree(tmp_path)
    with pytest.raises(
        FileExistsError, match=r"no result of prunus import \(precious\.txt\); it is left as it is"
    ):
        import_gguf(tiny_gguf, tmp_path / "full")
    with pytest.raises(FileExistsError, match="exists and is not a folder"):
        import_gguf(tiny_gguf, tmp_path / "file", overwrite=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("library", ["gguf", "accelerate"])
def test_missing_extra(tiny_gguf, tmp_path, uninstalled, library):
    uninstalled(library)
    with pytest.raises(ModuleNotFoundError, match=rf"needs {library}: pip install '\.\[gguf\]'"):
        import_gguf(tiny_gguf, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("llama.block_count", 0, "block_count is 0, and there are tensors of 2 blocks"),
        ("llama.block_count", 1, "block_count is 1, and there are tensors of 2 blocks"),
        ("llama.block_count", 3, "block_count is 3, and there are tensors of 2 blocks"),
        ("llama.vocab_size", 10**8, "vocab_size is 100,000,000, and at most 65,536 fits"),
        ("llama.embedding_length", 2**20, "embedding_length is 1,048,576, and at most 65,536"),
        ("llama.feed_forward_length", 128, "cannot import|mismatched keys"),
        ("llama.attention.head_count", 2**31, "at most 65,536 fits its tensors"),
        ("llama.context_length", 2**31, "at most 16,777,216 fits"),
        ("llama.attention.head_count_kv", 60_000, "its fields describe"),
    ],
)
def test_lengths_that_do_not_fit_the_tensors_are_refused(field, value, message, tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(tiny_llama(), path)
    data = bytearray(path.read_bytes())
    at = data.index(field.encode()) + len(field) + 4  # the name, and the type of the value
    data[at : at + 4] = value.to_bytes(4, "little")
    path.write_bytes(data)
    assert_refused(ValueError, message, import_gguf, path, tmp_path / "out")


def header(tensors: int, fields: int, *parts: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + b"".join(parts)


def array_field(kind: int, count: int, content: bytes) -> bytes:
    """A field "x" that is an array of `count` values of GGUF's type `kind`."""
    return struct.pack("<Q1sIIQ", 1, b"x", 9, kind, count) + content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(0, 1, array_field(0, 3 * 2**20, bytes(3 * 2**20))), "lists have 3,145,728 entries"),
        (header(0, 1, array_field(8, 2**22, bytes(2**25))), "lists have 4,194,304 entries"),
        (
            header(0, 1, array_field(9, 3, 3 * (struct.pack("<IQ", 0, 2**20) + bytes(2**20)))),
            "entries up to .*, and at most 2,097,152 are read",
        ),
        (header(0, 2**17, bytes(2**21)), "131,072 fields; at most 65,536 are read"),
        (header(2**17, 0, bytes(2**22)), "131,072 tensors and 0 fields; at most 65,536"),
        # Numbers that are not believed.
        (b"GGUF" + (9).to_bytes(4, "little") + bytes(16), "truncated or damaged .*version 9"),
        (header(0, 2**60), "truncated or damaged .*fields; at most"),
        (header(0, 1, array_field(9, 2**60, b"")), "truncated or damaged .*its lists have"),
    ],
)
def test_a_header_that_would_take_a_kilobyte_of_memory_per_byte_is_refused(
    content, message, monkeypatch, tmp_path
):
    """The package makes an object of every entry, so it must not see such a file."""
    monkeypatch.setattr(gguf, "GGUFReader", None)
    (tmp_path / "x.gguf").write_bytes(content)
    assert_refused(ValueError, message, import_gguf, tmp_path / "x.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]
