"""The verb that puts a model behind an endpoint: `serve`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from prunus.cli import arguments as arg
from prunus.cli.flags import opt, with_flags
from prunus.cli.terminal import log, user_errors
from prunus.runs.options import RunOptions


@with_flags(RunOptions, only=("device", "trust_remote_code"))
def serve(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Checkpoint, dense or packed, adapter, or hub id."),
    ],
    *,
    host: Annotated[
        str,
        opt(
            "Address to listen on. Default: 127.0.0.1, which only this machine reaches. "
            "Any other needs a key.",
            "ADDRESS",
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        opt("TCP port; 0 takes a free one. Default: 8000.", "N", min=0, max=65535),
    ] = 8000,
    api_key: Annotated[
        str | None,
        opt(
            "Key that every request must carry. Others can read it on a command line, but "
            "not in the environment. Default: none.",
            "KEY",
            names=("--api-key",),
            envvar="PRUNUS_API_KEY",
            show_envvar=True,
        ),
    ] = None,
    name: Annotated[
        str | None,
        opt("How clients call the model. Default: the name of the folder, or the hub id.", "NAME"),
    ] = None,
    max_concurrent: Annotated[
        int,
        opt(
            "Requests that are computed at once, each in a thread; the others wait for "
            "their turn. Default: 1.",
            "N",
        ),
    ] = 1,
    max_waiting: Annotated[
        int,
        opt(
            "Requests that may wait. Those beyond get status 503 with Retry-After. Default: 32.",
            "N",
        ),
    ] = 32,
    dtype: arg.ComputeDtype = "auto",
    **options: Any,
) -> None:
    """Answer requests in OpenAI's protocol: chats, completions, streams.

    Endpoints: /v1/chat/completions, /v1/completions, /v1/models, /health, /ready. Try it with:

    curl localhost:8000/v1/completions --json '{"prompt": "Once upon"}'

    SIGTERM and Ctrl-C end the server after the requests that are being computed.
    """
    with user_errors(None):
        from prunus.serving.server import serve as serve_model

        work = RunOptions.read(None, options)
        serve_model(
            model,
            name=name,
            host=host,
            port=port,
            api_key=api_key,
            max_concurrent=max_concurrent,
            max_waiting=max_waiting,
            device=work.device,
            dtype=dtype,
            trust_remote_code=work.trust_remote_code,
            log=log,
        )
