"""
Print stages as they end, for a developer who watches.

In:   encoded events, on their way to the sink.
Out:  one line each on standard error, indented by depth: a stage comes after the stages inside it.
Caller's thread. A line shows what was recorded, after redaction: counts, numbers, and the beginnings of texts.
"""

from __future__ import annotations

import os
import sys
from typing import Any, TextIO

import orjson

from evalvault_sdk.capture.context import open_scope
from evalvault_sdk.capture.recorder import Note, RefusalReason, Sink

#: Characters of one line, and of one value in it.
_LINE = 160
_VALUE = 40
_COLOURS = {"error": "31", "success": "32"}


class Console:
    """A sink that prints what it hands on to another one."""

    def __init__(self, sink: Sink, stream: TextIO | None = None) -> None:
        self._sink = sink
        self._stream = stream

    @property
    def closed(self) -> bool:
        """Whether the sink behind it takes no more."""
        return self._sink.closed

    def put(self, event: bytes) -> bool:
        """Hand on an event and print it."""
        taken = self._sink.put(event)
        try:
            stream = self._stream or sys.stderr
            stream.write(_line(orjson.loads(event), _depth(), colour=_wants_colour(stream)) + "\n")
        except Exception:  # noqa: BLE001,S110 - a stream that is closed, or takes no Korean
            pass
        return taken

    def refuse(self, reason: RefusalReason) -> None:
        """Hand on."""
        self._sink.refuse(reason)

    def note(self, what: Note, count: int = 1) -> None:
        """Hand on."""
        self._sink.note(what, count)


def _depth() -> int:
    depth, scope = 0, open_scope.get()
    while scope is not None and depth < _VALUE:
        depth += scope.stage_id is not None
        scope = scope._outer
    return depth


def _wants_colour(stream: TextIO) -> bool:
    return stream.isatty() and "NO_COLOR" not in os.environ


def _line(event: dict[str, Any], depth: int, *, colour: bool) -> str:
    status = _printable(str(event.get("status", "success")))[:_VALUE]
    duration_ms = event.get("duration_ms")
    took = f"{duration_ms:,.1f} ms" if isinstance(duration_ms, (int, float)) else ""
    name = event.get("stage_name")
    title = f"{'  ' * depth}{event.get('stage_type')}{f' ({name})' if name else ''}"
    told = " ".join(f"{key}={_short(value)}" for key, value in event.get("attributes", {}).items())
    clock = str(event.get("finished_at", ""))[11:19]
    before = _printable(f"{clock} {title:<44} {took:>12}  ")[: _LINE - _VALUE]
    after = _printable(f"{'':<{max(9 - len(status), 0)}} {told}")[: _LINE - len(before) - len(status)].rstrip()
    return f"{before}\x1b[{_COLOURS.get(status, '33')}m{status}\x1b[0m{after}" if colour else before + status + after


def _short(value: Any) -> str:
    if isinstance(value, dict):
        if "type" not in value:
            return f"{{{len(value)}}}"
        return f"{value['type']}: {_short(value['message'])}" if value.get("message") else str(value["type"])
    if isinstance(value, list):
        return f"[{len(value)}]"
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else orjson.dumps(value).decode()
    return text if len(text) <= _VALUE else text[: _VALUE - 1] + "…"


def _printable(text: str) -> str:
    """Return `text` on one line, without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
