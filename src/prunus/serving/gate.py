"""Before every request: the key, the size, the queue, and a client that leaves. After it: the log.

The gate is an ASGI application around another one. It needs no library, and the application inside
it knows nothing of keys and queues.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_App = Callable[[_Message, _Receive, _Send], Awaitable[None]]

_log = logging.getLogger("prunus.serving")

#: Paths that need no key: they say nothing about the model.
_OPEN = {"/health", "/ready"}
#: Paths whose requests take a turn.
GENERATING = {"/v1/chat/completions", "/v1/completions"}
#: Seconds after which a client that is sent away may try again.
_RETRY_AFTER = "2"
#: Seconds after which a client that reads nothing of its answer counts as gone.
_SLOWEST_READER = 60
#: Longest name that a client may give a request. It is sent back.
_MAX_ID = 128


class RequestError(Exception):
    """A request that is not served; an error as the OpenAI protocol writes it.

    >>> json.loads(RequestError(404, "no model x", code="model_not_found").body())["error"]["code"]
    'model_not_found'
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.code, self.param, self.headers = code, param, headers or {}

    def body(self) -> str:
        """The JSON of the answer, in ASCII: what a client sent may be no valid Unicode."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        told = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": told})


def client_gone() -> RequestError:
    """What ends a request whose client left. Only the log shows its status, which is nginx's."""
    return RequestError(499, "the client went away")


class Job:
    """A request by its `id`, the client's or a new one, until the last byte of its answer.

    The thread that generates checks `cancelled` before every token: nobody waits any more. `slot`
    is done when the request has its turn, or will have none.
    """

    def __init__(self, name: str) -> None:
        self.id = name
        self.body = b""
        self.cancelled = threading.Event()
        self.slot: asyncio.Future[None] | None = None
        self.prompt_tokens = self.answer_tokens = 0

    def cancel(self) -> None:
        """End the work on this request. Called in the event loop."""
        self.cancelled.set()
        if self.slot is not None and not self.slot.done():
            self.slot.set_exception(client_gone())

    def usage(self) -> dict[str, int]:
        """The numbers of tokens as OpenAI writes them."""
        total = self.prompt_tokens + self.answer_tokens
        found = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.answer_tokens}
        return {**found, "total_tokens": total}


