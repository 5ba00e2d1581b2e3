"""What was done to a checkpoint: the file `prunus.json` beside it, which the other commands read.

The manifest never claims more than is on disk. A block is entered after its shard has its final
name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from prunus.model.checkpoint.atomic_files import write_json
from prunus.model.checkpoint.records import check_same_work, read_record
from prunus.pruning.html_table import html_table
from prunus.pruning.recipe import Recipe
from prunus.pruning.records import BlockRecord, LinearRecord, UsedBos, mean_bits

if TYPE_CHECKING:
    import torch

__all__ = [
    "MANIFEST_NAME",
    "Manifest",
    "RunInputs",
]

MANIFEST_NAME = "prunus.json"
#: The number of an expert in a linear's name. All experts count as one kind of linear.
_EXPERT_NUMBER = re.compile(r"\.\d+\.")


class RunInputs(BaseModel):
    """Everything beside the recipe that decides the bytes of the result."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: str = Field(description="fingerprint of the source checkpoint")
    calibration: str = Field(description="where the calibration windows come from")
    calibration_sha256: str
    dtype: str = Field(description="of the forward passes, as decided for 'auto'")
    dtype_reason: str
    device: str = Field(description="cpu or cuda")
    batch: int
    bos: UsedBos = Field(description="whether every calibration window begins with BOS")


