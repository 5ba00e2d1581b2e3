"""A loaded model that keeps its model card and its record when it is saved or uploaded.

transformers saves weights and configuration, and for an upload writes a card that says nothing.
So models that prunus loads or prunes get a `save_pretrained` and a `push_to_hub` of their own.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunus.model.checkpoint.atomic_files import read_json, write_text
from prunus.model.checkpoint.card import add_tags
from prunus.model.checkpoint.regular_files import read_card

_CARD, _MANIFESTS = "README.md", ("prunus.json", "prunus-compress.json")
_OF_UPLOADS = ("commit_message", "private", "revision", "create_pr", "tags")


def records_of(folder: Path) -> dict[str, str]:
    """Name -> text of the card and the record that lie in a folder; empty if prunus wrote none."""
    name = next((each for each in _MANIFESTS if (folder / each).is_file()), None)
    if name is None:
        return {}
    card = read_card(folder / _CARD)
    return {name: manifest_text(read_json(folder / name))} | ({} if card is None else {_CARD: card})


def manifest_text(content: Any) -> str:
    """A record for other shards than those whose bytes it names, as text."""
    named = content | {"sha256": {}} if isinstance(content, dict) else content
    return json.dumps(named, indent=2) + "\n"


def keep_records(model: Any, records: Mapping[str, str]) -> None:
    """Let a transformers model write records next to its weights, wherever it is saved."""
    if records:
        # Partial functions, because they are copied and pickled with the model.
        model.save_pretrained = functools.partial(_save_pretrained, model, dict(records))
        model.push_to_hub = functools.partial(_push_to_hub, model, dict(records))


def _save_pretrained(
    model: Any,
    records: Mapping[str, str],
    save_directory: str | Path,
    is_main_process: bool = True,
    *,
    push_to_hub: bool = False,
    repo_id: str | None = None,
    **options: Any,
) -> None:
    """As `save_pretrained` of transformers, with the card and the record next to the weights."""
    hub = {name: options.pop(name) for name in _OF_UPLOADS if name in options}
    type(model).save_pretrained(model, save_directory, is_main_process, **options)
    folder = Path(save_directory)
    if is_main_process:
        for name, text in records.items():
            write_text(folder / name, text)
    if push_to_hub:
        _upload(folder, repo_id or folder.name, token=options.get("token"), **hub)


def _push_to_hub(
    model: Any,
    records: Mapping[str, str],
    repo_id: str,
    *,
    max_shard_size: int | str = "50GB",
    **options: Any,
) -> str:
    """As `push_to_hub` of transformers, with the model's own card and the record."""
    with tempfile.TemporaryDirectory() as scratch:
        _save_pretrained(model, records, scratch, max_shard_size=max_shard_size)
        return _upload(Path(scratch), repo_id, **options)


def _upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    tags: Sequence[str] | None = None,
    commit_message: str | None = None,
    **options: Any,
) -> str:
    """Upload a folder, whose card gets more tags first; returns the address of the commit."""
    from huggingface_hub import HfApi

    card = read_card(folder / _CARD)
    if tags and card is not None:
        write_text(folder / _CARD, add_tags(card, tags))
    api = HfApi(token=token)
    where = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    message = commit_message or "Upload a pruned model"
    return str(
        api.upload_folder(repo_id=where, folder_path=folder, commit_message=message, **options)
    )
