"""The Modelfile beside a GGUF file: its grammar, and that its template is the chat template."""

import re
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jinja2
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

pytest.importorskip("gguf")
pytest.importorskip("accelerate")

import prunus
from gguf_cases import gguf_checkpoint
from prunus.formats.gguf import modelfile
from prunus.formats.gguf.modelfile import _SAID, ChatTexts, chat_texts
from prunus.formats.gguf.result import read_record
from prunus.model.checkpoint.card import values_of
from prunus.model.open_folder import OpenFolder
from prunus.model.tokenizer import apply_chat_template, load_tokenizer
from tiny import token_ids

ALL = "{% for m in messages %}"
CHATML = (
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}"
    "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ s if loop.first }}"
    "{{ m.content }}<end>\n{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}"
    "[INST] {{ s if loop.PLACE }}{{ m.content }}[/INST]{% else %} {{ m.content }}</s>{% endif %}"
    "{% endfor %}"
)
#: Chat template -> (whether `TEMPLATE` is written, the end of a turn).
TEMPLATES = {
    "ChatML": (ALL + CHATML, True, "<|im_end|>"),
    "ChatML with a system message of its own": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
        + (ALL + CHATML),
        True,
        "<|im_end|>",
    ),
    "Llama 3": ("{{ bos_token }}" + ALL + LLAMA_3, True, "<|eot|>"),
    "Llama 3.1": (
        "{{ bos_token }}<|head|>system<|/head|>\n\nCutting date: 2023\n\n"
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}"
        "{% set messages = messages[1:] %}{% endif %}<|eot|>" + ALL + LLAMA_3,
        True,
        "<|eot|>",
    ),
    "Gemma": (GEMMA, True, "<end>"),
    "Gemma without system messages": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + GEMMA,
        True,
        "<end>",
    ),
    "Mistral": (MISTRAL.replace("PLACE", "first"), True, "</s>"),
    "Mistral, newer": (MISTRAL.replace("PLACE", "last"), True, "</s>"),
    "a number before each": (ALL + "{{ loop.index }}" + CHATML, False, "</s>"),
    "with braces": (ALL + "{{ '{{' }}" + CHATML, False, "</s>"),
    "with the date": ("{{ strftime_now('%d') }}" + ALL + CHATML, False, "</s>"),
    "damaged": ("{% for", False, "</s>"),
}
TALKS = [
    ("user",),
    ("user", "assistant", "user"),
    ("system", "user"),
    ("system", "user", "assistant", "user", "assistant", "user"),
]
#: What stands in Go's templates here -> the same in Jinja.
GO = {
    "range $i, $_ := .Messages": "for m in messages",
    'if eq .Role "user"': "if m.role == 'user'",
    'else if eq .Role "assistant"': "elif m.role == 'assistant'",
    "if le $i 1": "if loop.index0 <= 1",
    "if and $.System (le $i 1)": "if system and loop.index0 <= 1",
    "if and $.System (eq (len (slice $.Messages $i)) 1)": "if system and loop.last",
    "if false": "if false",
    "else": "else",
}


def parsed(text: str) -> list[tuple[str, str]]:
    """The instructions of a Modelfile by the rules of Ollama's parser/parser.go."""
    instructions = []
    while text := text.lstrip(" \t\r\n"):
        if text[0] == "#":
            text = re.sub(r"\A[^\r\n]*", "", text)
            continue
        start = re.match(r"(?:PARAMETER )?[A-Za-z]+[ \t]", text)
        assert start is not None, text
        value, unquoted, rest = "", None, iter(text[start.end() :] + "\n")
        for letter in rest:
            if letter in "\r\n" and (unquoted := without_quotes(value.strip())) is not None:
                break
            value += letter if letter in "\t\r\n" or letter.isprintable() else ""
        assert unquoted is not None, "the file ends within quotation marks"
        instructions.append((start[0].strip(), unquoted))
        text = "".join(rest)
    return instructions


def without_quotes(value: str) -> str | None:
    for quotes in ('"""', '"'):
        if value.startswith(quotes):
            is_whole = len(value) >= 2 * len(quotes) and value.endswith(quotes)
            return value[len(quotes) : -len(quotes)] if is_whole else None
    return value


def in_jinja(template: str) -> jinja2.Template:
    """A template in the language of Go, as far as Modelfiles of prunus use it."""
    open_blocks: list[str] = []

    def translated(action: re.Match) -> str:
        if action[1] == "end":
            return f"{{% end{open_blocks.pop()} %}}"
        if action[1] in GO:
            block = GO[action[1]].partition(" ")[0]
            open_blocks.extend([block] if block in ("if", "for") else [])
            return f"{{% {GO[action[1]]} %}}"
        return f"{{{{ {action[1].lstrip('$.').lower().replace('content', 'm.content')} }}}}"

    text = re.sub(r"\{\{ (.*?) \}\}", translated, template)
    return jinja2.Environment(keep_trailing_newline=True).from_string(text)


def prompt_of_ollama(instructions: list[tuple[str, str]], messages: list[dict[str, str]]) -> str:
    """The prompt by Ollama's documentation of templates."""
    values = dict(instructions)
    if messages[0]["role"] != "system" and "SYSTEM" in values:
        messages = [{"role": "system", "content": values["SYSTEM"]}, *messages]
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    return in_jinja(values["TEMPLATE"]).render(messages=messages, system=system)


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("modelfile") / "dense"
    return gguf_checkpoint(folder, hidden_size=32, intermediate_size=64, num_hidden_layers=1)


