"""More kinds of hostile inputs for `hostile.py`: all that is read beside weights.

Each kind is a good folder, a function that damages a copy of it, and the work to do with the copy.
"""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import prunus
from hostile_damage import mutate_bytes, mutate_json
from prunus.calibration.files import file_kind, read_documents, read_ids
from prunus.evaluation.generation import generate
from prunus.model import tokenizer
from prunus.model.open_folder import OpenFolder
from prunus.model.tokenizer import load_tokenizer
from prunus.reporting.page import document_json, to_markdown
from prunus.reporting.write import report
from report_samples import evaluation, sweep_results
from tiny import ids_file, tiny_checkpoint, token_ids
from tiny_tokenizer import VOCABULARY, byte_tokenizer

Kinds = dict[str, tuple[Path, Callable[[Path, random.Random], None], Callable[[Path], None]]]

ARCHITECTURES = ("gptj", "gpt_neo", "opt", "bloom", "gemma3_text", "gpt2", "mistral", "qwen3")
#: Fields that size something in some architecture. A case may add one that is not there.
SIZES = [
    *("num_hidden_layers", "n_layer", "num_layers", "n_positions", "max_position_embeddings"),
    *("hidden_size", "vocab_size", "intermediate_size", "num_attention_heads", "n_inner", "n_ctx"),
    *("num_key_value_heads", "head_dim", "rotary_dim", "num_labels", "attention_types"),
    *("layer_types", "sliding_window", "window_size", "num_experts"),
]
HUGE = [2**17, 2**20, 10**8, 10**9, 2**31, 2**62, 10**30, 1e9]
TEMPLATES = (
    "{{ 'x' * N }}",
    "{{ ['x'] * N }}",
    "{{ '%Nd' % 1 }}",
    "{{ 'x'.center(N) }}",
    "{{ 'x'.ljust(N) }}",
    "{{ '{:N}'.format(1) }}",
    "{{ N ** N }}",
    "{% for a in range(N) %}{% for b in range(N) %}x{% endfor %}{% endfor %}",
    "{% set x = namespace(v='x') %}{% for a in range(99) %}{% set x.v = x.v + x.v %}{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ messages[N] }}",
    "{{ messages[0].content.__class__.__mro__[1].__subclasses__() }}",
    "{{ raise_exception('N') }}",
    "{% include 'N' %}",
    "{{ 'x' | indent(N) }}",
    "{{ N | string | replace('0', 'xxxxxxxxxx') | center(N) }}",
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}",
)


def _architecture(folder: Path) -> tuple[Any, Any, Any]:
    for family in ARCHITECTURES:
        tiny_checkpoint(folder / family, family)

    def damage(model: Path, dice: random.Random) -> None:
        family = model / dice.choice(ARCHITECTURES)
        (family / "model.safetensors").rename(model / "model.safetensors")
        config = json.loads((family / "config.json").read_text())
        for _ in range(dice.choice((1, 1, 2))):
            if dice.random() < 0.5:
                value: Any = dice.choice(HUGE)
                name = dice.choice(SIZES)
                value = [[["global"], value]] if name == "attention_types" else value
                place = config if dice.random() < 0.8 else config.setdefault("text_config", {})
                place[name] = value
            else:
                config = mutate_json(config, dice)
        (model / "config.json").write_text(json.dumps(config))

    return folder, damage, lambda case: prunus.inspect(case / "model")


def _template(folder: Path) -> tuple[Any, Any, Any]:
    byte_tokenizer().save_pretrained(folder)

    def damage(model: Path, dice: random.Random) -> None:
        text = dice.choice(TEMPLATES).replace("N", str(dice.choice([3, 10**5, 10**8, 10**12])))
        data = text.encode()
        if dice.random() < 0.3:
            data = mutate_bytes(data, dice, 10**9)
        (model / "chat_template.jinja").write_bytes(data)

    def work(case: Path) -> None:
        messages = [{"role": "user", "content": "x"}]
        tokenizer.apply_chat_template(load_tokenizer(OpenFolder(case / "model")), [messages])

    return folder, damage, work


