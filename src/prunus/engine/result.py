"""Where a run writes: a folder, and for some formats a file that is made from one.

    check ► earlier ► … shards of the blocks … ► finish ► close

A `Result` has the path of the result and decides everything about files around it. The shards
themselves are `ShardFolder`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from prunus.engine.folder import ResultFolder, find_earlier
from prunus.engine.linear_plan import LinearPlan
from prunus.engine.run_options import RunOptions
from prunus.engine.run_plan import check_blocks
from prunus.engine.run_record import BlockwiseRecord, RunRecord
from prunus.model.checkpoint.files import remove
from prunus.model.checkpoint.output_folder import check_whole
from prunus.model.checkpoint.tensor_files import Checkpoint
from prunus.options import Options

_Record = TypeVar("_Record", bound=RunRecord)
#: File with the measurements of an unfinished run. They decide the bytes of all blocks, so a
#: resumed run reads them instead of measuring again.
MEASUREMENT = "sensitivity.safetensors"


@dataclass(frozen=True)
class Result(Generic[_Record]):
    """A result that is a folder.

    Attributes:
        path: The result as the user named it.
        kind: The class of the record that runs write.
        apart: Further folders that a run reads, beside the model.
    """

    path: Path
    kind: type[_Record]
    apart: tuple[Path, ...] = ()

    @property
    def folder(self) -> Path:
        """The folder that a run writes and holds, which may lie next to the result."""
        return self.path

    @property
    def card(self) -> Path:
        """The model card of the result."""
        return self.path / "README.md"

    def check(self, model: str | Path) -> None:
        """Check before any work that the result of a model can be written here.

        Raises:
            ValueError, FileExistsError: It cannot; says why.
        """

    def earlier(self, model: str | Path, recipe: Options, options: RunOptions) -> _Record | None:
        """The record of the run to go on with, or of a finished result; None for neither.

        Args:
            model: The model as the user named it.
            recipe: The options of this run.
            options: `overwrite` and `resume` say what to do with an earlier run.

        Raises:
            ValueError, FileExistsError, FileNotFoundError: As `find_earlier`.
        """
        return find_earlier(self.kind, self.folder, recipe, options, Path(model), *self.apart)

    def is_complete(self, earlier: _Record) -> bool:
        """Whether the result of an earlier run stands, and the folder holds nothing of it."""
        return False

    @staticmethod
    def advice(record: Any) -> str:
        """A line for those whom another result would serve better; empty for nobody."""
        return ""

    def finish(self, folder: ResultFolder, plan: LinearPlan) -> None:
        """Complete the result from its shards, on rank 0, and note in the record that it is."""
        record: Any = folder.record
        storage = plan.storage
        storage.note_size(record, Checkpoint(folder.folder, only=list(record.sha256)))
        folder.finish(
            [record.shard(index) for index in range(record.shard_count)],
            card=storage.card(record),
            config=storage.config(record),
            code=plan.options.trust_remote_code,
        )

    def finish_earlier(self, folder: ResultFolder, plan: Any) -> None:
        """Check on rank 0 a finished result of an earlier run and its source, and clean up.

        Raises:
            FileExistsError: The result is not whole, or was made from other weights.
        """
        check_whole(folder.folder)
        if isinstance(folder.record, BlockwiseRecord):
            check_blocks(plan, folder.record)
        remove(folder.folder / MEASUREMENT)  # A run that was killed at its very end left it.

    def close(self) -> None:
        """Clean up on rank 0, after the result is complete and while the folder is held."""

    def store_record(self, record: _Record) -> None:
        """Replace the record of a finished result."""
        record.save(self.path)