def compress(dense: Path, out: Path, **options) -> None:
    prunus.compress(dense, out, type="Q8_0", rounding="nearest", calibration=token_ids(), **options)


@pytest.mark.parametrize("family", TEMPLATES)
def test_the_template_of_the_modelfile_gives_the_prompts_of_the_chat_template(
    family, dense, tmp_path
):
    template, is_written, end = TEMPLATES[family]
    (dense / "chat_template.jinja").write_text(template)
    compress(dense, tmp_path / "A b.gguf")
    text = (tmp_path / "A b.Modelfile").read_bytes().decode()
    instructions = parsed(text)
    assert instructions[0] == ("FROM", "./A b.gguf")
    stops = [value for name, value in instructions if name == "PARAMETER stop"]
    assert stops == list(dict.fromkeys([end, "</s>"]))
    assert ("TEMPLATE" in dict(instructions)) == is_written
    assert ("# No TEMPLATE" in text) != is_written
    tokenizer = load_tokenizer(OpenFolder(dense))
    for roles in TALKS if is_written else []:
        messages = [{"role": x, "content": f"{x} says {i}"} for i, x in enumerate(roles)]
        if "system" in roles and "raise_exception" in template:
            continue
        [expected] = apply_chat_template(tokenizer, [messages])
        # llama.cpp puts BOS before the prompt of this tokenizer.
        assert prompt_of_ollama(instructions, messages) == expected.removeprefix("<s>")


PARTS = [*'"\n\r\t #a{}é', '"""', "SYSTEM x", "\nADAPTER y\n", "\0", "\u200d"]
TEXTS = st.lists(st.sampled_from(PARTS)).map("".join)


@given(st.builds(ChatTexts, *[TEXTS] * 7, st.sampled_from(["never", "last"])), TEXTS, TEXTS)
@example(ChatTexts("", "", "", '"\nSYSTEM """x"""\n'), 'x"\nADAPTER ./evil\n', "x.gguf\nFROM y")
def test_texts_of_a_model_come_out_of_the_modelfile_as_they_are_or_not_at_all(texts, eos, name):
    values = {"chat_template": "x", "ggml.tokens": ["a", eos], "ggml.eos_token_id": 1}
    fields = {f"tokenizer.{key}": SimpleNamespace(value=value) for key, value in values.items()}
    with (
        mock.patch.object(modelfile, "chat_texts", return_value=texts),
        mock.patch.object(modelfile, "_renders"),
    ):
        text = modelfile.modelfile(name, Path(), fields)
    stops = [stop for stop in dict.fromkeys([texts.end.strip(), eos]) if stop]
    wanted = [("FROM", f"./{name}"), ("TEMPLATE", texts.template)]
    wanted += [("SYSTEM", texts.default)] if texts.default else []
    wanted += [("PARAMETER stop", stop) for stop in stops]
    held = [pair for pair in wanted if not any(x in pair[1] for x in ('"""', "\0", "\u200d"))]
    assert parsed(text) == held
    assert text.count("# No ") == len(wanted) - len(held)


def test_a_text_that_ends_with_a_brace_is_in_no_template():
    assert chat_texts(lambda roles, _: "".join(f"{{{_SAID[x]}!" for x in roles)) is None


def test_a_model_without_a_chat_template_has_a_modelfile_that_names_the_file_alone(tmp_path):
    dense = gguf_checkpoint(tmp_path / "dense", hidden_size=32, intermediate_size=64)
    compress(dense, tmp_path / "x.gguf")
    assert parsed((tmp_path / "x.Modelfile").read_text()) == [("FROM", "./x.gguf")]


def test_the_card_beside_a_file_has_origin_commands_and_bytes_by_type(tmp_path):
    dense = gguf_checkpoint(tmp_path / "dense", hidden_size=32, intermediate_size=64)
    (dense / "README.md").write_text("---\nlicense: mit\nbase_model: owner/tiny\n---\n")
    compress(dense, tmp_path / "x.gguf")
    card = (tmp_path / "x.README.md").read_text()
    values = values_of(card)
    assert (values["license"], values["base_model"]) == ("mit", "owner/tiny")
    for part in (
        "llama-cli -m x.gguf",
        "-f x.Modelfile",
        "of Q8_0",
        'type = "Q8_0"',
        "prunus compress",
        "prunus eval x.gguf --reference dense --perplexity wikitext2,python-code",
    ):
        assert part in card
    assert read_record(tmp_path / "x.gguf") is not None


def test_a_modelfile_of_somebody_else_is_refused_before_any_work_and_left(dense, tmp_path):
    (tmp_path / "x.Modelfile").write_text("FROM mine")
    with pytest.raises(FileExistsError, match=r"x\.Modelfile exists and was not written"):
        compress(dense, tmp_path / "x.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["x.Modelfile"]
    (tmp_path / "x.Modelfile").unlink()
    compress(dense, tmp_path / "x.gguf")
    compress(dense, tmp_path / "x.gguf", overwrite=True)  # its own are replaced
    assert len(list(tmp_path.iterdir())) == 3
