"""
Turn any Python object into plain JSON values, within limits and without what must not be sent.

In:   one field of an event, in which a program may have put whatever it had at hand.
Out:  the same in terms of dict, list, str, int, float, bool and None: no NaN, no lone surrogate, no integer
      beyond 64 bits. What was cut says so in its place; secrets and personal data are replaced.
Caller's thread. Never raises (but for KeyboardInterrupt and its like), never changes what it is given, never
consumes an iterator. Looks at no more than the limits allow, however large the object is.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import decimal
import enum
import itertools
import math
import pathlib
import re
import uuid
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import attrs
import orjson

from evalvault_sdk.capture.redact import SECRET, Redactor
from evalvault_sdk.errors import describe_error
from evalvault_sdk.oversize import beginning

#: "none": ids, counts, scores and timings, but no text.
Content = Literal["all", "none"]

#: Characters kept of the `repr` of an object that has no better form, and of a key.
_MAX_REPR = 1_000
_MAX_KEY = 256
#: Bytes of a limit that are kept for saying what was cut.
_MARKERS = 512
#: So much more of a text that is cut is looked through for secrets: half a secret would not be recognised.
_OVERLAP = 4_096
#: Rows of a table, and elements of a large array, that are kept.
_HEAD = 10

#: Keys whose texts are names of things in the program, not what its users said.
_NAMES = re.compile(
    "ids?|citations|model|provider|language|label|predicted_label|finish_reason|type|status|kind|cancelled_by|sample_kept"
)
_IDS = re.compile(r".*_ids?", re.DOTALL)
_ONE_WORD = re.compile(r"\S{1,128}")


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
        self._textless = content == "none"
        self._values_left = limits.max_items
        self._bytes_left = max(limits.max_attribute_bytes - _MARKERS, limits.max_attribute_bytes // 2)
        self._open: set[int] = set()  # containers we are inside of: meeting one again is a cycle
        #: How often something was cut.
        self.cuts = 0

    def fields(self, values: Mapping[Any, Any]) -> dict[str, Any]:
        """Return attributes or metadata, each field with limits of its own: one cannot cost the others theirs."""
        plain: dict[str, Any] = {}
        items = _first(values.items(), self._limits.max_items)
        for key, value in items:
            walk = Walk(self._limits, self._redactor, "none" if self._textless else "all")
            walk._put(plain, key, value, 0)
            self.cuts += walk.cuts
        self._say_what_is_left_out(plain, len(values) - len(items))
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
            return value
        if isinstance(value, str):
            return self._text(value, key)
        if isinstance(value, int):
            return self._number(_integer(value), key)
        if isinstance(value, float):
            return self._number(float(value) if math.isfinite(value) else None, key)
        if depth >= self._limits.max_depth:
            self.cuts += 1
            return f"<{type(value).__qualname__}: nested too deeply>"
        if isinstance(value, (dict, list, tuple, set, frozenset, collections.deque)):
            return self._container(value, depth, key)
        return self.plain(self._plainer(value), depth + 1, key)

    # -- single values ------------------------------------------------------------------------------

    def _text(self, value: str, key: str) -> str:
        room = max(self._bytes_left, 0)
        length = len(value)
        text = _utf8(value[: room + _OVERLAP])
        if self._redactor.active:
            text = self._redactor.text(text)
        if length > room + _OVERLAP or len(encoded := orjson.dumps(text)) > room + 2:
            self.cuts += 1
            kept = beginning(text, room)
            self._bytes_left = 0
            return f"{kept}... (truncated: {length - len(kept):,} of {length:,} characters left out)"
        self._bytes_left -= len(encoded)
        return text

    def _number(self, value: float | str | None, key: str) -> Any:
        if isinstance(value, int) and self._redactor.personal:
            value = self._redactor.number(value)
        self._bytes_left -= len(repr(value)) + 1
        return value

    def _plainer(self, value: Any) -> Any:
        """Return something plainer in place of `value`, at no more cost than looking at the top of it."""
        try:
            if isinstance(value, dt.datetime) and value.tzinfo is None:
                return value.replace(tzinfo=dt.timezone.utc).isoformat()
            if isinstance(value, (bytes, bytearray, memoryview)):
                return f"<{memoryview(value).nbytes} bytes>"
            if isinstance(value, decimal.Decimal):
                number = float(value)
                return number if math.isfinite(number) else str(value)
            if isinstance(value, (uuid.UUID, pathlib.PurePath)):
                return str(value)
            if isinstance(value, BaseException):
                return describe_error(value)
            if isinstance(value, type):
                return value.__qualname__
            if isinstance(value, Mapping):
                return _Items(_first(value.items(), self._values_left + 1), len(value))
            return _fields_of(value) or self._array(value) or _converted(value)
        except Exception:  # noqa: BLE001 - a user's property, method or repr
            return f"<{type(value).__qualname__} that cannot be shown>"

    def _array(self, value: Any) -> Any:
        """Return the elements of an array, or the beginning and the shape of a large one or of a table."""
        shape = getattr(value, "shape", None)
        if not isinstance(shape, tuple) or not all(isinstance(side, int) for side in shape):
            return None
        about = {"type": type(value).__qualname__, "shape": list(shape)}
        if hasattr(value, "columns"):
            self.cuts += 1
            head = value.head(_HEAD)
            rows = head.to_dict("records") if hasattr(head, "iterrows") else head.to_dicts()
            return {**about, "columns": [str(name) for name in value.columns[: self._limits.max_items]], "head": rows}
        about["dtype"] = str(getattr(value, "dtype", ""))
        if math.prod(shape) <= max(self._values_left, 0):
            elements = value.tolist()
            return elements if type(elements) is not type(value) else float(value)
        self.cuts += 1
        head = value.head(_HEAD) if hasattr(value, "head") else value.reshape(-1)[:_HEAD]
        return {**about, "head": head.tolist()}

    # -- containers ---------------------------------------------------------------------------------

    def _container(self, value: Any, depth: int, key: str) -> Any:
        if id(value) in self._open:
            return f"<{type(value).__qualname__}: contains itself>"
        self._open.add(id(value))
        try:
            room = max(self._values_left, 0)
            if isinstance(value, _Items):
                return self._dict(value[:], value.size, depth)
            if isinstance(value, dict):
                return self._dict(_first(value.items(), room), len(value), depth)
            return self._list(_first(value, room), len(value), depth, key)
        finally:
            self._open.discard(id(value))

    def _dict(self, items: list[tuple[Any, Any]], size: int, depth: int) -> dict[str, Any]:
        plain: dict[str, Any] = {}
        taken = 0
        for key, item in items:
            if self._values_left <= 0 or self._bytes_left <= 0:
                break
            self._put(plain, key, item, depth + 1)
            taken += 1
        self._say_what_is_left_out(plain, size - taken)
        return plain

    def _put(self, plain: dict[str, Any], key: Any, value: Any, depth: int) -> None:
        name = self._key(key)
        self._bytes_left -= len(name) + 4
        if self._redactor.is_secret(name) and not (value is None or isinstance(value, bool)):
            plain[name] = SECRET
        elif not self._textless:
            plain[name] = self.plain(value, depth, name)
        else:
            self._put_without_text(plain, name, value, depth)

    def _list(self, items: list[Any], size: int, depth: int, key: str) -> list[Any]:
        plain: list[Any] = []
        taken = 0
        for item in items:
            if self._values_left <= 0 or self._bytes_left <= 0:
                break
            plain.append(self.plain(item, depth + 1, key))
            taken += 1
        if size > taken:
            self.cuts += 1
            plain.append(f"... (truncated: {size - taken:,} of {size:,} left out)")
        return plain

    def _say_what_is_left_out(self, plain: dict[str, Any], count: int) -> None:
        if count > 0:
            self.cuts += 1
            plain["..."] = f"(truncated: {count:,} more left out)"

    def _key(self, key: Any) -> str:
        if isinstance(key, enum.Enum):
            key = key.value
        try:
            text = _utf8(key[:_MAX_KEY] if isinstance(key, str) else str(key)[:_MAX_KEY])
        except Exception:  # noqa: BLE001 - a user's __str__
            return f"<{type(key).__qualname__}>"
        return self._redactor.text(text) if self._redactor.active else text

    # -- content="none" -----------------------------------------------------------------------------

    def _put_without_text(self, plain: dict[str, Any], name: str, value: Any, depth: int) -> None:
        """Put `value` if it is no text; of a text only its length, of texts their number, unless they are names."""
        if not _ONE_WORD.fullmatch(name):
            name = "[text]"
        if isinstance(value, enum.Enum):
            value = value.value
        named = bool(_NAMES.fullmatch(name) or _IDS.fullmatch(name))
        whole = self.plain(value, depth, name)
        if isinstance(whole, str) and name != "traceback" and not (named and _ONE_WORD.fullmatch(whole)):
            plain[f"{name}_length"] = len(value) if isinstance(value, str) else len(whole)
        elif isinstance(whole, list) and name != "traceback":
            kept = [item for item in whole if not isinstance(item, str) or (named and _ONE_WORD.fullmatch(item))]
            if len(kept) == len(whole):
                plain[name] = whole
            else:
                plain[f"{name}_count"] = len(value) if hasattr(value, "__len__") else len(whole)
        else:
            plain[name] = whole


class _Items(list[tuple[Any, Any]]):
    """The first items of a mapping, and how many there are."""

    def __init__(self, items: list[tuple[Any, Any]], size: int) -> None:
        super().__init__(items)
        self.size = size


def _first(values: Iterable[Any], count: int) -> list[Any]:
    """Return the first of `values`, in one step of the interpreter: another thread may be changing them."""
    for _ in range(3):
        try:
            return list(itertools.islice(values, count))
        except RuntimeError:  # changed while we read: that one step may still be interrupted, but rarely is
            continue
    return list(values)[:count]


def _utf8(value: str) -> str:
    """Return `value` as text that UTF-8 can hold: a lone surrogate becomes a question mark."""
    return str.__str__(value) if value.isascii() else value.encode("utf-8", "replace").decode()


def _integer(value: int) -> int | str:
    if -(2**63) <= value < 2**64:
        return int(value)
    bits = value.bit_length()
    return str(int(value)) if bits <= 1024 else f"<integer of {bits:,} bits>"


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
    """Return what an object has as its plainer form: numpy and pandas scalars, other systems' models, times."""
    if isinstance(value, (collections.abc.Iterator, range)):
        return _repr(value)
    for method in ("model_dump", "item", "isoformat"):
        convert = getattr(value, method, None)
        if callable(convert):
            return convert()
    return _repr(value)


def _repr(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_REPR else f"{text[:_MAX_REPR]}... (truncated: {len(text):,} characters)"
