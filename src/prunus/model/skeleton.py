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
from typing import Any

import torch
import transformers
from torch import nn

from prunus.model import placement
from prunus.model.block_lists import find_block_list
from prunus.model.calls import BlockCall, split_hidden
from prunus.model.experts import Fused, fused_experts, fusing_rules, take_apart
from prunus.model.kinds import CAUSAL, IMAGES, image_tokens, kind_of
from prunus.model.linears import Linear, find_linears, left_dense

__all__ = ["Skeleton"]

ReadTensors = Callable[[list[str], nn.Module], dict[str, torch.Tensor]]


class _LastBlockReached(BaseException):
    """Ends a recording run: the final norm and the head are of no interest."""


class _HeadReached(BaseException):
    """Ends a run through the final norm: only what the head is given is of interest."""


class Skeleton:
    """A model on the meta device, taken apart into blocks and what surrounds them.

    Args:
        config: a transformers configuration of a causal LM, a masked LM or an image classifier; see `kinds`.
        dtype: dtype of the computation; parameters that the model itself keeps in float32 stay so.
        trust_remote_code: let transformers run code that comes with the checkpoint.

    Raises:
        ValueError: transformers makes no model of this configuration.
        NotImplementedError: it is of another kind, or not a stack of blocks of linears (see `families`, `linears`).
    """

    def __init__(self, config: Any, dtype: torch.dtype, trust_remote_code: bool = False) -> None:
        self.kind = kind_of(config)
        with placement.parameters_on_meta():
            # Buffers are computed for real: rotary frequencies and the like are in no checkpoint.
            try:
                self.model = getattr(transformers, self.kind.loader).from_config(
                    copy.deepcopy(config), dtype=dtype, trust_remote_code=trust_remote_code
                )
            except ValueError as fault:
                # The first line says it; then transformers lists some hundred classes that it would have taken.
                raise ValueError(
                    f"transformers makes no {self.kind.name} of model type {config.model_type!r}: "
                    f"{(str(fault).strip().splitlines() or [''])[0]}"
                ) from fault
            except ImportError:
                raise
            except (
                Exception
            ) as fault:  # a damaged configuration: of any kind, and from anywhere in a model's code
                raise ValueError(
                    f"transformers cannot make the model of type {config.model_type!r} that the configuration describes: "
                    f"{type(fault).__name__}: {' '.join(str(fault).split())[:300]}"
                ) from fault
        self.model.eval().requires_grad_(False)
        self.dtype = dtype
        self.path, self.blocks = find_block_list(self.model)
        # Per block: tensors of the checkpoint's or the loaded model's that are several linears here.
        rules = fusing_rules(self.model) if fused_experts(self.blocks) else []
        self._fused = [
            take_apart(rules, block, self.block_name(i)) for i, block in enumerate(self.blocks)
        ]
        self._returns_tuple: dict[type, bool] = {}
        inside = {id(module) for module in self.blocks.modules()}
        self._outer_modules = [
            module for module in self.model.modules() if id(module) not in inside
        ]

    def __len__(self) -> int:
        return len(self.blocks)

    def block_name(self, index: int) -> str:
        """Path of a block in the model, e.g. `model.layers.17`."""
        return f"{self.path}.{index}"

    def linears(self, index: int) -> list[Linear]:
        """The prunable linears of a block."""
        return find_linears(self.blocks[index])

    def fused(self, index: int) -> list[Fused]:
        """The tensors of a block that are taken apart into linears here: fused experts."""
        return self._fused[index]

    def left_dense(self, index: int) -> dict[str, tuple[int, ...]]:
        """Full name -> shape of the weights of a block that no method prunes."""
        found = left_dense(self.blocks[index], self.linears(index))
        return {f"{self.block_name(index)}.{name}": shape for name, shape in found.items()}

    @property
    def outside_parameter_names(self) -> list[str]:
        """Names of parameters and persistent buffers outside the blocks."""
        prefix = f"{self.path}."
        return [name for name in self.model.state_dict() if not name.startswith(prefix)]

    @contextlib.contextmanager
    def outside_blocks(
        self,
        read: ReadTensors,
        device: torch.device,
        with_head: bool = False,
        with_embedding: bool = True,
    ) -> Iterator[None]:
        """Give what surrounds the blocks its weights for the length of a `with`.

        An untied head gets its weights only `with_head`; without `with_embedding` an untied embedding gets none and
        gives zeros, for when only what comes after the blocks is of interest.
        """
        head = self._output_head()
        embedding: Any = (
            self.model.get_input_embeddings() if self.kind is not IMAGES else nn.Module()
        )
        of_head = {id(p) for p in head.parameters()} if head is not None else set()
        of_embedding = {id(p) for p in embedding.parameters()}
        skipped = set() if with_head else of_head - of_embedding  # a tied head is the embedding
        blank = (
            not with_embedding
            and isinstance(embedding, nn.Embedding)
            and not of_head & of_embedding
        )
        if blank:
            skipped |= of_embedding
        state = self.model.state_dict(keep_vars=True)
        names = [n for n in self.outside_parameter_names if id(state[n]) not in skipped]
        with contextlib.ExitStack() as stack:
            whole = with_head and of_head & of_embedding
            by_rows = (
                () if whole else stack.enter_context(placement.rows_alone(embedding, self.dtype))
            )
            stack.callback(placement.release, self.model)
            if blank:
                zero = torch.zeros((), dtype=self.dtype, device=device)
                embedding.forward = lambda ids, *_, **__: zero.expand(
                    *ids.shape, embedding.embedding_dim
                )
                stack.callback(embedding.__dict__.pop, "forward", None)
            placement.place(self.model, read(names, self.model), device, by_rows)
            for module in self._outer_modules:
                placement.move_buffers(module, device)
            # A small batch is enough to learn what the blocks return before large ones come.
            self.record(self.kind.smallest(self.model.config, self.dtype, device))
            yield

    def window_shape(self, index: int, seqlen: int) -> tuple[int, int]:
        """(positions, width) of one window's hidden states in block `index`: tokens, or what an image has of them."""
        if self.kind is IMAGES:
            return image_tokens(self.model.config, index)
        return seqlen, int(self.model.get_input_embeddings().weight.shape[1])

    @property
    def positions(self) -> int | None:
        """Tokens that a window can have at most; None where the configuration does not say."""
        count = getattr(self.model.config, "max_position_embeddings", None)
        if not isinstance(count, int):
            return None
        # RoBERTa and its kin begin to count behind the position that stands for padding.
        tables = [
            m for n, m in self.model.named_modules() if n.endswith("embeddings.position_embeddings")
        ]
        padding = next((m.padding_idx for m in tables if isinstance(m, nn.Embedding)), None)
        return count if padding is None else count - padding - 1

    def trial_batch(self, tokens: int) -> torch.Tensor:
        """A batch to try the model on, always the same: at most `tokens` ids spread out, or images of noise."""
        rows = 0 if self.kind is IMAGES else self.model.get_input_embeddings().weight.shape[0]
        return self.kind.spread(
            self.model.config, rows, min(tokens, rows, self.positions or tokens)
        )

    def record(self, batch: torch.Tensor) -> tuple[torch.Tensor, list[BlockCall]]:
        """Run everything before the blocks on a batch of the model's kind of inputs, inside `outside_blocks`.

        Args:
            batch: token ids (windows, tokens), or pixel values (images, channels, height, width).

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
                hidden, args, kwargs = split_hidden(args, kwargs)
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

        with self._stubs(stub), torch.no_grad(), contextlib.suppress(_LastBlockReached):
            batch = batch.to(self.dtype) if batch.is_floating_point() else batch
            self.model.base_model(**self.kind.arguments(batch))
        if len(calls) != len(self.blocks):
            raise NotImplementedError(
                f"{type(self.model).__name__} called {len(calls)} of its {len(self.blocks)} blocks"
            )
        return first[0], calls

    def head(self) -> Linear:
        """The output head as a linear, by its full name.

        Raises:
            NotImplementedError: there is none, it is no linear, or it is the embedding too (tied).
        """
        head = self._output_head()
        name = next((name for name, module in self.model.named_modules() if module is head), None)
        if name is None or not isinstance(head, nn.Linear):
            raise NotImplementedError(
                f"{type(self.model).__name__} has no linear as its output head to prune"
            )
        if head.weight is self.model.get_input_embeddings().weight:
            raise NotImplementedError(
                f"{name} is tied to the input embedding: pruning it would prune the embedding; leave --head out"
            )
        return Linear(name, head)

    def _output_head(self) -> nn.Module | None:
        """What makes logits over the vocabulary; classifiers of images have no such head."""
        head: nn.Module | None = self.model.get_output_embeddings() if self.kind is CAUSAL else None
        return head

    def head_input(self, input_ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """What the head is given when the last block returns `hidden`; inside `surroundings(with_head=True)`."""
        seen: list[torch.Tensor] = []

        def stop(x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            raise _HeadReached

        head = self.head().module
        head.forward = stop
        try:
            with (
                self._stubs(self._ending_in(hidden)),
                torch.no_grad(),
                contextlib.suppress(_HeadReached),
            ):
                self.model(input_ids=input_ids, use_cache=False)
        finally:
            del head.forward
        return seen[0]

    def logits(self, input_ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The model's logits (batch, tokens, vocabulary) when the last block returns `hidden` (batch, tokens, hidden).

        Inside `surroundings(with_head=True)`. Tokens do not see each other here: any part of a sequence may be given.
        Differentiable where `hidden` is.
        """
        with self._stubs(self._ending_in(hidden)), torch.set_grad_enabled(hidden.requires_grad):
            logits: torch.Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits

    def _ending_in(self, hidden: torch.Tensor) -> Callable[[int], Callable[..., Any]]:
        """Stubs for all blocks: they pass on what they get, and the last one `hidden`."""

        def stub(index: int) -> Callable[..., Any]:
            block = self.blocks[index]

            def forward(*args: Any, **kwargs: Any) -> Any:
                passed = hidden if index == len(self.blocks) - 1 else split_hidden(args, kwargs)[0]
                return (passed,) if self._returns_tuple.get(type(block), False) else passed

            return forward

        return stub

    @contextlib.contextmanager
    def _stubs(self, stub: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
        """While active, block i runs `stub(i)` in place of its forward."""
        originals = [block.__dict__.get("forward") for block in self.blocks]
        try:
            for index, block in enumerate(self.blocks):
                block.forward = stub(index)
            yield
        finally:
            for block, original in zip(self.blocks, originals, strict=True):
                if original is None:
                    block.__dict__.pop("forward", None)
                else:
                    block.forward = original

    def _returns_tuple_of(self, block: nn.Module, call: BlockCall, hidden: torch.Tensor) -> bool:
        """Whether blocks of this class return a tuple (hidden first): seen by running one made of zeros."""
        kind = type(block)
        if kind not in self._returns_tuple:
            trial = copy.deepcopy(block)
            trial.__dict__.pop("forward", None)
            placement.fill_with_zeros(trial, hidden.device)
            output = trial(hidden, *call.args, **call.kwargs)
            self._returns_tuple[kind] = isinstance(output, tuple | list)
        return self._returns_tuple[kind]

    def fill(
        self, index: int, values: Mapping[str, torch.Tensor], device: torch.device
    ) -> nn.Module:
        """Give block `index` its weights (names relative to the block) and return it, ready to run."""
        block = self.blocks[index]
        placement.place(block, values, device)
        for module in block.modules():
            placement.move_buffers(module, device)
        return block

    def duplicate(
        self, index: int, values: Mapping[str, torch.Tensor], device: torch.device
    ) -> nn.Module:
        """A copy of block `index` with weights of its own, by relative name, ready to run."""
        block = copy.deepcopy(self.blocks[index])
        placement.place(block, values, device)
        for module in block.modules():
            placement.move_buffers(module, device)
        return block

    def release(self, index: int) -> None:
        """Take the weights of a block away again."""
        placement.release(self.blocks[index])
