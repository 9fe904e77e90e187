"""
Keep what the server will never take, with the reason, where a person can look at it.

In:   events that were refused, and damaged lines of the spool.
Out:  lines of `dead-letter.jsonl` in the destination's folder, 0600:
      `{"rejected_at", "reason", "event": {...}}`, or `"damaged": "..."` in place of an event.
Worker's thread.

An event may be there more than once: when it was sent again, since nobody could know what had become of it.

Several processes append to one file: each holds a lock on it while it writes. At its bound the file becomes
`dead-letter.1.jsonl` in place of the one before; nothing else ever removes what is in it.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from pathlib import Path

import orjson

from evalvault_sdk.delivery.append import append_lines
from evalvault_sdk.delivery.folder import make_folder

DEAD_LETTER_FILE = "dead-letter.jsonl"
OLDER_DEAD_LETTER_FILE = "dead-letter.1.jsonl"
#: So long another process may hold the file; delivery does not stand still for longer.
_WAIT_S = 1.0
#: Characters kept of a damaged line.
_MAX_DAMAGED = 10_000


class DeadLetter:
    """The file of one destination."""

    def __init__(self, folder: Path, destination: str, *, max_bytes: int) -> None:
        self.path = folder / DEAD_LETTER_FILE
        self._destination = destination
        self._max_bytes = max_bytes

    def add(self, refused: Iterable[tuple[bytes, str]], *, damaged: bool = False) -> bool:
        """Append events with their reasons; say whether they are there."""
        now = dt.datetime.now(dt.timezone.utc).isoformat()
        lines = b"".join(_line(now, text, reason, damaged=damaged) for text, reason in refused)
        try:
            make_folder(self.path.parent, self._destination)
            append_lines(self.path, lines, max_bytes=self._max_bytes, older=self.path.with_name(OLDER_DEAD_LETTER_FILE))
        except OSError:
            return False
        return True


def _line(now: str, text: bytes, reason: str, *, damaged: bool) -> bytes:
    head = {"rejected_at": now, "reason": reason}
    if damaged:
        return orjson.dumps({**head, "damaged": text.decode("utf-8", "replace")[:_MAX_DAMAGED]}) + b"\n"
    return orjson.dumps(head)[:-1] + b',"event":' + text + b"}\n"  # the event's own bytes, unchanged
