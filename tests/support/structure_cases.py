"""What tests of smaller models share."""

import contextlib
import functools
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from prunus.model.linears import find_block_list
from prunus.structure.shrink import shrink
from prunus.structure.structure_record import StructureRecord
from stopping import interrupt
from tiny import stored  # noqa: F401

#: Most tests look at what is removed, and not at what is trained afterwards.
shrink_without_repair = functools.partial(shrink, repair=False)


def loaded(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval().requires_grad_(False)


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


def assert_same_logits(found: Tensor, expected: Tensor, original: Tensor) -> None:
    """Check logits against the expected ones, which must differ from those of the old model."""
    close = 1e-5 * float(original.abs().max())
    assert float((found - expected).abs().max()) <= close
    assert float((expected - original).abs().max()) > 10 * close, "what was removed did nothing"


def divergence(dense: Any, other: Any, ids: Tensor, gone: Collection[int] = ()) -> float:
    """The KL divergence of a model without some blocks from the dense one, in nats per token."""
    logp = logits(dense, ids).double().log_softmax(-1)
    logq = logits(other, ids, gone).double().log_softmax(-1)
    return float((logp.exp() * (logp - logq)).sum(-1).mean())


def bytes_of(folder: Path) -> dict[str, bytes]:
    """The files of a result that must not depend on how often the run was stopped."""
    names = [*folder.glob("*.safetensors"), folder / "config.json"]
    return {path.name: path.read_bytes() for path in names}


class Killed(BaseException):
    pass


def shrunk_with_a_kill(dense: Path, output: Path, after: int, **options: Any) -> None:
    """Stop a run after some blocks, then give the same command again."""
    options = {"repair": False, **options}
    interrupt(shrink, dense, output, after=after, **options)
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
