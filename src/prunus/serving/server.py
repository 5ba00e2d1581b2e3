"""The application, its socket, and a clean end."""

from __future__ import annotations

import contextlib
import importlib.util
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunus.evaluation.generation import token_settings
from prunus.evaluation.model_input import find_folder
from prunus.hardware.errors import reason
from prunus.model.device import choose_device
from prunus.model.loading import load_model, no_downloads
from prunus.model.tokenizer import load_tokenizer
from prunus.serving.gate import GENERATING, Gate, RequestError, is_loopback

if TYPE_CHECKING:
    from prunus.serving.generation import Answers, Generator
    from prunus.serving.reader import PromptReader

_LIBRARIES = ("starlette", "uvicorn")
#: Seconds in which a request must arrive, headers and body.
_ARRIVAL = 60
_LATE = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


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
        log: called with a line of text when a GGUF file is unpacked, when the server is ready, and
            when it ends. Requests are logged by the logger "prunus.serving".
    """
    _require_libraries()
    from prunus.serving.reader import PromptReader

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
        folder = find_folder(model, log)
        chosen = choose_device(device)
        # The port is taken before the model is loaded, which may take minutes.
        listener = stack.enter_context(open_socket(host, port))
        reader = stack.enter_context(
            contextlib.closing(PromptReader(load_tokenizer(folder, trust_remote_code)))
        )
        loaded = load_model(folder, dtype, trust_remote_code).to(chosen)
        loaded.generation_config = token_settings(loaded.generation_config)
        stack.enter_context(no_downloads())
        served = name or (folder.resolve().name if Path(model).is_dir() else str(model))
        limits = {"max_concurrent": max_concurrent, "max_waiting": max_waiting}
        gate, generator = build_app(served, loaded, reader, api_key=api_key, **limits)
        address, number = listener.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        server = make_server(gate, lambda: log(f"{served} at http://{shown}:{number}/v1"))
        server.run(sockets=[listener])
        gate.cancel()
        generator.shutdown()
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
    """A socket that listens. Connections wait until a server accepts them."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # Without the last option, an IPv6 address would take no clients of IPv4.
        return socket.create_server(
            (host, port), family=family, backlog=2048, dualstack_ipv6=family == socket.AF_INET6
        )
    except (OSError, OverflowError, UnicodeError) as fault:
        why = reason(fault).partition(" (while")[0]  # Python repeats the address there
        raise ValueError(
            f"port {port} of {host} cannot be used ({why}); choose another `port` or `host`"
        ) from fault


def build_app(
    name: str,
    model: Any,
    reader: PromptReader,
    *,
    api_key: str | None = None,
    max_concurrent: int = 1,
    max_waiting: int = 32,
) -> tuple[Gate, Generator]:
    """The application for one loaded causal language model, and what generates for it, whose
    `shutdown` waits for its threads. The options are those of `serve`.
    """
    from prunus.serving.generation import Answers, Generator
    from prunus.serving.reader import Limits

    limits = Limits.of(name, model, reader.tokenizer)
    generator = Generator(model, reader.tokenizer, limits.context, max_concurrent)
    app = _routes(name, Answers(reader, limits, generator))
    gate = Gate(
        app,
        api_key=api_key,
        max_body=limits.body,
        max_concurrent=max_concurrent,
        max_waiting=max_waiting,
    )
    return gate, generator


def _routes(name: str, answers: Answers) -> Any:
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    from prunus.serving.reader import unknown_model

    shown = {"id": name, "object": "model", "created": 0, "owned_by": "prunus"}

    async def health(_request: Any) -> Any:
        return JSONResponse({"status": "ok"})

    async def models(_request: Any) -> Any:
        return JSONResponse({"object": "list", "data": [shown]})

    async def one_model(request: Any) -> Any:
        if (asked := request.path_params["name"]) != name:
            raise unknown_model(asked, name)
        return JSONResponse(shown)

    async def generate(request: Any) -> Any:
        found = await answers.answer(request.url.path, request.scope["job"])
        if isinstance(found, dict):
            return JSONResponse(found)
        return StreamingResponse(found, media_type="text/event-stream")

    def refused(_request: Any, error: Any) -> Any:
        return Response(error.body(), error.status, error.headers, "application/json")

    def unknown(request: Any, error: Any) -> Any:
        reason = f"{request.method} {request.url.path} is not served; see {', '.join(paths)}"
        return refused(request, RequestError(error.status_code, reason))

    def failed(request: Any, _error: Exception) -> Any:
        return refused(request, RequestError(500, "the server failed; its log says more"))

    paths = ["/health", "/ready", "/v1/models", *sorted(GENERATING)]
    routes = [
        Route("/health", health),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", one_model),
        *(Route(path, generate, methods=["POST"]) for path in GENERATING),
    ]
    handlers = {RequestError: refused, HTTPException: unknown, Exception: failed}
    return Starlette(routes=routes, exception_handlers=handlers)


def make_server(gate: Gate, started: Callable[[], None]) -> Any:
    """uvicorn's server for an application, with a clean end. It calls `started` when it listens.

    After SIGTERM or SIGINT no connection is taken. Requests that are computed are finished, those
    that wait for their turn get status 503. A second SIGINT ends the server at once.
    """
    import h11
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Protocol(H11Protocol):
        """HTTP that ends a request that is not complete in time; uvicorn itself waits for ever."""

        timer: Any = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.timer = self.loop.call_later(_ARRIVAL, self.end_late)

        def connection_lost(self, exc: Exception | None) -> None:
            self.timer.cancel()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self.timer.cancelled():
                self.timer = self.loop.call_later(_ARRIVAL, self.end_late)
            super().data_received(data)
            if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
                self.timer.cancel()

        def end_late(self) -> None:
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                self.transport.write(_LATE)
            self.transport.close()

    class Server(uvicorn.Server):
        should_exit = force_exit = False

        def handle_exit(self, sig: int, frame: Any) -> None:
            # uvicorn's own keeps the signal, and raises it again when the server has ended.
            self.force_exit |= self.should_exit and sig == signal.SIGINT
            self.should_exit = True

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            started()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            gate.stop()
            await super().shutdown(sockets)

    quiet: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False}
    return Server(uvicorn.Config(gate, http=Protocol, lifespan="off", **quiet))
