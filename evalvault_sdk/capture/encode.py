"""
Turn an event into JSON bytes, within its limits and without what must not be sent.

In:   the fields of an event, in which attributes and metadata may hold whatever a program has at hand.
Out:  UTF-8 JSON that EvalVault's rules accept.
Caller's thread, but for `finish`: mostly the worker's. Never raises (but for KeyboardInterrupt and its like), never
changes what it is given.

Two ways: orjson at once, for small values of JSON's own types without anything to redact; else through
`capture.plain`. Whether a text holds a secret is seen in the encoded bytes, and may be looked for later, by `finish`.
orjson must never run Python (a `default=` hook, a time zone written in Python) while it is inside
a dict: another thread that adds a key meanwhile would crash the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import attrs
import orjson

from evalvault_sdk.capture.draft import Draft
from evalvault_sdk.capture.finish import Finisher
from evalvault_sdk.capture.plain import Content, Limits, Walk
from evalvault_sdk.capture.redact import Redactor
from evalvault_sdk.oversize import shrink

Mask = Callable[[dict[str, Any]], dict[str, Any]]

_OPTIONS = orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_PASSTHROUGH_SUBCLASS | orjson.OPT_PASSTHROUGH_DATACLASS

#: Looked up but once: every stage calls it.
_dumps = orjson.dumps

_SCALARS = frozenset((int, float, bool, type(None)))
#: So many types of stages are remembered as they are encoded.
_MAX_BEGINS = 1_000
_CONTAINERS = frozenset((list, tuple, dict))
#: Bytes of JSON that a character, and a number, take at most.
_CHARACTER_BYTES = 6
_NUMBER_BYTES = 26
#: The size of what orjson must not see: larger than any limit.
_NOT_PLAIN = 1 << 60
#: Characters of a field that is no content, such as the name of a stage.
_MAX_FIELD = 1_000
#: What becomes of content whose mask failed. Nothing of it is sent.
_MASKED = {"redacted": "the function given as mask= failed"}
#: Characters of a key.
_MAX_KEY = 128
#: How large a stored payload may be, next to an event.
_PAYLOAD_FACTOR = 64
#: Bytes of an event that are left for its ids and times, and for saying what was taken out.
_HEAD_ROOM = 2048


class Counter(Protocol):
    """Who is told how often something happened."""

    def note(self, what: Any, count: int = 1) -> None:
        """Count something."""


class Notes(Counter, Protocol):
    """Who is told what happened on the way."""

    def hook_failed(self, hook: str, error: BaseException) -> None:
        """Count that a function of the user's raised, and say so."""


@attrs.frozen
class _WithoutHooks:
    """Where there is no function of the user's that could fail."""

    counter: Counter

    def note(self, what: Any, count: int = 1) -> None:
        self.counter.note(what, count)

    def hook_failed(self, hook: str, error: BaseException) -> None:
        pass


