"""Before every request: the key, the size, the queue, and a client that leaves.

The gate is an ASGI application around another one. It needs no library, and the application behind
it knows nothing of keys and queues.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from prunus.serving.errors import RequestError
from prunus.serving.job import Job, working_on

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_App = Callable[[_Message, _Receive, _Send], Awaitable[None]]

#: Paths that need no key: they say nothing about the model.
_OPEN = {"/health", "/ready"}
#: Paths whose requests take a turn.
_GENERATING = {"/v1/chat/completions", "/v1/completions"}
#: Largest body of a request, in bytes. A context of a million tokens fits.
_MAX_BODY = 8 * 2**20
#: Seconds after which a client that is sent away may try again.
_RETRY_AFTER = 2


class _ClientGoneError(Exception):
    """The client has closed its connection."""


class Gate:
    """Lets requests through to an application, some at a time.

    At most `max_concurrent` requests are computed at once. Up to `max_waiting` more wait for their
    turn, in the order in which they came; the rest get status 503 and the header Retry-After.

    Args:
        api_key: the key that requests must carry, or None. Without a key, the header Host must name
            this machine: otherwise a page in a browser could reach the server under a name of its
            own (DNS rebinding).
        max_concurrent: at least 1.
        max_waiting: at least 0.

    Attributes:
        jobs: the requests that wait or are computed.
    """

    def __init__(
        self, app: _App, *, api_key: str | None, max_concurrent: int, max_waiting: int
    ) -> None:
        self._app = app
        self._key = None if api_key is None else api_key.encode()
        self._free = max_concurrent
        self._max_waiting = max_waiting
        self._waiting: deque[Job] = deque()
        self._stopping = False
        self.jobs: set[Job] = set()

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        try:
            self._check_client(scope)
            if path == "/ready" and scope["method"] in ("GET", "HEAD"):
                self._check_ready()
                await _send_json(send, 200, {"status": "ready"}, {})
            elif path in _GENERATING and scope["method"] == "POST":
                await self._generate(scope, receive, send)
            else:
                await self._app(scope, receive, send)
        except RequestError as error:
            await _send_json(send, error.status, error.body(), error.headers())
        except _ClientGoneError:
            pass

    def stop(self) -> None:
        """Send the waiting requests away. Those that are computed go on. Called in the loop."""
        self._stopping = True
        while self._waiting:
            slot = self._waiting.popleft().slot
            if slot is not None and not slot.done():
                slot.set_exception(_busy("the server is stopping", "stopping"))

    def cancel(self) -> None:
        """End the requests that are computed, at their next token."""
        for job in self.jobs:
            job.cancelled.set()

    def _check_client(self, scope: _Message) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self._key is None:
            host = headers.get(b"host", b"localhost").decode("latin-1")
            if not is_loopback(_without_port(host)):
                raise RequestError(
                    403,
                    f"the header Host names {host[:100]!r}, but a server without a key answers "
                    "only to localhost and addresses of this machine",
                )
            return
        if scope["path"] in _OPEN:
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._key):
            raise RequestError(
                401,
                "the request carries no key, or another one; send the header Authorization: "
                "Bearer KEY with the server's key",
                code="invalid_api_key",
            )

    def _check_ready(self) -> None:
        if self._stopping:
            raise _busy("the server is stopping", "stopping")
        if not self._free and len(self._waiting) >= self._max_waiting:
            reason = "all turns and all places in the queue are taken; try again later"
            raise _busy(reason, "overloaded")

    async def _generate(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        body = await _read_body(receive)
        job = Job()
        self.jobs.add(job)
        watcher = asyncio.create_task(_watch(receive, job))
        try:
            if not await self._take_turn(job):
                return
            try:
                with working_on(job):
                    await self._app(scope, _replay(body, job), send)
            finally:
                self._end_turn()
        finally:
            # Where the answer was not read to its end, nobody wants the rest.
            job.cancelled.set()
            self.jobs.discard(job)
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher

    async def _take_turn(self, job: Job) -> bool:
        """Wait for a turn; false if the client went away meanwhile."""
        self._check_ready()
        if self._free:
            self._free -= 1
            return True
        job.slot = asyncio.get_running_loop().create_future()
        self._waiting.append(job)
        try:
            return await job.slot
        finally:
            with contextlib.suppress(ValueError):
                self._waiting.remove(job)

    def _end_turn(self) -> None:
        """Give the turn to the request that has waited longest."""
        while self._waiting:
            slot = self._waiting.popleft().slot
            if slot is not None and not slot.done():
                slot.set_result(True)
                return
        self._free += 1


def is_loopback(host: str) -> bool:
    """Whether a host's name or address can be reached from this machine only.

    >>> [is_loopback(host) for host in ("localhost", "127.0.0.1", "[::1]", "0.0.0.0", "a.example")]
    [True, True, True, False, False]
    """
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() else host


def _busy(message: str, code: str) -> RequestError:
    return RequestError(503, message, code=code, retry_after=_RETRY_AFTER)


async def _read_body(receive: _Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _ClientGoneError
        body += message.get("body", b"")
        if len(body) > _MAX_BODY:
            raise RequestError(413, f"the request is larger than {_MAX_BODY >> 20} MiB")
        if not message.get("more_body", False):
            return bytes(body)


async def _watch(receive: _Receive, job: Job) -> None:
    """Cancel a job when its client leaves."""
    while (await receive())["type"] != "http.disconnect":
        pass
    job.cancel()


def _replay(body: bytes, job: Job) -> _Receive:
    """What the application receives: the body, and the end of the connection when it comes."""
    unread = True

    async def receive() -> _Message:
        nonlocal unread
        if unread:
            unread = False
            return {"type": "http.request", "body": body, "more_body": False}
        await job.gone.wait()
        return {"type": "http.disconnect"}

    return receive


async def _send_json(send: _Send, status: int, body: Any, headers: dict[str, str]) -> None:
    content = json.dumps(body).encode()
    found = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
        *((name.lower().encode(), value.encode()) for name, value in headers.items()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": found})
    await send({"type": "http.response.body", "body": content})
