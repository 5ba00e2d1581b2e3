"""Where the checkpoint of a model is that a user names: a folder, a file, or a hub id."""

from __future__ import annotations

import atexit
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from prunus.model.checkpoint.files import check_folder
from prunus.model.checkpoint.hub import no_answer
from prunus.model.formats import format_of, suffixes
from prunus.model.open_folder import OpenFolder
from prunus.words import did_you_mean

#: Path, size and time of each file of a model that was unpacked -> the folder of its checkpoint.
_unpacked: dict[tuple[tuple[Path, int, int], ...], Path] = {}


def unpacked(folder: OpenFolder, say: Callable[[str], None] | None = None) -> OpenFolder:
    """The checkpoint of a model in another format, made when first asked for, removed at exit.

    Args:
        folder: The model; a plain checkpoint is returned as it is.
        say: Called with a line of text before each step; None for silence.
    """
    if folder.format is None:
        return folder
    path = folder.path
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    states = [(file.resolve(), file.stat()) for file in files if file.is_file()]
    key = tuple((file, state.st_size, state.st_mtime_ns) for file, state in states)
    if key not in _unpacked:
        temporary = Path(tempfile.mkdtemp(prefix="prunus-"))
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        folder.format.unpack(path, temporary / path.stem, dtype=None, progress=say)
        _unpacked[key] = temporary / path.stem
    return OpenFolder(_unpacked[key], folder.trust_remote_code, folder)


def open_folder(
    model: str | Path | OpenFolder,
    trust_remote_code: bool = False,
    say: Callable[[str], None] | None = None,
    unpacks: bool = True,
) -> OpenFolder:
    """The folder of a model: a local one, a snapshot from the hub, or one unpacked from a file.

    From the hub come safetensors, configuration and tokenizer files only. A model in a format with
    a suffix, such as a GGUF file, is unpacked to a temporary folder, which is removed when the
    process ends.

    Args:
        model: Path of a folder, path of a model in a format with a suffix, or hub id such as
            `owner/name`. A folder that is open already is returned as it is.
        trust_remote_code: Let transformers run code that comes with the checkpoint.
        say: Called with a line of text before each step of unpacking; None for silence.
        unpacks: Whether a model in another format is unpacked; else it has a `format`.

    Raises:
        FileNotFoundError: The model is none of these, or the hub cannot be reached.
        ModuleNotFoundError: The format of the file needs an extra that is not installed.
        ValueError: A file in the folder is no regular file or too large, or the model is damaged
            or of a kind that cannot be unpacked.
    """
    if isinstance(model, OpenFolder):
        return model
    path = Path(model)
    folder = OpenFolder(path, trust_remote_code)
    if folder.format is not None:
        return unpacked(folder, say) if unpacks else folder
    if path.is_dir() and str(model):
        check_folder(path)
        return folder
    name = str(model)
    if name and path.exists():
        raise FileNotFoundError(
            f"{name} is {'a file' if path.is_file() else 'not a folder'}; expected the folder of a "
            f"Hugging Face checkpoint, or a file NAME{', NAME'.join(suffixes())}"
        )
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if looks_local or not name:
        raise FileNotFoundError(
            f"{name!r} is neither a folder nor a hub id; give the folder of a Hugging Face "
            f"checkpoint, or a hub id such as owner/name{_similar(path)}"
        )
    from huggingface_hub import snapshot_download

    # Without an answer, only what was downloaded earlier is used.
    silent = no_answer()
    try:
        snapshot = snapshot_download(
            name,
            allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md"],
            local_files_only=bool(silent),
        )
    except Exception as fault:
        if silent:
            raise FileNotFoundError(
                f"{name!r} is neither a local folder nor a model that was downloaded earlier, and "
                f"the hub gives no answer ({silent}). Give the folder of a checkpoint; "
                f"benchmarks/fetch_model.py gets a small one without the hub{_similar(path)}"
            ) from fault
        said = (str(fault).strip().splitlines() or [type(fault).__name__])[0]
        # Without the number that the system has for an error.
        reason = re.sub(r"\[Errno [^]]*\] ", "", said)
        raise FileNotFoundError(
            f"{name!r} is neither a local folder nor a model that could be downloaded from the "
            f"hub: {reason.rstrip('.')}{_similar(path)}"
        ) from fault
    return OpenFolder(Path(snapshot), trust_remote_code)


def _similar(path: Path) -> str:
    """A hint at the folder of a model with nearly this name, or at a file of the same format."""
    if entry := format_of(path):
        return did_you_mean(path, map(str, path.parent.glob(f"*{entry.suffix}")))
    folders = (str(file.parent) for file in path.parent.glob("*/config.json"))
    return did_you_mean(path, folders, "the folder ")
