"""What tests of smaller models share."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prunus.model.block_lists import find_block_list
from prunus.model.linears import find_linears
from prunus.structure.record import StructureRecord
from prunus.structure.run import shrink

#: Most tests look at what goes, and not at what is trained afterwards.
shrink_without_repair = functools.partial(shrink, repair=False)

#: Names of the linears that read heads, and of those that read the channels of the only MLP.
_HEAD_READERS = ("self_attn.o_proj", "self_attn.dense", "self_attn.out_proj", "mixer.o_proj")
_CHANNEL_READERS = (
    "down_proj",
    "fc2",
    "mlp.c_proj",
    "mlp.fc_out",
    "mlp.dense_4h_to_h",
    "feed_forward.w2",
    "shared_mlp.output_linear",
)


def zero_what_went(model: Any, record: StructureRecord, heads: int = 4) -> int:
    """Set the columns to zero that read channels and heads which a record says went.

    Args:
        model: the old model, as transformers loads it.
        record: of the run without a fit of the columns that stay.
        heads: query heads of the old model.

    Returns:
        How many linears have lost columns.
    """
    layers, count = find_block_list(model)[1], 0
    for block in record.blocks:
        layer = layers[block.made_from]
        linears = {linear.name: linear.weight_OI for linear in find_linears(layer)}
        parts = [(name, part, None) for name, part in block.width.mlps.items()]
        for part, readers, units in (
            (block.width.heads, _HEAD_READERS, heads),
            (block.width.channels, _CHANNEL_READERS, None),
        ):
            if part is not None:
                (name,) = [name for name in linears if name.endswith(readers)]
                parts.append((name, part, units))
        for name, part, units in parts:
            in_experts = re.match(r"(.*experts)\.(\d+)\.", name)
            if in_experts:
                # transformers holds all experts in one tensor, with the numbers of the old model.
                experts: Any = layer.get_submodule(in_experts[1])
                kept, place = block.experts.kept if block.experts else None, int(in_experts[2])
                weight_OI = experts.down_proj[place if kept is None else kept[place]]
                weight_OI = weight_OI.T if experts.is_transposed else weight_OI
            else:
                weight_OI = linears[name]
            units = units or weight_OI.shape[1]
            mask = torch.zeros(units).index_fill_(0, torch.tensor(part.kept), 1)
            weight_OI.mul_(mask.repeat_interleave(weight_OI.shape[1] // units))
            assert part.error == part.error_before_fit
            assert len(part.kept) == units // 2
            count += 1
    return count


@contextlib.contextmanager
def jumped_over(model: Any, gone: Collection[int]) -> Iterator[None]:
    """While active, some blocks return what they are given."""

    def jump(_module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    layers = find_block_list(model)[1]
    handles = [layers[i].register_forward_hook(jump, with_kwargs=True) for i in gone]
    yield
    for handle in handles:
        handle.remove()


def logits(model: Any, ids: Tensor, gone: Collection[int] = ()) -> Tensor:
    """The logits of a loaded model, in which some blocks are jumped over."""
    with torch.no_grad(), jumped_over(model, gone):
        return model(input_ids=ids, use_cache=False).logits


def bytes_of(folder: Path) -> dict[str, bytes]:
    """The files of a result that must not depend on how often the run was stopped."""
    names = [*folder.glob("*.safetensors"), folder / "config.json"]
    return {path.name: path.read_bytes() for path in names}


class Killed(BaseException):
    pass


def shrunk_with_a_kill(dense: Path, output: Path, after: int, **options: Any) -> None:
    """Stop a run after some steps, then give the same command again."""
    seen: list[Any] = []
    options = {"repair": False, **options}

    def kill(step: Any) -> None:
        seen.append(step)
        if len(seen) == after:
            raise Killed

    with pytest.raises(Killed):
        shrink(dense, output, progress=kill, **options)
    assert StructureRecord.load(output).state == "running"
    assert not (output / "model.safetensors.index.json").exists()
    shrink(dense, output, resume=True, **options)


def shrink_killed_in_second_step(
    monkeypatch: pytest.MonkeyPatch, module: Any, step: str, *args: Any, **options: Any
) -> None:
    """Call `shrink`, and kill it when the search of `module` calls its function `step` again.

    One step of the search is then recorded in the folder of the result.
    """
    original, calls = getattr(module, step), []

    def kill(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise Killed
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, step, kill)
        with pytest.raises(Killed):
            shrink_without_repair(*args, **options)
