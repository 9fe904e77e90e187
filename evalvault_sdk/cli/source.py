"""
Where the command reads a run from: a server, or a database file.

In:   a run's id.
Out:  the objects of the contract, the same from either source (`Source`).
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Protocol

from evalvault_sdk.config import Settings
from evalvault_sdk.delivery.transport.http import open_session, request_options
from evalvault_sdk.errors import EvalVaultError
from evalvault_sdk.server.reader import RunReader
from evalvault_sdk.server.store import EventFilter, open_store


class Source(Protocol):
    """What `show` and `demo` ask."""

    #: Where that is, for people.
    address: str

    def summary(self, run_id: str) -> dict[str, Any]:
        """Return the summary with `stage_types`."""

    def debug(self, run_id: str) -> dict[str, Any]:
        """Return the debug report."""

    def events(self, run_id: str, *, trace_id: str | None = None) -> list[dict[str, Any]]:
        """Return the first 10,000 events of a run, or of one of its traces."""


_MAX_EVENTS = 10_000


#: A field by which an answer of the server is known.
_EXPECTED = {"summary": "stage_types", "debug": "run_summary", "events": "events"}


class ServerSource:
    """A running server."""

    def __init__(self, url: str | None, token: str | None) -> None:
        self._settings = Settings.resolve(run_id="show", api_url=url, token=token)
        self.address = self._settings.api_url

    def summary(self, run_id: str) -> dict[str, Any]:
        """Return the summary with `stage_types`."""
        return self._get("summary", run_id, detail="true")

    def debug(self, run_id: str) -> dict[str, Any]:
        """Return the debug report."""
        return self._get("debug", run_id)

    def events(self, run_id: str, *, trace_id: str | None = None) -> list[dict[str, Any]]:
        """Return the first 10,000 events."""
        query = {"limit": str(_MAX_EVENTS)} | ({"trace_id": trace_id} if trace_id else {})
        events: list[dict[str, Any]] = []
        while True:
            page = self._get("events", run_id, **query)
            events += page["events"]
            cursor = page.get("next_cursor")  # another server may know no pages
            if cursor is None or len(events) >= _MAX_EVENTS:
                return events[:_MAX_EVENTS]
            query["cursor"] = cursor

    def _get(self, what: str, run_id: str, **query: str) -> dict[str, Any]:
        from urllib.parse import quote

        import requests

        url = f"{self.address}/api/stage/{what}/{quote(run_id, safe='')}"
        try:
            with open_session(self._settings) as session:
                response = session.get(url, params=query, timeout=30, **request_options(self._settings))
            answer = response.json()
        except requests.JSONDecodeError:
            answer = None
        except requests.exceptions.SSLError:
            raise EvalVaultError(
                f"the certificate of {self.address} is not trusted: set EVALVAULT_CA_BUNDLE to your CA's file"
            ) from None
        except (requests.RequestException, OSError) as error:
            raise EvalVaultError(
                f"no server at {self.address} ({type(error).__name__}): start one with `evalvault-sdk serve`, "
                "or give --url or --db"
            ) from None
        expected = _EXPECTED[what] if response.ok else "details"
        if not isinstance(answer, dict) or expected not in answer:
            raise EvalVaultError(f"{self.address} answers, but is not an EvalVault server: check --url")
        if not response.ok:
            raise EvalVaultError(f"{answer.get('error')}: {answer['details']}")
        return answer


class DatabaseSource:
    """A database, of ours or of EvalVault's."""

    def __init__(self, address: str) -> None:
        if ":" not in address and not Path(address).is_file():
            raise EvalVaultError(f"there is no database file {address}")
        store = open_store(address, read_only=True)
        self.address = store.address
        self._reader = RunReader(store)

    def summary(self, run_id: str) -> dict[str, Any]:
        """Return the summary with `stage_types`."""
        return self._reader.summary(run_id, detail=True)

    def debug(self, run_id: str) -> dict[str, Any]:
        """Return the debug report."""
        return self._reader.debug(run_id, limit=_MAX_EVENTS)

    def events(self, run_id: str, *, trace_id: str | None = None) -> list[dict[str, Any]]:
        """Return the first 10,000 events."""
        pages = self._reader.pages(run_id, EventFilter(trace_id=trace_id))
        events = (stored.event.to_dict() for page in pages for stored in page)
        return list(itertools.islice(events, _MAX_EVENTS))
