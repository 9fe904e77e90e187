"""
Turn any Python object into plain JSON values, within limits and without what must not be sent.

In:   one field of an event, in which a program may have put whatever it had at hand.
Out:  the same in terms of dict, list, str, int, float, bool and None: no NaN, no lone surrogate, no integer
      beyond 64 bits. What was cut says so in its place; secrets and personal data are replaced.
Caller's thread. Never raises (but for KeyboardInterrupt and its like), never changes what it is given, never
consumes an iterator. Looks at no more than the limits allow, however large the object is.
"""

from __future__ import annotations

import array
import collections
import dataclasses
import datetime as dt
import decimal
import enum
import itertools
import math
import pathlib
import types
import uuid
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import Any, Literal

import attrs
import orjson

from evalvault_sdk.capture import textless
from evalvault_sdk.capture.redact import SECRET, Redactor
from evalvault_sdk.errors import describe_error
from evalvault_sdk.oversize import beginning

#: "none": ids, counts, scores and timings, but no text.
Content = Literal["all", "none"]

#: Characters kept of the `repr` of an object that has no better form, and of a key.
_MAX_REPR = 1_000
_MAX_KEY = 256
#: Bytes of a limit that are kept for saying what was cut.
_MARKER_BYTES = 96
#: So much more of a text that is cut is looked through for secrets: half a secret would not be recognised.
_OVERLAP = 16_384
#: Rows and columns of a table, and elements of a large array, that are kept.
_HEAD = 10
_COLUMNS = 50
#: Integers beyond 64 bits are kept as text, up to so many bits.
_MAX_BITS = 1024

#: What is a list for JSON.
_LISTS = (
    *(list, tuple, set, frozenset, collections.deque, array.array, collections.UserList),
    *(KeysView, ValuesView, ItemsView),
)


@attrs.frozen(kw_only=True)
class Limits:
    """How much of an event's content is kept. What is beyond is cut, says so in its place, and is counted."""

    #: Bytes of JSON of one attribute, and of one field of the metadata.
    max_attribute_bytes: int = 128 << 10
    #: Bytes of JSON of the whole event.
    max_event_bytes: int = 1 << 20
    #: Levels of nesting within an attribute.
    max_depth: int = 32
    #: Values within an attribute, at all levels together.
    max_items: int = 10_000


