"""Bad input: the message says what is wrong, and no file is changed or added."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

import prunus
from prunus.engine.record import shard_name
from prunus.model.checkpoint.reader import INDEX_NAME
from prunus.pruning.manifest import Manifest
from tiny import pruned_checkpoint, shards, tiny_checkpoint, tiny_model, token_ids, tree
from tiny_tokenizer import VOCABULARY, byte_tokenizer

#: Weights outside the blocks.
OUTSIDE = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
PICKLE = b"\x80\x04K\x01."


@pytest.fixture
def refused(tmp_path):
    """Checks that `prune` raises, and that everything below `tmp_path` stays as it was."""

    def check(kind: type[Exception], message: str, model: Any, out: str = "out", **options) -> None:
        before = tree(tmp_path)
        with pytest.raises(kind, match=message):
            prunus.prune(model, tmp_path / out, **{"calibration": token_ids(), **options})
        assert tree(tmp_path) == before

    return check


@pytest.fixture(scope="module")
def master(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("master") / "dense", vocab_size=VOCABULARY)


@pytest.fixture
def dense(master, tmp_path) -> Path:
    """A checkpoint of one file, without a tokenizer, alone in `tmp_path`."""
    return Path(shutil.copytree(master, tmp_path / "dense"))


@pytest.fixture
def sharded(tmp_path) -> Path:
    tiny_model().save_pretrained(tmp_path / "dense", max_shard_size="50KB")
    assert len(list((tmp_path / "dense").glob("model-*-of-00003.safetensors"))) == 3
    return tmp_path / "dense"


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes a key."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


# --- the checkpoint ---


def test_shards_that_are_missing_cut_off_or_elsewhere(sharded, tmp_path, refused):
    shard, index = sharded / "model-00002-of-00003.safetensors", sharded / INDEX_NAME
    whole, places = shard.read_bytes(), json.loads(index.read_text())["weight_map"]
    shard.unlink()
    refused(FileNotFoundError, r"shard model-00002-of-00003\.safetensors is missing", sharded)
    for keep in (0, 5, 200, -1):
        shard.write_bytes(whole[:keep])
        refused(ValueError, r"model-00002-of-00003\.safetensors \([\d,]+ bytes\) is not a", sharded)
    shard.write_bytes(whole)
    name = next(iter(places))
    # The file exists and is whole, so only its name can be the reason.
    (sharded / "sub").mkdir()
    for folder in (tmp_path, sharded / "sub"):
        shutil.copy(sharded / "model-00001-of-00003.safetensors", folder / "x.safetensors")
    for place in ("../", f"{tmp_path}/", "..\\", "sub/", ".."):
        place += "" if place == ".." else "x.safetensors"
        edit_json(index, weight_map=places | {name: place})
        refused(ValueError, f"places '{name}' in .*shards must be plain file names", sharded)
    (sharded / "weights.bin").write_bytes(PICKLE)
    edit_json(index, weight_map=dict.fromkeys(places, "weights.bin"))
    refused(ValueError, r"'weights\.bin': shards must be .*ending in \.safetensors", sharded)
    wrong = {"model.norm.weight": "model-00001-of-00003.safetensors"}
    assert places["model.norm.weight"] != wrong["model.norm.weight"]
    edit_json(index, weight_map=places | wrong)
    refused(ValueError, r"'model\.norm\.weight' is in .*does not hold it.*belong together", sharded)
    for content in ("{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}'):
        index.write_text(content)
        refused(ValueError, rf"{INDEX_NAME} (is not valid JSON|has no 'weight_map')", sharded)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "nonsense"}, "describes no model that transformers .* knows: .*`nonsense`"),
        ({"model_type": None, "architectures": None}, "describes no model that .* knows"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "holds quantised weights; "),
        ({"num_hidden_layers": 3}, r"no weight for model\.layers\.2\..*is the checkpoint whole"),
        ({"num_hidden_layers": 1}, r"holds 'model\.layers\.1\..*no such weight in its 1 blocks"),
        ({"intermediate_size": 96}, r"shape \(64, 32\), but config\.json asks for \(96, 32\)"),
    ],
)
def test_a_config_that_does_not_describe_the_weights(changes, message, dense, refused):
    edit_json(dense / "config.json", **changes)
    refused(ValueError, message, dense)


def test_checkpoints_that_are_not_whole(dense, tmp_path, refused):
    file = dense / "model.safetensors"
    whole = file.read_bytes()
    for keep in (0, 5, 200, -1):
        file.write_bytes(whole[:keep])
        refused(ValueError, r"not a whole safetensors file.* download or copy", dense)
    file.unlink()
    refused(FileNotFoundError, r"no safetensors checkpoint\. Expected model\.safetensors", dense)
    (dense / "pytorch_model.bin").write_bytes(PICKLE)
    refused(FileNotFoundError, r"pytorch_model\.bin, a pickle, .* never loaded", dense)


@pytest.mark.parametrize(
    "name",
    [*OUTSIDE, "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.experts.2.w3.weight"],
)
@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_a_weight_that_is_not_there(name, method, tmp_path, refused):
    dense = tiny_checkpoint(tmp_path / "dense", "mixtral" if "experts" in name else "llama")
    tensors = load_file(dense / "model.safetensors")
    del tensors[name.replace("mlp.experts", "block_sparse_moe.experts")]
    save_file(tensors, dense / "model.safetensors")
    # Without its head a model is of another kind, and is refused as such.
    kind = NotImplementedError if name == "lm_head.weight" else ValueError
    refused(kind, f"holds no weight for {name.removesuffix('.weight')}", dense, method=method)


def test_a_hub_id_that_cannot_be_downloaded(tmp_path, monkeypatch, refused):
    asked = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["allow_patterns"]))
        raise ConnectionError("no route to the hub\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    refused(FileNotFoundError, r"'org/model' is neither .* hub: no route to the hub$", "org/model")
    [(name, patterns)] = asked
    assert name == "org/model"
    assert not any(glob.endswith((".bin", ".pt", ".py", "*")) for glob in patterns), "no code"


# --- options and text ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "2:5"}, r"layers\.0\.self_attn\.q_proj has 32 inputs, .* multiple of 5"),
        ({"pattern": "5:4"}, "1 <= N <= M; got '5:4'"),
        ({"method": "wanda-variant", "pattern": "2:4"}, "wanda-variant has no 2:4 form"),
        ({"ignore": ["lm_head"]}, "`ignore` 'lm_head' matches none of the 14 linears"),
        ({"device": "cuda:99"}, r"device 'cuda:99' is not there: \d+ CUDA devices are visible"),
        ({"memory": "1MB", "device": "cpu"}, "the memory budget is .*Raise `memory`"),
        ({"calibration": token_ids().float()}, r"integers \(samples, seqlen\), got torch\.float32"),
        ({"calibration": token_ids()[0]}, r"must be integers \(samples, seqlen\)"),
        ({"calibration": token_ids()[:0]}, r"\(samples, seqlen\), got torch\.int64 \(0, 16\)"),
        ({"calibration": token_ids()[:, :1]}, "seqlen must be at least 2 tokens; got 1"),
        ({"calibration": token_ids() + VOCABULARY}, f"from 261 to 382, but .* {VOCABULARY} rows"),
        ({"calibration": token_ids() - 100}, "the calibration token ids run from -97 to"),
        ({"calibration": token_ids(2, 65)}, "windows of 65 tokens do not fit: .* 64 positions"),
        ({"calibration": "python-docs", "samples": 0}, "samples must be at least 1"),
    ],
)
def test_options_that_make_no_sense(options, message, dense, tmp_path, refused):
    refused(ValueError, message, dense, **options)


def test_a_loaded_model_and_an_output_folder_exclude_each_other(dense, tmp_path, refused):
    refused(ValueError, "leave output out and call its save_pretrained", tiny_model())
    with pytest.raises(ValueError, match="pruned into a new folder: give output"):
        prunus.prune(dense, calibration=token_ids())
    with pytest.raises(TypeError, match=r"expected a transformers model .* got Linear"):
        prunus.prune(torch.nn.Linear(3, 3), calibration=token_ids())
    with pytest.raises(ValueError, match="needs its tokenizer: pass tokenizer="):
        prunus.prune(tiny_model(), calibration="python-docs", samples=2, seqlen=16)


# --- the output folder ---


@pytest.mark.parametrize("overwrite", [False, True])
def test_outputs_that_are_something_else(overwrite, dense, tmp_path, refused):
    (tmp_path / "out").write_text("years of work")
    refused(FileExistsError, "exists and is not a folder", dense, overwrite=overwrite)
    (tmp_path / "out").unlink()
    (tmp_path / "out").mkdir()
    for out in ("dense", "dense/out", "dense/deep/out", "out/../dense", "."):
        refused(ValueError, "overlap: choose a folder of its own", dense, out, overwrite=overwrite)
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    message = "holds no result of prunus prune; it is left"
    refused(FileExistsError, message, dense, overwrite=overwrite)


def test_a_damaged_manifest(dense, tmp_path, refused):
    (tmp_path / "out").mkdir()
    for content in ("{", "{}", '{"format": 2}'):
        (tmp_path / "out" / Manifest.FILE).write_text(content)
        refused(ValueError, rf"{Manifest.FILE} is (not valid JSON|damaged or of another)", dense)
    report = prunus.prune(dense, tmp_path / "out", calibration=token_ids(), overwrite=True)
    assert report.state == "finished"


@pytest.mark.parametrize("harm", ["gone", "cut"])
def test_a_finished_run_that_lost_a_shard_is_not_finished(harm, dense, tmp_path, refused):
    prunus.prune(dense, tmp_path / "out", calibration=token_ids())
    shard = tmp_path / "out" / "model-00002-of-00003.safetensors"
    if harm == "gone":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:1000])
    refused(FileExistsError, rf"damaged since: .*{shard.name}.*overwrite`? ma", dense)


# --- errors in the middle of a run ---


def spoil(dense: Path, name: str, value: float, everywhere: bool = False) -> None:
    tensors = load_file(dense / "model.safetensors")
    if everywhere:
        tensors[name] *= value
    else:
        tensors[name].view(-1)[3] = value
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})


def check_unfinished(out: Path, blocks: int, of: int) -> None:
    """Check that the folder holds finished blocks only, and does not pass for a model."""
    shards = [shard_name(index, of + 1) for index in (*range(blocks), of)]
    assert sorted(path.name for path in out.iterdir()) == [*shards, Manifest.FILE]
    manifest = Manifest.load(out)
    assert (manifest.state, len(manifest.blocks)) == ("running", blocks)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_weights_that_are_not_finite(value, method, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", num_hidden_layers=3)
    whole = load_file(dense / "model.safetensors")
    spoil(dense, "model.layers.1.mlp.up_proj.weight", value)
    source = tree(dense)
    with pytest.raises(ValueError, match=r"\.1\.mlp\.up_proj\.weight holds .* not finite"):
        prunus.prune(dense, tmp_path / "out", method, calibration=token_ids())
    assert tree(dense) == source
    check_unfinished(tmp_path / "out", blocks=1, of=3)
    # With a corrected model the run continues, and its result is that of a run that never failed.
    save_file(whole, dense / "model.safetensors", metadata={"format": "pt"})
    steps: list[Any] = []
    for name in ("out", "undisturbed"):
        prunus.prune(dense, tmp_path / name, method, calibration=token_ids(), progress=steps.append)
    assert "earlier run" in steps[0].message
    assert shards(tmp_path / "out") == shards(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("dtype", "factor"), [("float32", 1e30), ("float16", 1e5), ("bfloat16", 1e30)], ids=str
)
@pytest.mark.parametrize("propagate", ["linear", "block"])
def test_activations_that_are_not_finite(dtype, factor, propagate, dense, tmp_path):
    for name in ("gate_proj", "up_proj"):
        spoil(dense, f"model.layers.1.mlp.{name}.weight", factor, everywhere=True)
    source = tree(dense)
    with pytest.raises(ValueError, match=r"reach model\.layers\.1\.mlp\.down_proj are not finite"):
        prunus.prune(
            dense, tmp_path / "out", calibration=token_ids(), dtype=dtype, propagate=propagate
        )
    assert tree(dense) == source
    check_unfinished(tmp_path / "out", blocks=1, of=2)


@pytest.mark.parametrize("name", OUTSIDE)
def test_weights_outside_the_blocks_that_are_not_finite(name, dense, tmp_path):
    spoil(dense, name, torch.inf)
    with pytest.raises(ValueError, match=f"{name} holds weights that are not finite"):
        prunus.prune(dense, tmp_path / "out", calibration=token_ids())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", *OUTSIDE])
def test_verbs_that_read_a_whole_model_name_what_is_not_finite(name, tmp_path):
    dense = pruned_checkpoint(tmp_path / "dense", vocab_size=VOCABULARY)
    byte_tokenizer().save_pretrained(dense)
    spoil(dense, name, torch.nan)
    message = f"{name} holds weights that are not finite"
    with pytest.raises(ValueError, match=message):
        prunus.load(dense)
    if name not in OUTSIDE:
        with pytest.raises(ValueError, match=message):
            prunus.inspect(dense)


def test_a_loaded_model_names_what_is_not_finite():
    embeddings, weight = tiny_model(), tiny_model()
    with torch.no_grad():
        embeddings.model.embed_tokens.weight.fill_(torch.inf)
        weight.model.layers[1].self_attn.o_proj.weight[0, 0] = torch.nan
    for model, message in (
        (embeddings, "the embeddings give hidden states that are not finite"),
        (weight, r"model\.layers\.1\.self_attn\.o_proj\.weight .* not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            prunus.prune(model, calibration=token_ids())
