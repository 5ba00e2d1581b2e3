"""The files of a checkpoint next to its weights, which a result copies.

A stranger's checkpoint may hold a link to a private file of the user. A result with a copy of that
file, once published, would give it away. So a run copies only what resolves inside the folder of
the checkpoint. A snapshot of the Hugging Face hub is the exception: its files are links into the
cache's `blobs`.
"""

from __future__ import annotations

from pathlib import Path

from prunus.model.checkpoint.atomic_files import copy_file
from prunus.model.checkpoint.reader import INDEX_NAME, PICKLE_SUFFIXES
from prunus.model.checkpoint.regular_files import check_regular, open_regular

#: Most bytes of a file that is copied next to the weights.
_MAX_BYTES = 2**30
# Weights in any format and prunus' own files. All other files are copied next to the result.
_NOT_AUXILIARY = {".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".partial", *PICKLE_SUFFIXES}
# A record of an earlier recovery names the pruned linears of that checkpoint, not of the result.
_OWN_FILES = {INDEX_NAME, "prunus.json", "prunus-recovery.json", "README.md"}
_OTHERS = ("README.md", "prunus.json", INDEX_NAME)


def auxiliary_files(folder: Path, code: bool = False) -> list[Path]:
    """Files of a checkpoint that are copied next to the result, such as config and tokenizer.

    Args:
        code: copy Python files too; only if the user trusts the code of the checkpoint.
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
    """Check, before any work, everything that a result takes over from a checkpoint."""
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
        ValueError: it is a link that leads out of its folder, or no regular file.
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
    """Whether a file lies in the hub cache's blobs, to which the links of a snapshot lead."""
    # CACHE/models--OWNER--NAME/snapshots/REVISION and CACHE/models--OWNER--NAME/blobs
    if folder.parent.name == "snapshots" and path.parent == folder.parent.parent / "blobs":
        return True
    if path.parent.name != "blobs":
        return False
    from huggingface_hub.constants import HF_HUB_CACHE

    return path.parent.parent.parent == Path(HF_HUB_CACHE).resolve()
