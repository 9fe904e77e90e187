"""
Put together again what OpenInference took apart: lists of objects, one attribute for each leaf.

In:   attributes such as `llm.input_messages.0.message.role`, in any order.
Out:  lists of objects: `[{"role": "user", ...}, ...]`.
Pure. An index only gives the order: 10**9 takes no more room than 0, and gaps close.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

#: Levels below the root; what is deeper stays one name with dots.
_MAX_LEVELS = 16
#: A longer number is no index. Python reads numbers in quadratic time.
_MAX_DIGITS = 10
#: Every element of a list of messages is `{"message": {...}}`: such a single name says nothing.
_WRAPPERS = ("message", "document", "embedding", "tool_call", "message_content", "tool", "prompt", "completion")


class _Node(dict[str, Any]):
    """A level of names; not to be taken for a value that is a dict."""


def gather(attributes: Mapping[str, Any], roots: Collection[str]) -> tuple[dict[str, list[Any]], set[str]]:
    """Return the list below each of `roots` that has one, and the names of the attributes it was made of."""
    found: dict[str, _Node] = {}
    used: set[str] = set()
    for name, value in attributes.items():
        root, rest = _split(name, roots)
        if root is not None:
            used.add(name)
            _put(found.setdefault(root, _Node()), rest, value)
    return {root: _elements(node) for root, node in found.items()}, used


def _split(name: str, roots: Collection[str]) -> tuple[str | None, list[str]]:
    """Return the root of `root.<index>...` and the names below it, or None: roots have two or three names."""
    names = name.split(".", _MAX_LEVELS)
    for length in (2, 3):
        if len(names) > length and _is_index(names[length]):
            root = ".".join(names[:length])
            if root in roots:
                return root, names[length:]
    return None, []


def _is_index(name: str) -> bool:
    return name.isascii() and name.isdecimal() and len(name) <= _MAX_DIGITS


def _put(node: _Node, path: list[str], value: Any) -> None:
    for name in path[:-1]:
        below = node.get(name)
        if not isinstance(below, _Node):
            # A value where there are also names below it: it keeps a place among them.
            node[name] = below = _Node() if name not in node else _Node(value=below)
        node = below
    last = path[-1]
    if isinstance(node.get(last), _Node):
        node[last]["value"] = value
    else:
        node[last] = value


def _elements(node: _Node) -> list[Any]:
    return [_tidy(node[name]) for name in sorted(node, key=int)]


def _tidy(value: Any) -> Any:
    if not isinstance(value, _Node):
        return value
    if all(map(_is_index, value)):
        return _elements(value)
    whole = {name: _tidy(below) for name, below in value.items()}
    if len(whole) == 1:
        name, below = next(iter(whole.items()))
        if name in _WRAPPERS and isinstance(below, dict):
            return below
    return whole
