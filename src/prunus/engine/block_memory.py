"""What fits in memory, and so where the data of a run live and how they move.

`with_memory` (run_plan.py) finds a `BlockMemory` for each block by shapes. `Memory`
decides by it whether hidden states stay, whether the windows run through a block in lockstep, and
whether reading and writing overlap with computing. It holds numbers, no model and no options.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Tokens per window whose logits are in memory at a time. With a vocabulary of 150,000, these are
#: 77 MB per window and tensor in float32.
CHUNK_TOKENS = 128


@dataclass(frozen=True)
class BlockMemory:
    """The memory of one block by purpose, in bytes.

    >>> memory = BlockMemory(weights=40, working=20, hidden=8, paused=16, transient=4)
    >>> memory.total(hidden=True, paused=True), memory.minimum
    (88, 64)

    Attributes:
        weights: The block in the dtype of the computation, the block as stored, and the pruned
            tensors that wait to be written.
        working: The temporaries of the largest linear while it is pruned, and its input statistics.
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
            hidden: Whether hidden states stay in this memory; otherwise a file or the host has
                them.
            paused: Whether all windows pause at once, as in lockstep; otherwise one batch does.
        """
        always = self.weights + self.working + self.transient
        return always + hidden * self.hidden + paused * self.paused

    @property
    def minimum(self) -> int:
        """Bytes with the hidden states elsewhere and one batch in flight."""
        return self.total(hidden=False, paused=False)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The budgets of a run and what its blocks need. All numbers are bytes.

    Attributes:
        budget: Memory for the run on its device.
        host_budget: Memory for the run on the host. Where blocks run on the host, both are the
            same.
        on_host: Whether blocks run on the host's processor.
        reads_files: Whether blocks are read from a checkpoint; a loaded model is in memory.
        blocks: The need of each block by purpose; empty until it is measured.
        stored_nbytes: The size of each block in the checkpoint.
        outside: The size of what lies outside the blocks in the checkpoint; 0 for a loaded model.
    """

    budget: int
    host_budget: int
    on_host: bool
    reads_files: bool
    blocks: tuple[BlockMemory, ...] = ()
    stored_nbytes: tuple[int, ...] = ()
    outside: int = 0

    @property
    def hidden_states_stay(self) -> bool:
        """Whether hidden states stay on the device between blocks.

        They do if they fit there next to one batch in flight, and if keeping them elsewhere would
        not let more blocks run in lockstep. Reading them back costs less than a second pass.
        """
        fits = all(memory.total(hidden=True, paused=False) <= self.budget for memory in self.blocks)
        return fits and self._in_lockstep(hidden=True) >= self._in_lockstep(hidden=False)

    def _in_lockstep(self, *, hidden: bool) -> int:
        """How many blocks can run in lockstep, with the hidden states here or elsewhere."""
        needed = (memory.total(hidden=hidden, paused=True) for memory in self.blocks)
        return sum(nbytes <= self.budget for nbytes in needed)

    @property
    def spills(self) -> bool:
        """Whether a file holds the hidden states: neither the device nor the host has room."""
        if self.hidden_states_stay:
            return False
        largest = max(memory.hidden for memory in self.blocks)
        return self.on_host or largest > self.host_budget

    def fits_lockstep(self, index: int) -> bool:
        """Whether all batches can pause in block `index` at once."""
        needed = self.blocks[index].total(hidden=self.hidden_states_stay, paused=True)
        return needed <= self.budget

    @property
    def overlaps(self) -> bool:
        """Whether the next block is read and the last one written while one is changed.

        This takes memory for two blocks more, and changes nothing but the time.
        """
        return self.reads_files and all(
            self.host_bytes(index) + self.overlap_bytes(index) <= self.host_budget
            for index in range(len(self.blocks))
        )

    def overlap_bytes(self, index: int) -> int:
        """Bytes of the block that is read and of the one that is written next to block `index`."""
        near = [i for i in (index - 1, index + 1) if 0 <= i < len(self.blocks)]
        return sum(self.stored_nbytes[i] for i in near)

    def host_bytes(self, index: int) -> int:
        """Bytes that block `index` needs on the host, with nothing read or written meanwhile."""
        memory = self.blocks[index]
        if not self.on_host:
            return 0 if self.hidden_states_stay or self.spills else memory.hidden
        return memory.total(hidden=self.hidden_states_stay, paused=self.fits_lockstep(index))

    def peak_bytes(self) -> int:
        """The largest need of any block on the device, or of what is before them, in bytes."""
        stay, overlaps = self.hidden_states_stay, self.overlaps and self.on_host
        needed = [
            memory.total(hidden=stay, paused=self.fits_lockstep(index))
            + overlaps * self.overlap_bytes(index)
            for index, memory in enumerate(self.blocks)
        ]
        if self.reads_files:
            # The embedding is in memory while it is applied to the windows and block 0 is read.
            first = stay * self.blocks[0].hidden + overlaps * self.stored_nbytes[0]
            needed.append(self.outside + first)
        return max(needed)

    @property
    def least_bytes(self) -> int:
        """The smallest budget of the device with which the run can be done, in bytes.

        Hidden states are then elsewhere, windows go through a block batch by batch, and nothing is
        read or written meanwhile.
        """
        return max(self.outside, *(memory.minimum for memory in self.blocks))

    @property
    def spilled_bytes(self) -> int:
        """Bytes of the file that holds the hidden states; 0 without one."""
        return max(memory.hidden for memory in self.blocks) if self.spills else 0


def paused_bytes(tokens: int, hidden: int, widest: int, itemsize: int) -> int:
    """Bytes that paused windows hold next to their hidden states.

    Per token these are four hidden states (residual, normed input, and queries with keys and
    values), and one activation as wide as the widest linear.

    Args:
        tokens: Tokens of all windows that pause.
        hidden: Width of a hidden state.
        widest: The largest width, of inputs or outputs, of any linear of the block.
        itemsize: Bytes of a number.

    >>> paused_bytes(tokens=10, hidden=4, widest=16, itemsize=2)
    640
    """
    return tokens * (4 * hidden + widest) * itemsize


def transient_bytes(tokens: int, hidden: int, widest: int, itemsize: int) -> int:
    """Bytes of the activations of one forward pass over `tokens` tokens.

    The peak lies in the feed-forward network. Six hidden states and three activations of the widest
    linear are in memory there. The other arguments are those of `paused_bytes`.

    >>> transient_bytes(tokens=10, hidden=4, widest=16, itemsize=2)
    1440
    """
    return tokens * (6 * hidden + 3 * widest) * itemsize


def activation_bytes(
    tokens: int, window_tokens: int, hidden: int, widest: int, heads: int, itemsize: int
) -> int:
    """Bytes of the activations of a block that a backward pass needs.

    Args:
        tokens: Number of tokens in a batch.
        window_tokens: Number of tokens in a window. Attention is among these.
        hidden: Size of the hidden states.
        widest: Inputs or outputs of the widest linear, whichever are more.
        heads: Number of attention heads.
        itemsize: Bytes per number.

    Per token these are about 24 hidden states (the residual stream before and after both parts,
    two norms with their statistics, queries, keys, values, outputs, and the gradients of as many),
    eight activations of the widest linear (gate, up, their product and its gradients), and four
    rows of attention scores per head: before and after the softmax, with gradients.
    """
    return itemsize * tokens * (24 * hidden + 8 * widest + 4 * heads * window_tokens)
