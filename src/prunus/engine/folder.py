"""The folder of a result: who may write into it, what an earlier run left, and how it is completed.

    find_earlier ► held ► begin ► write a shard, enter it in the record ► … ► finish

A finished shard is a checkpoint of the run. It is written under a temporary name, made durable and
renamed, and the record names it afterwards. The index is written last. No loader finds the weights
without it, so nobody takes an unfinished folder for a model. `BlockFolder` has a shard
for each block and one for all that lies outside them.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from prunus.distributed import fail_together, is_rank_0, on_rank_0, tensors_from_rank_0
from prunus.engine.loop import FinishedBlock
from prunus.engine.run_options import RunOptions
from prunus.engine.run_plan import RunPlan, check_known
from prunus.engine.run_record import BlockwiseRecord, RunInputs, RunRecord
from prunus.hardware.machine import describe_hardware, versions
from prunus.model.checkpoint.files import (
    RECORD_FILES,
    TEMPORARY_SUFFIX,
    check_shard,
    file_digest,
    fsync_folder,
    make_folder,
    move_file,
    remove,
    remove_temporaries,
    write_json,
    write_text,
)
from prunus.model.checkpoint.lock import LOCK_NAME, locked
from prunus.model.checkpoint.output_folder import (
    auxiliary_files,
    check_apart,
    check_folder_name,
    check_resume,
    copy_companion,
    holds_result,
)
from prunus.model.checkpoint.tensor_files import INDEX_NAME, Checkpoint, Writable, save_safetensors
from prunus.model.source import CheckpointSource, tensors_digest
from prunus.options import Options

_Record = TypeVar("_Record", bound=RunRecord)
_BlockwiseRecord = TypeVar("_BlockwiseRecord", bound=BlockwiseRecord)


def remove_result(folder: Path, record: str) -> None:
    """Remove a folder that a run made and this run holds; folders inside it stay.

    The record goes after all other files, so that after a kill the folder still says what it is.
    The lock goes last. From then on another run may take the folder, which then is not empty and
    stays.

    Args:
        folder: The folder. Without a record in it, only temporary files and the lock are removed:
            the other files are somebody else's.
        record: File name of the record.
    """
    last = [folder / record, folder / LOCK_NAME]
    files = folder.glob("*") if last[0].exists() else folder.glob(f"*{TEMPORARY_SUFFIX}")
    for path in (*(x for x in files if x.is_file() and x not in last), *last):
        remove(path)
    with contextlib.suppress(OSError):
        folder.rmdir()


def find_earlier(
    kind: type[_Record],
    output: Path,
    recipe: Options,
    options: RunOptions,
    *sources: Path,
) -> _Record | None:
    """The record of the earlier run in the output folder, or None if this run starts afresh.

    The record is that of an unfinished run, which this run resumes, or of a finished result.
    Nothing is written.

    Args:
        kind: The class of the record.
        output: Folder of the result, which need not exist.
        recipe: The options of this run, which those of the earlier run must equal.
        options: `overwrite` and `resume` say what to do with an earlier run.
        *sources: Folders that the run reads, which must lie apart from `output`.

    Raises:
        FileExistsError: The folder holds files that the command did not write, or a run with other
            options, or a run of an earlier version that cannot be resumed; or `resume` is False and
            there is an unfinished run.
        FileNotFoundError: `resume` is True and there is no unfinished run.
        ValueError: A source lies inside the output or around it, the name is that of a file of some
            format, or the record is damaged.
    """
    for source in sources:
        check_apart(output, source)
    check_folder_name(output)
    earlier = None
    if holds_result(output, kind.FILE, kind.COMMAND, options.overwrite) and not options.overwrite:
        earlier = kind.load(output)
    check_resume(output, earlier is not None and earlier.state == "running", options.resume)
    if earlier is not None:
        earlier.check_same_run(output, recipe)
    return earlier


def resumed_or_new(
    kind: type[_Record],
    earlier: _Record | None,
    place: Path | None,
    recipe: Options,
    inputs: RunInputs,
    device: torch.device,
    **fields: Any,
) -> _Record:
    """The record of the run that is resumed, or a new record.

    Args:
        kind: The class of the record.
        earlier: What `find_earlier` returned.
        place: The folder of the run; None if it changes a loaded model.
        recipe: The options that decide the bytes of the result.
        inputs: What else decides them.
        device: Where the run computes, for the hardware that a new record names.
        **fields: Further fields of a new record.

    Raises:
        FileExistsError: The earlier run had other options or other inputs.
    """
    if earlier is not None:
        earlier.check_same_run(place, recipe, inputs)
        return earlier
    hardware = describe_hardware(device)
    return kind(recipe=recipe, inputs=inputs, versions=versions(), hardware=hardware, **fields)


@contextlib.contextmanager
def held(
    kind: type[_Record], output: Path, find: Callable[[], _Record | None]
) -> Iterator[_Record | None]:
    """Hold a folder against other runs for the length of a `with` block.

    Only rank 0 touches the folder. All processes must enter the block, and all fail if it does.

    Args:
        kind: The class of the record.
        output: Folder of the result.
        find: Calls `find_earlier`.

    Yields:
        What `find` returned on rank 0, the same on every rank.
    """

    # `find` is called twice. The first call is before anything is written, so that a folder of
    # somebody else stays untouched. The second call is while the folder is held, because another
    # run may finish in between.

    def look() -> dict[str, Any] | None:
        earlier = find()
        return None if earlier is None else earlier.model_dump(mode="json")

    with locked_output(output, find):
        content = on_rank_0(look)
        yield None if content is None else kind.model_validate(content)


@contextlib.contextmanager
def locked_output(output: Path, look: Callable[[], object]) -> Iterator[None]:
    """Hold a folder against other runs, unless `look` raises an error: then no lock is written."""
    with contextlib.ExitStack() as stack:
        with fail_together():
            if is_rank_0():
                look()
                stack.enter_context(locked(output))
        yield


class ResultFolder:
    """Writes the result of one run, in a folder that the run holds.

    Every method leaves the folder in a state from which a killed run can resume. Only rank 0 may
    call the methods that write.

    Args:
        folder: The folder of the result.
        record: The record of the run, which the methods keep up to date.
        source: The checkpoint that the result is made from: its companions are copied, and every
            shard is preceded by a check that its files did not change. None if there is none.
    """

    def __init__(
        self, folder: Path, record: RunRecord, source: CheckpointSource | None = None
    ) -> None:
        self.folder, self.record, self.source = folder, record, source

    def save(self) -> None:
        """Write the record. Other processes than rank 0 do nothing."""
        if is_rank_0():
            self.record.save(self.folder)

    def begin(self, overwrite: bool) -> list[str]:
        """Create the folder, or clean up what a killed run left in it.

        Args:
            overwrite: Whether to remove shards that the record does not name, and the records of
                other commands.

        Returns:
            The shards that were deleted since, which the record has forgotten.

        Raises:
            ValueError: The bytes of a shard are not those that the record has the SHA-256 of.
        """
        folder, record = self.folder, self.record
        make_folder(folder)
        for name, expected in record.sha256.items():
            if (folder / name).exists():
                replacement = record.replacing.get(name)
                if replacement is not None and file_digest(folder / name) == replacement:
                    record.sha256[name] = expected = replacement
                remedy = "remove it, and the same command makes it again"
                check_shard(folder / name, expected, remedy)
        # The record claims the folder first. Then the index is removed, so that the rest of an
        # overwritten result is no model any more.
        record.save(folder)
        remove(folder / INDEX_NAME)
        fsync_folder(folder)
        if overwrite:
            # Shards of the result that is replaced, and records of other commands about it.
            others = [x for x in folder.glob("*.safetensors") if x.name not in record.sha256]
            for path in (*others, *(folder / name for name in RECORD_FILES if name != record.FILE)):
                remove(path)
        remove_temporaries(folder)
        missing = [name for name in record.sha256 if not self.has(name)]
        if record.forget_missing({*missing}):
            record.save(folder)
        return missing

    def has(self, shard: str) -> bool:
        """Whether a shard is there, and the record names it."""
        return shard in self.record.sha256 and (self.folder / shard).exists()

    def write_shard(
        self, name: str, tensors: Mapping[str, Writable], *, uncached: bool = False
    ) -> None:
        """Write a shard and note its SHA-256; the caller enters it in the record and saves that.

        Args:
            name: File name of the shard.
            tensors: Its tensors by name.
            uncached: Whether to keep the written pages out of the page cache; see
                `save_safetensors`.
        """
        if self.source is not None:
            self.source.checkpoint.check_unchanged()
        self.record.sha256[name] = save_safetensors(self.folder / name, tensors, uncached=uncached)

    def replace_shard(self, name: str, tensors: Mapping[str, Writable]) -> None:
        """Replace a finished shard; a kill leaves the one or the other, and the record knows both.

        Args:
            name: File name of the shard.
            tensors: What takes the place of its tensors.
        """
        new = self.folder / f"{name}{TEMPORARY_SUFFIX}"
        self.record.replacing = {name: save_safetensors(new, tensors)}
        self.save()
        move_file(new, self.folder / name, replaces=True)
        self.record.sha256 |= self.record.replacing
        self.record.replacing = {}
        self.save()

    def finish(
        self,
        shards: Iterable[str],
        *,
        card: str,
        config: Mapping[str, Any] | None = None,
        keep_records: Iterable[str] = ("prunus-structure.json",),
        code: bool = False,
    ) -> None:
        """Complete the result: companions, configuration, card, and at last the index.

        Args:
            shards: File names of all shards of the result.
            card: The model card, README.md.
            config: The content of config.json; None copies that of the source.
            keep_records: Records of earlier work on the source that hold for the result as well.
                By default the one that says which parts were removed.
            code: Whether to copy Python files that come with the checkpoint.
        """
        folder = self.folder
        if self.source is not None:
            opened, here = self.source.folder, self.source.folder.path
            if config is None and opened.quantization:
                config = opened.dense_config
            for path in auxiliary_files(here, code=code):
                if path.name not in RECORD_FILES and (config is None or path.name != "config.json"):
                    copy_companion(path, folder / path.name)
            for name in keep_records:
                if name != self.record.FILE and (here / name).exists():
                    copy_companion(here / name, folder / name)
        write_text(folder / "README.md", card)
        if config is not None:
            write_json(folder / "config.json", dict(config))
        written = Checkpoint(folder, only=list(shards))
        weight_map = {name: info.file for name, info in sorted(written.tensors.items())}
        total = written.nbytes(written.tensors)
        write_json(
            folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
        self.record.state = "finished"
        self.record.save(folder)


class BlockFolder(ResultFolder):
    """Writes a result block by block; all processes call its methods, rank 0 touches the folder.

    `position` counts the blocks of the result from 0. A subclass says which tensors a shard has.

    Args:
        folder: The folder of the result.
        record: The record of the run.
        plan: The run.
        made_from: For each block of the result, the index of the block of the source that it is
            made from; None for all blocks in order.
    """

    record: BlockwiseRecord

    def __init__(
        self,
        folder: Path,
        record: BlockwiseRecord,
        plan: RunPlan,
        made_from: Sequence[int] | None = None,
    ) -> None:
        super().__init__(folder, record, plan.checkpoint)
        self.plan = plan
        self.made_from = range(len(plan.skeleton)) if made_from is None else made_from

    @property
    def finished(self) -> int:
        """How many blocks are finished, the first ones of the result."""
        return len(self.record.blocks)

    @property
    def finished_seconds(self) -> float:
        """Seconds that the finished blocks took."""
        return sum(block.seconds for block in self.record.blocks)

    @abstractmethod
    def shard_tensors(self, position: int, block: FinishedBlock) -> dict[str, torch.Tensor]:
        """The tensors of the shard of a block, by the names of the checkpoint."""

    @abstractmethod
    def restored(self, position: int) -> dict[str, torch.Tensor]:
        """The tensors of a finished block, by relative name, from its shard."""

    def read_block(self, position: int) -> Mapping[str, torch.Tensor]:
        """The tensors of a finished block by relative name, on every rank.

        Raises:
            FileExistsError: The source's block is not the one that the finished block was made
                from.
        """
        return tensors_from_rank_0(lambda: self._read_block(position))

    def _read_block(self, position: int) -> dict[str, torch.Tensor]:
        index = self.made_from[position]
        name = self.plan.skeleton.block_name(index)
        digest = tensors_digest(self.plan.source.block(index))
        check_known({name: self.record.blocks[position].input_sha256}, name, digest)
        return self.restored(position)

    def write_block(self, position: int, block: FinishedBlock) -> None:
        """Write a block's shard, then save the record."""
        if is_rank_0():
            self.write_shard(self.record.shard(position), self.shard_tensors(position, block))
        self.record.blocks.append(block.record)
        self.save()
