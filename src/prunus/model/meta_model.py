"""Building a transformers model without its weights, within limits.

Parameters stay on the meta device, where they have a shape but no memory. Buffers, such as the
frequencies of rotary embeddings, are tables that no checkpoint stores: transformers computes them
in the end. Their sizes are known before that, and modules are counted while they are made. So a
damaged configuration cannot fill memory.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from prunus.model.kinds import Kind
from prunus.model.placement import release

#: Modules of a model. A model of 61 blocks with 384 experts each has 94,000.
_MAX_MODULES = 2**17
#: Bytes of all tables together that a model may compute before it has any weight.
_MAX_COMPUTED = 2**31


class _TooLargeError(ValueError):
    """A model is larger than any that prunus expects."""


@contextlib.contextmanager
def limited_modules() -> Iterator[None]:
    """While active, no more than `_MAX_MODULES` modules become part of others.

    Raises:
        ValueError: there are more.
    """
    count = 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > _MAX_MODULES:
            raise _TooLargeError(f"it has more than {_MAX_MODULES:,} modules")

    with register_module_module_registration_hook(counted):
        yield


def build_on_meta(kind: Kind, config: Any, dtype: Any, trust_remote_code: bool) -> Any:
    """The transformers model of a configuration, with its parameters on the meta device."""
    loader = getattr(transformers, kind.loader)
    try:
        # What code computes while it is imported must not be on the meta device.
        importlib.import_module("transformers.modeling_utils")
        loader._model_mapping.get(type(config), None)
        with torch.device("meta"), limited_modules():
            model = loader.from_config(
                copy.deepcopy(config), dtype=dtype, trust_remote_code=trust_remote_code
            )
        # Some parameters are made in memory whatever the device, but are not written to.
        release(model)
        _compute_tables(model)
        return model
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


def _compute_tables(model: nn.Module) -> None:
    """Give the buffers of a model on the meta device memory, and let transformers fill them.

    This is what `from_pretrained` does for buffers that a checkpoint does not store.
    """
    if sum(buffer.nbytes for buffer in model.buffers()) > _MAX_COMPUTED:
        raise _TooLargeError(
            f"it asks for more than {_MAX_COMPUTED:,} bytes of tables before it has any weights, "
            "such as one row for each of its positions"
        )
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros_like(buffer, device="cpu")
    # transformers passes over parameters with this mark, as if they were loaded already.
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    model.initialize_weights()  # type: ignore[operator]
