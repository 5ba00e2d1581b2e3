"""Every family gets the same weights streamed, in place, and from a naive reference.

Also encoders, classifiers of text, the output head, and language models inside image-text models.
What is no row of blocks is refused by name.
"""

from itertools import product
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    Gemma3nTextConfig,
)

import prunus
from command_line import call
from image_text import IMAGE_TEXT_MODELS, VISION, image_text_checkpoint, loaded_with_images
from prunus.engine.run_options import RunOptions
from prunus.model.calls import BlockStubs
from prunus.model.kinds import CAUSAL, kind_of
from prunus.model.loading import load_model
from prunus.model.open_folder import OpenFolder
from prunus.pruning.prune import Pruning
from prunus.pruning.recipe import Recipe
from recovery_cases import SHORT, shards, training_text
from reference import assert_three_ways_agree, prune_as_called, prune_rows, wanda_by_whole_runs
from refusals import assert_refused
from tiny import COMMON, FAMILIES, SIZES, tiny_checkpoint, tiny_model, token_ids, weights


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_streaming_equals_in_memory_equals_naive(family, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "dense")
    ids = token_ids()
    report = prunus.prune(
        tmp_path / "dense", tmp_path / "pruned", sparsity=0.5, calibration=ids, batch=2
    )
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype="auto")
    naive = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    wanda_by_whole_runs(naive, ids)
    prunus.prune(model, sparsity=0.5, calibration=ids, batch=2)
    assert report.totals["sparsity"] == pytest.approx(0.5)
    assert_three_ways_agree(streamed, model, naive)


def test_the_result_generates_and_keeps_its_settings(tmp_path):
    model = tiny_model("llama", torch.bfloat16, tie_word_embeddings=True)
    model.generation_config.temperature = 0.7
    model.generation_config.do_sample = True
    model.save_pretrained(tmp_path / "dense")
    prunus.prune(tmp_path / "dense", tmp_path / "pruned", calibration=token_ids())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.generation_config.temperature == 0.7
    out = loaded.generate(token_ids(1, 4), max_new_tokens=3, do_sample=False, temperature=None)
    assert out.shape == (1, 7)
    config = (tmp_path / "pruned" / "config.json").read_text()
    assert "sparsity_config" not in config
    assert config == (tmp_path / "dense" / "config.json").read_text()


def test_weights_that_stay_dense_in_a_block_are_named(tmp_path):
    model = tiny_model("llama")
    report = prunus.prune(model, calibration=token_ids(), ignore=["*.q_proj", "*.1.mlp.*"])
    dense = set(report.left_dense)
    assert "model.layers.0.self_attn.q_proj.weight" in dense
    assert "model.layers.1.mlp.down_proj.weight" in dense
    assert "model.layers.0.mlp.down_proj.weight" not in dense


# --- the output head ---


@pytest.mark.parametrize(
    ("family", "head"), [("llama", "lm_head"), ("gpt_neox", "embed_out"), ("phi", "lm_head")]
)
def test_the_head_is_pruned_on_the_inputs_that_the_pruned_blocks_give_it(family, head, tmp_path):
    model = tiny_model(family, tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "dense")
    ids = token_ids()
    prunus.prune(tmp_path / "dense", tmp_path / "plain", calibration=ids, batch=2)
    report = prunus.prune(
        tmp_path / "dense", tmp_path / "headed", calibration=ids, batch=2, head=True
    )
    plain, headed = weights(tmp_path / "plain"), weights(tmp_path / "headed")
    key = next(
        name for name in plain if name.endswith("lm_head.weight") or name.endswith(f"{head}.weight")
    )
    assert report.head is not None
    assert report.head.sparsity == pytest.approx(0.5)
    assert all(torch.equal(plain[name], headed[name]) for name in plain if name != key)

    # The naive way: run the pruned model, record the head's input, sort each row.
    naive = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    caught: list[torch.Tensor] = []
    naive.get_output_embeddings().register_forward_pre_hook(lambda m, args: caught.append(args[0]))
    with torch.no_grad():
        for part in ids.split(2):
            naive(part)
    expected = plain[key].clone()
    prune_rows(expected, torch.cat([x.reshape(-1, x.shape[-1]) for x in caught]))
    assert torch.equal(headed[key], expected)

    prunus.prune(model, calibration=ids, batch=2, head=True)
    assert torch.equal(model.state_dict()[key], headed[key])


