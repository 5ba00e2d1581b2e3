"""GGUF import: one file of llama.cpp becomes a checkpoint folder that transformers can read.

Quantised tensors are unpacked. The result has the weights that llama.cpp computes with, not those
that the model had before it was quantised.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from prunus.formats.gguf.card import imported_card
from prunus.formats.gguf.file import GgufFile, check_extra, tensor_names
from prunus.formats.gguf.header import open_gguf
from prunus.formats.gguf.types import FULL_TYPES
from prunus.formats.gguf.vocabulary import adds_bos, restore_split
from prunus.hardware.errors import did_you_mean, reason
from prunus.hardware.process_state import no_stderr
from prunus.model.checkpoint.atomic_files import (
    TEMPORARY_SUFFIX,
    fsync_folder,
    in_held,
    read_json,
    remove,
    remove_temporaries,
    write_json,
    write_text,
)
from prunus.model.checkpoint.lock import LOCK_NAME, locked
from prunus.model.checkpoint.output_folder import is_vacant
from prunus.model.device import DTYPES
from prunus.model.kinds import CAUSAL
from prunus.model.meta_model import build_on_meta


def import_gguf(
    path: Path,
    dest: Path,
    *,
    overwrite: bool = False,
    dtype: str | None = "bfloat16",
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Write the model and tokenizer of a GGUF file to the folder `dest`.

    The files get their names when all of them are complete, and config.json last, so no loader
    takes a part for a model. The whole model is in memory for a while.

    Args:
        path: The GGUF file.
        dest: A folder that does not exist or is empty.
        overwrite: Whether to replace what `dest` holds. It stays there until the new files are
            complete.
        dtype: Dtype of the weights in the checkpoint, a name of `DTYPES`. None takes float32 where
            it holds all values of the file exactly and costs little, else bfloat16.
        progress: Called with a line of text before each step; None for silence.

    Returns:
        `architecture` (llama.cpp's name), `parameters` (count), `tied` (whether head and embedding
        are one matrix), `chat_template` (whether there is one), `types` (those of the file -> share
        of the weights), `dtype`, `files` (names), `bytes` (of all files).

    Raises:
        FileNotFoundError: There is no such file.
        FileExistsError: `dest` holds something and `overwrite` is not set, or another run holds it.
        ModuleNotFoundError: The extra `gguf` is not installed.
        ValueError: It is no GGUF file, it is truncated or damaged, or transformers cannot import
            the model.
    """
    path, dest = Path(path), Path(dest)
    _check_arguments(path, dest, overwrite=overwrite, dtype=dtype)
    say = progress or (lambda line: None)
    say(f"reading {path.name}")
    file = open_gguf(path)
    dtype = dtype or _dtype_for(file)
    with locked(dest):
        check_destination(dest, overwrite=overwrite)
        staging = in_held(dest / f"import{TEMPORARY_SUFFIX}")
        remove_temporaries(dest)
        staging.mkdir()
        try:
            say(f"unpacking {len(file.tensors)} tensors to {dtype}")
            # transformers and gguf show progress bars; the caller shows its own.
            with no_stderr(), file.read_once():
                summary = _convert(path, file, staging, DTYPES[dtype])
            restore_split(file, staging)
            _tidy(staging)
            say(f"writing {dest}")
            _put_in_place(staging, dest)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    files = sorted(written for written in dest.iterdir() if written.is_file())
    return {
        "architecture": file.architecture,
        **summary,
        "types": file.types,
        "dtype": dtype,
        "files": [written.name for written in files],
        "bytes": sum(written.stat().st_size for written in files),
    }


def _dtype_for(file: GgufFile) -> str:
    """float32 for a file in full precision, whose values it holds; others are not worth it."""
    return "float32" if file.types.keys() <= FULL_TYPES - {"BF16"} else "bfloat16"


