"""Stubs in place of the blocks of a model: they record its calls, and stand in for the blocks.

Every version of transformers calls the blocks of every family in its own way, with masks, positions
and rotary embeddings. prunus builds none of these by hand: it runs the real model with each block
replaced by a stub, and the stubs keep the arguments that they are called with.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from prunus.model import placement
from prunus.model.calls import BlockCall, replaced_forward, split_hidden


class _LastBlockReached(BaseException):
    """Ends a recording run early: the final norm and the head are not needed."""


class BlockStubs:
    """Stand-ins for the blocks of one model."""

    def __init__(self, model_name: str, blocks: Sequence[nn.Module], images: bool = False) -> None:
        self._model_name = model_name
        self._images = images
        self._blocks = blocks
        # Class of a block -> what its forward returns after the hidden states; None if it returns
        # the hidden states alone, not in a tuple.
        self._other_outputs: dict[type, tuple[Any, ...] | None] = {}

    def record(self, run: Callable[[], object]) -> tuple[torch.Tensor, list[BlockCall]]:
        """Run a model up to its last block, and record how it calls each block.

        Returns:
            The hidden states (batch, tokens, hidden) that the first block receives, and the call of
            every block.
        """
        calls: list[BlockCall] = []
        first: list[torch.Tensor] = []

        def stub(index: int) -> Callable[..., Any]:
            block = self._blocks[index]

            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, args, kwargs = split_hidden(args, kwargs)
                if index != len(calls):
                    raise NotImplementedError(
                        f"{self._model_name} calls block {index} where block {len(calls)} was "
                        "expected; only models that call every block once and in order can be "
                        "pruned"
                    )
                # A stub returns the tensor that it received. If the next stub receives another
                # one, the model has computed something in between.
                if index > 0 and hidden is not first[0]:
                    raise NotImplementedError(
                        f"{self._model_name} changes the hidden states between blocks {index - 1} "
                        f"and {index}; such models cannot be pruned block by block yet"
                    )
                if index == 0:
                    self._check_shape(hidden)
                    first.append(hidden)
                calls.append(BlockCall(args, kwargs))
                if index == len(self._blocks) - 1:
                    if index == 0:
                        # No other block shows what this class returns; see `returning`.
                        self._try_block(block, calls[-1], hidden)
                    raise _LastBlockReached
                self._try_block(block, calls[-1], hidden)
                return self._as_returned(block, hidden)

            return forward

        with self._in_place(stub), torch.no_grad(), contextlib.suppress(_LastBlockReached):
            run()
        if len(calls) != len(self._blocks):
            raise NotImplementedError(
                f"{self._model_name} called {len(calls)} of its {len(self._blocks)} blocks; only "
                "models that call every block once and in order can be pruned"
            )
        return first[0], calls

    def returning(self, hidden: torch.Tensor) -> contextlib.AbstractContextManager[None]:
        """While active, the last block returns `hidden`, and the others return their input."""

        def stub(index: int) -> Callable[..., Any]:
            block = self._blocks[index]

            def forward(*args: Any, **kwargs: Any) -> Any:
                last = index == len(self._blocks) - 1
                output = hidden if last else split_hidden(args, kwargs)[0]
                return self._as_returned(block, output)

            return forward

        return self._in_place(stub)

    @contextlib.contextmanager
    def _in_place(self, stub: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
        """While active, block i runs `stub(i)` in place of its forward."""
        with contextlib.ExitStack() as stack:
            for index, block in enumerate(self._blocks):
                stack.enter_context(replaced_forward(block, stub(index)))
            yield

    def _as_returned(self, block: nn.Module, hidden: torch.Tensor) -> Any:
        """Hidden states in the form in which a block returns them."""
        others = self._other_outputs.get(type(block))
        return hidden if others is None else (hidden, *others)

    def _try_block(self, block: nn.Module, call: BlockCall, hidden: torch.Tensor) -> None:
        """Find out what blocks of this class return; runs a copy with zero weights to see it.

        What a class returns depends on the version of transformers, and annotations of its forward
        are not reliable. Some models unpack all that a block returns, such as attention weights.
        """
        kind = type(block)
        if kind not in self._other_outputs:
            trial = copy.deepcopy(block)
            trial.__dict__.pop("forward", None)  # the copy must not run the stub
            placement.fill_with_zeros(trial, hidden.device)
            output = trial(hidden, *call.args, **call.kwargs)
            self._other_outputs[kind] = (
                tuple(output[1:]) if isinstance(output, tuple | list) else None
            )

    def _check_shape(self, hidden: torch.Tensor) -> None:
        """Refuse hidden states of text that have more axes than (windows, tokens, hidden)."""
        if hidden.dim() != 3 and not self._images:
            raise NotImplementedError(
                f"{self._model_name} passes hidden states of shape {tuple(hidden.shape)} to its "
                "blocks, and prunus takes (windows, tokens, hidden); such models cannot be pruned "
                "yet"
            )
