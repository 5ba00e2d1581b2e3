"""The model without its weights, taken apart into its blocks and what is outside the blocks.

The skeleton is the real transformers model with every parameter on the meta device. A block gets
its weights while it is in work (`fill`, `release`), and so do the modules outside the blocks:
embeddings, final norm and head (`outside_blocks`). Memory thus holds one block, whatever the size
of the model.

How the model calls its blocks is recorded from the model itself; see `calls.py`. The functions at
the end of the file match the names of a checkpoint's tensors with those of the skeleton.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from prunus.model.calls import BlockCall, BlockStubs, StopForward, replaced_forward
from prunus.model.experts import Fused, find_fused_experts, fusing_rules, unfuse_experts
from prunus.model.kinds import IMAGE_TEXT, IMAGES, image_tokens, kind_of, trial_image_size
from prunus.model.linears import Linear, find_block_list, find_linears, left_dense
from prunus.model.meta_model import build_on_meta, limited_modules, move_buffers, place, release
from prunus.model.vocabulary_weights import VocabularyWeights

#: From the model's names to the stored tensors; see `WeightSource.read_outside`.
ReadTensors = Callable[[list[str]], dict[str, torch.Tensor]]


class Skeleton:
    """A model on the meta device, as a row of blocks and what is outside the blocks.

    Args:
        config: A transformers configuration of one of the kinds of model in `kinds`.
        dtype: Dtype of the computation.
        trust_remote_code: Let transformers run code that comes with the checkpoint.

    Attributes:
        kind: What the model takes and returns.
        dtype: As given. Parameters that the model itself keeps in float32 stay so.
        model: The transformers model, in evaluation mode and without gradients.
        path: Name of the list of blocks in the model, e.g. `model.layers`.
        blocks: Its blocks, in order.

    Raises:
        ValueError: transformers makes no model of this configuration.
        NotImplementedError: The model is of another kind, has no single stack of blocks, or reads
            no text without an image.
    """

    def __init__(self, config: Any, dtype: torch.dtype, trust_remote_code: bool = False) -> None:
        self.kind = kind_of(config)
        self.dtype = dtype
        self.model: Any = build_on_meta(self.kind, config, dtype, trust_remote_code)
        self.model.eval().requires_grad_(False)
        takes = inspect.signature(self.model.forward).parameters
        # Some configurations ask for the logits of routers, of which the stubs of blocks know none.
        without_routers = {"output_router_logits": False} if "output_router_logits" in takes else {}
        self._arguments = {"use_cache": False} | without_routers
        images = takes.get("pixel_values")
        if self.kind is IMAGE_TEXT and images and images.default is inspect.Parameter.empty:
            raise NotImplementedError(
                f"{type(self.model).__name__} reads no text without an image, so its language "
                "model cannot be calibrated on text. docs/reference/models.md lists what can be "
                "pruned"
            )
        self.path, self.blocks = find_block_list(self.model)
        # Per block: tensors of the checkpoint or the loaded model that are several linears here.
        rules = fusing_rules(self.model) if find_fused_experts(self.blocks) else []
        with limited_modules():
            self._fused = [
                unfuse_experts(rules, block, self.block_name(i))
                for i, block in enumerate(self.blocks)
            ]
        name = type(self.model).__name__
        self._stubs = BlockStubs(name, list(self.blocks), images=self.kind is IMAGES)
        inside = set(self.blocks.modules())
        self._outside_modules = [module for module in self.model.modules() if module not in inside]

    def __len__(self) -> int:
        """The number of blocks."""
        return len(self.blocks)

    # --- the blocks ---

    def block_name(self, index: int) -> str:
        """Path of a block in the model, e.g. `model.layers.17`."""
        return f"{self.path}.{index}"

    def linears(self, index: int) -> list[Linear]:
        """The prunable linears of a block; see `find_linears`."""
        return find_linears(self.blocks[index])

    def all_linears(self) -> dict[str, tuple[int, Linear]]:
        """The prunable linears of all blocks, in order: full name -> (block, linear)."""
        return {
            f"{self.block_name(index)}.{linear.name}": (index, linear)
            for index in range(len(self))
            for linear in self.linears(index)
        }

    def fused(self, index: int) -> list[Fused]:
        """The tensors of a block, such as fused experts, that are split into linears here."""
        return self._fused[index]

    def left_dense(self, index: int) -> dict[str, tuple[int, ...]]:
        """Full name -> shape of the weights of a block that no method prunes."""
        shapes = left_dense(self.blocks[index], self.linears(index))
        return {f"{self.block_name(index)}.{name}": shape for name, shape in shapes.items()}

    def fill(
        self,
        index: int,
        values: Mapping[str, torch.Tensor],
        device: torch.device,
        duplicate: bool = False,
    ) -> nn.Module:
        """Give block `index` its weights, and return it, ready to run.

        Args:
            index: Position of the block.
            values: Its tensors by relative name; they are copied.
            device: Where the block will run.
            duplicate: Fill a copy in its place. The block itself stays as it is.
        """
        block = copy.deepcopy(self.blocks[index]) if duplicate else self.blocks[index]
        place(block, values, device)
        move_buffers(block.modules(), device)
        return block

    def release(self, index: int) -> None:
        """Take the weights of block `index` away again."""
        release(self.blocks[index])

    def window_shape(self, index: int, seqlen: int) -> tuple[int, int]:
        """(positions, width) of the hidden states of one window in block `index`.

        A position is a token, of which a window has `seqlen`, or a patch of an image.
        """
        if self.kind is IMAGES:
            return image_tokens(self.model.config, index)
        return seqlen, int(self.model.get_input_embeddings().weight.shape[1])

    @property
    def vocabulary_weights(self) -> VocabularyWeights:
        """The input embedding and the output head."""
        return VocabularyWeights(self.model, self.kind)

    # --- outside the blocks ---

    @property
    def outside_parameter_names(self) -> list[str]:
        """Names of parameters and persistent buffers outside the blocks."""
        prefix = f"{self.path}."
        return [name for name in self.model.state_dict() if not name.startswith(prefix)]

    @contextlib.contextmanager
    def outside_blocks(
        self, read: ReadTensors, device: torch.device, with_head: bool = False
    ) -> Iterator[None]:
        """Give the modules outside the blocks their weights for the length of a `with` block.

        Args:
            read: From the model's names to the stored tensors; see `WeightSource.read_outside`.
            device: Where the weights go.
            with_head: Give the head its weights too, to run what follows the blocks. An untied
                embedding is then left out and returns zeros. Without the flag, an untied head is
                left out.
        """
        head = self.vocabulary_weights.head_of_next_token
        embedding: Any = (
            self.model.get_input_embeddings() if self.kind is not IMAGES else nn.Module()
        )
        of_head = {id(p) for p in head.module.parameters()} if head is not None else set()
        of_embedding = {id(p) for p in embedding.parameters()}
        skipped: set[int] = set()
        as_stored: Collection[int] = ()
        with contextlib.ExitStack() as stack:
            if not with_head:
                skipped = of_head - of_embedding
                as_stored = stack.enter_context(_rows_as_stored(embedding, self.dtype))
            elif isinstance(embedding, nn.Embedding) and not of_head & of_embedding:
                skipped = of_embedding
                width = embedding.embedding_dim
                zero = torch.zeros((), dtype=self.dtype, device=device)
                stack.enter_context(
                    replaced_forward(
                        embedding, lambda ids, *_, **__: zero.expand(*ids.shape, width)
                    )
                )
            stack.callback(release, self.model)
            state = self.model.state_dict(keep_vars=True)
            names = [n for n in self.outside_parameter_names if id(state[n]) not in skipped]
            place(self.model, read(names), device, as_stored)
            move_buffers(self._outside_modules, device)
            # The first call finds out what the blocks return; a small batch is enough for it.
            self.record(self.trial_batch(2).to(device))
            yield

    def record(self, batch: torch.Tensor) -> tuple[torch.Tensor, list[BlockCall]]:
        """Run what precedes the blocks, and record how the model calls each block.

        Only inside `outside_blocks`.

        Args:
            batch: Token ids (windows, tokens), or pixel values (images, channels, height, width).

        Returns:
            The hidden states that the first block receives, and the call of every block.

        Raises:
            NotImplementedError: The model does not call its blocks in a row; see
                `BlockStubs.record`.
        """
        batch = batch.to(self.dtype) if batch.is_floating_point() else batch
        base = self.model.base_model
        arguments = self.kind.arguments(batch)
        # A decoder with a classifier on top would otherwise pass a cache from block to block.
        if "use_cache" in inspect.signature(base.forward).parameters:
            arguments["use_cache"] = False
        return self._stubs.record(lambda: base(**arguments))

    def head_input(self, input_ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The input of the head when the last block returns `hidden`: its final norm, as a rule.

        Only inside `outside_blocks(with_head=True)`.

        Args:
            input_ids: (windows, tokens); only the shape matters.
            hidden: Hidden states (windows, tokens, hidden).

        Returns:
            (windows, tokens, hidden), without a graph for gradients.

        Raises:
            NotImplementedError: As `VocabularyWeights.linear_head`.
        """
        seen: list[torch.Tensor] = []

        def stop(x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            raise StopForward

        with (
            replaced_forward(self.vocabulary_weights.linear_head.module, stop),
            self._stubs.returning(hidden),
            torch.no_grad(),
            contextlib.suppress(StopForward),
        ):
            self.model(input_ids=input_ids, **self._arguments)
        return seen[0]

    def logits(self, input_ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The logits of the model when its last block returns `hidden`.

        Only inside `outside_blocks(with_head=True)`. After the blocks no token sees another, so
        `hidden` can be any part of a sequence. The result is differentiable if `hidden` is.

        Args:
            input_ids: (windows, tokens); only the shape matters.
            hidden: Hidden states (windows, tokens, hidden).

        Returns:
            (windows, tokens, vocabulary).
        """
        with self._stubs.returning(hidden), torch.set_grad_enabled(hidden.requires_grad):
            logits: torch.Tensor = self.model(input_ids=input_ids, **self._arguments).logits
        return logits

    def is_in_front_of_head(self, index: int) -> bool:
        """Whether only the final norm and the head follow a block, so it can compare logits."""
        return index == len(self) - 1 and self.kind.is_causal

    # --- inputs ---

    @property
    def max_positions(self) -> int | None:
        """The longest window in tokens; None if the configuration does not say."""
        count = getattr(self.model.config, "max_position_embeddings", None)
        if not isinstance(count, int):
            return None
        # RoBERTa and its relatives start to count after the position that stands for padding.
        tables = [
            m for n, m in self.model.named_modules() if n.endswith("embeddings.position_embeddings")
        ]
        padding = next((m.padding_idx for m in tables if isinstance(m, nn.Embedding)), None)
        return count if padding is None else count - padding - 1

    def trial_batch(self, tokens: int) -> torch.Tensor:
        """A batch that reaches many of the model's weights, always the same.

        Args:
            tokens: The most ids. They are spread evenly over the vocabulary.

        Returns:
            Ids (1, tokens), or four images of noise (4, channels, height, width) in float32.
        """
        if self.kind is IMAGES:
            config = self.model.config
            noise = torch.Generator().manual_seed(0)
            shape = (4, config.num_channels, *trial_image_size(config))
            return torch.randn(shape, generator=noise)
        rows = self.model.get_input_embeddings().weight.shape[0]
        count = min(tokens, rows, self.max_positions or tokens)
        return torch.linspace(0, rows - 1, count).long().unsqueeze(0)


@contextlib.contextmanager
def _rows_as_stored(embedding: nn.Module, dtype: torch.dtype) -> Iterator[Collection[int]]:
    """While active, an embedding may keep its weight as stored, and returns rows in `dtype`.

    Calibration looks up a small part of the vocabulary, so only these rows are converted. Yields
    what to pass to `place` as `as_stored`: nothing for subclasses of `nn.Embedding`, which may
    compute with their weight.
    """
    if type(embedding) is not nn.Embedding:
        yield ()
        return
    look_up = embedding.forward
    try:
        with replaced_forward(embedding, lambda *args, **named: look_up(*args, **named).to(dtype)):
            yield (id(embedding.weight),)
    finally:
        embedding.to(dtype)


# --- the names of a checkpoint's tensors in the skeleton, by transformers' own rules ---


def names_in_model(
    skeleton: Skeleton, keys: Mapping[str, Any]
) -> tuple[dict[str, str], set[str], dict[str, str]]:
    """Match stored names with the names of the skeleton.

    A checkpoint may be older than the model's code, or store experts one by one.

    Args:
        skeleton: The model.
        keys: The stored names. The values are not used.

    Returns:
        Three results:
        the skeleton's name -> stored name, where a stored fused tensor, which is several in the
        skeleton, appears under its own name;
        the stored names of tensors that need more than a new name;
        and the name that a tensor would have -> stored name, of tensors that the model has no place
        for.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    model = skeleton.model
    # Fused tensors and the experts in them.
    fused: set[str] = set()
    members: set[str] = set()
    for index in range(len(skeleton)):
        for tensor in skeleton.fused(index):
            fused.add(f"{skeleton.block_name(index)}.{tensor.name}")
            members.update(f"{skeleton.block_name(index)}.{name}" for name in tensor.members)
    # Only the names matter.
    expected = dict(model.state_dict()) | dict.fromkeys(fused, True)
    # Renamings are for whole tensors. Converters make one tensor of several, or several of one.
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    prefix = model.base_model_prefix
    names: dict[str, str] = {}
    converted: set[str] = set()
    unknown: dict[str, str] = {}
    for key in sorted(keys):
        # First without the converters: what they would fuse, the skeleton wants one by one.
        name, _ = rename_source_key(key, renamings, [], prefix, expected)
        if name in fused or name in members:
            names[name] = key
            continue
        name, pattern = rename_source_key(key, renamings, converters, prefix, expected)
        # A name that the model has stays, also where a rule would change it.
        if name not in expected and key in expected:
            name, pattern = key, None
        if pattern is not None:
            converted.add(key)
        elif name in expected:
            names[name] = key
        else:
            unknown[name] = key
    return names, converted, unknown