def _generation(folder: Path) -> tuple[Any, Any, Any]:
    tiny_checkpoint(folder, vocab_size=VOCABULARY)
    byte_tokenizer().save_pretrained(folder)
    good = {
        "do_sample": False,
        "temperature": 1.0,
        "top_k": 50,
        "num_beams": 1,
        "num_return_sequences": 1,
        "max_length": 20,
        "eos_token_id": 1,
        "bos_token_id": 0,
        "cache_implementation": None,
        "stop_strings": None,
        "sequence_bias": None,
        "repetition_penalty": 1.0,
    }

    def damage(model: Path, dice: random.Random) -> None:
        settings = mutate_json(good, dice)
        if isinstance(settings, dict) and dice.random() < 0.5:
            settings[dice.choice(list(good))] = dice.choice(HUGE)
        (model / "generation_config.json").write_text(json.dumps(settings))

    return folder, damage, lambda case: list(generate(case / "model", "ab", max_new_tokens=2))


def _report(folder: Path) -> tuple[Any, Any, Any]:
    (folder / "run").mkdir(parents=True)
    (folder / "sweep").mkdir()
    dense, out = tiny_checkpoint(folder.with_name("dense")), folder.with_name("out")
    prunus.prune(dense, out, calibration=token_ids(2, 16), batch=2)
    (folder / "run" / "prunus.json").write_text((out / "prunus.json").read_text())
    sweep_results().save(folder / "sweep")
    (folder / "eval.json").write_text(json.dumps(evaluation()))
    files = ("run/prunus.json", "sweep/results.json", "eval.json")

    def damage(model: Path, dice: random.Random) -> None:
        path = model / dice.choice(files)
        content = json.loads(path.read_text())
        for _ in range(dice.choice((1, 1, 3))):
            content = mutate_json(content, dice)
        text = "[" * 100_000 if dice.random() < 0.02 else json.dumps(content)
        path.write_text(text)

    def work(case: Path) -> None:
        model = case / "model"
        document = report([model / "run", model / "sweep", model / "eval.json"])
        to_markdown(document)
        document_json(document)

    return folder, damage, work


def _text(folder: Path) -> tuple[Any, Any, Any]:
    folder.mkdir()
    line = b'{"text": "an ordinary text"}\n'
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(line * 20))
    (folder / "a.txt.gz").write_bytes(gzip.compress(b"an ordinary text " * 20))
    (folder / "a.jsonl").write_bytes(line * 20)
    ids_file(folder / "a.safetensors")
    names = ["a.jsonl.gz", "a.txt.gz", "a.jsonl", "a.safetensors"]
    bomb = gzip.compress(bytes(2**27))

    def damage(model: Path, dice: random.Random) -> None:
        chosen = dice.choice(names)
        for name in names:
            if name != chosen:
                (model / name).unlink()
        if dice.random() < 0.05 and chosen.endswith(".gz"):
            (model / chosen).write_bytes(bomb)
        else:
            content = (model / chosen).read_bytes()
            (model / chosen).write_bytes(mutate_bytes(content, dice, 10**9))

    def work(case: Path) -> None:
        [path] = (case / "model").iterdir()
        if file_kind(path) == "safetensors":
            read_ids(path)
        else:
            read_documents(path)

    return folder, damage, work


def more_kinds(scratch: Path, wanted: set[str]) -> Kinds:
    """The kinds of this file that are wanted; `scratch` is an empty folder."""
    tokenizer._SECONDS = 0.5
    makers = [_architecture, _template, _generation, _report, _text]
    root = scratch / "more"
    root.mkdir()
    named = {make.__name__.removeprefix("_"): make for make in makers}
    return {name: make(root / name) for name, make in named.items() if name in wanted}
