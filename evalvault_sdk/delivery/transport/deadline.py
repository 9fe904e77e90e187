"""
Read an HTTP answer within a deadline, all of it.

In:   requests' read timeout, which by itself bounds each read: a server that sends a byte a second could hold the
      worker for ever.
Out:  the same timeout as a bound on status line, headers and body together.
Worker's thread. Imported late: it needs `requests`, which is slow to import.
"""

from __future__ import annotations

import http.client
import io
import socket
import time
from typing import Any

import urllib3.connection
import urllib3.connectionpool
from requests.adapters import HTTPAdapter


class _TimedReads(io.RawIOBase):
    """A socket's bytes, until time is up."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, timeout_s: float) -> None:
        self._raw = raw
        self._socket = sock
        self._until = time.monotonic() + timeout_s

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left_s = self._until - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the answer is not complete in time")
        self._socket.settimeout(left_s)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _TimedResponse(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *arguments: Any, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        timeout_s = sock.gettimeout()
        if timeout_s is not None:
            raw: Any = self.fp.detach()
            self.fp = io.BufferedReader(_TimedReads(raw, sock, timeout_s))


class _Connection(urllib3.connection.HTTPConnection):
    response_class = _TimedResponse


class _TlsConnection(urllib3.connection.HTTPSConnection):
    response_class = _TimedResponse


class _Pool(urllib3.connectionpool.HTTPConnectionPool):
    ConnectionCls = _Connection


class _TlsPool(urllib3.connectionpool.HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


class DeadlineAdapter(HTTPAdapter):
    """Requests' adapter, with connections whose read timeout bounds the whole answer."""

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        """Make connections to servers of the kind above."""
        super().init_poolmanager(*arguments, **options)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}

    def proxy_manager_for(self, *arguments: Any, **options: Any) -> Any:
        """Make connections through a proxy of the same kind."""
        manager = super().proxy_manager_for(*arguments, **options)
        manager.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}
        return manager
