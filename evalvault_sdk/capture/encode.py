"""
Turn any Python object into JSON bytes.

In:   the fields of an event, in which attributes and metadata may hold whatever a program has at hand.
Out:  UTF-8 JSON that EvalVault's rules accept: no NaN, no lone surrogate, no integer beyond 64 bits.
Caller's thread. Never raises (but for KeyboardInterrupt and its like), never changes what it is given.

Two ways: orjson at once, for what it encodes without running any Python; else a walk that copies every
container before it looks inside, and replaces what JSON has no form for. orjson must never run Python (a
`default=` hook, a time zone written in Python) while it is inside a dict: another thread that adds a key
meanwhile would crash the interpreter.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import decimal
import enum
import math
import pathlib
import uuid
from collections.abc import Mapping
from typing import Any

import attrs
import orjson

from evalvault_sdk.errors import describe_error

_OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_PASSTHROUGH_SUBCLASS

#: Below so many levels of nesting only the kind of an object is kept.
_MAX_DEPTH = 32
#: So many values are walked in one field of an event; each container says where the rest was left out.
_MAX_VALUES = 20_000
#: Characters kept of the `repr` of an object that has no better form.
_MAX_REPR = 1_000

_second: tuple[int, str] = (0, "")


def iso_time(time_ns: int) -> str:
    """Return Unix time in nanoseconds as ISO 8601 in UTC with microseconds and offset."""
    global _second
    second, fraction = divmod(time_ns, 1_000_000_000)
    known, prefix = _second
    if second != known:
        prefix = dt.datetime.fromtimestamp(second, dt.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.")
        _second = (second, prefix)
    return f"{prefix}{fraction // 1000:06d}+00:00"


def encode(event: dict[str, Any]) -> bytes:
    """Return `event` as JSON bytes."""
    try:
        return orjson.dumps(event, option=_OPTIONS)
    except Exception:  # noqa: BLE001 - something that orjson alone has no form for
        # Field by field: attributes without end must not cost the event its ids.
        return orjson.dumps({name: _Walk().plain(value, 0) for name, value in event.items()})


def _substitute(value: Any) -> Any:
    """Return something plainer in place of `value`."""
    try:
        if isinstance(value, (set, frozenset, collections.deque)):
            return list(value)
        if isinstance(value, (bytes, bytearray, memoryview)):
            return f"<{len(value)} bytes>"
        if isinstance(value, decimal.Decimal):
            return float(value)
        if isinstance(value, pathlib.PurePath):
            return str(value)
        if isinstance(value, BaseException):
            return describe_error(value)
        if isinstance(value, type):
            return value.__qualname__
        if isinstance(value, Mapping):
            return dict(value)
        if attrs.has(type(value)):
            return attrs.asdict(value, recurse=False)
        for method in ("model_dump", "tolist", "item", "isoformat"):  # pydantic, numpy, pandas times
            convert = getattr(value, method, None)
            if callable(convert):
                return convert()
        return _cut(repr(value))
    except Exception:  # noqa: BLE001 - a user's property, method or repr
        return f"<{type(value).__qualname__} that cannot be shown>"


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_REPR else f"{text[:_MAX_REPR]}... ({len(text)} characters)"


def _text(value: str) -> str:
    """Return `value` as text that UTF-8 can hold: a lone surrogate becomes a question mark."""
    return str(value) if value.isascii() else value.encode("utf-8", "replace").decode()


class _Walk:
    """One pass over one field of an event; holds what must be known of the whole of it."""

    def __init__(self) -> None:
        self._values_left = _MAX_VALUES
        self._open: set[int] = set()  # containers we are inside of: meeting one again is a cycle

    def plain(self, value: Any, depth: int) -> Any:
        """Return `value` in terms of what orjson encodes without fail; what cannot be looked at costs its own place."""
        try:
            return self._plain(value, depth)
        except Exception:  # noqa: BLE001 - even isinstance() asks an object for its class: a dead weak proxy raises
            return f"<{type(value).__qualname__} that cannot be shown>"

    def _plain(self, value: Any, depth: int) -> Any:
        self._values_left -= 1
        if value is None or value is True or value is False:
            return value
        if isinstance(value, enum.Enum):
            value = value.value
        if isinstance(value, str):
            return _text(value)
        if isinstance(value, int):
            return int(value) if -(2**63) <= value < 2**64 else str(value)
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else None
        if isinstance(value, dt.datetime) and value.tzinfo is None:
            value = value.replace(tzinfo=dt.timezone.utc)
        if isinstance(value, uuid.UUID):
            return str(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
        if isinstance(value, (dict, list, tuple)):
            return self._container(value, depth)
        substitute = _substitute(value)
        if isinstance(substitute, str):
            return _text(substitute)
        return self.plain(substitute, depth + 1) if depth < _MAX_DEPTH else f"<{type(value).__qualname__}>"

    def _container(self, value: dict[Any, Any] | list[Any] | tuple[Any, ...], depth: int) -> Any:
        if depth >= _MAX_DEPTH:
            return f"<{type(value).__qualname__}: nested too deeply>"
        if id(value) in self._open:
            return f"<{type(value).__qualname__}: contains itself>"
        self._open.add(id(value))
        try:
            return self._dict(value, depth) if isinstance(value, dict) else self._list(value, depth)
        finally:
            self._open.discard(id(value))

    def _dict(self, value: dict[Any, Any], depth: int) -> dict[str, Any]:
        plain: dict[str, Any] = {}
        items = value.copy()  # another thread may be filling the dict
        for key, item in items.items():
            if self._values_left <= 0:
                plain["..."] = f"<{len(items) - len(plain)} more left out>"
                break
            plain[self._key(key)] = self.plain(item, depth + 1)
        return plain

    def _list(self, value: list[Any] | tuple[Any, ...], depth: int) -> list[Any]:
        plain: list[Any] = []
        items = tuple(value)
        for item in items:
            if self._values_left <= 0:
                plain.append(f"<{len(items) - len(plain)} more left out>")
                break
            plain.append(self.plain(item, depth + 1))
        return plain

    @staticmethod
    def _key(key: Any) -> str:
        if isinstance(key, enum.Enum):
            key = key.value
        if isinstance(key, str):
            return _text(key)
        try:
            return _text(_cut(str(key)))
        except Exception:  # noqa: BLE001 - a user's __str__
            return f"<{type(key).__qualname__}>"