def _check_arguments(path: Path, dest: Path, *, overwrite: bool, dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(
            f"dtype must be one of {', '.join(sorted(DTYPES))}, not {dtype!r}"
            f"{did_you_mean(dtype, DTYPES)}"
        )
    check_destination(dest, overwrite=overwrite)
    if not path.is_file():
        state = "not a file" if path.exists() else "no such file"
        raise FileNotFoundError(f"{path}: {state}; give a file of llama.cpp, NAME.gguf")
    with path.open("rb") as file:
        if (magic := file.read(4)) != b"GGUF":
            raise ValueError(
                f"{path}: not a GGUF file; it starts with {magic!r}, not b'GGUF'. Give a file of "
                "llama.cpp"
            )
    check_extra()


def check_destination(dest: Path, *, overwrite: bool) -> None:
    """Raise FileExistsError unless the folder `dest` is missing, vacant, or may be overwritten."""
    if not is_vacant(dest) and not overwrite:
        raise FileExistsError(
            f"{dest}: the folder is not empty; choose another one or give `overwrite`"
        )


def _convert(path: Path, file: GgufFile, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Let transformers read a GGUF file and save it to `folder`; returns figures of the model."""
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    # Versions of transformers without GgufConfig unpack every GGUF file by default.
    config = getattr(transformers, "GgufConfig", None)
    unpack = {"quantization_config": config(dequantize=True)} if config is not None else {}
    try:
        described = complete_config(transformers.AutoConfig.from_pretrained(**source), file)
        _check_size(described, sum(int(tensor.n_elements) for tensor in file.tensors.values()))
        says_bos = {"add_bos_token": True} if adds_bos(file) else {}
        card = imported_card(file, path.name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source, **says_bos)
        if described.model_type in ("mixtral", "qwen2_moe", "qwen3_moe"):
            model, loading = read_experts(described, file, dtype), {}
        else:
            model, loading = transformers.AutoModelForCausalLM.from_pretrained(
                **source, **unpack, config=described, dtype=dtype, output_loading_info=True
            )
    except Exception as error:
        raise ValueError(
            f"{path}: transformers cannot import this file ({reason(error)})"
        ) from error
    # transformers would fill missing weights with random numbers.
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if names := sorted(map(str, loading.get(problem) or ())):
            raise ValueError(
                f"{path}: transformers does not fully know this kind of model: "
                f"{problem.replace('_', ' ')} {', '.join(names[:5])}"
                f"{' ...' if len(names) > 5 else ''}"
            )
    tied = _tie_if_one_matrix(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_text(folder / "README.md", card)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tied": tied,
        "chat_template": tokenizer.chat_template is not None,
    }


@torch.no_grad()
def _tie_if_one_matrix(model: Any) -> bool:
    """Tie the head to the embedding if both hold one matrix. Returns whether they are tied now.

    Many GGUF files store the embedding of a tied model twice, the second time as the head and in
    more bits. The two then differ by errors of rounding, at most by a fifth (Q2_K); matrices that
    were trained apart differ by more than their own size. The head's form is kept, which is the
    more precise one.
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if embedding is head or embedding.shape != head.shape:
        return embedding is head
    if float((embedding - head).norm(dtype=torch.float32)) > 0.3 * float(head.float().norm()):
        return False
    model.get_input_embeddings().weight = head
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return True


def _check_size(config: Any, weights: int) -> None:
    """Refuse a model that is larger than the weights of its file, before it takes memory."""
    model = build_on_meta(CAUSAL, config, torch.float32, False)
    count = sum(parameter.numel() for parameter in model.parameters())
    # Tied weights are counted once here, and the file may store them once or twice.
    if count > 2 * weights:
        raise ValueError(f"its fields describe {count:,} weights, and its tensors hold {weights:,}")


def _tidy(folder: Path) -> None:
    """Remove traces of the GGUF file from config.json; give all files the same permissions."""
    config = read_json(folder / "config.json")
    for leftover in ("_model_name_or_path", "_name_or_path", "quantization_config"):
        config.pop(leftover, None)
    write_json(folder / "config.json", config)
    mode = (folder / "config.json").stat().st_mode
    for file in folder.iterdir():
        file.chmod(mode)  # the safetensors library makes its files readable by their owner alone


def _put_in_place(staging: Path, dest: Path) -> None:
    """Move the files of a folder into `dest`, in the place of what is there."""
    for path in staging.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    # The configuration makes a folder a model, so it is removed first and appears last.
    needed = (staging.name, LOCK_NAME)
    old = [path for path in dest.iterdir() if path.name not in needed]
    for path in sorted(old, key=lambda path: path.name != "config.json"):
        remove(path)
    for path in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, in_held(dest / path.name))
        fsync_folder(dest)


# --- what transformers does not read of a file: widths of heads and experts, and the experts ---
#
# Its configuration has the widths of one known model, whatever the file says. It takes Mixtral for
# a Llama, as llama.cpp has one name for both, and knows only one of two shapes of Qwen2-MoE's
# routers.

# Fields of a file -> options of transformers.
_WIDTHS = {
    "attention.key_length": "head_dim",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}


def complete_config(config: Any, file: GgufFile) -> Any:
    """The configuration that transformers makes of a file, with what it leaves out.

    The file's widths of heads and experts replace those of `config`. A file of Mixtral, which
    transformers takes for a Llama, gets a `MixtralConfig`.
    """
    for field, option in _WIDTHS.items():
        if hasattr(config, option) and (value := file.get(f"{file.architecture}.{field}")):
            setattr(config, option, value)
    if not (count := file.get("llama.expert_count")):
        return config
    option_names = vars(transformers.MixtralConfig()).keys() - {
        "architectures",
        "transformers_version",
    }
    options = {name: value for name, value in vars(config).items() if name in option_names}
    options |= {"num_local_experts": count, "architectures": ["MixtralForCausalLM"]}
    options["num_experts_per_tok"] = file.get("llama.expert_used_count")
    return transformers.MixtralConfig(**options)


def read_experts(config: Any, file: GgufFile, dtype: torch.dtype) -> Any:
    """The model of a file of Mixtral, Qwen2-MoE or Qwen3-MoE, with weights in `dtype` on the CPU.

    Llama's queries and keys get the row order of transformers back (see layout.py): llama.cpp
    rotates neighbours, transformers rotates halves.

    Args:
        config: The configuration that `complete_config` returned.
        file: The GGUF file.
        dtype: Dtype of the weights.

    Raises:
        ValueError: The file lacks a tensor of the model.
    """
    model = build_on_meta(CAUSAL, config, dtype, False)
    names = tensor_names(file.architecture, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    weights = {}
    for name, parameter in model.named_parameters():
        whole = name if name.endswith((".weight", ".bias")) else f"{name}.weight"
        # transformers has gate and up in one tensor.
        leaves = ("gate_proj", "up_proj") if "gate_up_proj" in name else ("",)
        pieces = [whole.replace("gate_up_proj", leaf) for leaf in leaves]
        parts = [file.read(names.get_name(x, (".weight", ".bias")) or x) for x in pieces]
        value = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        if file.architecture == "llama" and (count := heads.get(name.split(".")[-2])):
            value = value.unflatten(0, (count, -1, 2)).transpose(1, 2)
        weights[name] = value.reshape(parameter.shape).to(dtype)
    model.load_state_dict(weights, assign=True, strict=False)
    model.tie_weights()
    return model
