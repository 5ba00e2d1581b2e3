"""The memory that the training of a block takes, in bytes, from shapes alone."""

from __future__ import annotations

from prunus.pruning.reconstruction.kl_loss import CHUNK_TOKENS
from prunus.pruning.reconstruction.reconstruct_block import in_front_of_head
from prunus.runs.job import RunJob


def activation_bytes(
    tokens: int, window_tokens: int, hidden: int, widest: int, heads: int, itemsize: int
) -> int:
    """Bytes of the activations of a block that a backward pass needs.

    Per token these are about 24 hidden states (the residual stream before and after both parts,
    two norms with their statistics, queries, keys, values, outputs, and the gradients of as many),
    eight activations of the widest linear (gate, up, their product and its gradients), and four
    rows of attention scores per head: before and after the softmax, with gradients.
    """
    return itemsize * tokens * (24 * hidden + 8 * widest + 4 * heads * window_tokens)


def training_bytes(job: RunJob, index: int) -> tuple[int, int]:
    """Bytes of the training of block `index`: those that stay, and those of one batch."""
    linears = job.skeleton.linears(index)
    parameters = sum(p.numel() for p in job.skeleton.blocks[index].parameters())
    window_tokens, hidden = job.skeleton.window_shape(index, job.recipe.seqlen)
    tokens = min(job.batch, job.windows) * window_tokens
    widest = max(max(linear.shape) for linear in linears)
    heads = int(getattr(job.source.config.get_text_config(), "num_attention_heads", 1) or 1)
    moves = activation_bytes(tokens, window_tokens, hidden, widest, heads, itemsize=4)
    if in_front_of_head(job.skeleton, index):
        # The head, and for some tokens the logits of both models; see `kl_divergence`.
        vocabulary = job.skeleton.vocabulary
        moves += vocabulary * hidden * job.dtype.itemsize
        moves += 24 * CHUNK_TOKENS * job.batch * vocabulary
    # Six float32 tensors per parameter: the weight, its gradient, Adam's two moments, a copy of the
    # start and a copy of the best so far.
    return 6 * 4 * parameters, moves
