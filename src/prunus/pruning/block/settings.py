"""The settings of a run that decide how its blocks and linears are pruned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from prunus.methods import Method, Work
from prunus.methods.statistics import Drift, StatisticsSpec
from prunus.pruning.reconstruction.schedule import ReconstructionSettings


@dataclass(frozen=True, kw_only=True)
class LinearSettings:
    """How a linear is pruned.

    Attributes:
        work: what is asked of it. How its rows are split and rounded is decided linear by linear.
    """

    method: Method
    work: Work


def _no_dense_target(_in_features: int) -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class BlockSettings:
    """How every block of a run is pruned.

    Attributes:
        min_expert_tokens: an expert that fewer tokens choose is measured on all tokens; None for
            the method's own minimum. See `hooks.py`.
        reconstruction: how blocks are reconstructed after they are pruned, or None.
        uses_dense_target: whether a linear with this number of inputs is pruned towards the outputs
            of the dense model.
    """

    linear: LinearSettings
    device: torch.device
    sparsities: Mapping[str, float] = field(default_factory=dict)
    min_expert_tokens: int | None = None
    reconstruction: ReconstructionSettings | None = None
    drift_stride: int = 1
    uses_dense_target: Callable[[int], bool] = _no_dense_target

    @property
    def runs_dense_stream(self) -> bool:
        """Whether the hidden states of the dense model are needed."""
        return self.linear.method.needs_drift or self.reconstruction is not None

    def for_linear(self, full_name: str) -> LinearSettings:
        """The settings of one linear, with a sparsity of its own where it has one."""
        work = self.linear.work
        sparsity = self.sparsities.get(full_name, work.sparsity)
        return replace(self.linear, work=replace(work, sparsity=sparsity))

    def statistics_spec(self, in_features: int, distributed: bool) -> StatisticsSpec:
        """The statistics that the method needs of a linear with `in_features` inputs."""
        method = self.linear.method
        drift: Drift = "some" if self.drift_stride > 1 else "all"
        return StatisticsSpec(
            needs=method.needs,
            drift=drift if self.uses_dense_target(in_features) else "none",
            hold_out=method.needs_held_out,
            low_precision=method.adds_ridge,
            reference_order=self.linear.work.reference_order,
            distributed=distributed,
        )