# --- hybrids and encoder-decoders ---

#: Linear attention beside full attention; the tests of mixtures of experts have the latter alone.
OPTIONS = {
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
}


#: Model type -> what stays dense in its blocks, besides vectors.
WORKING = {
    "mamba": {"A_log", "conv1d"},
    "mamba2": {"conv1d"},
    "jamba": {"A_log", "conv1d"},
    "bamba": {"conv1d"},
    "falcon_h1": {"conv1d"},
    "granitemoehybrid": {"conv1d"},
    "lfm2": {"conv"},
    "qwen3_next": {"conv1d", "gate", "shared_expert_gate"},
}
REFUSED = {
    "rwkv": "rescales hidden states between its blocks",
    **dict.fromkeys(("t5", "bart", "whisper"), "has an encoder and a decoder"),
}


@pytest.mark.parametrize(("family", "stays_dense"), WORKING.items())
def test_what_works_is_pruned_and_loaded(family, stays_dense, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", family, torch.bfloat16, **OPTIONS.get(family, {}))
    manifest = prunus.prune(dense, tmp_path / "out", "magnitude", calibration=token_ids(2))
    parts = {name.removesuffix(".weight").split(".")[-1] for name in manifest.left_dense}
    assert parts == stays_dense
    assert 0.45 < manifest.totals["sparsity"] < 0.55
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(token_ids(1)).logits
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize(("family", "reason"), REFUSED.items())
def test_what_does_not_work_is_refused_by_name_with_the_reason(family, reason):
    config = AutoConfig.for_model(family)
    heads = {"rwkv": "RwkvForCausalLM"}
    config.architectures = [heads.get(family, f"{family}ForConditionalGeneration")]
    with pytest.raises(NotImplementedError) as refusal:
        kind_of(config)
    assert f"'{family}'" in str(refusal.value) and reason in str(refusal.value)


# --- the language model inside an image-text model ---


@pytest.mark.parametrize("family", IMAGE_TEXT_MODELS)
def test_the_language_model_is_pruned_and_nothing_else(family, tmp_path):
    dense = image_text_checkpoint(tmp_path / "dense", family)
    prunus.prune(dense, tmp_path / "out", calibration=token_ids(), dtype="float32", batch=2)
    expected = loaded_with_images(dense)
    decoder = expected.get_decoder()
    todo = [x for x in decoder.layers.modules() if isinstance(x, nn.Linear)]
    assert len(todo) == 14

    prune_as_called(todo, token_ids().split(2), lambda ids: expected(input_ids=ids), prune_rows)
    found = loaded_with_images(tmp_path / "out").state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl"])
def test_what_follows_pruning(family, tmp_path):
    """Scoring in parts and as a whole, recovery and loading in one line."""
    dense = image_text_checkpoint(tmp_path / "dense", family)
    prunus.prune(dense, tmp_path / "out", calibration=token_ids(), dtype="float32")
    pruned = loaded_with_images(tmp_path / "out").eval()
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
    trained = loaded_with_images(tmp_path / "new").state_dict()
    changed = {name for name, x in pruned.state_dict().items() if not torch.equal(trained[name], x)}
    assert changed and not any("vis" in name for name in changed)
    assert all(((x == 0) | (x != 0)).all() for name, x in trained.items())
    assert prunus.load(tmp_path / "out").tokenizer is not None


def test_compression(tmp_path):
    dense = image_text_checkpoint(tmp_path / "dense", "llava")
    prunus.compress(dense, tmp_path / "out", bits=4, calibration=token_ids(8, 64))
    ids, model = token_ids(), load_model(OpenFolder(tmp_path / "out"))
    assert model(input_ids=ids).logits.isfinite().all()
    assert sum(map(len, shards(tmp_path / "out").values())) < sum(map(len, shards(dense).values()))


def without_text() -> Any:
    """A model that reads no text without an image."""
    opt = {"model_type": "opt", "ffn_dim": 64, "vocab_size": 128, "word_embed_proj_dim": 32}
    config = transformers.Blip2Config(
        text_config=SIZES | opt,
        vision_config=VISION,
        qformer_config=SIZES | {"encoder_hidden_size": 32},
        num_query_tokens=2,
    )
    return transformers.Blip2ForConditionalGeneration(config)


#: Llama 4 gives every token to every expert, scaled by the router. No tokens are routed.
LLAMA_4 = {"num_local_experts": 2, "intermediate_size_mlp": 64, "head_dim": 8}


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (lambda: tiny_model("llama4_text", **LLAMA_4), {}, "experts.*form that prunus does not"),
        (lambda: tiny_model(tie_word_embeddings=True), {"head": True}, "tied to the input embedd"),
        (without_text, {}, "reads no text without an image"),
    ],
    ids=["experts", "tied head", "no text"],
)
def test_models_that_cannot_be_pruned_are_refused_before_any_work(make, options, words, tmp_path):
    make().save_pretrained(tmp_path / "dense")
    given = {"calibration": token_ids(), **options}
    kind, folders = NotImplementedError, (tmp_path / "dense", tmp_path / "out")
    assert_refused(kind, words, prunus.prune, *folders, **given)


