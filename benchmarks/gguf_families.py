"""Does `compress --template` write a file that llama.cpp computes with as transformers does?

    python benchmarks/gguf_families.py WORK --tokenizer FOLDER --json gguf-families.json

For each family (`tests/support/tiny.py`, made wider) there is a tiny random model, and
these steps:

    llama.cpp's converter       ─► FULL.gguf, in bfloat16
    prunus compress --template  ─► OUT.gguf
    llama-perplexity            ─► log-probabilities of OUT.gguf, of text without meaning
    OUT.gguf's weights, put back into the checkpoint ─► log-probabilities of transformers
    OUT.gguf, as transformers itself and as `prunus import` read it ─► log-probabilities

llama.cpp and the weights must agree: the KL divergence is less than 3 % of the one to a wrong
model. That has its matrices upside down; where the rotary embedding is scaled, it has the same
matrices and no scaling. llama.cpp rounds activations, so that routers with random weights choose
other experts now and then. Random weights show whether every number is in its place, and nothing of
quality. What reads no OUT.gguf is in the table with what it said.

--tokenizer (or PRUNUS_TOKENIZER) is a folder with a tokenizer of merged bytes, such as one that
benchmarks/small_llama.py trained. --llama-cpp is a folder with llama.cpp, built; without it,
llama.cpp is built in WORK, see proof.py. Families that the converter or llama.cpp refuses are in
the table with what they said.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from proof import CONVERT, build_llama_cpp, run
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import prunus
from prunus.formats.gguf.file import GgufFile
from prunus.formats.gguf.import_checkpoint import import_gguf
from prunus.formats.gguf.template import Template
from prunus.model.checkpoint.files import write_text
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
from prunus.model.open_folder import OpenFolder
from tiny import tiny_model

#: Tokens of a chunk, of which llama.cpp scores the second half; and the number of chunks.
CONTEXT, CHUNKS = 64, 2
#: Sizes of all models. Spans of 256 columns fit.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 512}
HEADS: dict[str, Any] = {"head_dim": 64}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 64}
#: Ways to scale the rotary embedding. Half of a text of CONTEXT tokens is longer than the original.
LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4}
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": CONTEXT // 2,
    "rope_theta": 1e4,
}  # fmt: skip
PLAIN = [
    "llama", "qwen2", "olmo", "olmo2", "granite", "stablelm", "starcoder2", "cohere", "arcee",
    "lfm2", "mixtral", "granitemoe", "granitemoeshared", "falcon_h1", "mamba", "bloom",
]  # fmt: skip
WITH_HEADS = ["qwen3", "olmo3", "smollm3", "apertus", "seed_oss", "gpt_oss", "hunyuan_v1_dense"]
GEMMA3: dict[str, Any] = HEADS | {"query_pre_attn_scalar": 64}
#: Known families whose rotary embedding may be scaled.
SCALED: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "mixtral": HEADS,
    "qwen2": {},
    "qwen3": HEADS,
    "qwen2_moe": HEADS | EXPERTS,
    "qwen3_moe": HEADS | EXPERTS | {"norm_topk_prob": True},
    "olmoe": {"num_key_value_heads": 4},
}
#: Family -> options, and options of the converter. What follows + in a name is the variant of the
#: family. Not here are families whose converter wants a tokenizer of their own.
FAMILIES: dict[str, tuple[dict[str, Any], list[str]]] = {
    **dict.fromkeys(PLAIN, ({}, [])),
    **dict.fromkeys(WITH_HEADS, (HEADS, [])),
    "qwen3_moe": (HEADS | EXPERTS | {"norm_topk_prob": True}, []),
    "qwen2_moe": (HEADS | EXPERTS, []),
    # llama.cpp attends to all tokens in Mistral, and to near ones in five of six blocks of Gemma 3.
    "mistral": ({"sliding_window": None}, []),
    "gemma3_text": (
        GEMMA3 | {"layer_types": ["sliding_attention"] * 2},
        [],
    ),
    # As Gemma 3 4B to 27B: only blocks that see all tokens are scaled. The converter does not write
    # which blocks these are.
    "gemma3_text+linear": (
        GEMMA3
        | {
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 16,
            "rope_parameters": {
                "full_attention": LINEAR,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            },
        },
        [],
    ),
    **{
        f"{family}+{scaling['rope_type']}": (own | {"rope_parameters": dict(scaling)}, [])
        for family, own in SCALED.items()
        for scaling in (LINEAR, YARN)
    },
    "exaone4": (HEADS | {"sliding_window": None, "layer_types": ["full_attention"] * 2}, []),
    "phi": ({"num_key_value_heads": 4, "intermediate_size": 1024}, []),
    "olmoe": ({"num_key_value_heads": 4}, []),
    "deepseek_v2": ({"q_lora_rank": 32}, []),
    "mamba2": ({"num_heads": 64}, []),
    "qwen3_5_text": (HEADS, ["--no-mtp"]),
}
TEXT = "The river runs through seven towns, and in each of them a bridge was built by hand. "


def checkpoint(family: str, options: dict[str, Any], tokenizer: Any, folder: Path) -> None:
    """A tiny random model in bfloat16 with the tokenizer."""
    ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    settings = {**WIDE, **ids, **options}
    kind, _, scaling = family.partition("+")
    model = tiny_model(kind, vocab_size=len(tokenizer), **settings)
    for name, parameter in model.named_parameters() if scaling else ():
        # Sharp attention shows where positions are.
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.data += 1.5
        elif name.endswith(("q_proj.weight", "k_proj.weight")):
            parameter.data *= 6
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def restored(folder: Path, template: Path, written: Path, out: Path) -> None:
    """The checkpoint with the weights of a GGUF file, in float32."""
    source = CheckpointSource(OpenFolder(folder))
    skeleton = Skeleton(source.config, torch.float32)
    source.bind(skeleton)
    file, weights = GgufFile.open(written), dict[str, torch.Tensor]()
    for tensor in Template(template, source, skeleton).tensors:
        if not tensor.sources:
            continue
        parts = [weights.get(x, source.weight(x)).float() for x in tensor.sources]
        values, rows = file.read(tensor.name), torch.cat(parts)
        values = values.reshape(-1, values.shape[-1])
        if tensor.columns:
            values = values[:, torch.tensor(tensor.columns).argsort()]
        rows[slice(None) if tensor.rows is None else tensor.rows] = values
        weights |= dict(zip(tensor.sources, rows.split([len(x) for x in parts]), strict=True))
    tensors = {}
    for index in range(len(skeleton)):
        path = skeleton.block_name(index)
        block = {k: weights.get(f"{path}.{k}", x.float()) for k, x in source.block(index).items()}
        tensors |= source.as_stored(index, block)
    names = {key: name for name, key in source.stored_names.items()}
    for key in source.outside_keys():
        tensors[key] = weights.get(names.get(key, key), source.checkpoint.whole(key).float())
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    contents = {key: x.contiguous().clone() for key, x in tensors.items()}
    save_file(contents, out / "model.safetensors", {"format": "pt"})


def of_llama_cpp(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (chunks, CONTEXT) and log-probabilities that llama-perplexity has written."""
    data = path.read_bytes()
    width, vocabulary, chunks = np.frombuffer(data, np.int32, 3, 8)
    tokens = np.frombuffer(data, np.int32, width * chunks, 20).reshape(chunks, width)
    size = 2 * ((vocabulary + 1) // 2) + 4
    rows = np.frombuffer(data, np.uint16, offset=20 + tokens.nbytes).reshape(-1, size)
    scales = np.ascontiguousarray(rows[:, :4]).view(np.float32)
    levels = rows[:, 4 : 4 + vocabulary].astype(np.float32)
    values = levels * scales[:, :1] + scales[:, 1:]
    return torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(values)


@torch.no_grad()
def of_transformers(
    folder: Path,
    tokens: torch.Tensor,
    *,
    flipped: bool = False,
    unscaled: bool = False,
    **options: Any,
) -> torch.Tensor:
    """The log-probabilities of the same positions."""
    if unscaled:
        options["config"] = AutoConfig.from_pretrained(folder)
        rope = options["config"].rope_parameters
        rope.get("full_attention", rope)["rope_type"] = "default"
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **options
    ).eval()
    for name, parameter in model.named_parameters() if flipped else ():
        if parameter.dim() == 2 and "embed" not in name:
            parameter.copy_(parameter.flip(0))
    logits = model(tokens, use_cache=False).logits[:, CONTEXT // 2 : CONTEXT - 1]
    return logits.flatten(0, 1).float().log_softmax(-1)


def divergence(reference: torch.Tensor, other: torch.Tensor) -> float:
    """The mean KL divergence in nats."""
    return float((reference.exp() * (reference - other)).sum(-1).mean())


def read_back(out: Path, folder: Path, tokens: torch.Tensor, theirs: torch.Tensor) -> str:
    """How far a file is from `theirs` if transformers reads it, and if `prunus import` does."""
    ways = {
        "gguf_file": lambda: of_transformers(out.parent, tokens, gguf_file=out.name),
        "import": lambda: import_gguf(out, folder) and of_transformers(folder, tokens),
    }
    words = []
    for way, logits in ways.items():
        try:
            words.append(f"{way} {divergence(theirs, logits()):.1e}")
        except Exception as fault:  # of transformers
            words.append(f"{way} {type(fault).__name__}: {fault}"[:200])
    return "; ".join(words)


def measure(family: str, llama: Path, work: Path, tokenizer: Any) -> dict[str, Any]:
    """What one family gives; raises where a step fails."""
    options, converting = FAMILIES[family]
    folder, full, out = work / "dense", work / "full.gguf", work / "out.gguf"
    checkpoint(family, options, tokenizer, folder)
    script = llama / "convert_hf_to_gguf.py"
    command = [sys.executable, "-c", CONVERT, script, folder.resolve()]
    command += ["--outtype", "bf16", "--outfile", full.resolve(), *converting]
    run(command, work / "convert.log", cwd=llama)
    ids = torch.randint(10, len(tokenizer), (8, 64), generator=torch.Generator().manual_seed(0))
    settings = {"calibration": ids, "template": full, "dense_weight": 0.0, "progress": False}
    record = prunus.compress(folder, out, bits=5.0, **settings)
    text = work / "text.txt"
    write_text(text, TEXT * (2 * CONTEXT))
    program = [llama / "build" / "bin" / "llama-perplexity", "-m", out, "-f", text]
    program += ["-c", CONTEXT, "-b", CONTEXT, "--chunks", CHUNKS, "-t", torch.get_num_threads()]
    program += ["-fa", "off", "--kl-divergence-base", work / "logits"]
    run(program, work / "perplexity.log")
    restored(folder, full, out, work / "restored")
    tokens, ours = of_llama_cpp(work / "logits")
    theirs = of_transformers(work / "restored", tokens)
    is_scaled = "+" in family
    wrong = of_transformers(work / "restored", tokens, flipped=not is_scaled, unscaled=is_scaled)
    file = GgufFile.open(out)
    return {
        "kl": divergence(theirs, ours),
        "kl_wrong": divergence(theirs, wrong),
        "same_top": float((theirs.argmax(-1) == ours.argmax(-1)).float().mean()),
        "bits_in_blocks": file.block_bits,
        "linears": len(record.types),
        "types": file.types,
        "read_back": read_back(out, work / "imported", tokens, theirs),
    }


def main() -> None:
    """Measure the families, and print a table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--tokenizer", type=Path, default=os.environ.get("PRUNUS_TOKENIZER"))
    parser.add_argument("--llama-cpp", type=Path, default=os.environ.get("LLAMA_CPP"))
    parser.add_argument("--families", default=",".join(FAMILIES), help="a list with commas")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.tokenizer is None:
        parser.error("give --tokenizer, a folder with a tokenizer of merged bytes")
    options.work.mkdir(parents=True, exist_ok=True)
    llama = Path(options.llama_cpp or build_llama_cpp(options.work))
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    results = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    for family in options.families.split(","):
        work = options.work / family
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            result = measure(family, llama, work, tokenizer)
            passed = result["kl"] < 0.03 * result["kl_wrong"]
            words = f"{result['kl']:.1e} of {result['kl_wrong']:.1e}, {result['read_back']}"
        except Exception as fault:  # of the converter, of llama.cpp, or of the run
            passed, words = False, f"{type(fault).__name__}: {fault}".splitlines()[0][:300]
            result = {"failed": words}
        results[family] = {"passed": passed, **result}
        print(f"{family:20} {'passed' if passed else 'FAILED'}  {words}", flush=True)
        if options.json:
            write_text(options.json, json.dumps(results, indent=1) + "\n")
        for path in ("dense", "restored", "imported"):
            shutil.rmtree(work / path, ignore_errors=True)
    sys.exit(not all(result["passed"] for result in results.values()))


if __name__ == "__main__":
    main()
