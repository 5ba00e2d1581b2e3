"""GGUF import: one file of llama.cpp becomes a checkpoint folder that transformers can read.

Quantised tensors are unpacked. The result has the weights that llama.cpp computes with, not those
that the model had before it was quantised.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import transformers
from pydantic import RootModel

from prunus.distributed import on_rank_0
from prunus.engine.command import Command, Run, run_verb
from prunus.engine.result import Result
from prunus.engine.run_options import RunOptions
from prunus.engine.session import SILENT, Session
from prunus.formats.gguf.card import imported_card
from prunus.formats.gguf.file import GgufFile, check_extra, open_gguf
from prunus.formats.gguf.import_config import UNREAD, config_of_unread, restore_constants
from prunus.formats.gguf.layout import ARCHITECTURES, GgufTensor, tensors_of
from prunus.formats.gguf.types import FULL_TYPES, PLAIN
from prunus.formats.gguf.vocabulary import adds_bos, drop_added_tokens, restore_split
from prunus.hardware.process_state import no_stderr
from prunus.model.checkpoint.files import (
    TEMPORARY_SUFFIX,
    fsync_folder,
    in_held,
    read_json,
    remove,
    remove_temporaries,
    write_json,
    write_text,
)
from prunus.model.checkpoint.output_folder import check_apart, check_folder_name, holds_result
from prunus.model.checkpoint.tensor_files import FileTensor, TensorInfo, Writable, save_safetensors
from prunus.model.device import DTYPES
from prunus.model.kinds import CAUSAL
from prunus.model.meta_model import build_on_meta
from prunus.model.skeleton import Skeleton
from prunus.options import Option, Options
from prunus.words import reason

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
# Kind of model -> a part of its names in transformers, and what checkpoints have for it.
_RENAMED = {"mixtral": (".mlp.", ".block_sparse_moe.")}


class ImportOptions(Options):
    """What decides the checkpoint, beside the file."""

    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        Option("Store weights in bfloat16, float16 or float32.", metavar="DTYPE"),
    ] = "bfloat16"


class ImportRecord(RootModel[dict[str, Any]]):
    """What an import wrote, as values for JSON. The file `prunus-import.json` has it.

    `architecture` (llama.cpp's name), `parameters` (count), `tied` (whether head and embedding are
    one matrix), `chat_template` (whether there is one), `types` (those of the file -> share of the
    weights), `dtype`, `files` (names), `bytes` (of all files). The file also has the `state`:
    "running" until all files have their names. By `files` an import knows what it may replace.
    """

    FILE: ClassVar[str] = "prunus-import.json"


@dataclass(frozen=True)
class ImportPlan:
    """A GGUF file that can be imported.

    Attributes:
        path: The file.
        file: Its header and tensors.
        dtype: The dtype of the checkpoint, a name of `DTYPES`.
    """

    path: Path
    file: GgufFile
    dtype: str

    def disk_bytes(self) -> int:
        """Bytes of the weights of the checkpoint."""
        weights = sum(tensor.n_elements for tensor in self.file.tensors.values())
        return weights * DTYPES[self.dtype].itemsize

    def describe(self) -> dict[str, Any]:
        """The plan as JSON values; `types` are those of the file -> share of the weights."""
        return {
            "architecture": self.file.architecture,
            "types": self.file.types,
            "dtype": self.dtype,
            "disk_bytes": self.disk_bytes(),
        }


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
    takes a part for a model. Of the families that prunus writes, a part of a tensor is in memory at
    a time; of others, the whole model.

    Args:
        path: The GGUF file.
        dest: A folder that does not exist or is empty.
        overwrite: Whether to replace what `dest` holds. It stays there until the new files are
            complete.
        dtype: Dtype of the weights in the checkpoint. None takes float32 where it holds all values
            of the file exactly and costs little, else bfloat16.
        progress: Called with a line of text before each step; None for silence.

    Returns:
        The content of an `ImportRecord`.

    Raises:
        FileNotFoundError: There is no such file.
        FileExistsError: `dest` holds something and `overwrite` is not set, or holds files that no
            import wrote, or another run holds it. What a killed import left is replaced.
        ModuleNotFoundError: The extra `gguf` is not installed.
        ValueError: It is no GGUF file, it is truncated or damaged, it lies in `dest`, or
            transformers cannot import the model.
    """
    recipe, options = ImportOptions(dtype=dtype), RunOptions(overwrite=overwrite)
    command = Importing(Path(path), Path(dest), recipe, options)
    figures: dict[str, Any] = run_verb(command, Session(announce=progress)).root
    return figures


