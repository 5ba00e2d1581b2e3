"""Changes to the files of a checkpoint, as a user, a stranger or an accident makes them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes a key."""
    content = json.loads(path.read_text()) | changes
    removed = {key for key, value in changes.items() if value is None}
    path.write_text(json.dumps({key: x for key, x in content.items() if key not in removed}))


def swap_two_tokens(folder: Path) -> None:
    """Let the tokenizer of a folder give two letters each other's ids."""
    content = json.loads((folder / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a safetensors file, or of the folder that holds it alone.

    `change` may assign tensors, remove them, and write into them.
    """
    file = path / "model.safetensors" if path.is_dir() else path
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
