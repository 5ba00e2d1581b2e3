"""Text that a model writes: how tokens are chosen, and chats."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from command_line import call
from prunus.evaluation.eval_options import WritingOptions
from prunus.evaluation.generation import chosen_settings, generate
from prunus.reporting.console import printable
from refusals import assert_refused
from tiny import tiny_checkpoint
from tiny_tokenizer import VOCABULARY, byte_tokenizer, dense_checkpoint

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def talker(tmp_path_factory) -> Path:
    """A model with a chat template, whose own settings draw at random."""
    folder = tiny_checkpoint(
        tmp_path_factory.mktemp("talker") / "model",
        vocab_size=VOCABULARY,
        max_position_embeddings=160,
    )
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    GenerationConfig(do_sample=True, temperature=5.0).save_pretrained(folder)
    return folder


def write(folder: Path, temperature=None, top_p=None, seed=None) -> str:
    options = {"temperature": temperature, "top_p": top_p, "seed": seed}
    return "".join(generate(folder, "ab", max_new_tokens=16, **options))


def test_a_seed_gives_the_same_text_again_and_another_seed_another_one(talker):
    assert write(talker, None, None, 1) == write(talker, None, None, 1)
    assert write(talker, None, None, 1) != write(talker, None, None, 2)


def test_temperature_zero_and_a_tiny_top_p_take_the_most_likely_token(talker):
    greedy = write(talker, 0.0)
    assert greedy == write(talker, 0.0, None, 7) == write(talker, 1e-310, None, 7)
    assert write(talker, 2.0, 1e-6, 3) == greedy
    assert write(talker, 2.0, 1.0, 3) != greedy


def test_a_model_that_computes_no_numbers_ends_with_an_error(talker, tmp_path):
    shutil.copytree(talker, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    for value, message in (
        (1e38, "the model's logits are not finite, so it cannot write text"),
        (torch.nan, r"model\.norm\.weight holds weights that are not finite"),
    ):
        tensors["model.norm.weight"].fill_(value)
        tensors["lm_head.weight"].mul_(1e5)
        save_file(tensors, file, metadata={"format": "pt"})
        assert_refused(ValueError, message, write, tmp_path / "model")


def test_choices_take_the_place_of_the_checkpoints_and_the_rest_stays():
    own = GenerationConfig(do_sample=True, temperature=5.0, top_p=0.5, repetition_penalty=1.2)
    assert chosen_settings(own, WritingOptions(seed=3)) == own
    wide = GenerationConfig(**own.to_diff_dict(), num_beams=10**6, cache_implementation="static")
    assert chosen_settings(wide, WritingOptions()) == own
    drawn = chosen_settings(own, WritingOptions(temperature=0.7))
    assert (drawn.do_sample, drawn.temperature, drawn.top_p) == (True, 0.7, 0.5)
    greedy = chosen_settings(own, WritingOptions(temperature=0))
    assert not greedy.do_sample and greedy.repetition_penalty == 1.2
    assert chosen_settings(GenerationConfig(), WritingOptions(top_p=0.3)).do_sample
    tiny = GenerationConfig(do_sample=True, temperature=1e-40)
    assert not chosen_settings(tiny, WritingOptions()).do_sample


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"temperature": -1}, r"temperature must lie in \[0, inf\)"),
        ({"temperature": float("nan")}, "temperature must"),
        ({"top_p": 0}, r"top_p must lie in \(0, 1\]"),
        ({"top_p": 1.5}, "top_p must"),
        ({"temperature": 0, "top_p": 0.5}, "leave one of them out"),
        ({"seed": -1}, "seed must be from 0"),
    ],
)
def test_choices_out_of_range_are_refused(values, said):
    assert_refused(ValueError, said, WritingOptions.read, None, values)


def test_a_chat_answers_the_prompt_as_a_message(talker, tmp_path):
    options = {"max_new_tokens": 6, "temperature": 0}
    asked = "[user]hello[assistant]"
    answer = "".join(generate(talker, "hello", chat=True, **options))
    assert answer == "".join(generate(talker, asked, **options))
    shown = call(
        "generate", talker, "--prompt", "hello", "--chat", "--max-new-tokens", 6, "--temperature", 0
    )
    assert shown.stdout == printable(answer.replace("\r", "")) + "\n"
    with pytest.raises(ValueError, match="has no chat template"):
        generate(dense_checkpoint(tmp_path / "plain"), "hello", chat=True)


@pytest.mark.usefixtures("short_python_texts")
def test_quiet_verbs_show_their_result_alone(tmp_path):
    dense = dense_checkpoint(tmp_path / "dense")
    options = ("--calibration", "python-docs", "--samples", 2, "--seqlen", 16)
    loud = call("prune", dense, tmp_path / "loud", *options)
    quiet = call("prune", dense, tmp_path / "quiet", *options, "--quiet")
    assert "[1/" in loud.stderr and not quiet.stderr
    assert "self_attn.q_proj" in quiet.stdout
    assert not call("prune", dense, tmp_path / "quiet", *options, "-q").stderr
    assert "error:" in call("prune", dense, dense, *options, "-q", status=2).stderr
    assert "[1/" in call("prune", dense, tmp_path / "last", *options).stderr