class Gate:
    """Lets requests through to an application, some at a time.

    At most `max_concurrent` requests are computed at once. Up to `max_waiting` more wait in the
    order of arrival; the rest get status 503 and the header Retry-After. The application finds the
    `Job` of a request in the scope, under "job". Larger bodies than `max_body` are refused.

    Requests must carry `api_key`. Without one, the header Host must name this machine: otherwise a
    page in a browser could reach the server under a name of its own (DNS rebinding).
    """

    def __init__(
        self,
        app: _App,
        *,
        api_key: str | None,
        max_body: int,
        max_concurrent: int,
        max_waiting: int,
    ) -> None:
        self._app = app
        self._key = None if api_key is None else api_key.encode()
        self._max_body = max_body
        self._free = max_concurrent
        self._max_waiting = max_waiting
        self._waiting: deque[Job] = deque()
        self._stopping = False
        self.jobs: set[Job] = set()

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status = time.monotonic(), client_gone().status
        headers = {name.lower(): value for name, value in scope["headers"]}
        job = scope["job"] = Job(_request_id(headers))

        async def answer(message: _Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = (b"x-request-id", job.id.encode())
                message["headers"] = [*message.get("headers", ()), own]
            # A client that does not read holds up the requests that wait for its turn.
            async with asyncio.timeout(_SLOWEST_READER):
                await send(message)

        try:
            await self._serve(scope, headers, receive, answer)
        except RequestError as error:
            await _send_json(answer, error.status, error.body(), error.headers)
        except TimeoutError:
            pass  # the connection is closed, because the answer is not complete
        finally:
            method, path = scope["method"][:16], scope["raw_path"].decode("latin-1")[:200]
            tokens, seconds = f"{job.prompt_tokens} + {job.answer_tokens}", time.monotonic() - begin
            _log.info("%s %s %d, %s tokens, %.3f s", method, path, status, tokens, seconds)

    async def _serve(
        self, scope: _Message, headers: dict[bytes, bytes], receive: _Receive, send: _Send
    ) -> None:
        path = scope["path"]
        self._check_client(path, headers)
        if path == "/ready" and scope["method"] in ("GET", "HEAD"):
            self._check_ready()
            await _send_json(send, 200, '{"status": "ready"}', {})
        elif path in GENERATING and scope["method"] == "POST":
            # A page in a browser can send other kinds to any address without being asked.
            kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            if kind != b"application/json":
                raise RequestError(400, "the body must be a JSON object, sent as application/json")
            self._check_ready()
            await self._generate(scope, receive, send)
        else:
            await self._app(scope, receive, send)

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

    def _check_client(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self._key is None:
            host = headers.get(b"host", b"localhost").decode("latin-1")
            if not is_loopback(_without_port(host)):
                raise RequestError(
                    403,
                    f"the header Host names {host[:100]!r}, but a server without a key answers "
                    "only to localhost and addresses of this machine",
                )
            return
        if path in _OPEN:
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._key):
            raise RequestError(
                401,
                "the request carries no key, or another one; send the header Authorization: "
                "Bearer KEY with the server's key",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _check_ready(self) -> None:
        if self._stopping:
            raise _busy("the server is stopping", "stopping")
        if not self._free and len(self._waiting) >= self._max_waiting:
            reason = "all turns and all places in the queue are taken; try again later"
            raise _busy(reason, "overloaded")

    async def _generate(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        job = scope["job"]
        job.body = await self._read_body(receive)
        self.jobs.add(job)
        watcher = asyncio.create_task(_watch(receive, job))
        try:
            await self._take_turn(job)
            try:
                await self._app(scope, _nothing, send)
            finally:
                self._end_turn()
        finally:
            # Where the answer was not read to its end, nobody wants the rest.
            job.cancelled.set()
            self.jobs.discard(job)
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher

    async def _read_body(self, receive: _Receive) -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise client_gone()
            body += message.get("body", b"")
            if len(body) > self._max_body:
                raise RequestError(413, f"the request is larger than {self._max_body} bytes")
            if not message.get("more_body", False):
                return bytes(body)

    async def _take_turn(self, job: Job) -> None:
        self._check_ready()
        if self._free:
            self._free -= 1
            return
        job.slot = asyncio.get_running_loop().create_future()
        self._waiting.append(job)
        try:
            await job.slot
        finally:
            with contextlib.suppress(ValueError):
                self._waiting.remove(job)

    def _end_turn(self) -> None:
        """Give the turn to the request that has waited longest."""
        while self._waiting:
            slot = self._waiting.popleft().slot
            if slot is not None and not slot.done():
                slot.set_result(None)
                return
        self._free += 1


def _request_id(headers: dict[bytes, bytes]) -> str:
    """The client's name of a request, if it is short and can be printed, or a new one."""
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    fits = 0 < len(given) <= _MAX_ID and given.isascii() and given.isprintable()
    return given if fits else str(uuid.uuid4())


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
    return RequestError(503, message, code=code, headers={"Retry-After": _RETRY_AFTER})


async def _watch(receive: _Receive, job: Job) -> None:
    """Cancel a job when its client leaves."""
    while (await receive())["type"] != "http.disconnect":
        pass
    job.cancel()


async def _nothing() -> _Message:
    """What the application receives, which needs no more than the job."""
    return await asyncio.Future()


async def _send_json(send: _Send, status: int, body: str, headers: dict[str, str]) -> None:
    found = {"content-type": "application/json", "content-length": str(len(body)), **headers}
    encoded = [(name.lower().encode(), value.encode()) for name, value in found.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body.encode()})
