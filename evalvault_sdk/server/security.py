"""
Decide who may talk to the server, and about which runs.

In:   a request's `Authorization` header; the tokens, plain or hashed; the address to listen on.
Out:  an `Access`; or the `ApiError` or `ConfigurationError` that says what to do.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from evalvault_sdk.errors import ConfigurationError
from evalvault_sdk.server.answers import ApiError
from evalvault_sdk.server.files import read_config_file
from evalvault_sdk.server.settings import ServerSettings

_SHA256 = re.compile(r"[0-9a-f]{64}")


@attrs.frozen(kw_only=True)
class Access:
    """What somebody may do."""

    #: Who that is, for the log and the rate limit.
    name: str
    #: What the ids of the runs begin with that this is about; `""` is all.
    runs: tuple[str, ...] = ("",)
    read: bool = True
    write: bool = True

    def check(self, *, write: bool) -> None:
        """Raise `ApiError` 403 unless it is allowed to read, or to write."""
        if not (self.write if write else self.read):
            may, may_not = ("read", "write") if write else ("write", "read")
            raise ApiError(403, "Forbidden", f"this token may {may}, but not {may_not}", reason="forbidden")

    def check_run(self, run_id: str) -> None:
        """Raise `ApiError` 403 for a run of somebody else; whether it exists is not said."""
        if not self.covers(run_id):
            raise ApiError(
                403, "Forbidden", f"this token is for runs whose id begins with {self.scope}", reason="forbidden"
            )

    def covers(self, run_id: str) -> bool:
        """Return whether this is about that run."""
        return run_id.startswith(self.runs)

    @property
    def scope(self) -> str:
        """What a run's id has to begin with, for people."""
        return " or ".join(repr(prefix) for prefix in self.runs)


#: What everybody may do where there are no tokens.
EVERYBODY = Access(name="everybody")


class Guard:
    """Knows the tokens, by their hashes only."""

    def __init__(self, tokens: Mapping[bytes, Access]) -> None:
        self._tokens = dict(tokens)

    @classmethod
    def of(cls, settings: ServerSettings) -> Guard:
        """Return the guard that settings ask for. Raises `ConfigurationError`."""
        tokens = {
            token_digest(token.strip()): Access(name="token" if number == 1 else f"token-{number}")
            for number, token in enumerate(settings.token, start=1)
        }
        if settings.tokens_file is not None:
            tokens.update(_read_tokens(settings.tokens_file))
        return cls(tokens)

    @property
    def is_open(self) -> bool:
        """Whether everybody may do everything."""
        return not self._tokens

    def access(self, authorization: str | None) -> Access:
        """Return what the bearer of a header may do. Raises `ApiError` 401."""
        if not self._tokens:
            return EVERYBODY
        scheme, _, given = (authorization or "").partition(" ")
        digest = token_digest(given.strip())
        found = None
        # All of them, in constant time each: an answer's time must not tell how much of a guess was right.
        for known, access in self._tokens.items():
            if hmac.compare_digest(digest, known):
                found = access
        if scheme.lower() != "bearer" or found is None:
            raise ApiError(
                401,
                "Unauthorized",
                "send the header 'Authorization: Bearer <token>' with the server's token",
                headers={"WWW-Authenticate": "Bearer"},
                reason="unauthorized",
            )
        return found


def token_digest(token: str) -> bytes:
    """Return what is kept of a token. SHA-256, since tokens are drawn, not thought of: there is nothing to guess."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def new_token() -> str:
    """Return a token that nobody has: 256 bits, safe in headers and shells."""
    return f"evt_{secrets.token_urlsafe(32)}"


def check_exposure(host: str, *, guarded: bool, insecure: bool) -> None:
    """Raise `ConfigurationError` for a server that would show its users' questions to the network."""
    if not guarded and not insecure and not is_loopback(host):
        raise ConfigurationError(
            f"listening on {host} without a token would let anyone on the network read and write: "
            "give --token (EVALVAULT_API_TOKEN) or --tokens-file, or say --insecure if something in front checks access"
        )


def is_loopback(host: str) -> bool:
    """Return whether a name or address is this machine's for itself."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read_tokens(path: str) -> dict[bytes, Access]:
    """
    Read a file of tokens::

        [[token]]
        name = "rag-service"
        sha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
        runs = ["prod-"]        # what run ids begin with; absent: all runs
        access = ["write"]      # "read", "write"; absent: both
    """
    if Path(path).is_file() and Path(path).stat().st_mode & 0o022:
        raise ConfigurationError(f"{path} can be changed by others than its owner: chmod go-w {path}")
    entries = read_config_file(path).get("token")
    if not isinstance(entries, list) or not entries:
        raise ConfigurationError(f"{path} has no [[token]]: make one with `evalvault-sdk token`")
    tokens: dict[bytes, Access] = {}
    for number, entry in enumerate(entries, start=1):
        digest, access = _read_token(entry, f"{path}: token {number}")
        if digest in tokens:
            raise ConfigurationError(f"{path}: token {number} is there already, as {tokens[digest].name!r}")
        tokens[digest] = access
    return tokens


def _read_token(entry: Any, where: str) -> tuple[bytes, Access]:
    if not isinstance(entry, dict):
        raise ConfigurationError(f"{where} must be a table with name and sha256")
    unknown = sorted(set(entry) - {"name", "sha256", "runs", "access"})
    if unknown:
        raise ConfigurationError(f"{where} has an unknown key {unknown[0]!r}: name, sha256, runs, access are known")
    name, digest = entry.get("name"), entry.get("sha256")
    if not isinstance(name, str) or not name.strip():
        raise ConfigurationError(f"{where} needs a name: it is what the log calls its bearer")
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest.lower()):
        raise ConfigurationError(f"{where} needs sha256: 64 hexadecimal digits, as `evalvault-sdk token` prints them")
    runs = _names(entry.get("runs", [""]), f"{where}: runs")
    access = _names(entry.get("access", ["read", "write"]), f"{where}: access")
    if not set(access) <= {"read", "write"}:
        raise ConfigurationError(f"{where}: access must be some of: read, write")
    return bytes.fromhex(digest), Access(name=name, runs=runs, read="read" in access, write="write" in access)


def _names(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ConfigurationError(f"{where} must be a list with at least one text")
    if not all(isinstance(text, str) for text in value):
        raise ConfigurationError(f"{where} must be a list of texts")
    return tuple(value)