class Encoder:
    """One tracer's way from fields to bytes."""

    def __init__(
        self,
        limits: Limits | None = None,
        redactor: Redactor | None = None,
        *,
        run_id: str = "",
        content: Content = "all",
        mask: Mask | None = None,
    ) -> None:
        self._finisher = Finisher(run_id)
        #: For a type of stage: what the content of one that went well begins with.
        self._begins: dict[str, bytes] = {}
        self._limits = limits or Limits()
        self._redactor = redactor or Redactor()
        self._content = content
        self._mask = mask
        self._look_at_all = content != "all" or mask is not None or self._redactor.personal
        self._max_items, self._max_bytes = self._limits.max_items, self._limits.max_attribute_bytes
        self._max_depth = self._limits.max_depth
        self._max_event = self._limits.max_event_bytes
        # An event of several fields at once is as large as one of them may be at most.
        self._max_small = min(self._max_bytes, self._max_event - _HEAD_ROOM)
        # Characters that may take more bytes than that are found out by encoding them.
        self._max_text = self._max_bytes
        # A value counts for so many bytes that no more than `max_items` of them fit into the bytes of an attribute.
        self._value_bytes = max(_NUMBER_BYTES, self._max_bytes // self._max_items + 1)

    def finish(self, drafts: Sequence[Draft], counter: Counter) -> list[bytes | None]:
        """Return the events of drafts as JSON bytes; None as for `encode`."""
        events: list[bytes | None] = [*map(self._finisher.event_of, drafts)]
        for number in self._redactor.suspects([draft[-1] for draft in drafts]):
            whole = orjson.loads(events[number] or b"")
            events[number] = self._thorough(whole, _WithoutHooks(counter))
        return events

    def encode(self, fields: dict[str, Any], notes: Notes) -> bytes | None:
        """Return an event as JSON bytes; None if it is too large whatever is cut."""
        event = self._at_once(fields)
        if event is None or self._may_hold_secret(event):
            event = self._thorough(fields, notes)
        # A copy: orjson leaves its result as large as the buffer was that it was written into, and it may have to wait.
        return None if event is None else b"%b" % event

    def _may_hold_secret(self, encoded: bytes) -> bool:
        return self._redactor.may_hold_secret(encoded, encoded.find(b'"stage_type":'))  # before it are ids and times

    def snapshot(self, attributes: dict[str, Any], notes: Notes) -> dict[str, Any]:
        """Return attributes as they are now, as plain JSON values."""
        walk = self._walk()
        plain = walk.fields(attributes)
        if walk.cuts:
            notes.note("truncated", walk.cuts)
        return plain

    def payload(self, name: str, value: Any, notes: Notes) -> bytes | None:
        """Return `value` as JSON bytes to be stored apart, masked as attributes are; None if no content is to leave."""
        if self._content == "none":
            return None
        larger = attrs.evolve(
            self._limits,
            max_attribute_bytes=self._limits.max_event_bytes * _PAYLOAD_FACTOR,
            max_items=self._limits.max_items * _PAYLOAD_FACTOR,
        )
        plain, _ = self._content_of({"attributes": {name: value}, "metadata": {}}, larger, notes)
        return orjson.dumps(plain["attributes"].get(name, plain["attributes"]))

    # -- the fast way: is there anything to be careful about? -----------------------------------------

    def content(
        self, stage_type: Any, status: Any, attributes: Any, rest: dict[str, Any] | None = None
    ) -> bytes | None:
        """
        Return all of an event but its ids and times as JSON without the brace that it begins with.

        None, if there is anything to be careful about but secrets in texts. It may hold those: nobody but `finish` is
        to see it. `rest` are the fields that few events have.
        """
        if self._look_at_all:
            return None
        try:
            begin = self._begins.get(stage_type) if status == "success" else None
            if begin is None:
                begin = self._begin(stage_type, status)
            if begin is None or not self._are_small(attributes):
                return None
            end = b"}" if rest is None else self._end(rest)
            if end is None:
                return None
            # A copy: orjson leaves its result as large as the buffer was that it was written into.
            encoded = begin + _dumps(attributes, None, _OPTIONS) + end
            return encoded if len(encoded) <= self._max_small else None
        except Exception:  # noqa: BLE001 - something that orjson alone has no form for
            return None

    def _begin(self, stage_type: Any, status: Any) -> bytes | None:
        if not _are_names(stage_type, status):
            return None
        begin = b'"stage_type":%b,"status":%b,"attributes":' % (_dumps(stage_type), _dumps(status))
        if status == "success":
            if len(self._begins) >= _MAX_BEGINS:
                self._begins.clear()
            self._begins[stage_type] = begin
        return begin

    def _end(self, rest: dict[str, Any]) -> bytes | None:
        return b",%b" % _dumps(rest, None, _OPTIONS)[1:] if self._is_plain(rest) else None

    def _at_once(self, fields: dict[str, Any]) -> bytes | None:
        """Return a whole event as JSON, if there is nothing to be careful about but secrets in texts; else None."""
        if self._look_at_all:
            return None
        try:
            if not (_are_names(fields["stage_type"], fields["status"]) and self._is_plain(fields)):
                return None
            if not self._are_small(fields["attributes"]):
                return None
            encoded = _dumps(fields, None, _OPTIONS)
            return encoded if len(encoded) <= self._max_small else None
        except Exception:  # noqa: BLE001 - something that orjson alone has no form for
            return None

    def _is_plain(self, fields: dict[str, Any]) -> bool:
        """Whether there is nothing to be careful about in the fields that few events have."""
        name = fields.get("stage_name", "")
        if type(name) is not str or len(name) > _MAX_FIELD or "input_ref" in fields or "output_ref" in fields:
            return False
        return "metadata" not in fields or self._are_small(fields["metadata"])

    def _are_small(self, values: dict[str, Any]) -> bool:
        """Whether every field is harmless: its key no secret's, its value of JSON's own types and within limits."""
        max_text, max_items = self._max_text, self._max_items
        if len(values) > max_items:
            return False
        innocent = self._redactor.innocent
        for key, value in values.items():
            if key not in innocent and self._tells_a_secret(key):
                return False
            kind = type(value)
            if kind is str:
                if len(value) > max_text:
                    return False
            elif kind is list and value:
                # Ids or scores, mostly.
                if len(value) >= max_items:
                    return False
                if type(value[0]) is str:
                    if not _are_texts(value, max_text):
                        return False
                elif not _are_floats(value) and not self._is_small(value, kind):
                    return False
            elif kind not in _SCALARS and not self._is_small(value, kind):
                return False
        return True

    def _is_small(self, value: Any, kind: type) -> bool:
        return self._size(value, kind, self._max_depth, self._max_bytes) <= self._max_bytes

    def _tells_a_secret(self, key: str) -> bool:
        return len(key) > _MAX_KEY or self._redactor.is_secret(key)  # of a long key there is no verdict by heart

    def _size(self, value: Any, kind: type, depth: int, room: int) -> int:
        """Return the bytes of JSON that `value` takes at most, or more than `room` if orjson should not see it."""
        if kind is str:
            return len(value) * _CHARACTER_BYTES + self._value_bytes
        if kind in _SCALARS:
            return self._value_bytes
        if depth <= 0 or kind not in _CONTAINERS:
            return _NOT_PLAIN
        size = (len(value) + 1) * self._value_bytes
        if size > room:
            return _NOT_PLAIN
        if kind is not dict:
            if _SCALARS.issuperset(map(type, value)):  # scores, mostly: a few steps in C
                return size
            for item in value:
                size += self._size(item, type(item), depth - 1, room - size)
                if size > room:
                    break
            return size
        for key, item in value.items():
            if type(key) is not str or (key not in self._redactor.innocent and self._tells_a_secret(key)):
                return _NOT_PLAIN
            size += len(key) * _CHARACTER_BYTES + self._size(item, type(item), depth - 1, room - size)
            if size > room:
                break
        return size

    # -- the thorough way ---------------------------------------------------------------------------

    def _walk(self, limits: Limits | None = None) -> Walk:
        return Walk(limits or self._limits, self._redactor, self._content)

    def _thorough(self, fields: dict[str, Any], notes: Notes) -> bytes | None:
        content, cuts = self._content_of(fields, self._limits, notes)
        plain = {name: self._field(name, value) for name, value in fields.items() if name not in content}
        plain.update(content)
        try:
            event: bytes | None = orjson.dumps(plain)
        except Exception:  # noqa: BLE001 - what nobody has thought of must not cost the event its ids
            event = orjson.dumps({**plain, "attributes": {"content": "that cannot be shown"}, "metadata": {}})
        if event is not None and len(event) > self._max_event:
            event = shrink(event, self._max_event)
            cuts += 1
        if cuts:
            notes.note("truncated", cuts)
        return event

    def _content_of(self, fields: dict[str, Any], limits: Limits, notes: Notes) -> tuple[dict[str, Any], int]:
        """Return what an event has of content, in plain terms and masked, and how often something was cut."""
        content: dict[str, Any] = {}
        cuts = 0
        for name in ("attributes", "metadata"):
            if name in fields:
                walk = self._walk(limits)
                content[name] = walk.fields(fields[name])
                cuts += walk.cuts
        if self._mask is not None:
            content = self._masked(self._mask, content, fields, limits, notes)
        return content, cuts

    def _masked(
        self, mask: Mask, content: dict[str, Any], fields: dict[str, Any], limits: Limits, notes: Notes
    ) -> dict[str, Any]:
        """Return what the user's function makes of the content. If it fails, nothing of the content is sent."""
        named = {"stage_name": self._field("stage_name", fields["stage_name"])} if fields.get("stage_name") else {}
        sampled = {name: value for name, value in content.get("metadata", {}).items() if name.startswith("sample_")}
        masked: dict[str, Any]
        try:
            about = {name: fields.get(name) for name in ("stage_type", "status")}
            result = mask({"metadata": {}, "stage_name": None, **content, **named, **about})
            masked = {name: self._walk(limits).fields(result[name]) for name in content}
            if named:
                masked["stage_name"] = self._field("stage_name", result.get("stage_name", named["stage_name"]))
        except Exception as error:  # noqa: BLE001 - a function of the user's
            notes.hook_failed("mask", error)
            masked = {"attributes": dict(_MASKED), "metadata": {}, **dict.fromkeys(named)}
        if sampled:  # without it nobody could tell how many traces this one stands for
            masked["metadata"] = {**masked.get("metadata", {}), **sampled}
        return masked

    def _field(self, name: str, value: Any) -> Any:
        """Return a field that is no attribute: a name, an id, a time, a reference."""
        if isinstance(value, str) and len(value) > _MAX_FIELD:
            value = value[:_MAX_FIELD]
        # Without a call more, which may be one too many for a program that is deep in a recursion.
        if type(value) is str and value.isascii() and (name not in _NAMES or value in _STATUSES):
            return value
        # Ids and times are what they are: changed, they would lead nowhere.
        redactor = self._redactor if name in _NAMES else _NOTHING
        return Walk(_FIELD_LIMITS, redactor).plain(value)


def _are_names(stage_type: Any, status: Any) -> bool:
    return type(stage_type) is type(status) is str and len(stage_type) + len(status) <= _MAX_FIELD


def _are_texts(values: list[Any], room: int) -> bool:
    """Whether all are texts, of so many characters together at most."""
    for value in values:
        if type(value) is not str:
            return False
        room -= len(value)
        if room < 0:
            return False
    return True


def _are_floats(values: list[Any]) -> bool:
    for value in values:  # noqa: SIM110 - a generator costs more than the list
        if type(value) is not float:
            return False
    return True


#: Fields of an event that a program may put content into, besides attributes and metadata.
_NAMES = frozenset(("stage_type", "stage_name", "status", "input_ref", "output_ref"))
#: What is a status, and no content.
_STATUSES = frozenset(("success", "error", "cancelled", "skipped"))
_FIELD_LIMITS = Limits(max_attribute_bytes=16 << 10, max_items=100, max_depth=8)
_NOTHING = Redactor(secrets=False)
