"""
The server as a program: processes, sockets, signals.

In:   the settings.
Out:  requests answered, until SIGINT or SIGTERM; those under way are finished first.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import shutil
import socket
import ssl
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import attrs

from evalvault_sdk.errors import ConfigurationError, MissingDependencyError
from evalvault_sdk.server.app import create_app
from evalvault_sdk.server.criteria import Criteria
from evalvault_sdk.server.security import Guard, check_exposure
from evalvault_sdk.server.settings import ServerSettings
from evalvault_sdk.server.store import open_store
from evalvault_sdk.server.telemetry import MULTIPROCESS_DIR, forget_dead_processes, set_up_logging

try:
    import uvicorn
    from uvicorn.protocols.http.auto import AutoHTTPProtocol
except ImportError as missing:
    raise MissingDependencyError.for_extra("serving", "server", missing) from missing

#: Seconds that requests under way may take once the server is to end. What they brought is stored in any case.
_GRACE_S = 6
#: Seconds that a new connection may take to say what it wants.
_HEAD_TIMEOUT_S = 30.0
#: Bytes of a request's line and headers.
_MAX_HEAD_BYTES = 64 << 10
#: Connections that wait to be accepted.
_BACKLOG = 2048
#: Objects that are made before Python looks for cycles among them; a request of 8,192 events is sixty thousand.
_COLLECT_EVERY = 200_000
#: Seconds that a thread may keep the interpreter while others wait for it, a tenth of Python's own: whoever stores
#: needs it for a moment only, between two statements that the database works on for some milliseconds.
_SWITCH_S = 0.0005


def run(settings: ServerSettings, *, on_ready: Callable[[str], None] = lambda url: None) -> None:
    """
    Serve until SIGINT or SIGTERM; requests under way are finished first.

    `on_ready` is told the address once it is ours. Raises `ConfigurationError` for settings that cannot work
    and an address that cannot be had, `StoreError` when the database cannot be opened.
    """
    check_exposure(settings.host, guarded=not Guard.of(settings).is_open, insecure=settings.insecure)
    Criteria.of(settings)
    _check_tls(settings)
    if settings.workers > 1 and not settings.db.startswith(("postgresql://", "postgres://")):
        raise ConfigurationError(
            f"{settings.workers} workers need PostgreSQL (--db postgresql://...): an SQLite file has one writer"
        )
    _raise_file_limit()
    set_up_logging(settings.log_format)
    # The database first: what is wrong with it is said now, and once.
    app = create_app(settings=settings) if settings.workers == 1 else None
    if app is None:
        open_store(settings.db).close()
    with _listen(settings.host, settings.port) as listening:
        host, port = f"[{settings.host}]" if ":" in settings.host else settings.host, listening.getsockname()[1]
        settings = attrs.evolve(settings, port=port)
        url = f"{'https' if settings.tls_cert else 'http'}://{host}:{port}"
        if app is not None:
            _tune_interpreter()
            # Else a page elsewhere, whose name is made to mean this machine, could ask as if it were from here.
            app.state.evalvault.local_only = Guard.of(settings).is_open and not settings.insecure
            on_ready(url)
            uvicorn.Server(uvicorn.Config(app, **_options(settings))).run(sockets=[listening])
            return
    on_ready(url)
    _run_workers(settings)


def _run_workers(settings: ServerSettings) -> None:
    """Let uvicorn start processes, and replace those that die. They read the settings from variables."""
    os.environ.update(settings.as_variables())
    folder = os.environ[MULTIPROCESS_DIR] = tempfile.mkdtemp(prefix="evalvault-metrics-")
    try:
        uvicorn.run(
            f"{__name__}:create_worker_app",
            factory=True,
            workers=settings.workers,
            host=settings.host,
            port=settings.port,
            **_options(settings),
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def create_worker_app() -> Any:
    """Return the app of one of several processes."""
    settings = ServerSettings.resolve()
    set_up_logging(settings.log_format)
    forget_dead_processes()
    app = create_app(settings=settings)
    _tune_interpreter()
    return app


def _tune_interpreter() -> None:
    """Have threads take turns more often, and Python look for cycles less often: events form none."""
    sys.setswitchinterval(_SWITCH_S)
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT_EVERY, 20, 50)


def _options(settings: ServerSettings) -> dict[str, Any]:
    return {
        "http": _Protocol,
        "access_log": False,  # a line per batch tells nobody anything; ours names what failed
        "log_config": None,
        "server_header": False,
        "proxy_headers": bool(settings.trusted_proxies),
        "forwarded_allow_ips": list(settings.trusted_proxies),
        "backlog": _BACKLOG,
        "timeout_graceful_shutdown": _GRACE_S,
        "ssl_certfile": settings.tls_cert,
        "ssl_keyfile": settings.tls_key,
        "ws_max_size": 1 << 16,  # nobody has anything to say to us over a WebSocket
    }


class _Protocol(AutoHTTPProtocol):  # type: ignore[misc,valid-type]
    """uvicorn's HTTP, which by itself would let a connection that asks nothing stay for ever."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Give a new connection some time for its first request."""
        super().connection_made(transport)
        self._head_bytes = 0
        self._patience: asyncio.TimerHandle | None = self.loop.call_later(_HEAD_TIMEOUT_S, self._give_up)

    def data_received(self, data: bytes) -> None:
        """Take what comes, but no head without end: what parses it would keep all of it."""
        super().data_received(data)
        if self._asks_nothing():
            self._head_bytes += len(data)
            if self._head_bytes > _MAX_HEAD_BYTES:
                self.transport.close()
            elif self._patience is None:
                self._patience = self.loop.call_later(_HEAD_TIMEOUT_S, self._give_up)
        else:
            self._head_bytes = 0
            self._be_patient()

    def eof_received(self) -> bool:
        """Answer also those who have nothing more to say (RFC 9293, 3.6): keep the connection until that is done."""
        super().eof_received()
        return self.cycle is not None and not self.cycle.more_body and not self.cycle.response_started

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._be_patient()
        super().connection_lost(exc)

    def _asks_nothing(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _be_patient(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _give_up(self) -> None:
        self._patience = None
        # Not while a request is answered, nor once it has become a WebSocket, which has a protocol of its own.
        if self._asks_nothing() and self.transport.get_protocol() is self:
            self.transport.close()


@contextlib.contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
            listening.listen(_BACKLOG)
        except (OSError, UnicodeError) as error:
            raise ConfigurationError(
                f"cannot listen on {host} port {port} ({error.strerror or error}): give another --host or --port"
                if isinstance(error, OSError)
                else f"{host!r} is no address to listen on"
            ) from None
        yield listening


def _check_tls(settings: ServerSettings) -> None:
    if settings.tls_cert is None:
        if settings.tls_key is not None:
            raise ConfigurationError("tls_key needs tls_cert: a key alone serves nothing")
        return
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(settings.tls_cert, settings.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(
            f"tls_cert {settings.tls_cert} and tls_key {settings.tls_key} cannot be used: "
            f"{getattr(error, 'strerror', None) or error}; both must be PEM, and belong together"
        ) from None


def _raise_file_limit() -> None:
    """Allow as many connections as the system does: the usual 1,024 are fewer than a fleet has."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
