"""
Turn any Python object into JSON bytes.

In:   the fields of an event, in which attributes and metadata may hold whatever a program has at hand.
Out:  UTF-8 JSON that EvalVault's rules accept: no NaN, no lone surrogate, no integer beyond 64 bits.
Caller's thread. Never raises (but for KeyboardInterrupt and its like), never changes what it is given.

Two ways: orjson at once, for nearly everything; and where orjson refuses some part, a walk in Python that
replaces just that part and tries the rest again.
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

_OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NAIVE_UTC

#: Below so many levels of nesting only the kind of an object is kept.
_MAX_DEPTH = 32
#: So many values are looked at in one event; what lies beyond is left out and marked.
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
        return orjson.dumps(event, default=_substitute, option=_OPTIONS)
    except Exception:  # noqa: BLE001 - orjson's own errors, and whatever a user's object raises
        return orjson.dumps(_Walk().plain(event, 0))


def describe_error(error: BaseException) -> dict[str, str]:
    """Return the type and the message of an exception, as they are recorded."""
    kind = type(error)
    name = (
        kind.__qualname__ if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}.{kind.__qualname__}"
    )
    try:
        message = str(error)
    except Exception:  # noqa: BLE001 - a user's __str__
        message = f"<{kind.__qualname__} whose message cannot be shown>"
    return {"type": name, "message": message}


def _substitute(value: Any) -> Any:
    """Return something that orjson can encode in place of `value`, which it cannot."""
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
    """One pass over one event; holds what must be known of the whole of it."""

    def __init__(self) -> None:
        self._values_left = _MAX_VALUES
        self._open: set[int] = set()  # containers we are inside of: meeting one again is a cycle

    def plain(self, value: Any, depth: int) -> Any:
        """Return `value` in terms of what orjson encodes without fail."""
        self._values_left -= 1
        if self._values_left < 0:
            return "<left out: too many values in one event>"
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
        if isinstance(value, (dt.datetime, dt.date, dt.time, uuid.UUID)):
            return str(value) if isinstance(value, uuid.UUID) else value.isoformat()
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
            if isinstance(value, dict):
                # A copy first: another thread may be filling it.
                return {self._key(key): self.plain(item, depth + 1) for key, item in value.copy().items()}
            return [self.plain(item, depth + 1) for item in tuple(value)]
        except Exception:  # noqa: BLE001 - a container of a user's own making
            return f"<{type(value).__qualname__} that cannot be shown>"
        finally:
            self._open.discard(id(value))

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
