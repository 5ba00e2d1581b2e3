"""The record of a run: a JSON file next to the result that says what was done and how far it is.

A record never claims more than is on disk: a shard is entered after it has its final name. Every
command adds fields of its own. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prunus.model.checkpoint.card import base_model, inherited_fields, with_fields
from prunus.model.checkpoint.files import read_json, write_json
from prunus.options import Options, words
from prunus.words import in_bytes

_Record = TypeVar("_Record", bound=BaseModel)

# The first version whose records are read.
_FIRST = (0, 4)
#: How the windows run through a block; see `prunus.engine.block.walks`.
Walk = Literal["lockstep", "replay", "two_pass"]
#: Whether every window begins with the BOS token; `given` where the windows were given.
UsedBos = Literal["yes", "no", "given"]


def shard_name(index: int, count: int) -> str:
    """File name of a shard, as the hub and its tools know it; `index` counts from 0.

    >>> shard_name(3, 31)
    'model-00004-of-00031.safetensors'
    """
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def bos_words(bos: UsedBos) -> str:
    """How windows begin, for people.

    >>> bos_words("yes")
    'BOS first in every window'
    """
    return {
        "yes": "BOS first in every window",
        "no": "no BOS added to windows",
        "given": "windows as they were given",
    }[bos]


def read_record(path: Path, kind: type[_Record]) -> _Record:
    """The record in the JSON file `path`, which must exist.

    Raises:
        ValueError: The file is no record of this kind; names the first field that is wrong.
    """
    return checked_record(read_json(path), kind, path)


def checked_record(content: Any, kind: type[_Record], path: Path) -> _Record:
    """The record in a value of JSON, which comes from outside.

    Args:
        content: The value.
        kind: The class of the record.
        path: The file that holds it, for messages.

    Raises:
        ValueError: It is no record of this kind; names the first field that is wrong.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: its record is no JSON object, but {content!r:.40}")
    made_by = content.get("versions")
    version = str(made_by.get("prunus", "")) if isinstance(made_by, dict) else ""
    if (numbers := re.match(r"(\d+)\.(\d+)", version)) and (
        (int(numbers[1]), int(numbers[2])) < _FIRST
    ):
        raise ValueError(
            f"{path} is a record of prunus {version}, and those of versions before 0.4 are not "
            "read: make the result again"
        )
    try:
        return kind.model_validate(content)
    except ValidationError as fault:
        first = fault.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(
            f"{path} is damaged or of another version: {where or 'the record'}: {words(first)}"
        ) from fault


class OtherRunError(FileExistsError):
    """A folder holds a run with other options or other inputs."""


class RecordPart(BaseModel):
    """A part of a record, in which an unknown field is an error."""

    model_config = ConfigDict(extra="forbid")


class RunInputs(RecordPart):
    """What the bytes of the result depend on, next to the options.

    Attributes:
        checkpoint: Fingerprint of the source checkpoint.
        outside: Stored name of a tensor outside the blocks -> its SHA-256.
        dtype: The dtype of the forward passes, as decided for "auto".
        dtype_reason: Why it is that dtype, in words.
        device: "cpu" or "cuda".
    """

    checkpoint: str = Field(description="fingerprint of the source checkpoint")
    outside: dict[str, str] = Field(
        default_factory=dict,
        description="stored name of a tensor outside the blocks -> its SHA-256",
    )
    dtype: str = Field(description="of the forward passes, as decided for 'auto'")
    dtype_reason: str
    device: str = Field(description="cpu or cuda")

    #: Fields that explain others, and need not be equal in a resumed run.
    REASONS: ClassVar[set[str]] = {"dtype_reason", "bos"}

    def deciding(self) -> dict[str, Any]:
        """The fields that a resumed run must have in common with the run before it.

        The hash of each tensor is a field of its own, so that an error names the tensor. Which BOS
        the windows had shows in their hash.
        """
        values = self.model_dump(exclude=self.REASONS)
        outside = values.pop("outside")
        return values | {f"tensor {name}": digest for name, digest in outside.items()}


