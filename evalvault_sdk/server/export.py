"""
Write a run as a file that other programs take.

In:   a run's events, page by page.
Out:  the bytes of a JSONL file (what `evalvault stage ingest` and our own `ingest` take), or of a CSV file.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import orjson

from evalvault_sdk.events import StageEvent
from evalvault_sdk.server.store.base import StoredEvent
from evalvault_sdk.server.store.rows import COLUMNS, row_of

_JSON = orjson.OPT_NON_STR_KEYS
#: What a spreadsheet takes for a formula when a cell begins with it.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def as_jsonl(pages: Iterable[list[StoredEvent]]) -> Iterator[bytes]:
    """Yield one event a line, every field present."""
    for page in pages:
        yield b"".join(orjson.dumps(stored.event.to_dict(), option=_JSON) + b"\n" for stored in page)


def as_csv(pages: Iterable[list[StoredEvent]]) -> Iterator[bytes]:
    """
    Yield a table with EvalVault's columns: objects as JSON, times as ISO 8601.

    It begins with a byte order mark, without which Excel shows no Korean; a text that a spreadsheet would
    take for a formula gets a `'` before it. JSONL is the exact form.
    """
    yield codecs.BOM_UTF8
    yield _csv_lines([COLUMNS])
    for page in pages:
        yield _csv_lines(_cells(stored.event) for stored in page)


def _cells(event: StageEvent) -> list[Any]:
    return [f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell for cell in row_of(event)]


def _csv_lines(rows: Iterable[Iterable[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


#: By name of the format: how it is written, and its media type.
FORMATS: Mapping[str, tuple[Callable[[Iterable[list[StoredEvent]]], Iterator[bytes]], str]] = {
    "jsonl": (as_jsonl, "application/x-ndjson"),
    "csv": (as_csv, "text/csv; charset=utf-8"),
}
