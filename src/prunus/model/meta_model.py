"""Building a transformers model without its weights, within limits.

The code of a model turns its configuration into modules, and into buffers that no checkpoint
stores, such as tables of positions. Both take real memory, also where every parameter is on the
meta device. So modules are counted, and the size of every tensor is known before it is computed.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers.initialization import guard_torch_init_functions

from prunus.model import placement
from prunus.model.kinds import Kind

__all__ = ["build_on_meta", "limited_modules"]

#: Modules of a model. A model of 61 blocks with 384 experts each has 94,000.
_MAX_MODULES = 2**17
#: Bytes that a model may compute before it has any weight, added up over all tensors.
_MAX_COMPUTED = 2**31


class _TooLargeError(ValueError):
    """A model is larger than any that prunus expects."""


class _LimitedTensors(TorchDispatchMode):
    """While active, tensors that are computed on real devices must stay small in sum.

    Each operation runs on the meta device first, which tells the size of its result.
    """

    def __init__(self) -> None:
        super().__init__()
        self._computed = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # Memory that nobody writes to costs nothing: parameters are made so, and go to meta.
        if not func.is_view and func.overloadpacket is not torch.ops.aten.empty:
            self._computed += _result_bytes(func, args, kwargs)
            if self._computed > _MAX_COMPUTED:
                raise _TooLargeError(
                    f"it asks for more than {_MAX_COMPUTED:,} bytes of tables before it has any "
                    "weights, such as one row for each of its positions"
                )
        return func(*args, **kwargs)


def _result_bytes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Bytes of an operation's result on a real device; 0 if that cannot be known before."""
    first = _first_tensor((*args, *kwargs.values()))
    device = kwargs.get("device") or (torch.device("cpu") if first is None else first.device)
    if torch.device(device).type == "meta":
        return 0
    described, options = tree_map_only(
        torch.Tensor,
        lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta"),
        (args, dict(kwargs)),
    )
    if "device" in options or first is None:
        options["device"] = torch.device("meta")
    try:
        results = func(*described, **options)
    except Exception:  # it reads values, or has no form on the meta device; the result is small
        return 0
    made = results if isinstance(results, list | tuple) else (results,)
    return sum(x.nbytes for x in made if isinstance(x, torch.Tensor))


def _first_tensor(values: Iterable[Any]) -> torch.Tensor | None:
    """The first tensor of the arguments of an operation, which holds them also in lists."""
    for value in values:
        found = _first_tensor(value) if isinstance(value, list | tuple) else value
        if isinstance(found, torch.Tensor):
            return found
    return None


@contextlib.contextmanager
def limited_modules() -> Iterator[None]:
    """While active, no more than `_MAX_MODULES` modules are made.

    Raises:
        ValueError: there are more.
    """
    original = nn.Module.__init__
    count = 0

    def counted(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        nonlocal count
        count += 1
        if count > _MAX_MODULES:
            raise _TooLargeError(f"it has more than {_MAX_MODULES:,} modules")
        original(self, *args, **kwargs)

    nn.Module.__init__ = counted  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__init__ = original  # type: ignore[method-assign]


def build_on_meta(kind: Kind, config: Any, dtype: Any, trust_remote_code: bool) -> Any:
    """The transformers model of a configuration, with its parameters on the meta device.

    Args:
        kind: of the model.
        config: its transformers configuration, which is not changed.
        dtype: of the parameters.
        trust_remote_code: let transformers run code that comes with the checkpoint.

    Raises:
        ValueError: transformers makes no model of it, or one beyond all limits.
    """
    loader = getattr(transformers, kind.loader)
    try:
        # torch passes over parameters that carry the mark of `placement.parameters_on_meta`. On the
        # meta device their initial values change nothing. Tables that no checkpoint stores are
        # buffers, and are computed as always.
        with (
            placement.parameters_on_meta(),
            limited_modules(),
            guard_torch_init_functions(),
            _LimitedTensors(),
        ):
            return loader.from_config(
                copy.deepcopy(config), dtype=dtype, trust_remote_code=trust_remote_code
            )
    except _TooLargeError as fault:
        raise ValueError(
            f"the configuration describes a model of type {config.model_type!r} that is too "
            f"large: {fault}; is it damaged?"
        ) from fault
    except ValueError as fault:
        # The first line has the reason; then transformers lists a hundred classes it would accept.
        raise ValueError(
            f"transformers makes no {kind.name} of model type {config.model_type!r}: "
            f"{(str(fault).strip().splitlines() or [''])[0]}"
        ) from fault
    except ImportError:
        raise
    except Exception as fault:
        # A damaged configuration can raise any error, anywhere in the code of a model.
        raise ValueError(
            f"transformers cannot make the model of type {config.model_type!r} that the "
            f"configuration describes: {type(fault).__name__}: {' '.join(str(fault).split())[:300]}"
        ) from fault