class WindowInputs(RunInputs):
    """What a run with calibration windows depends on.

    Attributes:
        calibration: Where the calibration windows come from, in words.
        calibration_sha256: SHA-256 of the windows' token ids or pixel values.
        batch: Windows per forward pass. It decides the order of sums, and so the last bits.
        method_sha256: SHA-256 of the code of the user's own method; None for the others.
        allocation_sha256: The same of the user's own allocation.
        masks_sha256: SHA-256 of the masks that were given; None without any.
        bos: Whether every calibration window begins with the BOS token.
        measure_error: Whether the run measured the output error that its method does not need. It
            decides figures of the record, and no weight.
    """

    calibration: str = Field(description="where the calibration windows come from")
    calibration_sha256: str
    batch: int
    method_sha256: str | None = Field(
        default=None, description="of the code of the user's own method; None for the others"
    )
    allocation_sha256: str | None = Field(
        default=None, description="of the code of the user's own allocation; None for the others"
    )
    masks_sha256: str | None = Field(
        default=None, description="of the masks that were given; None without any"
    )
    bos: UsedBos = Field(description="whether every calibration window begins with BOS")
    measure_error: bool = Field(
        default=False, description="whether the output error was measured for any method"
    )


class RunRecord(RecordPart):
    """The record of one run, which a JSON file next to the result holds.

    Attributes:
        FILE: Name of the file.
        COMMAND: The command that writes it, such as "prunus prune".
        format: Version of the record.
        state: "running" until every shard and the index exist, then "finished".
        source: The model as the user named it.
        recipe: The options that decide the bytes of the result.
        inputs: What else decides them.
        versions: Name of Python or of a library -> its version.
        hardware: What the run computes on; see `describe_hardware`.
        sha256: File name of a finished shard -> SHA-256 of its bytes.
        totals: Figures of the whole run; empty before it is finished.
        replacing: File name of a finished shard -> SHA-256 of the bytes that are about to take its
            place; empty at all other times.
    """

    FILE: ClassVar[str]
    COMMAND: ClassVar[str]

    format: Literal[2] = 2
    state: Literal["running", "finished"] = "running"
    source: str
    recipe: Options
    inputs: RunInputs
    versions: dict[str, str] = Field(default_factory=dict)
    hardware: dict[str, Any] = Field(default_factory=dict)
    sha256: dict[str, str] = Field(default_factory=dict)
    totals: dict[str, Any] = Field(default_factory=dict)
    replacing: dict[str, str] = Field(default_factory=dict, exclude_if=lambda x: not x)

    def save(self, folder: Path) -> None:
        """Write the record atomically."""
        write_json(folder / self.FILE, self.model_dump(mode="json"))

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read the record in a folder.

        Raises:
            FileNotFoundError: The folder has none.
            ValueError: It is damaged, or of another version.
        """
        folder = Path(folder)
        if not (folder / cls.FILE).exists():
            raise FileNotFoundError(f"{folder} has no {cls.FILE}: {cls.COMMAND} did not write it")
        return read_record(folder / cls.FILE, cls)

    def check_same_run(
        self, where: Path | None, recipe: Options, inputs: RunInputs | None = None
    ) -> None:
        """Check that this record belongs to the same run, which may then be resumed.

        Args:
            where: The folder or the file of the record, for the message; None if there is none.
            recipe: The options of the run now.
            inputs: What else its result depends on; None before that is known.

        Raises:
            OtherRunError: The runs differ; names the first option or input that does.
        """
        if other := self.difference(recipe, inputs):
            raise OtherRunError(
                f"{where or 'the output folder'} holds a run with {other}; it is left as it is. "
                "Choose another name for the result, or `overwrite` to replace it"
            )

    def difference(self, recipe: Options, inputs: RunInputs | None = None) -> str:
        """The first option or input in which this record differs from a run, in words.

        It is empty if they are the same run. The arguments are those of `check_same_run`.
        """
        before, now = dict(self.recipe), dict(recipe)
        if inputs is not None:
            # What "auto" meant replaces the recipe's batch and dtype. The recipe's bos is kept.
            before |= self.inputs.deciding()
            now |= inputs.deciding()
        return first_difference(before, now)

    def forget_missing(self, missing: set[str]) -> bool:
        """Forget deleted shards, and what depends on them.

        Args:
            missing: File names of shards that the folder has not.

        Returns:
            Whether that changed the record, so that it must be saved.
        """
        known = missing & self.sha256.keys()
        for name in known:
            del self.sha256[name]
        return bool(known)


class BlockwiseRecord(RunRecord):
    """The record of a run that writes one shard per block.

    Attributes:
        inputs: What decides the result next to the options.
        measured: Name of a block -> SHA-256 of its dense weights, where a measurement before the
            first block read all blocks and decides their results.
        blocks: The entries of the finished blocks, in order.
        shard_count: How many shards the result has: one per block, and a last one for what lies
            outside them. 0 for a loaded model.
    """

    inputs: WindowInputs
    measured: dict[str, str] = Field(default_factory=dict)
    blocks: list[Any] = Field(default_factory=list)
    shard_count: int = 0

    def shard(self, position: int) -> str:
        """File name of the shard of a block; `position` counts the blocks of the result from 0."""
        return shard_name(position, self.shard_count)

    @property
    def outside_shard(self) -> str:
        """File name of the shard of all that lies outside the blocks: embeddings, norm, head."""
        return self.shard(self.shard_count - 1)

    def forget_missing(self, missing: set[str]) -> bool:
        """Forget deleted shards, and every block from the first deleted one on."""
        present = self.sha256.keys() - missing
        lost = next((i for i in range(len(self.blocks)) if self.shard(i) not in present), None)
        if lost is None:
            return super().forget_missing(missing)
        # The blocks after a lost one were calibrated on it, so they are made again as well.
        gone = {self.shard(index) for index in range(lost, len(self.blocks))}
        del self.blocks[lost:]
        super().forget_missing(missing | gone)
        return True


def another(what: str, before: Any, now: Any) -> str:
    """A difference between two runs, in words.

    >>> another("seed", 0, 1)
    'another seed (0, now 1)'
    """
    return f"another {what} ({_brief(before)}, now {_brief(now)})"


def first_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first value of `now` that was another before, in words; "" if there is none."""
    others = (another(key, before.get(key), x) for key, x in now.items() if before.get(key) != x)
    return next(others, "")


