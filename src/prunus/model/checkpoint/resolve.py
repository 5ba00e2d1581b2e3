"""Where the checkpoint of a model is that a user names: a folder, a GGUF file, or a hub id."""

from __future__ import annotations

import atexit
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from prunus.hardware.errors import did_you_mean
from prunus.model.checkpoint.gguf import import_gguf, open_gguf
from prunus.model.checkpoint.gguf_file import check_extra
from prunus.model.checkpoint.regular_files import check_folder

#: Types of GGUF files whose weights are those of the model, or nearly so.
FULL_TYPES = frozenset({"F32", "F16", "BF16", "Q8_0"})
#: Path, size and time of a GGUF file -> the folder that holds its checkpoint.
_made: dict[tuple[Path, int, int], Path] = {}


def is_gguf(path: str | Path) -> bool:
    """Whether a path names a GGUF file, by its ending."""
    return str(path).lower().endswith(".gguf")


def _imported(path: Path, say: Callable[[str], None] | None) -> Path:
    """The checkpoint of a GGUF file, made when it is first asked for and removed at exit."""
    state = path.stat()
    key = (path.resolve(), state.st_size, state.st_mtime_ns)
    if key not in _made:
        check_extra()
        # float32 holds all values of a file in full precision; others are not worth the memory.
        exact = (file := open_gguf(path)).types.keys() <= FULL_TYPES - {"BF16"}
        dtype = "float32" if exact else "bfloat16"
        made = Path(tempfile.mkdtemp(prefix="prunus-"))
        atexit.register(shutil.rmtree, made, ignore_errors=True)
        import_gguf(path, made / path.stem, dtype=dtype, progress=say, file=file)
        _made[key] = made
    return _made[key] / path.stem


def resolve_folder(model: str | Path, say: Callable[[str], None] | None = None) -> Path:
    """The folder of a model: a local one, a snapshot from the hub, or the import of a GGUF file.

    From the hub come safetensors, configuration and tokenizer files only. The import of a GGUF file
    lies in a temporary folder, which is removed when the process ends.

    Args:
        model: Path of a folder, path of a GGUF file, or hub id such as `owner/name`.
        say: Called with a line of text before each step of an import; None for silence.

    Raises:
        FileNotFoundError: The model is none of these, or the hub cannot be reached.
        ModuleNotFoundError: It is a GGUF file, and the extra `gguf` is not installed.
        ValueError: A file in the folder is no regular file or too large, or the GGUF file is
            damaged or of a kind that transformers cannot import.
    """
    path = Path(model)
    if path.is_dir() and str(model):
        check_folder(path)
        return path
    name = str(model)
    if is_gguf(path) and path.is_file():
        return _imported(path, say)
    if name and path.exists():
        raise FileNotFoundError(
            f"{name} is {'a file' if path.is_file() else 'not a folder'}; expected the folder of a "
            "Hugging Face checkpoint, or a file of llama.cpp, NAME.gguf"
        )
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if looks_local or not name:
        raise FileNotFoundError(
            f"{name!r} is neither a folder nor a hub id; give the folder of a Hugging Face "
            f"checkpoint, or a hub id such as owner/name{_similar(path)}"
        )
    from huggingface_hub import snapshot_download

    try:
        snapshot = snapshot_download(
            name,
            allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md"],
        )
    except Exception as fault:
        said = (str(fault).strip().splitlines() or [type(fault).__name__])[0]
        # Without the number that the system has for an error.
        reason = re.sub(r"\[Errno [^]]*\] ", "", said)
        raise FileNotFoundError(
            f"{name!r} is neither a local folder nor a model that could be downloaded from the "
            f"hub: {reason.rstrip('.')}{_similar(path)}"
        ) from fault
    return Path(snapshot)


def _similar(path: Path) -> str:
    """A hint at the folder of a model with nearly this name, or at such a GGUF file."""
    if is_gguf(path):
        return did_you_mean(path, map(str, path.parent.glob("*.gguf")))
    folders = (str(file.parent) for file in path.parent.glob("*/config.json"))
    return did_you_mean(path, folders, "the folder ")