class Walk:
    """One pass over one field; holds what must be known of the whole of it."""

    def __init__(self, limits: Limits, redactor: Redactor, content: Content = "all") -> None:
        self._limits = limits
        self._redactor = redactor
        self._content = content
        self._values_left = limits.max_items
        self._bytes_left = min(limits.max_attribute_bytes, limits.max_event_bytes) - 3 * _MARKER_BYTES
        self._open: set[int] = set()  # objects we are inside of: meeting one again is a cycle
        #: How often something was cut.
        self.cuts = 0

    def fields(self, values: Mapping[Any, Any]) -> dict[str, Any]:
        """Return attributes or metadata, each field with limits of its own: one cannot cost the others theirs."""
        plain: dict[str, Any] = {}
        # What is much too large altogether is made smaller later, the largest first; but not looked at without end.
        limits = self._limits
        room = 32 * min(limits.max_attribute_bytes, limits.max_event_bytes) + 4 * limits.max_event_bytes
        items = _first(values.items(), self._limits.max_items)
        taken = 0
        for key, value in items:
            if room <= 0:
                break
            walk = Walk(limits, self._redactor, self._content)
            whole = walk._bytes_left
            walk._put(plain, key, value, 0)
            if walk.cuts:
                self.cuts += walk.cuts
                _keep_within(plain, limits.max_attribute_bytes)
            room -= whole - walk._bytes_left
            taken += 1
        self._say_what_is_left_out(plain, len(values) - taken)
        return plain

    def plain(self, value: Any, depth: int = 0, key: str = "") -> Any:
        """Return `value` in plain terms; what cannot be looked at costs its own place. `key` is what it is called."""
        try:
            return self._plain(value, depth, key)
        except Exception:  # noqa: BLE001 - even isinstance() asks an object for its class: a dead weak proxy raises
            return f"<{type(value).__qualname__} that cannot be shown>"

    def _plain(self, value: Any, depth: int, key: str) -> Any:
        self._values_left -= 1
        if isinstance(value, enum.Enum):
            value = value.value
        if value is None or value is True or value is False:
            self._bytes_left -= 6
            return value
        if isinstance(value, str):
            return self._text(value, key, self._bytes_left)
        if isinstance(value, int):
            return self._number(int.__add__(value, 0))  # of a subclass, with methods of its own, the number it is
        if isinstance(value, float):
            number = float.__add__(value, 0.0)
            return self._number(number if math.isfinite(number) else None)
        if depth >= self._limits.max_depth:
            self._cut()
            return f"<{type(value).__qualname__}: nested too deeply>"
        if id(value) in self._open:
            self._bytes_left -= _MARKER_BYTES
            return f"<{type(value).__qualname__}: contains itself>"
        self._open.add(id(value))
        try:
            self._bytes_left -= 3
            return self._container(value, depth, key)
        finally:
            self._open.discard(id(value))

    def _cut(self) -> None:
        self.cuts += 1
        self._bytes_left -= _MARKER_BYTES

    # -- single values ------------------------------------------------------------------------------

    def _text(self, value: str, key: str, room: int) -> Any:
        length = str.__len__(value)
        room = max(room, 0)
        whole = text = _utf8(str.__getitem__(value, slice(room + _OVERLAP)))
        if self._redactor.active:
            text = self._redactor.text(text)
        if self._content == "none":
            kept = textless.text_or_left(text, key)
            self._bytes_left -= len(kept) + 3 if isinstance(kept, str) else 12
            if isinstance(kept, textless.Left):
                kept.number = length
            return kept
        cut = length > room + _OVERLAP or len(orjson.dumps(text)) > room + 2
        if cut:
            self.cuts += 1
            kept = beginning(text, room - _MARKER_BYTES)
            # Of a text that was redacted as well, what is left out cannot be counted in its own characters.
            left_out = f"{length - len(kept):,} of {length:,}" if text is whole else f"some of {length:,}"
            text = f"{kept}... (truncated: {left_out} characters left out)"
        self._bytes_left -= len(orjson.dumps(text)) + 1
        return text

    def _number(self, value: float | None) -> Any:
        if isinstance(value, int):
            if not -(2**63) <= value < 2**64:
                bits = value.bit_length()
                return self._text(str(value) if bits <= _MAX_BITS else f"<integer of {bits:,} bits>", "", 400)
            if self._redactor.personal:
                value = self._redactor.number(value)
        self._bytes_left -= len(repr(value)) + 2
        return value

    def _plainer(self, value: Any) -> Any:
        """Return something plainer in place of `value`, at no more cost than looking at the top of it."""
        if isinstance(value, (dt.datetime, dt.date, dt.time)):
            if isinstance(value, dt.datetime) and value.tzinfo is None:
                value = value.replace(tzinfo=dt.timezone.utc)
            return value.isoformat()
        if isinstance(value, (bytes, bytearray, memoryview)):
            return f"<{memoryview(value).nbytes} bytes>"
        if isinstance(value, decimal.Decimal):
            return float(value) if value.is_finite() and abs(value.adjusted()) < 300 else str(value)
        if isinstance(value, (uuid.UUID, pathlib.PurePath)):
            return str(value)
        if isinstance(value, BaseException):
            return describe_error(value)
        if isinstance(value, type):
            return value.__qualname__
        if isinstance(value, types.SimpleNamespace) or type(value).__module__ == "argparse":
            return vars(value)
        for form in (_fields_of, self._array, _converted):
            plainer = form(value)
            if plainer is not None:
                return plainer
        return None

    def _array(self, value: Any) -> Any:
        """Return the elements of an array, or the beginning and the shape of a large one or of a table."""
        shape = getattr(value, "shape", None) if hasattr(type(value), "shape") else None
        if not isinstance(shape, tuple) or not all(isinstance(side, int) for side in shape):
            return None
        about = {"type": type(value).__qualname__, "shape": list(shape)}
        if hasattr(value, "columns"):
            self.cuts += shape[0] > _HEAD or shape[-1] > _COLUMNS
            head = value.iloc[:_HEAD, :_COLUMNS] if hasattr(value, "iloc") else value[:_HEAD, :_COLUMNS]
            rows = list(head.itertuples(index=False, name=None)) if hasattr(head, "itertuples") else head.rows()
            names = [str(name) for name in head.columns]
            return {**about, "columns": names, "head": [dict(zip(names, row, strict=False)) for row in rows]}
        kind = getattr(getattr(value, "dtype", None), "kind", "")
        if kind == "M":  # times, which in nanoseconds would become integers
            value = value.astype("datetime64[us]")
        elif kind in ("m", "c"):
            value = value.astype(str)
        if math.prod(shape) < max(self._values_left, 1):
            return self._elements(value)
        self.cuts += 1
        about["dtype"] = str(getattr(value, "dtype", ""))
        flat = value.flat if hasattr(value, "flat") else value
        return {**about, "head": self._elements(flat[:_HEAD])}

    @staticmethod
    def _elements(value: Any) -> Any:
        if type(getattr(value, "index", None)).__name__ not in ("NoneType", "RangeIndex") and hasattr(value, "to_dict"):
            return value.to_dict()  # a Series of pandas, whose labels may tell what the values are
        elements = value.tolist() if hasattr(value, "tolist") else value.to_list()
        names = getattr(getattr(value, "dtype", None), "names", None)
        if names and isinstance(elements, list):
            return [dict(zip(names, row, strict=True)) if isinstance(row, tuple) else row for row in elements]
        if elements is None:
            return math.nan  # NaT, which is JSON's null as well
        return float(elements) if type(elements) is type(value) else elements

    # -- containers ---------------------------------------------------------------------------------

    def _container(self, value: Any, depth: int, key: str) -> Any:
        if isinstance(value, Mapping):
            return self._dict(value, depth)
        if isinstance(value, tuple) and hasattr(type(value), "_fields"):
            return self._dict(dict(zip(type(value)._fields, value, strict=False)), depth)  # type: ignore[attr-defined]
        if isinstance(value, _LISTS):
            return self._list(value, depth, key)
        plainer = self._plainer(value)
        if plainer is not None:
            return self.plain(plainer, depth + 1, key)
        return self._text(repr(value), key, min(self._bytes_left, _MAX_REPR))

    def _dict(self, value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
        size = len(value)
        plain: dict[str, Any] = {}
        taken = 0
        for key, item in _first(value.items(), max(self._values_left, 0)):
            if self._values_left <= 0 or self._bytes_left <= _MARKER_BYTES:
                break
            self._put(plain, key, item, depth + 1)
            taken += 1
        self._say_what_is_left_out(plain, size - taken)
        return plain

    def _put(self, plain: dict[str, Any], key: Any, value: Any, depth: int) -> None:
        name = self._key(key)
        self._bytes_left -= len(orjson.dumps(name)) + 2
        try:
            end = str.__getitem__(key, slice(-_MAX_KEY, None)) if isinstance(key, str) else name  # uncut
            is_secret = self._redactor.is_secret(name) or self._redactor.is_secret(end)
            if is_secret and not (value is None or value is True or value is False):
                item: Any = SECRET
            else:
                item = self.plain(value, depth, name)
        except Exception:  # noqa: BLE001 - an object that raises however it is looked at
            item = "<something that cannot be shown>"
        if self._content == "none":
            textless.put(plain, name, item)
        else:
            plain[name] = item

    def _list(self, value: Any, depth: int, key: str) -> Any:
        size = len(value)
        room = max(self._values_left, 0)
        plain: list[Any] = []
        reserve = 0 if size <= room else 1  # for saying what was left out
        for item in _first(value, max(room - reserve, 0)):
            if self._values_left <= reserve or self._bytes_left <= _MARKER_BYTES:
                break
            plain.append(self.plain(item, depth + 1, key))
        taken = len(plain)
        if self._content == "none":
            left = textless.list_or_left(plain, size)
            if isinstance(left, textless.Left):
                return left
            plain = left
        if size > taken:
            self._cut()
            plain.append(f"... (truncated: {size - taken:,} of {size:,} left out)")
        return plain

    def _say_what_is_left_out(self, plain: dict[str, Any], count: int) -> None:
        if count > 0:
            self._cut()
            plain["..."] = f"(truncated: {count:,} more left out)"

    def _key(self, key: Any) -> str:
        try:
            if isinstance(key, enum.Enum):
                key = key.value
            if isinstance(key, str):
                text = _utf8(str.__getitem__(key, slice(_MAX_KEY + _OVERLAP)))
            elif key is None or isinstance(key, (bool, float)):
                text = str(key)
            elif isinstance(key, int):
                text = str(self._number(int.__add__(key, 0)))
            elif isinstance(key, (bytes, *_LISTS)) and len(key) > _MAX_KEY:
                text = f"<{type(key).__qualname__} of {len(key):,}>"
            else:
                text = _utf8(str(key)[: _MAX_KEY + _OVERLAP])
            if self._redactor.active:
                text = self._redactor.text(text)
        except Exception:  # noqa: BLE001 - a user's __str__
            return f"<{type(key).__qualname__}>"
        if len(text) > _MAX_KEY:
            self.cuts += 1
            return f"{text[: _MAX_KEY - 3]}..."
        return text


def _keep_within(plain: dict[str, Any], max_bytes: int) -> None:
    """Make the last field one text, if saying at many levels what was cut has made it too large."""
    name, value = next(reversed(plain.items()))
    encoded = orjson.dumps(value)
    if len(encoded) > max_bytes:
        kept = beginning(encoded.decode(), max_bytes - _MARKER_BYTES)
        plain[name] = f"{kept}... (truncated: {len(encoded):,} bytes in all)"


def _first(values: Iterable[Any], count: int) -> list[Any]:
    """Return the first of `values`, in one step of the interpreter: another thread may be changing them."""
    taken: list[Any] = []
    for _ in range(3):
        taken = []
        try:
            taken.extend(itertools.islice(values, count))
            break
        except RuntimeError:  # changed while we read: that one step may still be interrupted, but rarely is
            continue
    return taken


def _utf8(value: str) -> str:
    """Return `value` as text that UTF-8 can hold: a lone surrogate becomes a question mark."""
    return value if value.isascii() else value.encode("utf-8", "replace").decode()


def _fields_of(value: Any) -> dict[str, Any] | None:
    """Return the fields of a dataclass, an attrs class or a pydantic model, one level of them."""
    kind = type(value)
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    if attrs.has(kind):
        return {field.name: getattr(value, field.name, None) for field in attrs.fields(kind)}
    fields = getattr(kind, "model_fields", None)
    if isinstance(fields, dict):
        shown = {name: getattr(value, name, None) for name, field in fields.items() if not field.exclude}
        return {**shown, **(getattr(value, "__pydantic_extra__", None) or {})}
    return None


def _converted(value: Any) -> Any:
    """Return what an object has as its plainer form. Asked of its class: some objects answer to any name."""
    if isinstance(value, Iterator):
        return None
    for method in ("model_dump", "isoformat"):  # other systems' models, other systems' times
        convert: Callable[[Any], Any] | None = getattr(type(value), method, None)
        if callable(convert):
            return convert(value)
    return None
