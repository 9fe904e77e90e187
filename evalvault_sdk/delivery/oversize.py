"""
Make an event smaller that is too large for a request.

In:   one encoded event, and the bytes it may have.
Out:  the same event with its largest attributes and metadata truncated, or None if that is not enough.
Pure. Truncated text ends in a marker that says how long it was; what else was too large is replaced by one; the
metadata name every place in `truncated`.
"""

from __future__ import annotations

from typing import Any

import orjson

#: What is left at least of a text that is cut.
_MIN_KEPT = 64
_PARTS = ("attributes", "metadata")


def shrink(event: bytes, max_bytes: int) -> bytes | None:
    """Return `event` in at most `max_bytes` bytes of JSON, or None."""
    fields: dict[str, Any] = orjson.loads(event)
    parts = {name: dict(fields[name]) for name in _PARTS if isinstance(fields.get(name), dict)}
    sizes = {(part, key): len(orjson.dumps(value)) for part, values in parts.items() for key, value in values.items()}
    cut: list[str] = []
    largest = sorted(sizes, key=lambda place: sizes[place], reverse=True)
    for place in largest:
        part, key = place
        cut.append(f"{part}.{key}")
        shrunk = {**fields, **parts, "metadata": {**parts.get("metadata", {}), "truncated": cut}}
        shrunk[part] = {**shrunk[part], key: _MARKER % sizes[place]}
        room = max_bytes - len(orjson.dumps(shrunk))
        value = parts[part][key]
        if room > _MIN_KEPT and isinstance(value, str):
            shrunk[part][key] = _cut(value, room) + _MARKER % sizes[place]
        parts[part][key] = shrunk[part][key]
        if room >= 0:
            return orjson.dumps(shrunk)
    return None


_MARKER = "... (truncated: it was %d bytes)"


def _cut(text: str, max_bytes: int) -> str:
    """Return the beginning of `text` that takes at most `max_bytes` as JSON."""
    kept = text[:max_bytes]
    while kept and len(orjson.dumps(kept)) - 2 > max_bytes:
        kept = kept[: len(kept) * max_bytes // (len(orjson.dumps(kept)) - 2) - 1] if len(kept) > 1 else ""
    return kept