def unpack_gguf(
    path: Path,
    dest: Path,
    *,
    dtype: str | None = "bfloat16",
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Write the checkpoint of a GGUF file to a folder that nobody else knows; see `import_gguf`."""
    session = Session(announce=progress)
    plan = plan_import(path, dtype, session)
    dest.mkdir()
    return _fill(plan, dest, session)


class ImportResult(Result[Any]):
    """The folder of an import. A killed import begins anew, so no run goes on with another."""

    def earlier(self, model: str | Path, recipe: Options, options: RunOptions) -> None:
        """Check that the folder may be written; see `check_destination`."""
        check_apart(self.folder, Path(model))
        check_folder_name(self.folder)
        check_destination(self.folder, overwrite=options.overwrite)


class Importing(Command[ImportPlan, ImportRecord]):
    """The command import, as the engine knows it."""

    RECIPE, KIND, RESULT = ImportOptions, ImportRecord, ImportResult
    RESUMES = False

    def plan(self, session: Session = SILENT, decided_dtype: str | None = None) -> ImportPlan:
        """See `plan_import`."""
        return plan_import(Path(self.model), self.recipe.dtype, session)

    def change_model(self, run: Run[ImportPlan, ImportRecord], prepared: Any) -> None:
        """Write all files beside their places, and then move them there."""
        assert self.output is not None, "an import writes a folder"
        plan, session, dest = run.plan, run.session, self.output

        def write() -> dict[str, Any]:
            staging = in_held(dest / f"import{TEMPORARY_SUFFIX}")
            remove_temporaries(dest)
            staging.mkdir()
            try:
                figures = _fill(plan, staging, session)
                session.tell(f"writing {dest}")
                sizes = {x.name: x.stat().st_size for x in sorted(staging.iterdir())}
                figures |= {"files": [*sizes], "bytes": sum(sizes.values())}
                record, before = dest / ImportRecord.FILE, _files_of(dest)
                write_json(record, {"state": "running", "files": sorted({*sizes, *before})})
                _put_in_place(staging, dest, before)
                write_json(record, {"state": "finished", **figures})
            finally:
                shutil.rmtree(staging, ignore_errors=True)
            return figures

        run.record.root |= on_rank_0(write)


def plan_import(path: Path, dtype: str | None, session: Session) -> ImportPlan:
    """Check a GGUF file, and decide the dtype of its checkpoint if it is None.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: As `import_gguf`.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: {'not a file' if path.exists() else 'no such file'}; give a file of "
            "llama.cpp, NAME.gguf"
        )
    with path.open("rb") as opened:
        if (magic := opened.read(4)) != b"GGUF":
            raise ValueError(
                f"{path}: not a GGUF file; it starts with {magic!r}, not b'GGUF'. Give a file of "
                "llama.cpp"
            )
    check_extra()
    session.tell(f"reading {path.name}")
    file = open_gguf(path)
    # float32 holds the values of a file in full precision; others are not worth it.
    dtype = dtype or ("float32" if file.types.keys() <= FULL_TYPES - {"BF16"} else "bfloat16")
    return ImportPlan(path, file, dtype)


def _fill(plan: ImportPlan, folder: Path, session: Session) -> dict[str, Any]:
    """Write the files of the checkpoint to an empty folder, and return figures of the model."""
    file = plan.file
    session.tell(f"unpacking {len(file.tensors)} tensors to {plan.dtype}")
    # transformers and gguf show progress bars; the caller shows its own.
    with no_stderr(), file.read_by_transformers():
        figures = _convert(plan.path, file, folder, DTYPES[plan.dtype])
    drop_added_tokens(file, folder)
    restore_split(file, folder)
    _tidy(folder)
    return {"architecture": file.architecture, **figures, "types": file.types, "dtype": plan.dtype}


def check_destination(dest: Path, *, overwrite: bool) -> None:
    """Check that an import may write into a folder: it is vacant, or holds what an import wrote.

    Args:
        dest: The folder, which need not exist.
        overwrite: Whether a finished import may be replaced. What a killed one left always is.

    Raises:
        FileExistsError: It may not; names files that no import wrote.
        ValueError: The record in the folder is damaged.
    """
    held = holds_result(dest, ImportRecord.FILE, "prunus import", True, _files_of(dest))
    if held and not overwrite and read_json(dest / ImportRecord.FILE).get("state") == "finished":
        raise FileExistsError(
            f"{dest} holds a finished import; choose another folder or give `overwrite`"
        )


def _files_of(dest: Path) -> list[str]:
    """The names of the files that an earlier import wrote into a folder, or was writing."""
    path = dest / ImportRecord.FILE
    content = read_json(path) if path.is_file() else {}
    names = content.get("files", []) if isinstance(content, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} is damaged: it lists no files. Move the folder away")
    return names


