"""
Read JSON, also where it is none by the letter.

In:   bytes of JSON: a body, a line of a file, a text within an attribute.
Out:  the value, and whether it holds what JSON cannot hold, or what not everybody can read.
Pure. `orjson` is as strict as the standard; Python writes NaN, and senders are not always right.
"""

from __future__ import annotations

import json
from typing import Any

import orjson


def read_json(text: bytes) -> tuple[Any, bool]:
    """
    Return the value, and whether something in it is odd: NaN and infinities, lone surrogates, nesting without end.

    Raises `ValueError`, which says where it is malformed, for what is no JSON even so.
    """
    try:
        value = orjson.loads(text)
        orjson.dumps([[[value]]])  # it writes less deep than it reads, and our answers wrap what they give back
    except orjson.JSONDecodeError as error:
        strict_error = error
    except TypeError:
        return value, True
    else:
        return value, False
    try:
        return json.loads(text.decode("utf-8"), parse_int=as_integer), True
    except RecursionError:
        raise ValueError("the body is nested too deeply") from None
    except ValueError:
        place = f"line {strict_error.lineno} column {strict_error.colno}"
        raise ValueError(f"{strict_error.msg.partition(':')[0]} at {place}") from None


def as_integer(digits: str) -> int | float:
    """Return an integer of JSON as orjson does: beyond 64 bits as a float. JSONB writes 1e22 as 23 digits."""
    if len(digits) > len("-18446744073709551616"):
        return float(digits)
    number = int(digits)
    return number if -(2**63) <= number < 2**64 else float(digits)
