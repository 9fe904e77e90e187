"""
Be another object, in every way but that calls of it go elsewhere.

In:   an object that is called, and the function that is to be called in its place.
Out:  a proxy: type, attributes, operators, signature, what `inspect` and frameworks ask of it, are those of the object.
Caller's thread. For what cannot simply be a function: generator functions (see `capture.decorate`), callable
instances, cached functions, partials, bound methods.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

#: Special methods that a proxy does not forward: those of itself, and those that are about making objects.
_OWN = frozenset(
    f"__{name}__"
    for name in (
        *("call", "class", "class_getitem", "copy", "deepcopy", "del", "delattr", "dict", "doc"),
        *("get", "getattr", "getattribute", "getnewargs", "getnewargs_ex", "getstate"),
        *("init", "init_subclass", "module", "new", "reduce", "reduce_ex", "set_name", "setattr", "setstate"),
        *("sizeof", "slots", "subclasshook", "weakref"),
    )
)

_OF_PROXY = frozenset(
    ("_evalvault_target", "_evalvault_call", "_evalvault_again", "__call__", "__get__", "__reduce_ex__", "__copy__")
) | {"__deepcopy__"}


class Proxy:
    """An object that is in every way another one, but that its calls are measured."""

    __slots__ = ("__weakref__", "_evalvault_again", "_evalvault_call", "_evalvault_target")

    def __init__(self, target: Any, call: Callable[..., Any], again: Callable[[Any], Any]) -> None:
        object.__setattr__(self, "_evalvault_target", target)
        object.__setattr__(self, "_evalvault_call", call)
        object.__setattr__(self, "_evalvault_again", again)

    def __getattribute__(self, name: str) -> Any:
        if name == "__wrapped__":
            name = "_evalvault_target"
        if name in _OF_PROXY:
            return object.__getattribute__(self, name)
        return getattr(self._evalvault_target, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._evalvault_target, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._evalvault_target, name)

    @property
    def __call__(self) -> Callable[..., Any]:  # noqa: D102 - what it is called as
        call: Callable[..., Any] = self._evalvault_call
        return call

    def __reduce_ex__(self, protocol: Any) -> Any:
        target = self._evalvault_target
        # A function is pickled by its name, which leads back to the decorated one.
        return target.__qualname__ if isinstance(target, FunctionType) else target.__reduce_ex__(protocol)

    def __copy__(self) -> Any:
        target = self._evalvault_target
        return self if isinstance(target, FunctionType) else self._evalvault_again(copy.copy(target))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        target = self._evalvault_target
        return self if isinstance(target, FunctionType) else self._evalvault_again(copy.deepcopy(target, memo))


class _MethodProxy(Proxy):
    """A proxy of what becomes a method when it is found in a class, as functions do."""

    __slots__ = ()

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        target = self._evalvault_target
        return self if instance is None or target.__get__(instance, owner) is target else MethodType(self, instance)


def proxy(target: Any, call: Callable[..., Any], again: Callable[[Any], Any]) -> Any:
    """Return a proxy of `target` that is called as `call`; `again` makes one of a copy."""
    kind: Any = type(target)
    if isinstance(inspect.getattr_static(kind, "__call__", None), (FunctionType, Proxy)):
        # `proxy.__call__` is looked at as well: by frameworks that ask whether an object is called or awaited.
        call = proxy(target.__call__, call, again)
    made = _classes.get(kind)
    if made is None:
        made = _classes[kind] = _class_for(kind)
    return made(target, call, again)


_classes: weakref.WeakKeyDictionary[type, type[Proxy]] = weakref.WeakKeyDictionary()


def _class_for(kind: Any) -> Any:
    """Return a class whose instances forward the special methods of `kind`: Python looks for these in the class."""
    special: dict[str, Any] = {"__slots__": ()}
    for name in dir(kind):
        if name.startswith("__") and name.endswith("__") and name not in _OWN:
            method = getattr(kind, name, None)
            if callable(method) and getattr(object, name, None) is not method:
                special[name] = _forwarded(name)
    special["__hash__"] = _forwarded("__hash__") if getattr(kind, "__hash__", None) else None
    return type(kind.__name__, (_MethodProxy if hasattr(kind, "__get__") else Proxy,), special)


def _forwarded(name: str) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        target = self._evalvault_target
        result = getattr(type(target), name)(target, *args, **kwargs)
        return self if result is target else result  # as of `with` and `+=`

    return forward