class Manifest(BaseModel):
    """The state of a run: "running" until every shard and the index exist, then "finished"."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    state: Literal["running", "finished"] = "running"
    source: str
    recipe: Recipe
    inputs: RunInputs
    versions: dict[str, str]
    hardware: dict[str, Any]
    blocks: list[BlockRecord] = Field(default_factory=list)
    sha256: dict[str, str] = Field(
        default_factory=dict, description="file name of a finished shard -> SHA-256 of its bytes"
    )
    head: LinearRecord | None = None
    allocation: dict[str, float] = Field(
        default_factory=dict,
        description="full name of a linear -> its sparsity; empty if all have the recipe's",
    )
    packed_outside: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="stored name of a packed embedding or head -> its entry in config.json",
    )
    data_dir: str | None = Field(
        default=None,
        description="folder of local datasets that the calibration text came from; None for others",
    )
    left_dense: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    totals: dict[str, Any] = Field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write `prunus.json` atomically."""
        write_json(folder / MANIFEST_NAME, self.model_dump(mode="json"))

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read `prunus.json`.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is damaged or of another format.
        """
        path = folder / MANIFEST_NAME
        if not path.exists():
            raise FileNotFoundError(
                f"{folder} has no {MANIFEST_NAME}: it is not the output of prunus"
            )
        return read_record(path, cls)

    def summary(self) -> dict[str, Any]:
        """Totals over the pruned linears: weights, zeros, sparsity, mean error, seconds."""
        linears = [linear for block in self.blocks for linear in block.linears.values()]
        linears += [self.head] if self.head is not None else []
        weights = sum(linear.shape[0] * linear.shape[1] for linear in linears)
        zeros = sum(linear.zeros for linear in linears)
        errors = [x.relative_output_error for x in linears if x.relative_output_error is not None]
        energy = [x.removed_energy for x in linears if x.removed_energy is not None]
        return {
            "linears": len(linears),
            "weights": weights,
            "zeros": zeros,
            "sparsity": zeros / weights if weights else 0.0,
            "mean_relative_output_error": sum(errors) / len(errors) if errors else None,
            "mean_removed_energy": sum(energy) / len(energy) if energy else None,
            **_bits(linears),
            **_experts(linears),
            "block_seconds": sum(block.seconds for block in self.blocks),
        }

    def linears_by_kind(self) -> dict[str, list[LinearRecord]]:
        """Name of a linear inside its block -> the records of all blocks; the head comes last."""
        kinds: dict[str, list[LinearRecord]] = {}
        for block in self.blocks:
            for name, record in block.linears.items():
                kinds.setdefault(_EXPERT_NUMBER.sub(".*.", name), []).append(record)
        return kinds | ({} if self.head is None else {"output head": [self.head]})

    def _repr_html_(self) -> str:
        """The run as a table in a notebook."""
        compressed, totals = self.recipe.bits is not None, self.all_totals()

        def row(name: str, records: Sequence[LinearRecord], seconds: float) -> list[object]:
            weights = sum(x.shape[0] * x.shape[1] for x in records)
            share = sum(x.zeros for x in records) / weights if weights else 0.0
            errors = [e for x in records if (e := x.relative_output_error) is not None]
            bits = mean_bits(records) if compressed else None
            return [
                name,
                len(records),
                f"{weights:,}",
                f"{share:.2%}",
                *([None if bits is None else f"{bits:.3f}"] if compressed else []),
                f"{sum(errors) / len(errors):.3%}" if errors else None,
                f"{seconds:.1f}",
            ]

        kinds = self.linears_by_kind()
        rows = [row(name, each, sum(x.seconds for x in each)) for name, each in kinds.items()]
        every = [record for each in kinds.values() for record in each]
        work = f"{self.recipe.bits:g} bits" if compressed else self.recipe.method
        columns = ["linear", "count", "weights", "zeros", *(["bits"] if compressed else [])]
        return html_table(
            f"{work}, {self.source}",
            [*columns, "relative output error", "seconds"],
            [*rows, row("all", every, totals["seconds"])],
            "" if self.state == "finished" else "The run is not finished.",
        )

    def all_totals(self) -> dict[str, Any]:
        """The recorded totals, and those that follow from the linears where one is missing.

        A record of another version, or a damaged one, may lack some, or hold text for a number.
        """
        recorded = {
            name: value
            for name, value in self.totals.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        found = self.summary() | recorded
        return found | {"seconds": found.get("seconds", found["block_seconds"])}

    def check_same_run(self, recipe: Recipe, inputs: RunInputs | None = None) -> None:
        """Check that this manifest belongs to the same run.

        Args:
            recipe: Of the run.
            inputs: Of the run; None while they are not known yet.

        Raises:
            FileExistsError: It belongs to another run; names the first difference.
        """
        before, now = self.recipe.model_dump(), recipe.model_dump()
        if inputs is not None:
            # The inputs' batch and dtype replace the recipe's: they say what "auto" meant.
            # The recipe's bos stays: which one it came to shows in the hash of the windows.
            before |= self.inputs.model_dump(exclude={"dtype_reason", "bos"})
            now |= inputs.model_dump(exclude={"dtype_reason", "bos"})
        check_same_work(before, now, "run")

    def close(self, seconds: float, device: torch.device) -> None:
        """Enter the totals and mark the run as finished. The caller writes the files.

        Args:
            seconds: Time of the run; of a resumed run, since it was resumed.
            device: Where blocks ran; a GPU's peak memory is entered too.
        """
        # It imports torch, which whoever only reads a manifest does not need.
        from prunus.hardware.memory import peak_memory

        self.totals = self.summary() | {
            "seconds": round(seconds, 2),
            "peak_memory_bytes": peak_memory(),
        }
        if device.type == "cuda":
            self.totals["peak_device_memory_bytes"] = peak_memory(device)
        self.state = "finished"


def _bits(linears: Sequence[LinearRecord]) -> dict[str, float]:
    """Of a compressed checkpoint: the mean bits per weight, and the zeros that a mask forced.

    All other zeros follow from the rate. Empty for runs that do not compress.
    """
    bits = mean_bits(linears)
    if bits is None:
        return {}
    return {
        "bits": bits,
        "forced_zeros": sum(x.notes.get("forced_zeros", 0) for x in linears),
    }


def _experts(linears: Sequence[LinearRecord]) -> dict[str, int]:
    """How many linears belong to experts, and how many of them were measured on all tokens.

    Empty for models without experts.
    """
    notes = [linear.notes for linear in linears if "routed_tokens" in linear.notes]
    if not notes:
        return {}
    return {
        "expert_linears": len(notes),
        "expert_linears_measured_on_all": sum("measured_on" in each for each in notes),
        "least_routed_tokens": min(each["routed_tokens"] for each in notes),
    }
