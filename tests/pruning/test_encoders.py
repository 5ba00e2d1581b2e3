"""Encoders with a masked-language-model head are pruned. Encoder-decoders are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

import prunus
from command_line import call
from prunus.model.kinds import CAUSAL, kind_of
from reference import prune_as_called
from tiny import token_ids

_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
}
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


def naive_wanda(model: Any, ids: torch.Tensor) -> None:
    """Prune linear by linear in the order of execution, each on inputs from the whole model."""
    blocks = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)

    def prune(weight_OI: torch.Tensor, X_TI: torch.Tensor) -> None:
        score_OI = weight_OI.abs() * X_TI.double().square().sum(0).sqrt().float()
        for row in range(len(score_OI)):
            weight_OI[row, score_OI[row].sort(stable=True).indices[: score_OI.shape[1] // 2]] = 0

    todo = [m for m in blocks.modules() if isinstance(m, nn.Linear)]
    prune_as_called(todo, ids.split(2), lambda part: model(input_ids=part), prune)


@pytest.mark.parametrize("family", sorted(ENCODERS))
def test_streaming_equals_in_memory_equals_naive(family, tmp_path):
    model, ids = tiny_encoder(family), token_ids()
    model.save_pretrained(tmp_path / "dense")
    report = prunus.prune(tmp_path / "dense", tmp_path / "pruned", calibration=ids, batch=2)
    result = AutoModelForMaskedLM.from_pretrained(tmp_path / "pruned").state_dict()
    expected = AutoModelForMaskedLM.from_pretrained(tmp_path / "dense").eval()
    naive_wanda(expected, ids)
    prunus.prune(model, calibration=ids, batch=2)
    assert report.totals["sparsity"] == pytest.approx(0.5)
    for name, tensor in result.items():
        assert torch.equal(tensor, model.state_dict()[name]), name
        assert float((tensor != expected.state_dict()[name]).float().mean()) <= 2e-3, name
    assert "AutoModelForMaskedLM" in (tmp_path / "pruned" / "README.md").read_text()


def test_positions_start_after_the_padding(tmp_path):
    tiny_encoder("roberta").save_pretrained(tmp_path / "dense")
    with pytest.raises(
        ValueError, match="windows of 64 tokens do not fit: the model has 62 positions"
    ):
        prunus.prune(tmp_path / "dense", tmp_path / "pruned", calibration=token_ids(2, 64))
    prunus.prune(tmp_path / "dense", tmp_path / "pruned", calibration=token_ids(2, 62))


def test_scoring_an_encoder_on_text_is_refused(tmp_path):
    tiny_encoder("bert").save_pretrained(tmp_path / "dense")
    text = call("eval", tmp_path / "dense", status=2).output.replace("\n", " ")
    assert "scoring on text is for causal language models; this is an encoder" in text


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
        (
            "t5",
            {
                "d_model": 32,
                "d_ff": 64,
                "num_layers": 2,
                "num_heads": 4,
                "d_kv": 8,
                "vocab_size": 128,
            },
        ),
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
        "prunus prunes causal language models, encoders with a masked-language-model head and image"
        in text
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_models_without_a_head_that_prunus_knows_are_refused(tmp_path):
    config = AutoConfig.for_model(
        "clip_text_model", hidden_size=32, intermediate_size=64, num_hidden_layers=1
    )
    AutoModel.from_config(config).save_pretrained(tmp_path / "dense")
    with pytest.raises(NotImplementedError, match=r"of type 'clip_text_model' .* cannot be pruned"):
        prunus.prune(tmp_path / "dense", tmp_path / "out", calibration=token_ids())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("architectures", [None, "LlamaForCausalLM", [3.5], [["x"]], {}])
def test_damaged_architectures_count_as_causal(architectures):
    config = AutoConfig.for_model("llama")
    config.architectures = architectures
    assert kind_of(config) is CAUSAL


def test_the_decoder_of_an_encoder_decoder_is_causal():
    config = AutoConfig.for_model("bart", is_encoder_decoder=False)
    config.architectures = ["BartForCausalLM"]
    assert kind_of(config) is CAUSAL
