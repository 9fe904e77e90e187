"""
Turn values of attributes into JSON that can be stored, and texts that hold JSON into values.

In:   values as the decoders leave them, and what is within their texts.
Out:  dict, list, str, int, float, bool and None: no NaN, no bytes, nothing nested without end.
Pure, and never raises.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any

import orjson

from evalvault_sdk.jsontext import read_json

#: What stands for a value that is nested deeper than it may be.
TOO_DEEP = "[nested too deeply]"
#: Bytes that a resource or a scope may have as JSON: each stage event of its spans repeats them.
_MAX_SHARED_BYTES = 16 << 10
#: Levels of nesting in what is stored: an attribute's, and those of the JSON in its texts.
_MAX_DEPTH = 32
_OPENING = ("{", "[")
#: Characters of a text beyond which it stays one, whatever it holds.
_MAX_PARSED = 1 << 20
#: What a resource that was too large says of the attributes that were left out.
_LEFT_OUT = "evalvault.attributes_left_out"


def storable(text: str) -> str:
    """Return a text as every store takes it: without lone surrogates, which are no UTF-8, and without NUL."""
    if text.isascii():
        return text.replace("\x00", "\ufffd") if "\x00" in text else text
    return text.encode("utf-8", "replace").decode().replace("\x00", "\ufffd")


def plain(value: Any, depth: int = 0) -> Any:
    """
    Return `value` as it is stored.

    NaN and infinities become None, as in the client; bytes become base64, as in OTLP/JSON.
    """
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, dict | list):
        if depth >= _MAX_DEPTH:
            return TOO_DEEP
        if isinstance(value, list):
            return [plain(item, depth + 1) for item in value]
        return {storable(key): plain(item, depth + 1) for key, item in value.items()}
    return value


def shared(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return the attributes of a resource or scope as they are stored, once for every span of it.

    Of more than 16 KiB the smallest are kept (a service's name will be one of them), and the number of the others.
    """
    safe: dict[str, Any] = plain(dict(attributes))
    sizes = {name: len(orjson.dumps({name: value})) for name, value in safe.items()}
    room = _MAX_SHARED_BYTES
    if sum(sizes.values()) <= room:
        return safe
    kept: dict[str, Any] = {}
    for name in sorted(sizes, key=lambda name: sizes[name]):
        room -= sizes[name]
        if room < 0:
            break
        kept[name] = safe[name]
    return {**kept, _LEFT_OUT: len(safe) - len(kept)}


def parsed(value: Any) -> Any:
    """
    Return the list or object that a text holds as JSON; anything else as it is.

    Attributes of OpenTelemetry are scalars and lists of them, so conventions write what is more as JSON.
    """
    if not isinstance(value, str) or len(value) > _MAX_PARSED or not value.lstrip().startswith(_OPENING):
        return value
    try:
        found, _ = read_json(value.encode("utf-8", "replace"))
    except ValueError:
        return value
    return found
