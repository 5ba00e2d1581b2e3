"""The model without its weights, and how it calls its blocks.

The skeleton is the real transformers model with every parameter on the meta device. Only what surrounds
the blocks (embeddings, rotary tables) is given weights, and only while it is used. Running it with every
block replaced by a stub tells exactly how this version of transformers calls each block: no mask, position
or rotary embedding is built by hand here.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from prunus.model.families import find_block_list
from prunus.model.linears import Linear, find_linears, left_dense

__all__ = ["BlockCall", "Skeleton", "hidden_of"]

ReadTensors = Callable[[list[str], nn.Module], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class BlockCall:
    """The arguments with which the model calls one block, besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def same_as(self, other: BlockCall) -> bool:
        """Whether both calls pass equal values."""
        return _equal(self.args, other.args) and _equal(self.kwargs, other.kwargs)


class _LastBlockReached(BaseException):
    """Ends a recording run: the final norm and the head are of no interest."""


class Skeleton:
    """A causal LM on the meta device, taken apart into blocks and what surrounds them.

    Args:
        config: a transformers configuration of a causal LM.
        dtype: dtype of the computation; parameters that the model itself keeps in float32 stay so.
        trust_remote_code: let transformers run code that comes with the checkpoint.

    Raises:
        ValueError: transformers knows no causal LM for this configuration.
        NotImplementedError: the model is not a stack of blocks of linears (see `families`, `linears`).
    """

    def __init__(self, config: Any, dtype: torch.dtype, trust_remote_code: bool = False) -> None:
        with _parameters_on_meta():
            # Buffers are computed for real: rotary frequencies and the like are in no checkpoint.
            try:
                self.model = AutoModelForCausalLM.from_config(
                    copy.deepcopy(config), dtype=dtype, trust_remote_code=trust_remote_code
                )
            except ValueError as fault:
                # The first line says it; then transformers lists some hundred classes that it would have taken.
                raise ValueError(
                    f"transformers makes no causal language model of model type {config.model_type!r}: "
                    f"{str(fault).strip().splitlines()[0]}"
                ) from fault
        self.model.eval().requires_grad_(False)
        self.dtype = dtype
        self.path, self.blocks = find_block_list(self.model)
        self._returns_tuple: dict[type, bool] = {}
        inside = {id(module) for module in self.blocks.modules()}
        self._outer_modules = [module for module in self.model.modules() if id(module) not in inside]

    def __len__(self) -> int:
        return len(self.blocks)

    def block_name(self, index: int) -> str:
        """Path of a block in the model, e.g. `model.layers.17`."""
        return f"{self.path}.{index}"

    def linears(self, index: int) -> list[Linear]:
        """The prunable linears of a block."""
        return find_linears(self.blocks[index])

    def left_dense(self, index: int) -> dict[str, tuple[int, ...]]:
        """Full name -> shape of the weights of a block that no method prunes."""
        found = left_dense(self.blocks[index], self.linears(index))
        return {f"{self.block_name(index)}.{name}": shape for name, shape in found.items()}

    @property
    def outer_parameter_names(self) -> list[str]:
        """Names of parameters and persistent buffers outside the blocks."""
        prefix = f"{self.path}."
        return [name for name in self.model.state_dict() if not name.startswith(prefix)]

    @contextlib.contextmanager
    def surroundings(self, read: ReadTensors, device: torch.device) -> Iterator[None]:
        """Give the embeddings (what runs before the blocks) their weights for the length of a `with`."""
        head = self.model.get_output_embeddings()
        skipped = {id(p) for p in head.parameters()} if head is not None else set()
        embedding = self.model.get_input_embeddings()
        skipped -= {id(p) for p in embedding.parameters()}  # a tied head is the embedding
        state = self.model.state_dict(keep_vars=True)
        names = [n for n in self.outer_parameter_names if id(state[n]) not in skipped]
        try:
            place(self.model, read(names, self.model), device)
            for module in self._outer_modules:
                _move_buffers(module, device)
            # Two tokens are enough to learn what the blocks return before long inputs come.
            self.record(torch.zeros((1, 2), dtype=torch.int64, device=device))
            yield
        finally:
            release(self.model)

    def record(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, list[BlockCall]]:
        """Run everything before the blocks on `input_ids` (batch, tokens) inside `surroundings`.

        Returns:
            The first block's hidden states (batch, tokens, hidden), and the call of every block.

        Raises:
            NotImplementedError: the model changes hidden states between its blocks, or does not call each
                block exactly once in order.
        """
        calls: list[BlockCall] = []
        first: list[torch.Tensor] = []

        def stub(index: int) -> Callable[..., Any]:
            block = self.blocks[index]

            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, args, kwargs = _split_hidden(args, kwargs)
                if index != len(calls):
                    raise NotImplementedError(
                        f"{type(self.model).__name__} calls block {index} where block {len(calls)} was expected; "
                        "only models that call every block once and in order can be pruned"
                    )
                if index > 0 and hidden is not first[0]:
                    raise NotImplementedError(
                        f"{type(self.model).__name__} changes the hidden states between blocks {index - 1} and "
                        f"{index}; such models cannot be pruned block by block yet"
                    )
                if index == 0:
                    first.append(hidden)
                calls.append(BlockCall(args, kwargs))
                if index == len(self.blocks) - 1:
                    raise _LastBlockReached
                return (hidden,) if self._returns_tuple_of(block, calls[-1], hidden) else hidden

            return forward

        originals = [block.__dict__.get("forward") for block in self.blocks]
        try:
            for index, block in enumerate(self.blocks):
                block.forward = stub(index)
            with torch.no_grad(), contextlib.suppress(_LastBlockReached):
                self.model.base_model(input_ids=input_ids, use_cache=False)
        finally:
            for block, original in zip(self.blocks, originals, strict=True):
                if original is None:
                    block.__dict__.pop("forward", None)
                else:
                    block.forward = original
        if len(calls) != len(self.blocks):
            raise NotImplementedError(
                f"{type(self.model).__name__} called {len(calls)} of its {len(self.blocks)} blocks"
            )
        return first[0], calls

    def _returns_tuple_of(self, block: nn.Module, call: BlockCall, hidden: torch.Tensor) -> bool:
        """Whether blocks of this class return a tuple (hidden first): seen by running one made of zeros."""
        kind = type(block)
        if kind not in self._returns_tuple:
            trial = copy.deepcopy(block)
            trial.__dict__.pop("forward", None)
            _fill_with_zeros(trial, hidden.device)
            output = trial(hidden, *call.args, **call.kwargs)
            self._returns_tuple[kind] = isinstance(output, tuple | list)
        return self._returns_tuple[kind]

    def fill(self, index: int, values: Mapping[str, torch.Tensor], device: torch.device) -> nn.Module:
        """Give block `index` its weights (names relative to the block) and return it, ready to run."""
        block = self.blocks[index]
        place(block, values, device)
        for module in block.modules():
            _move_buffers(module, device)
        return block

    def release(self, index: int) -> None:
        """Take the weights of a block away again."""
        release(self.blocks[index])


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states in what a block returned: the tensor itself, or the first of a tuple."""
    return output[0] if isinstance(output, tuple | list) else output


def place(module: nn.Module, values: Mapping[str, torch.Tensor], device: torch.device | None = None) -> None:
    """Replace parameters and buffers by `values`, converted to the dtype that each has in the skeleton.

    Floating-point values are copied, so that no mapped file is kept alive. Tied parameters stay tied.
    """
    replaced: dict[int, nn.Parameter] = {}
    for name, value in values.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        old = owner._parameters.get(leaf)
        if old is None:
            buffer = owner._buffers[leaf]
            assert buffer is not None
            owner._buffers[leaf] = value.to(device=device or value.device, dtype=buffer.dtype, copy=True)
            continue
        new = value.to(device=device or value.device, dtype=old.dtype, copy=True)
        replaced[id(old)] = nn.Parameter(new, requires_grad=False)
    for owner in module.modules():
        for leaf, old in owner._parameters.items():
            if old is not None and id(old) in replaced:
                owner._parameters[leaf] = replaced[id(old)]


def release(module: nn.Module) -> None:
    """Send every parameter back to the meta device; ties are kept."""
    empty: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for leaf, old in owner._parameters.items():
            if old is not None and old.device.type != "meta":
                new = empty.setdefault(id(old), nn.Parameter(old.to("meta"), requires_grad=False))
                owner._parameters[leaf] = new


def _fill_with_zeros(module: nn.Module, device: torch.device) -> None:
    """Parameters of zeros that take no memory: one element each, read again and again."""
    for owner in module.modules():
        _move_buffers(owner, device)
        for leaf, old in owner._parameters.items():
            if old is not None:
                zeros = torch.zeros((), dtype=old.dtype, device=device).expand(old.shape)
                owner._parameters[leaf] = nn.Parameter(zeros, requires_grad=False)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """While active, every parameter that a module registers goes to the meta device; buffers stay real."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        original(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.device != device:
            module._buffers[name] = buffer.to(device)


def _split_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


def _equal(left: Any, right: Any) -> bool:
    if left is right:
        return True
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, tuple | list):
        return len(left) == len(right) and all(_equal(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_equal(left[key], right[key]) for key in left)
    return bool(left == right)