# --- encoders and classifiers of text ---

_FOR_TEXT: dict[str, Any] = COMMON | {"pad_token_id": 1, "bos_token_id": 0}
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


HEADS = ["SequenceClassification", "TokenClassification"]
CLASSIFIERS = [*product(HEADS, ["bert", "distilbert", "roberta", "llama", "qwen2"])]


@pytest.mark.parametrize(("head", "family"), [*product(["MaskedLM"], ENCODERS), *CLASSIFIERS])
def test_encoders_and_classifiers_of_text_agree_in_three_ways(head, family, tmp_path):
    loader = getattr(transformers, f"AutoModelFor{head}")
    options = {**_FOR_TEXT, **ENCODERS.get(family, {}), "num_labels": 3}
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
        Pruning(tmp_path / "dense", None, recipe, RunOptions(calibration_data=token_ids())).plan()
    return f"{stored.value} | {loaded.value}"


def test_a_model_without_its_head_is_refused_with_what_to_do(tmp_path):
    for family in ("llama", "bert"):
        model = AutoModel.from_config(AutoConfig.for_model(family, **_FOR_TEXT))
        found = refusal(tmp_path / family, model)
        assert "holds no weight for" in found
        assert "without its head. Save the whole model" in found
        assert f"a loaded {type(model).__name__} has no" in found


def test_heads_that_are_not_known_are_refused_by_name(tmp_path):
    model = AutoModelForQuestionAnswering.from_config(AutoConfig.for_model("bert", **_FOR_TEXT))
    assert refusal(tmp_path / "a", model).count("(BertForQuestionAnswering) cannot be pruned") == 2
    model = AutoModel.from_config(AutoConfig.for_model("clip_text_model", **SIZES))
    assert "of type 'clip_text_model' (CLIPTextModel) cannot be pruned" in refusal(
        tmp_path / "b", model
    )


def test_decoders_that_are_no_row_of_blocks_are_refused_by_name():
    words = "type 'gemma3n_text' passes several streams of hidden states"
    assert_refused(NotImplementedError, words, kind_of, Gemma3nTextConfig())


@pytest.mark.parametrize(
    ("family", "architectures"),
    [
        *(("llama", each) for each in (None, "LlamaForCausalLM", [3.5], [["x"]], {})),
        ("bart", ["BartForCausalLM"]),
    ],
    ids=str,
)
def test_damaged_architectures_and_the_decoder_of_an_encoder_decoder_are_causal(
    family, architectures
):
    config = AutoConfig.for_model(family, is_encoder_decoder=False)
    config.architectures = architectures
    assert kind_of(config) is CAUSAL


def test_hidden_states_of_another_shape_are_refused():
    block = nn.Linear(4, 4)
    stubs = BlockStubs("Streams", [block])
    with pytest.raises(NotImplementedError, match=r"Streams passes .* of shape \(2, 1, 3, 4\)"):
        stubs.record(lambda: block(torch.zeros(2, 1, 3, 4)))


def test_positions_start_after_the_padding(tmp_path):
    config = AutoConfig.for_model("roberta", **_FOR_TEXT)
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "dense")
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
