"""Errors as the OpenAI protocol writes them."""

from __future__ import annotations

import json


class RequestError(Exception):
    """A request that is not served.

    Args:
        headers: what the headers of the answer say of it.

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
