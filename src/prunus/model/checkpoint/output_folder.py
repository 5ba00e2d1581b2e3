"""The folder for a result: checks before any work, and the files that it gets from its source."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from prunus.model.checkpoint.files import (
    TEMPORARY_SUFFIX,
    check_place,
    check_regular,
    copy_file,
    open_regular,
    recorded_digests,
)
from prunus.model.checkpoint.lock import LOCK_NAME
from prunus.model.checkpoint.tensor_files import INDEX_NAME, PICKLE_SUFFIXES, Checkpoint
from prunus.model.formats import format_of, suffixes
from prunus.words import in_bytes

#: Most bytes of a file that is copied next to the weights: 1 GiB, far more than any tokenizer has.
_MAX_BYTES = 2**30
# Weights in any format and prunus' own files. All other files are copied next to the result.
_NOT_AUXILIARY = {
    ".safetensors", ".h5", ".msgpack", ".onnx", ".partial", *suffixes(), *PICKLE_SUFFIXES,
}  # fmt: skip
# A record of an earlier recovery names the pruned linears of that checkpoint, not of the result.
# Other programs describe in files of their own how they have quantised the source.
_OWN_FILES = {
    INDEX_NAME, "prunus.json", "prunus-recovery.json", "README.md", "quantize_config.json",
    "quant_config.json", "quantization_config.json", "hf_quant_config.json", "quant_log.csv",
}  # fmt: skip
# Weights of results, and what unfinished runs keep: a measurement, and the state of a training.
_WEIGHTS = re.compile(
    r"(model-\d{5}-of-\d{5}|adapter_model|sensitivity|training|best-\d+)\.safetensors"
)
# Files that a result does not copy but derives its own from, so they are checked as well.
_OTHERS = ("README.md", "prunus.json", INDEX_NAME)


def check_apart(output: Path, source: Path) -> None:
    """Check that output and source are different folders, and that neither lies in the other.

    Raises:
        ValueError: They overlap; names both.

    >>> check_apart(Path("pruned"), Path("dense"))
    >>> check_apart(Path("dense/pruned"), Path("dense"))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: output dense/pruned and model dense overlap: choose a folder of its own ...
    """
    here, there = output.resolve(), source.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ValueError(
            f"output {output} and model {source} overlap: choose a folder of its own for the result"
        )


def check_folder_name(output: Path) -> None:
    """Check that a folder is not named as a file of some format.

    Raises:
        ValueError: It is, so that programs would take it for such a file.

    >>> check_folder_name(Path("small.gguf"))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: small.gguf is the name of a .gguf file, and the result is a folder: choose ...
    """
    if (entry := format_of(output)) is not None:
        raise ValueError(
            f"{output} is the name of a {entry.suffix} file, and the result is a folder: choose "
            "another name. `prunus compress` writes such files"
        )


def is_vacant(output: Path) -> bool:
    """Whether a folder holds no result: it does not exist, or holds only what a killed run left.

    A killed run leaves files under their temporary names, and the lock.

    Args:
        output: The folder for the result.

    Raises:
        FileExistsError: `output` exists and is no folder.
        ValueError, PermissionError: The folder cannot be made; see `check_place`.
    """
    check_place(output)
    if output.exists() and not output.is_dir():
        raise FileExistsError(
            f"output {output} exists and is not a folder; choose another name for the result"
        )
    return not output.exists() or all(
        path.name.endswith(TEMPORARY_SUFFIX) or path.name == LOCK_NAME for path in output.iterdir()
    )


def holds_result(
    output: Path, record: str, command: str, overwrite: bool, written: Iterable[str] | None = None
) -> bool:
    """Whether a folder holds a result of a command, which may write there; False if it is vacant.

    This is the rule of all commands for `overwrite`: it replaces what the same command has written.

    Args:
        output: The folder.
        record: File name of the command's record.
        command: The command, such as "prunus prune".
        overwrite: Whether the result is to be replaced.
        written: Names of all files that the record lists, if it lists all. None if the command
            deletes no other files than weights.

    Raises:
        FileExistsError: The folder holds something else; names it. Or it is no folder.
        ValueError, PermissionError: The folder cannot be made.
    """
    if is_vacant(output):
        return False
    names = sorted({x.name for x in output.iterdir()} - {LOCK_NAME})
    names = [name for name in names if not name.endswith(TEMPORARY_SUFFIX)]
    if is_own := record in names:
        if written is None:
            names = [x for x in names if x.endswith(".safetensors") and not _WEIGHTS.fullmatch(x)]
            # A record that is damaged may be overwritten too.
            with contextlib.suppress(ValueError):
                written = recorded_digests(output)
        known = {record, *(written or ())}
        names = [name for name in names if name not in known] if overwrite else []
    if names:
        listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        replaces = "`overwrite` replaces only what that command made. " if overwrite else ""
        raise FileExistsError(
            f"output {output} exists and holds "
            + (f"files that {command} did not write" if is_own else f"no result of {command}")
            + f" ({listed}); it is left as it is. {replaces}Move it away, or choose another name "
            "for the result"
        )
    return True


def check_resume(output: Path, unfinished: bool, resume: bool | None) -> None:
    """Check that there is unfinished work if `resume` is True, and none if it is False.

    Args:
        output: The folder for the result.
        unfinished: Whether that folder holds work that can be resumed.
        resume: What the user wants; None continues what there is.

    Raises:
        FileNotFoundError: There is nothing to resume.
        FileExistsError: There is unfinished work, which a new start would lose.
    """
    if resume is True and not unfinished:
        raise FileNotFoundError(
            f"there is no unfinished run in {output} to resume; leave `resume` out to start one"
        )
    if resume is False and unfinished:
        raise FileExistsError(
            f"{output} holds an unfinished run; `overwrite` starts again, `resume` continues"
        )


def check_disk(output: Path, needed: int) -> None:
    """Check that the result fits on the disk of `output`, which need not exist yet.

    Args:
        output: The folder for the result.
        needed: Size of the result in bytes.

    Raises:
        OSError: Less is free.
    """
    here = output.resolve()
    free = shutil.disk_usage(
        next(folder for folder in (here, *here.parents) if folder.exists())
    ).free
    if free < needed:
        raise OSError(
            f"not enough disk for {output}: the result needs {in_bytes(needed)} and "
            f"{in_bytes(free)} are free; make room, or choose a folder on another disk"
        )


def check_whole(output: Path) -> None:
    """Check that a finished result still has all its shards, and none is cut off.

    Raises:
        FileExistsError: A file was removed or damaged since.
    """
    try:
        Checkpoint(output)
    except (FileNotFoundError, ValueError) as fault:
        raise FileExistsError(
            f"{output} holds a finished result that was damaged since: {fault}. `overwrite` makes "
            "it again"
        ) from fault


# --- the files of a checkpoint next to its weights, which a result copies ---

# A stranger's checkpoint may hold a link to a private file of the user. A result with a copy of it,
# once published, would give it away. So a run copies only what resolves inside the folder of the
# checkpoint, or, from a snapshot in the cache of the hub, in its `blobs`, to which its files lead.


def auxiliary_files(folder: Path, code: bool = False) -> list[Path]:
    """Files of a checkpoint that a result copies unchanged, such as the tokenizer, sorted by name.

    Args:
        folder: The checkpoint.
        code: Whether to copy Python files too: only if the user trusts the code of the checkpoint.
    """
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file()
        and path.suffix not in _NOT_AUXILIARY
        and (code or path.suffix != ".py")
        and path.name not in _OWN_FILES
        and not path.name.startswith(".")
        and not path.name.endswith(".index.json")
    )


def check_companions(folder: Path, code: bool = False) -> None:
    """Check, before any work, everything that a result takes over from a checkpoint.

    Args:
        folder: The checkpoint.
        code: Whether the result copies Python files too.

    Raises:
        ValueError: A file is a link that leads out of the folder, no regular file, or too large.
        OSError: A file cannot be read.
    """
    others = [folder / name for name in _OTHERS if (folder / name).exists()]
    for path in (*auxiliary_files(folder, code), *others):
        _check_inside(path, folder)
        open_regular(path).close()
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise ValueError(
                f"{path} has {size:,} bytes, and other files than weights may have {_MAX_BYTES:,}; "
                "move it out of the checkpoint"
            )
    # Tensors are copied as well.
    for path in folder.glob("*.safetensors"):
        if path.exists():
            _check_inside(path, folder)
            check_regular(path)


def copy_companion(path: Path, target: Path) -> None:
    """Copy a file of a checkpoint into a result, atomically.

    Raises:
        ValueError: It is a link that leads out of its folder, or no regular file.
    """
    _check_inside(path, path.parent)
    copy_file(path, target)


def _check_inside(path: Path, folder: Path) -> None:
    here, there = folder.resolve(), path.resolve()
    if not path.is_symlink() or here in there.parents or _is_blob(there, here):
        return
    raise ValueError(
        f"{path} is a link to {there}, outside of the checkpoint's folder, and the result would "
        "hold a copy of that file: put the file itself in the folder, or remove the link"
    )


def _is_blob(path: Path, folder: Path) -> bool:
    """Whether a file lies in the blobs of the hub's cache, and the folder is a snapshot of them."""
    # CACHE/models--OWNER--NAME/snapshots/REVISION and CACHE/models--OWNER--NAME/blobs
    return folder.parent.name == "snapshots" and path.parent == folder.parent.parent / "blobs"
