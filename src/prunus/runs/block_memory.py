"""The memory that one block needs while it is pruned, in bytes. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

#: Temporaries per weight of a linear while it is pruned: the float32 weight and score, the sorted
#: copy of the score, and the result in the checkpoint's 2-byte dtype.
BYTES_PER_PRUNED_WEIGHT = 14


@dataclass(frozen=True)
class BlockMemory:
    """The memory of one block by purpose, in bytes.

    >>> memory = BlockMemory(weights=40, working=20, hidden=8, paused=16, transient=4)
    >>> memory.total(hidden=True, paused=True), memory.minimum
    (88, 64)

    Attributes:
        weights: The block in the dtype of the computation, the block as stored, and the pruned
            tensors that wait to be written.
        working: The temporaries of the largest linear while it is pruned, and its input
            statistics.
        hidden: The hidden states of all windows between two blocks.
        paused: What windows that pause at a linear hold next to their hidden states; see
            `paused_bytes`.
        transient: The activations of one batch's forward pass; see `transient_bytes`.
    """

    weights: int
    working: int
    hidden: int
    paused: int
    transient: int

    def total(self, *, hidden: bool, paused: bool) -> int:
        """Bytes in all.

        Args:
            hidden: Whether hidden states stay in this memory (otherwise in a file or on the host).
            paused: Whether all windows pause at once (lockstep; otherwise replay or two passes).
        """
        always = self.weights + self.working + self.transient
        return always + hidden * self.hidden + paused * self.paused

    @property
    def minimum(self) -> int:
        """Bytes with the hidden states elsewhere and one batch in flight."""
        return self.total(hidden=False, paused=False)


def paused_bytes(tokens: int, hidden: int, widest: int, itemsize: int) -> int:
    """Bytes that paused windows hold next to their hidden states.

    Per token these are four hidden states (residual, normed input, and queries with keys and
    values), and one activation as wide as the widest linear.

    >>> paused_bytes(tokens=10, hidden=4, widest=16, itemsize=2)
    640
    """
    return tokens * (4 * hidden + widest) * itemsize


def transient_bytes(tokens: int, hidden: int, widest: int, itemsize: int) -> int:
    """Bytes of the activations of one forward pass over `tokens` tokens.

    The arguments are those of `paused_bytes`. The peak lies in the feed-forward network: six hidden
    states and three activations of the widest linear are alive there.

    >>> transient_bytes(tokens=10, hidden=4, widest=16, itemsize=2)
    1440
    """
    return tokens * (6 * hidden + 3 * widest) * itemsize
