"""Block reconstruction: what is trained after a block is pruned, on which batches, and how long.

The surviving weights and biases of a pruned block learn the outputs of the dense block. The masks
stay as they are. `train.py` does the training; this file decides the schedule and turns the result
into tensors as they are stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from prunus.engine.reconstruction.output_loss import LOGIT_STRIDE
from prunus.engine.reconstruction.train import TrainOptions

#: One batch in this many is a validation batch: it is not trained on, and chooses the result.
VALIDATION_STRIDE = 16

# Many small steps lower the error more than few large ones on the same tokens. So a step uses about
# this many tokens of its batch if the trained part treats tokens independently. It uses more if
# five epochs would otherwise not see all of them.
_TOKENS_PER_STEP = 256
_MIN_EPOCHS, _MAX_EPOCHS = 3, 5

# Peak learning rate relative to the RMS of the weights, and the hidden size it was measured at.
_RATE, _RATE_WIDTH = 7e-3, 576

# With the loss on logits, a token takes about ten times as long, so a step compares only one token
# in `LOGIT_STRIDE` of those above. Fewer tokens make noisier gradients, which need a lower rate.
# The number of steps is limited too. 240 steps are what eight epochs over 30 windows of 1024
# tokens take; they compare half of the tokens, each once. With half as many of either, perplexity
# was one per cent higher.
_LOGIT_STEPS, _LOGIT_RATE, _MAX_LOGIT_STRIDE = 240, 2e-3, 28


@dataclass(frozen=True)
class ReconstructionSettings:
    """What a run says about the reconstruction of all its blocks.

    Attributes:
        epochs: Passes over the training batches; None for the block's `default_schedule`.
        dtype: Dtype of matrix products and activations, float32 or bfloat16.
        last_only: Only the last block is reconstructed.
    """

    epochs: int | None
    dtype: torch.dtype
    last_only: bool = False

    def applies_to(self, index: int, blocks: int) -> bool:
        """Whether block `index` of a model with this many `blocks` is reconstructed."""
        return not self.last_only or index == blocks - 1


def default_schedule(
    tokens: int, hidden: int, by_token: bool, batches: int, by_logits: bool = False
) -> TrainOptions:
    """The schedule for a block if the user sets nothing.

    An epoch costs `1 / token_stride` of a pass over all tokens.

    The rate falls with the square root of the width. Relative to the RMS of the weights, 0.007 is
    best for SmolLM2-135M (hidden size 576) and about 0.003 for Qwen2.5-Coder-1.5B (1536). Both
    optima are flat within a factor of 1.5. The dtype is left at float32.

    Args:
        tokens: Number of tokens per batch.
        hidden: Size of the block's hidden states.
        by_token: The trained part of the block can run on some tokens of a batch.
        batches: Number of batches, for training and validation together.
        by_logits: The loss compares logits, as it does for the last block.

    >>> default_schedule(tokens=1024, hidden=576, by_token=True, batches=32)
    TrainOptions(epochs=5, token_stride=4, learning_rate=0.007, logit_stride=1, dtype=torch.float32)
    """
    fewer, most = (LOGIT_STRIDE, _MAX_LOGIT_STRIDE) if by_logits else (1, _MAX_EPOCHS)
    stride = min(most, max(1, fewer * tokens // _TOKENS_PER_STEP)) if by_token else 1
    # Wider blocks learn at a lower rate; narrower ones are not measured, so theirs is not raised.
    width_factor = min(1.0, (_RATE_WIDTH / hidden) ** 0.5)
    if not by_logits:
        # An epoch sees one token in `stride`, so twice as many epochs see every token twice.
        epochs = min(_MAX_EPOCHS, max(_MIN_EPOCHS, 2 * stride))
        return TrainOptions(epochs, stride, _RATE * width_factor)
    # Half as many epochs as the stride see every second token once.
    enough = round(_LOGIT_STEPS / max(1, len(split_batches(batches)[0])))
    epochs = max(1, min(max(_MIN_EPOCHS, stride // 2), enough))
    # A block that must run on all tokens leaves the choice of tokens to the loss.
    logit_stride = 1 if by_token else LOGIT_STRIDE
    return TrainOptions(epochs, stride, _LOGIT_RATE * width_factor, logit_stride)


def split_batches(batches: int) -> tuple[range, range]:
    """The numbers of the training batches and of the validation batches, which come last.

    `batches` is their number on all ranks, at least 2.

    >>> split_batches(32), split_batches(2)
    ((range(0, 30), range(30, 32)), (range(0, 1), range(1, 2)))
    """
    first = batches - max(1, batches // VALIDATION_STRIDE)
    return range(first), range(first, batches)


def linears_to_train(linears: Sequence[str], updated: bool) -> list[str]:
    """Those of a block's pruned linears that are trained.

    After a method that updates weights, these are the ones after attention: that takes half of
    the time for nearly all of the gain. A method that only masks leaves the error of attention as
    it is, so then all are trained. All are trained as well if attention holds all of them.

    Args:
        linears: Relative names in the order in which they run.
        updated: The pruning method updates the surviving weights.

    >>> linears_to_train(["self_attn.q_proj", "mlp.up_proj"], updated=True)
    ['mlp.up_proj']
    >>> linears_to_train(["self_attn.q_proj", "mlp.up_proj"], updated=False)
    ['self_attn.q_proj', 'mlp.up_proj']
    """
    # Attention is taken to be the submodule that holds the first linear.
    first = linears[0].partition(".")[0]
    after = [name for name in linears if updated and name.partition(".")[0] != first]
    return after or list(linears)