def _convert(path: Path, file: GgufFile, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Let transformers read a GGUF file and save it to `folder`; returns figures of the model."""
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    is_read = file.architecture not in UNREAD
    try:
        described = complete_config(
            transformers.AutoConfig.from_pretrained(**source)
            if is_read
            else config_of_unread(file),
            file,
        )
        _check_size(described, sum(tensor.n_elements for tensor in file.tensors.values()))
        says_bos = {"add_bos_token": True} if adds_bos(file) else {}
        card = imported_card(file, path.name)
        kind = transformers.AutoTokenizer if is_read else transformers.PreTrainedTokenizerFast
        tokenizer = kind.from_pretrained(**source, **says_bos)
        if file.architecture in ARCHITECTURES.values():
            figures = _save_known(described, file, folder, dtype)
        else:
            figures = _save_loaded(source, described, file, folder, dtype)
    except Exception as error:
        raise ValueError(
            f"{path}: transformers cannot import this file ({reason(error)})"
        ) from error
    tokenizer.save_pretrained(folder)
    write_text(folder / "README.md", card)
    return {**figures, "chat_template": tokenizer.chat_template is not None}


def _save_loaded(
    source: dict[str, str], described: Any, file: GgufFile, folder: Path, dtype: torch.dtype
) -> dict[str, Any]:
    """Let transformers unpack a file, which has room in memory, and save it to `folder`."""
    # Versions of transformers without GgufConfig unpack every GGUF file by default.
    config = getattr(transformers, "GgufConfig", None)
    unpack = {"quantization_config": config(dequantize=True)} if config is not None else {}
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        **source, **unpack, config=described, dtype=dtype, output_loading_info=True
    )
    # transformers would fill missing weights with random numbers.
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        _refuse(problem.replace("_", " "), map(str, loading.get(problem) or ()))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head_is_embedding(file)
    if tied:
        embedding.weight = head.weight
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(folder)
    return {"parameters": sum(x.numel() for x in model.parameters()), "tied": tied}


def _refuse(problem: str, names: Iterable[str]) -> None:
    """Raise ValueError if there are names."""
    if names := sorted(names):
        raise ValueError(
            "transformers does not fully know this kind of model: "
            f"{problem} {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
        )


def head_is_embedding(file: GgufFile) -> bool:
    """Whether the embedding of a file is its head as well, by all rows of both.

    Many GGUF files store the embedding of a tied model twice, the second time as the head and in
    more bits. The two then differ by errors of rounding, at most by a fifth (Q2_K); matrices that
    were trained apart differ by more than their own size. The head's form is kept, which is the
    more precise one. If nothing was rounded, the numbers of one matrix are equal.
    """
    if _HEAD not in file.tensors:
        return True
    if file.shape(_EMBEDDING) != file.shape(_HEAD):
        return False
    types = {file.tensors[name].tensor_type.name for name in (_EMBEDDING, _HEAD)}
    full = {name for name, _, _ in PLAIN.values()}
    slack = 0.3 if types - full else 2**-8 if len(types) > 1 else 0.0
    return all(
        bool(((ours - theirs).norm(dim=1) <= slack * theirs.norm(dim=1)).all())
        for ours, theirs in zip(file.rows(_EMBEDDING), file.rows(_HEAD), strict=True)
    )


# --- a file of a family whose layout is known: one tensor in memory at a time ---


def _save_known(described: Any, file: GgufFile, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Write the weights of a file to `folder`, with the configuration, a tensor at a time."""
    tied = head_is_embedding(file)
    described.tie_word_embeddings = tied
    skeleton = Skeleton(described, dtype)
    infos = {
        name: TensorInfo("", tuple(x.shape), dtype, 0)
        for name, x in skeleton.model.named_parameters()
    }
    tensors = tensors_of(file.architecture, described.get_text_config().to_dict(), infos)
    # The tables of rotary embeddings follow from the configuration.
    known = {tensor.name for tensor in tensors} | {_HEAD}
    _refuse("unexpected tensors", {x for x in file.tensors.keys() - known if "rope_" not in x})
    _refuse("missing tensors", {tensor.name for tensor in tensors} - file.tensors.keys())
    if tied and _HEAD in file.tensors:
        tensors = [replace(x, name=_HEAD) if x.name == _EMBEDDING else x for x in tensors]
    weights = _weights(file, tensors, infos)
    part = _RENAMED.get(described.model_type, ("", ""))
    weights = {name.replace(*part): weight for name, weight in weights.items()}
    described.architectures, described.dtype = [type(skeleton.model).__name__], dtype
    described.save_pretrained(folder)
    transformers.GenerationConfig.from_model_config(described).save_pretrained(folder)
    save_safetensors(folder / "model.safetensors", weights)
    return {"parameters": sum(math.prod(x.shape) for x in weights.values()), "tied": tied}


def _weights(
    file: GgufFile, tensors: Iterable[GgufTensor], infos: Mapping[str, TensorInfo]
) -> dict[str, Writable]:
    """Name -> weight that is unpacked when it is written.

    Args:
        file: The file.
        tensors: Its tensors, and what they are in the model.
        infos: Name in the model -> shape and dtype.

    Raises:
        ValueError: A tensor has another shape; names it.
    """
    weights: dict[str, Writable] = {}
    for tensor in tensors:
        if math.prod(file.shape(tensor.name)) != math.prod(tensor.shape):
            raise ValueError(
                f"{tensor.name} has shape {file.shape(tensor.name)}, not {tensor.shape}"
            )
        back_O = None if tensor.rows is None else tensor.rows.argsort()
        for number, name in enumerate(tensor.sources):
            info = infos[name]
            count = math.prod(info.shape[:-1])
            rows_O = torch.arange(count) + count * number if back_O is None else back_O
            pieces = partial(_unpacked, file, tensor, rows_O, info.dtype)
            weights[name] = FileTensor(info.dtype, info.shape, info.nbytes, pieces)
    return weights


def _unpacked(
    file: GgufFile, tensor: GgufTensor, rows_O: torch.Tensor, dtype: torch.dtype
) -> Iterator[torch.Tensor]:
    """Rows of a tensor as the checkpoint has them, a part at a time."""
    if tensor.rows is not None and len(tensor.shape) == 1:  # the bias of queries or keys
        yield file.read(tensor.name)[rows_O].to(dtype)
        return
    for part in file.rows(tensor.name, rows_O):
        yield part.sub_(tensor.shift).to(dtype)


def _check_size(config: Any, weights: int) -> None:
    """Refuse a model that is larger than the weights of its file, before it takes memory."""
    model = build_on_meta(CAUSAL, config, torch.float32, False)
    # Tied weights are counted once here, and the file may store them once or twice.
    if (count := sum(parameter.numel() for parameter in model.parameters())) > 2 * weights:
        raise ValueError(f"its fields describe {count:,} weights, and its tensors hold {weights:,}")


def _tidy(folder: Path) -> None:
    """Remove traces of the GGUF file from config.json; give all files the same permissions."""
    config = read_json(folder / "config.json")
    traces = ("_model_name_or_path", "_name_or_path", "quantization_config")
    write_json(folder / "config.json", {key: x for key, x in config.items() if key not in traces})
    mode = (folder / "config.json").stat().st_mode
    for file in folder.iterdir():
        file.chmod(mode)  # the safetensors library makes its files readable by their owner alone


def _put_in_place(staging: Path, dest: Path, before: list[str]) -> None:
    """Move the files of a folder into `dest`, in the place of those of an earlier import."""
    for path in staging.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    # The configuration makes a folder a model, so it is removed first and appears last.
    old = [path for path in dest.iterdir() if path.name in before]
    for path in sorted(old, key=lambda path: path.name != "config.json"):
        remove(path)
    for path in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, in_held(dest / path.name))
        fsync_folder(dest)


# --- what transformers does not read of a file: widths of heads and experts ---
#
# Its configuration has the widths of one known model, whatever the file says. It takes Mixtral for
# a Llama, as llama.cpp has one name for both.

# Fields of a file -> options of transformers.
_WIDTHS = {
    "attention.key_length": "head_dim",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}


def complete_config(config: Any, file: GgufFile) -> Any:
    """The configuration that transformers makes of a file, with what it leaves out.

    The file's widths of heads and experts replace those of `config`, and what `restore_constants`
    knows. A file of Mixtral, which
    transformers takes for a Llama, gets a `MixtralConfig`.
    """
    for field, option in _WIDTHS.items():
        if hasattr(config, option) and (value := file.get(f"{file.architecture}.{field}")):
            setattr(config, option, value)
    restore_constants(config, file)
    if not (count := file.get("llama.expert_count")):
        return config
    option_names = vars(transformers.MixtralConfig()).keys() - {
        "architectures",
        "transformers_version",
    }
    options = {name: value for name, value in vars(config).items() if name in option_names}
    options |= {
        "num_local_experts": count,
        "num_experts_per_tok": file.get("llama.expert_used_count"),
        "architectures": ["MixtralForCausalLM"],
    }
    return transformers.MixtralConfig(**options)
