"""
Say no in the contract's form: `{"error", "details", ...}` with a status.

In:   whatever a handler raised.
Out:  an `ApiError`: what the client is told, and nothing that it should not know.
Pure, but for a line in the log where the fault is ours.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import attrs

from evalvault_sdk.errors import RunNotFoundError, StoreError, UnsupportedError

logger = logging.getLogger("evalvault_sdk.server")

#: Seconds after which a client may try again when the database failed, or too many came at once.
RETRY_AFTER_S = 2


@attrs.frozen
class ApiError(Exception):
    """An answer other than success: `{"error", "details", ...}` with a status."""

    status: int
    error: str
    details: str
    extra: Mapping[str, Any] = attrs.field(factory=dict)
    headers: Mapping[str, str] = attrs.field(factory=dict)
    #: One word for what counts refusals.
    reason: str = "invalid"

    def body(self) -> dict[str, Any]:
        """Return the JSON object of the answer."""
        return {"error": self.error, "details": self.details, **self.extra}


def too_large(what: str, **limit: int) -> ApiError:
    """Return the answer 413, with the limit as text and as a number for the sender to go by."""
    return ApiError(413, "Request too large", what, extra=limit, reason="too_large")


def come_again(error: str, details: str, *, reason: str, status: int = 503, after_s: int = RETRY_AFTER_S) -> ApiError:
    """Return an answer that asks the client to send the same again later."""
    return ApiError(status, error, details, headers={"Retry-After": str(after_s)}, reason=reason)


def as_api_error(error: Exception) -> ApiError:
    """Return the answer to an error of ours; what it was goes to the log, not to the client."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RunNotFoundError):
        return ApiError(404, "Run not found", str(error), reason="not_found")
    if isinstance(error, UnsupportedError):
        return ApiError(501, "Not supported", str(error), reason="unsupported")
    if isinstance(error, StoreError):
        logger.error("evalvault: %s", error)
        return come_again(
            "Database unavailable",
            "the database does not do what it should; send the same again later",
            reason="database",
        )
    logger.error("evalvault: a request failed by a fault of the server", exc_info=error)
    return ApiError(500, "Internal error", "this is a fault of the server; its log has the details", reason="fault")
