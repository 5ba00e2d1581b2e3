"""How a model calls its blocks, and stubs in their place, which record these calls.

Every version of transformers calls the blocks of every family in its own way, with masks, positions
and rotary embeddings. prunus builds none of these by hand: it runs the real model with each block
replaced by a stub, and the stubs keep the arguments that they are called with.

Shape suffixes in docstrings: B windows or images of a batch, T tokens, H hidden size.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from prunus.model.meta_model import fill_with_zeros

#: The end of errors about a model that skips, repeats or reorders its blocks.
_ONCE = "only models that call every block once and in order can be pruned"


class BlockCall(NamedTuple):
    """The arguments with which the model calls one block, apart from the hidden states.

    Masks, positions and rotary embeddings are among them.
    """

    args: tuple[Any, ...]  #: positional arguments after the hidden states
    kwargs: dict[str, Any]  #: keyword arguments, without `hidden_states`


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states in the output of a block: the tensor itself, or the first of a tuple.

    >>> hidden_of((torch.tensor(1.0), "attention weights"))
    tensor(1.)
    """
    return output[0] if isinstance(output, tuple | list) else output


def split_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    """Split the arguments of a block into the hidden states and the others.

    Hidden states are the first positional argument, or the keyword `hidden_states`.

    >>> split_hidden((), {"hidden_states": torch.tensor(1.0), "use_cache": False})
    (tensor(1.), (), {'use_cache': False})
    """
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


def same_arguments(left: Any, right: Any) -> bool:
    """Whether two arguments of a block, or two calls, have equal values.

    Tensors are compared by shape and content, also inside tuples, lists and dicts.

    >>> call, other = (BlockCall((), {"position_ids": torch.arange(x)}) for x in (4, 5))
    >>> same_arguments(call, call), same_arguments(call, other)
    (True, False)
    """
    if left is right:
        return True
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    if isinstance(left, tuple | list):
        return len(left) == len(right) and all(
            same_arguments(a, b) for a, b in zip(left, right, strict=True)
        )
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(
            same_arguments(left[key], right[key]) for key in left
        )
    return bool(left == right)


@contextlib.contextmanager
def replaced_forward(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """While active, calling `module` runs `function` in place of its `forward`; hooks still run.

    Blocks nest: the inner one ends first and brings back the function of the outer one.

    >>> linear = nn.Linear(2, 2)
    >>> with replaced_forward(linear, lambda x: x + 1):
    ...     linear(torch.zeros(2))
    tensor([1., 1.])
    >>> "forward" in vars(linear)
    False
    """
    # An attribute of the instance hides the method of the class. It may be there already, from
    # another replacement or from a library.
    before = module.__dict__.get("forward")
    module.forward = function
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


class StopForward(BaseException):
    """A hook or a stub raises it to end a forward pass whose rest nobody needs.

    It derives from BaseException, so that no `except Exception` in a model's code catches it.
    """


class BlockStubs:
    """Stand-ins for the blocks of one model.

    Args:
        model_name: The model's class, for messages.
        blocks: Its blocks, in order. They are on the meta device while the stubs are in use.
        images: The model takes images, whose hidden states may be grids (images, channels, height,
            width).
    """

    def __init__(self, model_name: str, blocks: Sequence[nn.Module], images: bool = False) -> None:
        self._model_name = model_name
        self._images = images
        self._blocks = blocks
        # Class of a block -> what its forward returns after the hidden states; None if no tuple.
        self._other_outputs: dict[type, tuple[Any, ...] | None] = {}

    def record(self, run: Callable[[], object]) -> tuple[torch.Tensor, list[BlockCall]]:
        """Run a model up to its last block, and record how it calls each block.

        Args:
            run: Calls the model on a batch.

        Returns:
            The hidden states (B, T, H) that the first block receives, and the call of every block.

        Raises:
            NotImplementedError: The model changes hidden states between its blocks, passes them
                in another shape, or does not call each block exactly once and in order.
        """
        calls: list[BlockCall] = []
        first: list[torch.Tensor] = []

        def called(index: int, hidden: torch.Tensor, call: BlockCall) -> torch.Tensor:
            if index != len(calls):
                raise NotImplementedError(
                    f"{self._model_name} calls block {index} where block {len(calls)} was "
                    f"expected; {_ONCE}"
                )
            # A stub returns the tensor that it received. If the next stub receives another one, the
            # model has computed something in between.
            if index > 0 and hidden is not first[0]:
                raise NotImplementedError(
                    f"{self._model_name} changes the hidden states between blocks {index - 1} "
                    f"and {index}; such models cannot be pruned block by block yet"
                )
            if index == 0:
                if hidden.dim() != 3 and not self._images:
                    raise NotImplementedError(
                        f"{self._model_name} passes hidden states of shape "
                        f"{tuple(hidden.shape)} to its blocks, and prunus takes (windows, "
                        "tokens, hidden); such models cannot be pruned yet"
                    )
                first.append(hidden)
            calls.append(call)
            last = index == len(self._blocks) - 1
            # The last block is tried only if it is the only one. `returning` then uses what another
            # block of its class returns, or the tensor alone.
            if index == 0 or not last:
                self._try_block(self._blocks[index], call, hidden)
            if last:
                raise StopForward
            return hidden

        with self._in_place(called), torch.no_grad(), contextlib.suppress(StopForward):
            run()
        if len(calls) != len(self._blocks):
            raise NotImplementedError(
                f"{self._model_name} called {len(calls)} of its {len(self._blocks)} blocks; {_ONCE}"
            )
        return first[0], calls

    def returning(self, hidden: torch.Tensor) -> contextlib.AbstractContextManager[None]:
        """While active, the last block returns `hidden`, and the others return their input."""
        last = len(self._blocks) - 1
        return self._in_place(lambda index, received, _: hidden if index == last else received)

    @contextlib.contextmanager
    def _in_place(
        self, run: Callable[[int, torch.Tensor, BlockCall], torch.Tensor]
    ) -> Iterator[None]:
        """While active, stubs stand in for the blocks.

        Args:
            run: From the number of a block, the hidden states that it receives and its other
                arguments to the hidden states that it returns, in the form in which it returns
                them.
        """

        def stub(index: int, block: nn.Module) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, args, kwargs = split_hidden(args, kwargs)
                output = run(index, hidden, BlockCall(args, kwargs))
                others = self._other_outputs.get(type(block))
                return output if others is None else (output, *others)

            return forward

        with contextlib.ExitStack() as stack:
            for index, block in enumerate(self._blocks):
                stack.enter_context(replaced_forward(block, stub(index, block)))
            yield

    def _try_block(self, block: nn.Module, call: BlockCall, hidden: torch.Tensor) -> None:
        """Find out what blocks of this class return, by running a copy with zero weights.

        What a class returns depends on the version of transformers, and annotations of its forward
        are not reliable. Some models unpack all that a block returns, such as attention weights.
        """
        block_class = type(block)
        if block_class not in self._other_outputs:
            trial = copy.deepcopy(block)
            trial.__dict__.pop("forward", None)  # the copy must not run the stub
            fill_with_zeros(trial, hidden.device)
            output = trial(hidden, *call.args, **call.kwargs)
            is_tuple = isinstance(output, tuple | list)
            self._other_outputs[block_class] = tuple(output[1:]) if is_tuple else None
