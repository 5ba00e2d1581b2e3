"""The language model inside an image-text model: pruned like any other, the rest left alone."""

import pytest
import torch
import transformers
from torch import nn

import prunus
from image_text import IMAGE_TEXT_MODELS, VISION, image_text_checkpoint, loaded
from prunus.model.checkpoint.resolve import resolve_folder
from recovery_cases import SHORT, shards, training_text
from reference import prune_as_called, prune_rows
from tiny import SIZES, token_ids


@pytest.mark.parametrize("family", IMAGE_TEXT_MODELS)
def test_the_language_model_is_pruned_and_nothing_else(family, tmp_path):
    dense = image_text_checkpoint(tmp_path / "dense", family)
    prunus.prune(dense, tmp_path / "out", calibration=token_ids(), dtype="float32", batch=2)
    expected = loaded(dense)
    decoder = expected.get_decoder()
    todo = [x for x in decoder.layers.modules() if isinstance(x, nn.Linear)]
    assert len(todo) == 14

    prune_as_called(todo, token_ids().split(2), lambda ids: expected(input_ids=ids), prune_rows)
    found = loaded(tmp_path / "out").state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl"])
def test_what_follows_pruning(family, tmp_path):
    """Scoring in parts and as a whole, recovery and loading in one line."""
    dense = image_text_checkpoint(tmp_path / "dense", family)
    prunus.prune(dense, tmp_path / "out", calibration=token_ids(), dtype="float32")
    pruned = loaded(tmp_path / "out").eval()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoModelForImageTextToText.from_pretrained" in card and "CausalLM" not in card

    text = training_text(tmp_path)
    options = {"text": str(text), "seqlen": 16, "samples": 4, "dtype": "float32"}
    whole, streamed = (
        prunus.perplexity(tmp_path / "out", stream=stream, **options) for stream in (False, True)
    )
    assert whole.perplexity == pytest.approx(streamed.perplexity, rel=1e-6)
    record = prunus.recover(tmp_path / "out", tmp_path / "new", "masked", text=str(text), **SHORT)
    assert record.state == "finished"
    trained = loaded(tmp_path / "new").state_dict()
    changed = {name for name, x in pruned.state_dict().items() if not torch.equal(trained[name], x)}
    assert changed and not any("vis" in name for name in changed)
    assert all(((x == 0) | (x != 0)).all() for name, x in trained.items())
    assert prunus.load(tmp_path / "out").tokenizer is not None


def test_compression(tmp_path):
    dense = image_text_checkpoint(tmp_path / "dense", "llava")
    prunus.compress(dense, tmp_path / "out", bits=4, calibration=token_ids(8, 64))
    ids, model = token_ids(), loaded(resolve_folder(tmp_path / "out"))
    assert model(input_ids=ids).logits.isfinite().all()
    assert sum(map(len, shards(tmp_path / "out").values())) < sum(map(len, shards(dense).values()))


def test_a_model_that_reads_no_text_without_an_image_is_refused(tmp_path):
    opt = {"model_type": "opt", "ffn_dim": 64, "vocab_size": 128, "word_embed_proj_dim": 32}
    config = transformers.Blip2Config(
        text_config=SIZES | opt,
        vision_config=VISION,
        qformer_config=SIZES | {"encoder_hidden_size": 32},
        num_query_tokens=2,
    )
    dense = tmp_path / "dense"
    transformers.Blip2ForConditionalGeneration(config).save_pretrained(dense)
    with pytest.raises(NotImplementedError, match="reads no text without an image"):
        prunus.prune(dense, tmp_path / "out", calibration=token_ids())
    assert not (tmp_path / "out").exists()
