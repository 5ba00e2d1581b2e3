"""How much memory a block will need."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BlockCost"]


@dataclass(frozen=True)
class BlockCost:
    """What one block asks of memory, in bytes.

    Attributes:
        weights: the block in the dtype of the computation, its stored form, and the pruned copies that wait
            to be written.
        working: temporaries of the largest linear while it is pruned, and its input statistics.
        hidden: hidden states of all windows between blocks.
        paused: what the windows that stand at a linear hold beside that: residual, normed input,
            queries, keys and values, and the widest activation (four hidden states and one width of the widest
            linear per token).
        transient: one batch's forward pass, in whatever way the windows are walked through the block.
    """

    weights: int
    working: int
    hidden: int
    paused: int
    transient: int

    @property
    def lockstep_in_memory(self) -> int:
        return self.weights + self.working + self.hidden + self.paused + self.transient

    @property
    def lockstep_spilled(self) -> int:
        return self.weights + self.working + self.paused + self.transient

    @property
    def replay_in_memory(self) -> int:
        return self.weights + self.working + self.hidden + self.transient

    @property
    def least(self) -> int:
        """Hidden states on disk, one batch at a time."""
        return self.weights + self.working + self.transient
