"""What the manifest says of every linear and every block."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["BlockRecord", "LinearRecord", "ReconstructionRecord", "Walk"]

#: How the windows went through a block; see `prunus.pruning.block.lockstep`.
Walk = Literal["lockstep", "replay", "two_pass"]


class LinearRecord(BaseModel):
    """What happened to one linear.

    Attributes:
        shape: (out, in).
        zeros: weights that are exactly zero afterwards.
        relative_output_error: ‖X(W−Ŵ)ᵀ‖² / ‖XWᵀ‖² from the Gram matrix, where the method kept one.
        removed_energy: Σ (w−ŵ)²‖x_j‖² / Σ w²‖x_j‖²: the same with inputs taken as uncorrelated, where only
            norms were kept.
        tokens: calibration tokens that reached it.
        notes: what the method has to say, such as raised damping.
    """

    model_config = ConfigDict(extra="forbid")

    shape: tuple[int, int]
    zeros: int
    sparsity: float
    relative_output_error: float | None = None
    removed_energy: float | None = None
    tokens: int
    seconds: float
    notes: dict[str, Any] = Field(default_factory=dict)


class ReconstructionRecord(BaseModel):
    """What block matching did to a block.

    Attributes:
        error_before, error_after: mean over held-out tokens of ‖output − dense output‖² / ‖dense output‖², or of the
            divergence from the dense model's next token in nats.
        measure: outputs or logits: which of the two.
        steps: gradient steps taken.
        stopped: why training ended early, or None.
        dtype: of its matrix products.
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
    """One finished block: the hash of the weights it was made from, its linears, how many processes made it.

    Gram matrices are summed rank by rank, so that of methods that need one the last bits depend on `ranks`.
    Errors of the linears are those before block matching, zeros and sparsity those of the result.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    input_sha256: str
    walk: Walk
    seconds: float = 0.0
    ranks: int = 1
    linears: dict[str, LinearRecord]
    reconstruction: ReconstructionRecord | None = None
