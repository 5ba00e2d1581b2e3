"""What a run did to the linears of a checkpoint: the record that prune and compress share.

Imports no torch.
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from prunus.engine.linear_options import LinearOptions
from prunus.engine.run_record import BlockwiseRecord, RecordPart, Walk, bos_words
from prunus.hardware.words import name_patterns

if TYPE_CHECKING:
    from prunus.engine.document import Table

#: The number of an expert in a linear's name. All experts count as one kind of linear.
_EXPERT_NUMBER = re.compile(r"\.\d+\.")


class LinearRecord(RecordPart):
    """What happened to one linear.

    Attributes:
        shape: (out, in).
        zeros: Weights that are exactly zero afterwards.
        sparsity: Share of zeros.
        relative_output_error: ‖X(W−Ŵ)ᵀ‖² / ‖XWᵀ‖² from the Gram matrix; None if the run keeps none.
        removed_energy: Σ (w−ŵ)²‖x_j‖² / Σ w²‖x_j‖² from the norms, as if inputs were uncorrelated;
            None if the run keeps a Gram matrix, or nothing.
        tokens: Calibration tokens that reached the linear.
        seconds: Time to prune it.
        bits: Bits per weight in the compressed file, with all that belongs to the linear; None
            where the run does not compress.
        notes: Remarks of the method, such as raised damping.
    """

    FORMER = ("log2_step", "packed")

    shape: tuple[int, int]
    zeros: int
    sparsity: float
    relative_output_error: float | None = None
    removed_energy: float | None = None
    tokens: int
    seconds: float
    bits: float | None = None
    notes: dict[str, Any] = Field(default_factory=dict)

    @property
    def error(self) -> float | None:
        """The relative output error, or the removed energy where that alone was measured."""
        if self.relative_output_error is not None:
            return self.relative_output_error
        return self.removed_energy


def linear_kind(name: str) -> str:
    """The kind of a linear, by its name in the block: all experts count as one.

    >>> linear_kind("mlp.experts.3.up_proj")
    'mlp.experts.*.up_proj'
    """
    return _EXPERT_NUMBER.sub(".*.", name)


def mean_error(totals: Mapping[str, Any]) -> tuple[str, float | None]:
    """The name of the error that a run measured, and its mean over all linears.

    Args:
        totals: What `LinearsRecord.summary` returns.

    Returns:
        The name, and the mean; None where the run measured no error.
    """
    if totals["mean_relative_output_error"] is not None:
        return "relative output error", totals["mean_relative_output_error"]
    return "removed energy", totals["mean_removed_energy"]


def mean_bits(linears: Iterable[Any]) -> float | None:
    """The mean bits per weight of the linears whose `bits` are recorded; None where none are.

    Args:
        linears: Objects with a `shape` (out, in) and `bits` per weight, which may be None.
    """
    sized = [(x.bits, x.shape[0] * x.shape[1]) for x in linears if x.bits is not None]
    return sum(bits * n for bits, n in sized) / sum(n for _, n in sized) if sized else None


class ReconstructionRecord(RecordPart):
    """What block reconstruction did to a block.

    Attributes:
        error_before: Before the training, on the held-out tokens and in the unit of `measure`.
        error_after: After the training, likewise.
        measure: "outputs": the mean of ‖output − dense output‖² / ‖dense output‖². "logits": the
            KL divergence from the dense model's next token, in nats.
        steps: Gradient steps taken.
        stopped: Why training ended early, or None.
        dtype: The dtype of the matrix products.
        seconds: Time to train.
        step_seconds: Time of a step of the last epoch; 0 in earlier records, as the next.
        validation_seconds: Time of the last validation.
    """

    error_before: float
    error_after: float
    measure: Literal["outputs", "logits"] = "outputs"
    steps: int
    stopped: str | None = None
    dtype: str
    seconds: float
    step_seconds: float = 0.0
    validation_seconds: float = 0.0


class BlockRecord(RecordPart):
    """One finished block.

    Attributes:
        name: Full name of the block.
        input_sha256: Hash of the dense weights that it was made from.
        walk: How the windows went through it.
        seconds: Time for the whole block.
        ranks: Processes that made it. Every rank sums its own part of a Gram matrix, so the last
            bits of methods that use one depend on this number.
        linears: By relative name. Errors are those before reconstruction, zeros and sparsity those
            of the result.
        dense_zeros: By relative name, the zeros of the linears that stayed dense; None in records
            of earlier versions.
        reconstruction: None for blocks that were not reconstructed.
    """

    name: str
    input_sha256: str
    walk: Walk
    seconds: float = 0.0
    ranks: int = 1
    linears: dict[str, LinearRecord]
    dense_zeros: dict[str, int] | None = None
    reconstruction: ReconstructionRecord | None = None


class LinearsRecord(BlockwiseRecord):
    """The record of a run that changes linears; prune and compress have classes of their own.

    Attributes:
        recipe: The options that decide the bytes of the result.
        blocks: The finished blocks, in order.
        head: The pruned output head; None where it stays dense.
        allocation: Full name of a linear -> its sparsity; empty if all have the recipe's.
        method_name: The name that a method of one's own has; empty in records of versions before
            0.5.
        data_dir: Folder of local datasets that the calibration text was read from; None if none.
        left_dense: Weights of the blocks that stay as they are: full name -> shape.
        grid_bits: Bits of the grid that the weights of the model lay on before the run; None if
            they lay on none.
    """

    recipe: LinearOptions
    blocks: list[BlockRecord] = Field(default_factory=list)
    head: LinearRecord | None = None
    allocation: dict[str, float] = Field(default_factory=dict)
    method_name: str = ""
    data_dir: str | None = None
    left_dense: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    grid_bits: int | None = None

    @property
    @abstractmethod
    def what(self) -> str:
        """What was done, in two or three words."""

    def summary(self) -> dict[str, Any]:
        """Totals over the pruned linears of the finished blocks, and the head.

        Means over linears count each linear once, whatever its size, and are None where no linear
        has the figure. `zeros_before` counts the zeros of the dense weights. The figures of bits
        and of experts are missing where a run has none. `sparsity_of_all_linears` is that of all
        linears in the blocks, as `inspect` counts it; it is missing where the record of an earlier
        version does not say it.
        """
        linears = [linear for block in self.blocks for linear in block.linears.values()]
        of_all = self._of_all_linears(linears)
        linears += [self.head] if self.head is not None else []
        weights = sum(linear.shape[0] * linear.shape[1] for linear in linears)
        zeros = sum(linear.zeros for linear in linears)
        bits = mean_bits(linears)
        errors = [x.relative_output_error for x in linears if x.relative_output_error is not None]
        energy = [x.removed_energy for x in linears if x.removed_energy is not None]
        return {
            "linears": len(linears),
            "weights": weights,
            "zeros": zeros,
            "sparsity": zeros / weights if weights else 0.0,
            **of_all,
            "mean_relative_output_error": sum(errors) / len(errors) if errors else None,
            "mean_removed_energy": sum(energy) / len(energy) if energy else None,
            "zeros_before": sum(x.notes.get("zeros_before", 0) for x in linears),
            **({} if bits is None else {"bits": bits}),
            **_experts(linears),
            "block_seconds": sum(block.seconds for block in self.blocks),
        }

    def _of_all_linears(self, changed: Sequence[LinearRecord]) -> dict[str, float]:
        """`sparsity_of_all_linears` of the blocks, whose linears are `changed` or stayed dense."""
        zeros = sum(linear.zeros for linear in changed)
        weights = sum(math.prod(linear.shape) for linear in changed)
        for block in self.blocks:
            if block.dense_zeros is None:
                return {}
            zeros += sum(block.dense_zeros.values())
            keys = (f"{block.name}.{name}.weight" for name in block.dense_zeros)
            weights += sum(math.prod(self.left_dense.get(key, (0,))) for key in keys)
        return {"sparsity_of_all_linears": zeros / weights} if weights else {}

    def table(self) -> Table:
        """One row per kind of linear, and the totals; the head comes last."""
        # Only what shows a record needs documents.
        from prunus.engine.document import table_of

        totals = self.all_totals()
        error, mean = mean_error(totals)

        def row(name: str, records: Sequence[LinearRecord]) -> dict[str, Any]:
            weights = sum(x.shape[0] * x.shape[1] for x in records)
            errors = [x.error for x in records if x.error is not None]
            return {
                "linear": name,
                "count": len(records),
                "weights": weights,
                "zeros": sum(x.zeros for x in records) / weights if weights else 0.0,
                "bits": mean_bits(records),
                error: sum(errors) / len(errors) if errors else None,
                "seconds": sum(x.seconds for x in records),
            }

        kinds: dict[str, list[LinearRecord]] = {}
        for block in self.blocks:
            for name, record in block.linears.items():
                kinds.setdefault(linear_kind(name), []).append(record)
        kinds |= {} if self.head is None else {"output head": [self.head]}
        every = [record for records in kinds.values() for record in records]
        return table_of(
            f"{self.what}, {self.source}",
            [row(name, records) for name, records in kinds.items()],
            {
                "count": ",d",
                "weights": ",d",
                "zeros": ".2%",
                "bits": ".3f",
                error: ".3%",
                "seconds": ".1f",
            },
            "\n".join(self._notes(totals)),
            row("all", every) | {error: mean},
        )

    def _notes(self, totals: dict[str, Any]) -> list[str]:
        """What the table says below its rows."""
        lines = [] if self.state == "finished" else ["The run is not finished."]
        memory = totals.get("peak_memory_bytes")
        lines.append(
            f"computed in {self.inputs.dtype} on {self.inputs.device}, {totals['seconds']:.1f} s; "
            + ("" if memory is None else f"peak memory {memory / 1e9:.2f} GB; ")
            + f"calibration: {self.inputs.calibration}, {bos_words(self.inputs.bos)}"
        )
        if totals["zeros_before"]:
            share = totals["zeros_before"] / totals["weights"]
            lines.append(f"the model had {share:.1%} zeros already")
        if any(block.dense_zeros for block in self.blocks):
            share = totals["sparsity_of_all_linears"]
            lines.append(f"zeros of all linears in the blocks, those left dense too: {share:.2%}")
        if self.grid_bits is not None:
            lines.append(
                f"The weights of the model were rounded to about {self.grid_bits} bits before this "
                "run: beside formats of as many bits it compares better than ordinary weights "
                "would, and the size before is that of unpacked weights (benchmarks/dither.py "
                "makes fair ones of a GGUF file)."
            )
        blocks = tuple(f"{block.name}." for block in self.blocks)
        unused = [name for name in self.left_dense if not name.startswith(blocks)]
        if unused and self.state == "finished":
            names = ", ".join(name_patterns(unused))
            lines.append(f"kept as it is, though the model does not use it: {names}")
        if totals.get("expert_linears"):
            few, count = totals["expert_linears_measured_on_all"], totals["expert_linears"]
            lines.append(
                f"experts: {few} of {count} linears measured on all tokens, because too few chose "
                f"the expert (the fewest: {totals['least_routed_tokens']:,})"
            )
        return lines

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def all_totals(self) -> dict[str, Any]:
        """The recorded totals, and those that follow from the linears where one is missing.

        A record of another version, or a damaged one, may lack some, or hold text for a number.
        """
        recorded = {
            name: value
            for name, value in self.totals.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        totals = self.summary() | recorded
        return totals | {"seconds": totals.get("seconds", totals["block_seconds"])}


def _experts(linears: Sequence[LinearRecord]) -> dict[str, int]:
    """How many linears belong to experts, and how many were measured on all tokens, if any."""
    notes = [linear.notes for linear in linears if "routed_tokens" in linear.notes]
    if not notes:
        return {}
    return {
        "expert_linears": len(notes),
        "expert_linears_measured_on_all": sum("measured_on" in note for note in notes),
        "least_routed_tokens": min(note["routed_tokens"] for note in notes),
    }


def calibration_words(record: LinearsRecord) -> str:
    """Where the calibration windows were taken from."""
    return f"{record.inputs.calibration}, {bos_words(record.inputs.bos)}"
