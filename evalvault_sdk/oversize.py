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


def shrink(event: bytes, max_bytes: int) -> bytes | None:
    """Return `event` in at most `max_bytes` bytes of JSON, or None."""
    fields: dict[str, Any] = orjson.loads(event)
    parts = {name: dict(fields[name]) for name in _PARTS if isinstance(fields.get(name), dict)}
    sizes = {(part, key): len(orjson.dumps(value)) for part, values in parts.items() for key, value in values.items()}
    whole: dict[tuple[str, str], Any] = {}
    for part, key in sorted(sizes, key=lambda place: sizes[place], reverse=True):
        whole[part, key] = parts[part][key]
        parts[part][key] = _MARKER % sizes[part, key]
        if max_bytes >= len(_shrunk(fields, parts, whole)):
            break
    texts = [place for place, value in whole.items() if isinstance(value, str)]
    for number, (part, key) in enumerate(texts):
        # What room is left goes to the beginnings of the texts.
        room = (max_bytes - len(_shrunk(fields, parts, whole))) // (len(texts) - number)
        parts[part][key] = beginning(whole[part, key], room) + parts[part][key]
    smaller = _shrunk(fields, parts, whole)
    return smaller if len(smaller) <= max_bytes else None


def _shrunk(fields: dict[str, Any], parts: dict[str, dict[str, Any]], cut: dict[tuple[str, str], Any]) -> bytes:
    metadata = {**parts.get("metadata", {}), "truncated": [f"{part}.{key}" for part, key in cut]}
    return orjson.dumps({**fields, **parts, "metadata": metadata})


def beginning(text: str, max_bytes: int) -> str:
    """Return as much of the beginning of `text` as takes at most `max_bytes` of JSON."""
    kept = text[: max(max_bytes, 0)]
    while kept and (size := len(orjson.dumps(kept)) - 2) > max_bytes:
        kept = kept[: min(len(kept) * max_bytes // size, len(kept) - 1)]
    return kept
