"""
Make an event smaller that is too large: for the limit on events, or for what a server takes.

In:   one encoded event, and the bytes it may have.
Out:  the same event with its largest attributes and metadata truncated, or None if that is not enough.
Pure. Truncated text ends in a marker that says how long it was; what else was too large is replaced by one; the
metadata name every place in `truncated`.
"""

from __future__ import annotations

from typing import Any

import orjson

_PARTS = ("attributes", "metadata")
_MARKER = "... (truncated: it was %d bytes)"
#: What it takes at most to list the places: `,"metadata":{"truncated":[]}`.
_LIST_BYTES = 32


def shrink(event: bytes, max_bytes: int) -> bytes | None:
    """Return `event` in at most `max_bytes` bytes of JSON, or None."""
    fields: dict[str, Any] = orjson.loads(event)
    parts = {name: dict(fields[name]) for name in _PARTS if isinstance(fields.get(name), dict)}
    sizes = {(part, key): len(orjson.dumps(value)) for part, values in parts.items() for key, value in values.items()}
    whole: dict[tuple[str, str], Any] = {}
    left = len(event) + _LIST_BYTES
    for place in sorted(sizes, key=lambda place: sizes[place], reverse=True):
        if left <= max_bytes:
            break
        part, key = place
        marker = _MARKER % sizes[place]
        left += len(marker) + 2 - sizes[place] + len(orjson.dumps(f"{part}.{key}")) + 1
        whole[place] = parts[part][key]
        parts[part][key] = marker
    texts = [place for place, value in whole.items() if isinstance(value, str)]
    for number, (part, key) in enumerate(texts):
        # What room is left goes to the beginnings of the texts.
        kept = beginning(whole[part, key], (max_bytes - left) // (len(texts) - number))
        left += len(orjson.dumps(kept)) - 2
        parts[part][key] = kept + parts[part][key]
    metadata = {**parts.get("metadata", {}), "truncated": [f"{part}.{key}" for part, key in whole]}
    smaller = orjson.dumps({**fields, **parts, "metadata": metadata})
    return smaller if len(smaller) <= max_bytes else None


def beginning(text: str, max_bytes: int) -> str:
    """Return as much of the beginning of `text` as takes at most `max_bytes` of JSON."""
    kept = text[: max(max_bytes, 0)]
    while kept and (size := len(orjson.dumps(kept)) - 2) > max_bytes:
        kept = kept[: min(len(kept) * max_bytes // size, len(kept) - 1)]
    return kept
