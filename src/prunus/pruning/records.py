"""What the manifest says about every linear and every block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from prunus.runs.record import Walk


class LinearRecord(BaseModel):
    """What happened to one linear.

    Attributes:
        shape: (out, in).
        zeros: Weights that are exactly zero afterwards.
        sparsity: Share of zeros.
        relative_output_error: ‖X(W−Ŵ)ᵀ‖² / ‖XWᵀ‖² from the Gram matrix; None if the method keeps
            none.
        removed_energy: Σ (w−ŵ)²‖x_j‖² / Σ w²‖x_j‖² from the norms, as if inputs were uncorrelated;
            None if the method keeps a Gram matrix, or nothing.
        tokens: Calibration tokens that reached the linear.
        seconds: Time to prune it.
        bits: Bits per weight in the compressed file, with all that belongs to the linear; None
            where the run does not compress.
        log2_step: log2 of the step that the rate control gave it; see `rate_control.py`.
        packed: The linear's entry in the config.json of the compressed checkpoint, or None.
        notes: Remarks of the method, such as raised damping.
    """

    model_config = ConfigDict(extra="forbid")

    shape: tuple[int, int]
    zeros: int
    sparsity: float
    relative_output_error: float | None = None
    removed_energy: float | None = None
    tokens: int
    seconds: float
    bits: float | None = None
    log2_step: float | None = None
    packed: dict[str, Any] | None = None
    notes: dict[str, Any] = Field(default_factory=dict)

    @property
    def error(self) -> float | None:
        """The relative output error, or the removed energy where that alone was measured."""
        if self.relative_output_error is not None:
            return self.relative_output_error
        return self.removed_energy


def mean_error(totals: Mapping[str, Any]) -> tuple[str, float | None]:
    """The name of the error that a run measured, and its mean over all linears."""
    if totals["mean_relative_output_error"] is not None:
        return "relative output error", totals["mean_relative_output_error"]
    return "removed energy", totals["mean_removed_energy"]


class SizedLinear(Protocol):
    """A linear whose size in a file may be known: bits per weight, or None."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def bits(self) -> float | None: ...


def mean_bits(linears: Iterable[SizedLinear]) -> float | None:
    """The mean bits per weight of those linears whose bits are known; None where none are."""
    known = [(x.bits, x.shape[0] * x.shape[1]) for x in linears if x.bits is not None]
    return sum(bits * n for bits, n in known) / sum(n for _, n in known) if known else None


class ReconstructionRecord(BaseModel):
    """What block reconstruction did to a block.

    Attributes:
        error_before, error_after: On the held-out tokens, in the unit of `measure`.
        measure: "outputs": the mean of ‖output − dense output‖² / ‖dense output‖². "logits": the
            KL divergence from the dense model's next token, in nats.
        steps: Gradient steps taken.
        stopped: Why training ended early, or None.
        dtype: Of the matrix products.
        seconds: Time to train.
    """

    model_config = ConfigDict(extra="forbid")

    error_before: float
    error_after: float
    measure: Literal["outputs", "logits"] = "outputs"
    steps: int
    stopped: str | None = None
    dtype: str
    seconds: float


class BlockRecord(BaseModel):
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
        reconstruction: None for blocks that were not reconstructed.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    input_sha256: str
    walk: Walk
    seconds: float = 0.0
    ranks: int = 1
    linears: dict[str, LinearRecord]
    reconstruction: ReconstructionRecord | None = None
