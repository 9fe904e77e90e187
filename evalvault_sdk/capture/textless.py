"""
Keep ids, counts, scores and timings, but no text: `content="none"`.

In:   texts as they are met on the way to JSON, with the key they are under.
Out:  ids and names as they are; of every other text its length, of a list of texts their number.
Pure. Keys are taken for names of fields; what does not look like one is a text as well.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

#: Keys under which there are ids, and names of things in the program.
_IDS = re.compile(r"ids?|citations|.*_ids?", re.DOTALL)
_NAMES = re.compile(
    "model|provider|language|label|predicted_label|finish_reason|type|status|kind|cancelled_by|sample_kept|traceback"
)
_ONE_WORD = re.compile(r"\S{1,128}")
_FIELD_NAME = re.compile(r"[^\W\d][\w.-]{0,63}")


class Left:
    """Texts that were left out: the length of one, or the number of several."""

    __slots__ = ("number", "what")

    def __init__(self, what: str, number: int) -> None:
        self.what = what
        self.number = number


def text_or_left(text: str, key: str) -> str | Left:
    """Return what may be kept of a text under `key`. An id with blanks, a file's name perhaps, becomes a hash of it."""
    if _IDS.fullmatch(key):
        if _ONE_WORD.fullmatch(text):
            return text
        return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]
    if _NAMES.fullmatch(key) and _ONE_WORD.fullmatch(text):
        return text
    return Left("length", len(text))


def list_or_left(items: list[Any], size: int) -> list[Any] | Left:
    """Return a list of `size` items, of which these were looked at; in place of a text among other things is null."""
    if items and all(isinstance(item, Left) for item in items):
        return Left("count", size)
    return [None if isinstance(item, Left) else item for item in items]


def put(fields: dict[str, Any], name: str, value: Any) -> None:
    """Put `value` under `name`; of what was left out, say how much it was."""
    if not _FIELD_NAME.fullmatch(name):
        name = "text"
    if isinstance(value, Left):
        name, value = f"{name}_{value.what}", value.number
    fields[name] = value
