"""The verb that puts a model behind an endpoint: `serve`."""

from __future__ import annotations

from typing import Annotated

import typer

from prunus.cli import arguments as arg
from prunus.cli.terminal import log, user_errors

__all__ = ["serve"]


def serve(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Checkpoint, dense or packed, adapter, or hub id."),
    ],
    host: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            show_default=False,
            help="Address to listen on. Default: 127.0.0.1, which only this machine reaches. Any "
            "other needs a key.",
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            max=65535,
            show_default=False,
            help="TCP port; 0 takes a free one. Default: 8000.",
        ),
    ] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            metavar="KEY",
            envvar="PRUNUS_API_KEY",
            show_envvar=True,
            help="Key that every request must carry. Others can read it on a command line, but not "
            "in the environment. Default: none.",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How clients call the model. Default: the name of the folder, or the hub id.",
        ),
    ] = None,
    max_concurrent: Annotated[
        int,
        typer.Option(
            metavar="N",
            show_default=False,
            help="Requests that are computed at once, each in a thread; the others wait for their "
            "turn. Default: 1.",
        ),
    ] = 1,
    max_waiting: Annotated[
        int,
        typer.Option(
            metavar="N",
            show_default=False,
            help="Requests that may wait. Those beyond get status 503 with Retry-After. Default: "
            "32.",
        ),
    ] = 32,
    device: arg.Device = "auto",
    dtype: arg.ComputeDtype = "auto",
    trust_remote_code: arg.Trust = False,
) -> None:
    """Answer requests in OpenAI's protocol: chats, completions, streams.

    Endpoints: /v1/chat/completions, /v1/completions, /v1/models, /health, /ready. Try it with:

    curl localhost:8000/v1/completions --json '{"prompt": "Once upon"}'

    SIGTERM and Ctrl-C end the server after the requests that are being computed.
    """
    with user_errors(None):
        from prunus.serving.server import serve as serve_model

        serve_model(
            model,
            name=name,
            host=host,
            port=port,
            api_key=api_key,
            max_concurrent=max_concurrent,
            max_waiting=max_waiting,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            log=log,
        )
