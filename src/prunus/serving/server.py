"""The application, its socket, and a clean end."""

from __future__ import annotations

import contextlib
import importlib.util
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prunus.evaluation.generation import token_settings
from prunus.evaluation.model_input import find_folder
from prunus.model.device import choose_device
from prunus.model.loading import load_model, no_downloads
from prunus.model.tokenizer import load_tokenizer
from prunus.serving.errors import RequestError
from prunus.serving.gate import Gate, is_loopback

_LIBRARIES = ("fastapi", "uvicorn", "openai")
#: Paths that stay of transformers' application. The others load models, drop them, or do what a
#: language model cannot.
_PATHS = {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health"}


def serve(
    model: str | Path,
    *,
    name: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    max_concurrent: int = 1,
    max_waiting: int = 32,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    log: Callable[[str], None] = print,
) -> None:
    """Serve one model until SIGTERM or SIGINT comes.

    Args:
        model: checkpoint folder, dense or packed, folder of an adapter, or hub id. For a folder,
            nothing is downloaded.
        name: how clients call the model; None for the folder's name or the hub id.
        port: TCP port; 0 takes a free one.
        api_key: the key that requests must carry. Required where `host` is not loopback.
        max_waiting: requests that wait for their turn; those beyond get status 503.
        device, dtype: where and in which dtype the model computes; see `load_model`.
        log: called with a line of text when the server is ready, and when it ends.

    Raises:
        ModuleNotFoundError: a library of the extra `serve` is missing.
        ValueError: a value is out of range, a key is missing, the address cannot be used, or the
            model cannot be loaded.
        FileNotFoundError: there is no such model.
    """
    _require_libraries()
    if max_concurrent < 1 or max_waiting < 0:
        raise ValueError(
            "serve needs at least 1 concurrent and 0 waiting requests; got "
            f"{max_concurrent} and {max_waiting}"
        )
    if api_key is not None and not (
        api_key.isascii() and api_key.isprintable() and api_key.strip()
    ):
        raise ValueError("the API key must be printable ASCII text that is not empty")
    if api_key is None and not is_loopback(host):
        raise ValueError(
            f"{host} can be reached from other machines: give an `api_key` (or set "
            "PRUNUS_API_KEY), or serve this machine only with the `host` 127.0.0.1"
        )
    with contextlib.ExitStack() as stack:
        if Path(model).is_dir():
            stack.enter_context(no_downloads())
        folder = find_folder(model)
        chosen = choose_device(device)
        # The port is taken before the model is loaded, which may take minutes.
        listener = stack.enter_context(open_socket(host, port))
        tokenizer = load_tokenizer(folder, trust_remote_code)
        loaded = load_model(folder, dtype, trust_remote_code).to(chosen)
        loaded.generation_config = token_settings(loaded.generation_config)
        stack.enter_context(no_downloads())
        served = name or (folder.resolve().name if Path(model).is_dir() else str(model))
        gate, generation = build_app(
            served,
            loaded,
            tokenizer,
            api_key=api_key,
            max_concurrent=max_concurrent,
            max_waiting=max_waiting,
        )
        address, number = listener.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        with _quiet_signals():
            server = make_server(gate, lambda: log(f"{served} at http://{shown}:{number}/v1"))
            server.run(sockets=[listener])
        gate.cancel()
        generation.shutdown()
        log("stopped")


def _require_libraries() -> None:
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if not missing and importlib.util.find_spec("transformers.cli.serving") is None:
        missing = ["transformers 5.24 or later"]
    if missing:
        raise ModuleNotFoundError(
            f"prunus serve needs {', '.join(missing)}: pip install '.[serve]'"
        )


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address and takes no connections yet."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
    except (OSError, OverflowError, UnicodeError) as fault:
        raise ValueError(f"{host} with port {port} is no address: {fault}") from fault
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as fault:
        found.close()
        raise ValueError(
            f"port {port} of {host} cannot be used ({fault.strerror}); choose another `port`"
        ) from fault
    return found


def build_app(
    name: str,
    model: Any,
    tokenizer: Any,
    *,
    api_key: str | None = None,
    max_concurrent: int = 1,
    max_waiting: int = 32,
) -> tuple[Gate, Any]:
    """The application for one loaded causal language model, and the state of its generation, whose
    `shutdown` waits for its threads. The options are those of `serve`.
    """
    from transformers.cli.serving.server import build_server

    from prunus.serving.generation import ThreadedGeneration
    from prunus.serving.handlers import ChatHandler, TextHandler
    from prunus.serving.served_model import ServedModel, context_length

    if not hasattr(tokenizer, "_tokenizer"):
        raise ValueError(
            f"the tokenizer is a {type(tokenizer).__name__}, which cannot stream; the checkpoint "
            "needs a tokenizer.json"
        )
    manager = ServedModel(name, model, tokenizer)
    generation = ThreadedGeneration(max_concurrent, context_length(model))
    app = build_server(
        manager,
        ChatHandler(manager, generation),
        completion_handler=TextHandler(manager, generation),
        response_handler=None,
        transcription_handler=None,
        systemone_handler=None,
        generation_state=generation,
    )
    routes = app.router.routes
    routes[:] = [route for route in routes if getattr(route, "path", None) in _PATHS]
    _add_model_route(app, manager)
    _speak_openai_errors(app)
    gate = Gate(app, api_key=api_key, max_concurrent=max_concurrent, max_waiting=max_waiting)
    return gate, generation


def _add_model_route(app: Any, manager: Any) -> None:
    from prunus.serving.served_model import unknown_model

    def retrieve_model(name: str) -> dict[str, Any]:
        [found] = manager.list_models()
        if name != found["id"]:
            raise unknown_model(name, found["id"])
        return dict(found)

    app.add_api_route("/v1/models/{name:path}", retrieve_model, methods=["GET"])


def _speak_openai_errors(app: Any) -> None:
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    def answer(error: RequestError) -> Any:
        return JSONResponse(error.body(), status_code=error.status, headers=error.headers())

    async def refused(_request: Any, error: Any) -> Any:
        return answer(error)

    async def of_starlette(request: Any, error: Any) -> Any:
        message = str(error.detail)
        if error.status_code == 404:
            message = f"there is nothing at {request.url.path}; see {', '.join(sorted(_PATHS))}"
        # 422 is FastAPI's; OpenAI says 400.
        return answer(RequestError(400 if error.status_code == 422 else error.status_code, message))

    async def unreadable(_request: Any, _error: Any) -> Any:
        return answer(RequestError(400, "the body must be a JSON object, sent as application/json"))

    app.add_exception_handler(RequestError, refused)
    app.add_exception_handler(HTTPException, of_starlette)
    app.add_exception_handler(RequestValidationError, unreadable)


def make_server(gate: Gate, started: Callable[[], None]) -> Any:
    """uvicorn's server for an application, with a clean end. It calls `started` when it listens.

    After SIGTERM or SIGINT no connection is taken. Requests that are computed are finished, those
    that wait for their turn get status 503. A second SIGINT ends the server at once.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            started()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            gate.stop()
            await super().shutdown(sockets)

    quiet: dict[str, Any] = {"log_level": "error", "access_log": False, "server_header": False}
    return Server(uvicorn.Config(gate, lifespan="on", **quiet))


@contextlib.contextmanager
def _quiet_signals() -> Iterator[None]:
    """While active, SIGTERM and SIGINT do nothing by themselves.

    uvicorn handles them, and raises them again when it has ended, for whoever was there before.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: None) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