def _brief(value: Any) -> str:
    """A value in an error; of a hash, its beginning."""
    text = repr(value)
    return text if len(text) <= 60 else f"{str(value)[:12]}…"


def source_name(record: RunRecord) -> str:
    """The name of the model that a result was made from, without the folders above it."""
    return Path(record.source).name or record.source


def result_card(
    record: RunRecord,
    title: str,
    paragraphs: Iterable[str],
    *,
    tags: Iterable[str],
    relation: Literal["finetune", "quantized", "adapter"] = "finetune",
    fields: Mapping[str, str | None] | None = None,
    source: Path | None = None,
    nbytes: int | None = None,
) -> str:
    """The model card of a result, README.md.

    Args:
        record: The record of the finished run.
        title: What was done, in a word or two; follows the model's name in the heading.
        paragraphs: What the result is; empty ones are left out.
        relation: How the result is related to a base model on the hub, in the hub's words, which
            has none for pruned models.
        tags: Tags for the hub, next to "prunus".
        fields: Fields that replace those that are the same for all commands.
        source: The folder of the source, whose card has fields that hold for the result as well.
        nbytes: Bytes of the files with weights, where no paragraph says it.
    """
    size = "" if nbytes is None else f"The files with the weights take {in_bytes(nbytes)}."
    body = "\n\n".join(
        [
            f"# {source_name(record)}, {title}",
            *filter(None, [*paragraphs, size]),
            f"All figures are in `{record.FILE}`. The command was `{record.COMMAND} "
            f"{source_name(record)} OUTPUT` with these options:",
            f"```toml\n{record.recipe.without_folders().to_toml().rstrip()}\n```",
        ]
    )
    base = base_model(record.source, source)
    common_fields = {
        **inherited_fields(source),
        **({"base_model": base, "base_model_relation": relation} if base is not None else {}),
        "library_name": "transformers",
        "tags": f"[{', '.join(['prunus', *tags])}]",
    }
    return with_fields(f"{body}\n", {**common_fields, **(fields or {})})


def extended_card(card: str | None, title: str, section: str, *, name: str) -> str:
    """The model card with a section on later work.

    Args:
        card: The card before; None if there is none.
        title: Heading of the section. An older section of that title, and all that follows it, is
            replaced.
        section: Text of the section, Markdown.
        name: Name of the model, for the heading of a new card.
    """
    before = (card if card is not None else f"# {name}\n").split(f"## {title}\n")[0].rstrip()
    return f"{before}\n\n## {title}\n\n{section.rstrip()}\n"
