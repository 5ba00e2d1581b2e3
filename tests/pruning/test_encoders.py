"""Encoders and classifiers of text are pruned. What is no row of blocks is refused by name."""

from itertools import product
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    Gemma3nTextConfig,
    RwkvConfig,
)

import prunus
from command_line import call
from prunus.engine.linear_job import plan_run
from prunus.engine.options import RunOptions
from prunus.model.calls import BlockStubs
from prunus.model.kinds import CAUSAL, kind_of
from prunus.pruning.recipe import Recipe
from reference import assert_three_ways_agree, wanda_by_whole_runs
from tiny import COMMON, SIZES, token_ids

_COMMON: dict[str, Any] = COMMON | {"pad_token_id": 1, "bos_token_id": 0}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {},
    "xlm-roberta": {},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
    "electra": {"embedding_size": 16},
    "mpnet": {},
    "roformer": {},
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 8},
}


def tiny_encoder(family: str) -> Any:
    config = AutoConfig.for_model(family, **{**_COMMON, **ENCODERS[family]})
    torch.manual_seed(2)
    return AutoModelForMaskedLM.from_config(config).eval()


HEADS = ["SequenceClassification", "TokenClassification"]
CLASSIFIERS = [*product(HEADS, ["bert", "distilbert", "roberta", "llama", "qwen2"])]


@pytest.mark.parametrize(("head", "family"), [*product(["MaskedLM"], ENCODERS), *CLASSIFIERS])
def test_streaming_equals_in_memory_equals_naive(head, family, tmp_path):
    loader = getattr(transformers, f"AutoModelFor{head}")
    options = {**_COMMON, **ENCODERS.get(family, {}), "num_labels": 3}
    torch.manual_seed(2)
    loader.from_config(AutoConfig.for_model(family, **options)).save_pretrained(tmp_path / "dense")
    ids = token_ids()
    report = prunus.prune(tmp_path / "dense", tmp_path / "pruned", calibration=ids, batch=2)
    assert report.totals["sparsity"] == pytest.approx(0.5)
    naive, in_place = (loader.from_pretrained(tmp_path / "dense").eval() for _ in range(2))
    prunus.prune(in_place, calibration=ids, batch=2)
    wanda_by_whole_runs(naive, ids)
    streamed = loader.from_pretrained(tmp_path / "pruned")
    assert_three_ways_agree(streamed, in_place, naive, differ=2e-3)
    assert f"AutoModelFor{head}" in (tmp_path / "pruned" / "README.md").read_text()


def refusal(tmp_path, model: Any) -> str:
    """What a plan of the checkpoint and a run on the loaded model say; both refuse alike."""
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(NotImplementedError) as loaded:
        prunus.prune(model, calibration=token_ids())
    recipe = Recipe(calibration="token ids")
    with pytest.raises(NotImplementedError) as stored:
        plan_run(tmp_path / "dense", recipe, RunOptions(calibration_data=token_ids()))
    return f"{stored.value} | {loaded.value}"


def test_a_model_without_its_head_is_refused_with_what_to_do(tmp_path):
    for family in ("llama", "bert"):
        model = AutoModel.from_config(AutoConfig.for_model(family, **_COMMON))
        found = refusal(tmp_path / family, model)
        assert "holds no weight for" in found
        assert "without its head. Save the whole model" in found
        assert f"a loaded {type(model).__name__} has no" in found


def test_heads_that_are_not_known_are_refused_by_name(tmp_path):
    model = AutoModelForQuestionAnswering.from_config(AutoConfig.for_model("bert", **_COMMON))
    assert refusal(tmp_path / "a", model).count("(BertForQuestionAnswering) cannot be pruned") == 2
    model = AutoModel.from_config(AutoConfig.for_model("clip_text_model", **SIZES))
    assert "of type 'clip_text_model' (CLIPTextModel) cannot be pruned" in refusal(
        tmp_path / "b", model
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RwkvConfig(), "type 'rwkv' rescales hidden states between its blocks"),
        (Gemma3nTextConfig(), "type 'gemma3n_text' passes several streams of hidden states"),
    ],
)
def test_decoders_that_are_no_row_of_blocks_are_refused_by_name(config, message):
    with pytest.raises(NotImplementedError, match=message):
        kind_of(config)


def test_hidden_states_of_another_shape_are_refused():
    block = nn.Linear(4, 4)
    stubs = BlockStubs("Streams", [block])
    with pytest.raises(NotImplementedError, match=r"Streams passes .* of shape \(2, 1, 3, 4\)"):
        stubs.record(lambda: block(torch.zeros(2, 1, 3, 4)))


def test_positions_start_after_the_padding(tmp_path):
    tiny_encoder("roberta").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="windows of 64 tokens do not fit: the model has 62"):
        prunus.prune(tmp_path / "dense", tmp_path / "pruned", calibration=token_ids(2, 64))
    prunus.prune(tmp_path / "dense", tmp_path / "pruned", calibration=token_ids(2, 62))


_SEQUENCES: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 128,
}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        (
            "whisper",
            _SEQUENCES
            | {"max_source_positions": 32, "pad_token_id": 0, "decoder_start_token_id": 1},
        ),
        ("bart", _SEQUENCES),
        ("t5", {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8}),
    ],
)
@pytest.mark.parametrize("verb", ["prune", "plan"])
def test_encoder_decoders_are_refused_before_any_work(family, options, verb, tmp_path):
    from transformers import AutoModelForSpeechSeq2Seq

    auto = AutoModelForSpeechSeq2Seq if family == "whisper" else AutoModelForSeq2SeqLM
    model = auto.from_config(AutoConfig.for_model(family, **options))
    model.save_pretrained(tmp_path / "dense")
    text = call(
        verb, tmp_path / "dense", tmp_path / "out", "--calibration", "python-docs", status=2
    ).output
    text = " ".join(text.split())
    assert (
        f"a model of type '{family}' ({type(model).__name__}) has an encoder and a decoder" in text
    )
    assert (
        "prunus prunes causal language models, also those inside image-text models, encoders"
        in text
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


@pytest.mark.parametrize("architectures", [None, "LlamaForCausalLM", [3.5], [["x"]], {}])
def test_damaged_architectures_count_as_causal(architectures):
    config = AutoConfig.for_model("llama")
    config.architectures = architectures
    assert kind_of(config) is CAUSAL


def test_the_decoder_of_an_encoder_decoder_is_causal():
    config = AutoConfig.for_model("bart", is_encoder_decoder=False)
    config.architectures = ["BartForCausalLM"]
    assert kind_of(config) is CAUSAL
