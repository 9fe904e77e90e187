"""
Decide who may talk to the server.

In:   a request's `Authorization` header; the address that the server is to listen on.
Out:  nothing, or the `ApiError` or `ConfigurationError` that says what to do.
"""

from __future__ import annotations

import hmac
import ipaddress

from evalvault_sdk.errors import ConfigurationError
from evalvault_sdk.server.ingest import ApiError


def check_token(authorization: str | None, token: str | None) -> None:
    """Raise `ApiError` 401 unless `authorization` bears `token`; without a token everybody may in."""
    if token is None:
        return
    scheme, _, given = (authorization or "").partition(" ")
    # Compared in constant time, as bytes: an answer's time must not tell how much of a guess was right.
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token.encode()):
        raise ApiError(
            401,
            "Unauthorized",
            "send the header 'Authorization: Bearer <token>' with the server's token",
            headers={"WWW-Authenticate": "Bearer"},
        )


def check_token_setting(token: str | None) -> str | None:
    """Return a server's token as it is compared. Raises `ConfigurationError` for a blank one, which guards nothing."""
    if token is None:
        return None
    if not token.strip():
        raise ConfigurationError("the token is empty: give one, or none at all (is a variable not set?)")
    return token.strip()


def check_exposure(host: str, token: str | None, *, insecure: bool) -> None:
    """Raise `ConfigurationError` for a server that would show its users' questions to the network."""
    if token is None and not insecure and not _is_loopback(host):
        raise ConfigurationError(
            f"listening on {host} without a token would let anyone on the network read and write: "
            "give --token (EVALVAULT_API_TOKEN), or say --insecure if something in front checks access"
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
