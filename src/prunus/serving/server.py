"""The server of transformers (`transformers serve`), started for one model that was checked."""

from __future__ import annotations

import contextlib
import importlib.util
import socket
from collections.abc import Callable
from pathlib import Path

from prunus.evaluation.model_input import find_folder
from prunus.hardware.errors import reason
from prunus.model.adapter import is_adapter
from prunus.model.checkpoint.reader import Checkpoint
from prunus.model.device import choose_device
from prunus.model.formats import reader_of
from prunus.model.loading import check_architecture, no_downloads
from prunus.model.tokenizer import load_tokenizer

#: What transformers asks for when it serves. Its server takes a fixed model since version 5.24.
_LIBRARIES = ("fastapi", "uvicorn", "openai", "accelerate")
#: Hosts that only this machine reaches.
_LOCAL = ("127.0.0.1", "localhost", "::1")


def serve(
    model: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    log: Callable[[str], None] = print,
) -> None:
    """Run `transformers serve` for one model, until SIGTERM or Ctrl-C comes.

    Clients call the model as it is given here. While the server runs, nothing is downloaded.

    Args:
        model: Checkpoint folder, dense or packed, GGUF file or hub id.
        host: Name or address of this machine to listen on. Only this machine reaches the default.
            A host that others reach gets a warning, because the server asks for no key.
        port: TCP port; 0 takes a free one, which the server prints.
        device: Where the model computes, as `load_model` takes it.
        dtype: In which dtype the model computes, as `load_model` takes it.
        trust_remote_code: Whether Python code of the checkpoint may run.
        log: Called with a line of text before the model is loaded, and when the server ends.

    Raises:
        ModuleNotFoundError: If the extra `serve` is not installed.
        ValueError: If the model cannot be served, for example because it is an adapter, or if the
            address cannot be used. No weight was read then.
        FileNotFoundError: If there is no such model.
    """
    _require_libraries()
    folder = find_folder(model, log)
    if is_adapter(folder):
        raise ValueError(
            f"{model} is an adapter, which transformers serve does not load: merge it into its "
            "dense model with peft, or use prunus generate"
        )
    load_tokenizer(folder, trust_remote_code)
    Checkpoint(folder)  # transformers would also read pickles
    check_architecture(folder, trust_remote_code)
    chosen = choose_device(device)
    _check_address(host, port)
    if host not in _LOCAL:
        log(
            f"warning: {host} can be reached from other machines, and the server asks for no key: "
            "put a proxy that does in front of it"
        )
    served = str(model if reader_of(model) is None else folder)
    log(f"starting transformers serve; clients call the model {served}")
    from transformers.cli.serve import Serve

    with no_downloads(), contextlib.suppress(KeyboardInterrupt):
        Serve(
            force_model=served,
            device=str(chosen),
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            host=host,
            port=port,
        )
    log("stopped")


def _require_libraries() -> None:
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if importlib.util.find_spec("transformers.cli.serving") is None:
        missing.append("transformers 5.24 or later")
    if missing:
        raise ModuleNotFoundError(
            f"prunus serve needs {', '.join(missing)}: pip install '.[serve]'"
        )


def _check_address(host: str, port: int) -> None:
    """Check that a server can listen there. The server itself asks after the model is loaded."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError, UnicodeError) as fault:
        why = reason(fault).partition(" (while")[0]  # Python repeats the address there
        raise ValueError(
            f"port {port} of {host} cannot be used ({why}); choose another --port or --host"
        ) from fault
