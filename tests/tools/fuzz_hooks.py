"""Teach schemathesis to write events one a line."""

from __future__ import annotations

import json
from typing import Any

import schemathesis


def lines(context: Any, value: Any) -> bytes:
    """Return a list as a line for each of its entries; anything else as one line."""
    del context
    if isinstance(value, (bytes, str)):
        return value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
    entries = value if isinstance(value, list) else [value]
    return b"\n".join(json.dumps(entry).encode() for entry in entries)


schemathesis.serializer("application/x-ndjson", "application/jsonl")(lines)
