"""The result of a run that writes a GGUF file: the file, and what lies beside it.

The run writes shards as every other run does, with the bytes of GGUF's types in them, to the folder
OUT.gguf.part. At the end the file is put together from them in the same folder, with the record
among its fields. Then the record says that the run is finished, and the file gets its name:

    write FOLDER/model.gguf ► finished ► rename it to OUT.gguf ► and what lies beside it ►
    remove the folder

A kill at any moment leaves nothing outside the folder but the whole file. Beside it lie
OUT.Modelfile for Ollama and OUT.README.md, the model card.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from prunus.engine.folder import ResultFolder, remove_result
from prunus.engine.linear_plan import LinearPlan
from prunus.engine.result import Result
from prunus.engine.run_options import RunOptions
from prunus.engine.run_record import checked_record
from prunus.formats.gguf.contents import bytes_of
from prunus.formats.gguf.file import RECORD_FIELD, check_extra, open_gguf, write_gguf
from prunus.formats.gguf.modelfile import modelfile
from prunus.formats.gguf.speeds import advice
from prunus.formats.gguf.types import FULL_TYPES
from prunus.model.checkpoint.files import (
    check_file_place,
    check_place,
    has_content,
    move_file,
    replacing,
    write_text,
)
from prunus.model.checkpoint.output_folder import check_apart
from prunus.model.checkpoint.tensor_files import Checkpoint
from prunus.model.formats import reader_of
from prunus.options import Options
from prunus.rounding.cards import quantized_card
from prunus.rounding.compression_record import CompressionRecord
from prunus.words import reason

#: Name of the whole file in the folder of the run.
FILE = "model.gguf"
# The record lies behind the vocabulary, which takes 10 MB in the largest headers of today.
_MAX_HEADER = 2**26
# The ends of the names of what lies beside the file.
_BESIDE = (".Modelfile", ".README.md")
# Whether prunus wrote such a file: it says so.
_is_own = has_content(re.compile(b"prunus").search)


def reproducible(record: CompressionRecord) -> str:
    """The record as JSON without times and hashes, so that equal runs give equal files."""
    content = record.model_dump(mode="json", exclude={"sha256", "hardware", "measured"})
    content |= {"state": "finished", "source": Path(record.source).name}
    content["totals"] = {
        name: value
        for name, value in content["totals"].items()
        if not name.endswith(("seconds", "memory_bytes"))
    }
    for evaluation in (content.get("tuning") or {}).get("evaluations", ()):
        evaluation["seconds"] = 0.0
    content["inputs"] |= {"outside": {}}
    content["recipe"] = record.recipe.without_folders().model_dump(mode="json")
    for block in content["blocks"]:
        block["seconds"] = 0.0
        for linear in block["linears"].values():
            linear["seconds"] = 0.0
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False)


def read_record(path: Path) -> CompressionRecord | None:
    """The record in a GGUF file; None if prunus did not make it.

    Raises:
        ValueError: The file or its record is damaged.
    """
    content = open_gguf(path).get(RECORD_FIELD)
    # A record that was too long for its place is blank.
    if content is None or (isinstance(content, str) and not content.strip()):
        return None
    if isinstance(content, str):
        try:
            content = json.loads(content)
        except (ValueError, RecursionError) as fault:
            raise ValueError(
                f"{path} is damaged: its record is no JSON ({reason(fault)})"
            ) from fault
    return checked_record(content, CompressionRecord, path)


def _has_record(path: Path) -> bool:
    """Whether prunus made a file, also a damaged one: its header has a place for the record."""
    with path.open("rb") as file:
        return RECORD_FIELD.encode() in file.read(_MAX_HEADER)


def finished_file(path: Path, recipe: Options, overwrite: bool) -> CompressionRecord | None:
    """The record of a file that a run of the same recipe made; None if nothing has this name.

    Args:
        path: The file.
        recipe: The recipe of the run.
        overwrite: Whether the file may be one of another recipe, and may be damaged. The answer is
            None then.

    Raises:
        FileExistsError: Something else has this name, or a run of another recipe made the file.
        ValueError: The file is damaged.
    """
    if overwrite:
        check_file_place(path, _has_record, dict(recipe).values())
    if overwrite or not os.path.lexists(path):
        return None
    earlier = read_record(path) if path.is_file() else None
    if earlier is None:
        raise FileExistsError(
            f"output {path} exists and is not a file that prunus compress made; it is left as it "
            "is. Move it away, or choose another name"
        )
    earlier.check_same_run(path, recipe.without_folders())
    return earlier


class GgufResult(Result[CompressionRecord]):
    """A GGUF file, which is made from the shards in a folder next to it."""

    advice = staticmethod(advice)

    @property
    def folder(self) -> Path:
        """The folder OUT.gguf.part of the run."""
        return self.path.with_name(f"{self.path.name}.part")

    @property
    def card(self) -> Path:
        """The model card, beside the file."""
        return self.path.with_suffix(_BESIDE[1])

    def check(self, model: str | Path) -> None:
        """Check the model, the file and what would lie beside it.

        Raises:
            ValueError: The model is a GGUF file whose weights are rounded, or it overlaps the
                folder.
            FileExistsError: The output is a folder, or the folder of the run is a link.
            ModuleNotFoundError: The package `gguf` is not installed.
        """
        check_extra()
        kind = reader_of(model) if Path(model).is_file() else None
        is_gguf = kind is not None and kind.RESULT is type(self)
        if is_gguf and (few := open_gguf(Path(model)).types.keys() - FULL_TYPES):
            raise ValueError(
                f"{model} has weights in {', '.join(sorted(few))}, which were rounded already. "
                "Give a file in F32, F16, BF16 or Q8_0, or the checkpoint that it was made from"
            )
        output, folder = self.path, self.folder
        check_place(folder)
        check_apart(output, Path(model))
        if output.is_dir() or folder.is_symlink():
            wrong = f"{output} is a folder" if output.is_dir() else f"{folder} is a link"
            raise FileExistsError(f"{wrong}: move it away, or choose another name for the file")
        for suffix in _BESIDE:
            check_file_place(output.with_suffix(suffix), _is_own)

    def earlier(
        self, model: str | Path, recipe: Options, options: RunOptions
    ) -> CompressionRecord | None:
        """The record of the run to go on with, or that of the finished file; None for neither.

        Raises:
            FileExistsError: Something else has the name of the file.
        """
        done = finished_file(self.path, recipe, options.overwrite)
        earlier = super().earlier(model, recipe, options)
        # A kill may come between the name of the file and the end of its folder.
        whole = (self.folder / FILE).exists()
        is_over = earlier is None or (earlier.state == "finished" and not whole)
        return done if done is not None and is_over else earlier

    def is_complete(self, earlier: CompressionRecord) -> bool:
        """Whether the record is that of a whole file, of whose run nothing is left."""
        # A record in a finished file names no shards.
        return earlier.state == "finished" and not earlier.sha256

    def finish(self, folder: ResultFolder, plan: LinearPlan) -> None:
        """Write the file, say in the record that it is finished, and give it its name."""
        self._write_file(folder, plan.storage)
        folder.record.state = "finished"
        folder.save()
        self.finish_earlier(folder, plan)

    def finish_earlier(self, folder: ResultFolder, plan: LinearPlan) -> None:
        """Give the file its name, unless something else has it by now."""
        file, recipe = folder.folder / FILE, folder.record.recipe
        if not file.exists():  # The user has moved the file away since.
            self._write_file(folder, plan.storage)
        overwrite = plan.options.overwrite
        done = finished_file(self.path, recipe, overwrite)
        move_file(file, self.path, replaces=overwrite or done is not None)
        self._move_beside()

    def close(self) -> None:
        """Remove the folder of the run; after a kill, files may still be in it."""
        self._move_beside()
        remove_result(self.folder, CompressionRecord.FILE)

    def _move_beside(self) -> None:
        """Give their names to the files that lie beside the result."""
        for suffix in _BESIDE:
            if (file := self.folder / suffix[1:]).exists():
                target = self.path.with_suffix(suffix)
                check_file_place(target, _is_own)
                move_file(file, target, replaces=True)

    def store_record(self, record: CompressionRecord) -> None:
        """Replace the record in a finished file; one that is too long for its place is left out."""
        file = open_gguf(self.path)
        before = file.get(RECORD_FIELD).encode()
        text = reproducible(record).encode().ljust(len(before))
        with (
            self.path.open("rb") as source,
            replacing(self.path, self.path.stat().st_size) as copy,
        ):
            header = source.read(file.header.size)
            copy.write(header.replace(before, text) if len(text) == len(before) else header)
            shutil.copyfileobj(source, copy, 2**20)

    def _write_file(self, folder: ResultFolder, plan: Any) -> None:
        """Put the file together from the shards, in their folder."""
        record: Any = folder.record
        source, contents = plan.request.source, plan.contents
        shards = Checkpoint(folder.folder, only=list(record.sha256))
        plan.note_size(record, shards)
        tensors = contents.tensors(record.types, partial(bytes_of, source, shards, record.types))
        fields = contents.fields(record.types, reproducible(record))
        text = modelfile(self.path.name, source.folder, fields)
        write_text(folder.folder / "Modelfile", text)
        words = replace(plan.words, title=self.path.name, path=Path(self.path.name))
        card = quantized_card(record, words, source.checkpoint.folder, plan.lossless)
        card = card.replace(f"`{record.FILE}`", f"the field `{RECORD_FIELD}` of the file")
        write_text(folder.folder / "README.md", card)
        write_gguf(folder.folder / FILE, fields, tensors)
