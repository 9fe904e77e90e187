"""
Record what a decorated function was called with and what it returned, as far as its user wants that.

In:   a call's arguments and its result.
Out:  attributes of the call's stage. Nothing unless asked for.
Caller's thread. Errors in the user's functions are counted and logged, and change nothing; arguments are looked at
before the call (which may change them), and no iterator is consumed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from evalvault_sdk.log import warn

if TYPE_CHECKING:
    from evalvault_sdk.capture.stage import StageContext

#: Items of a stream that `capture_result` and `on_result` keep, and the characters of their text.
_MAX_KEPT_ITEMS = 10_000
_MAX_KEPT_CHARACTERS = 1 << 20
#: What an item of another kind counts for.
_OTHER_ITEM = 256


@attrs.frozen(eq=False)
class Call:
    """One call of a decorated function, as `attributes=` is given it."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    _signature: inspect.Signature | None = attrs.field(default=None, repr=False)

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments by the names of their parameters, defaults included; `*args` is a tuple."""
        signature = self._signature
        if signature is None:
            return {f"arg{number}": value for number, value in enumerate(self.args)} | dict(self.kwargs)
        bound = signature.bind(*self.args, **self.kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments = {**arguments.pop(name), **arguments}
        return arguments

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]


@attrs.frozen(kw_only=True)
class CallCapture:
    """What is recorded of every call."""

    #: True: all arguments; or the names of some.
    args: bool | Sequence[str] = False
    result: bool = False
    #: From a `Call` to attributes.
    attributes: Callable[[Call], Mapping[str, Any] | None] | None = None
    #: From the result to attributes; of a stream, from the list of its items.
    on_result: Callable[[Any], Mapping[str, Any] | None] | None = None

    def signature_of(self, function: Callable[..., Any]) -> inspect.Signature | None:
        """Return the signature, if it can be known: that of a builtin often cannot. Warn of arguments it has not."""
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):
            return None
        kinds = {parameter.kind for parameter in signature.parameters.values()}
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            for name in _names(self.args):
                if name not in signature.parameters:
                    warn("capture_args names %r, but %r has no such parameter", name, _name_of(function))
        return signature

    @property
    def wants_result(self) -> bool:
        """Whether the result is looked at."""
        return self.result or self.on_result is not None

    def before(self, stage: StageContext, call: Call) -> None:
        """Put what is known before the call into the stage's attributes."""
        recorder = stage._recorder
        if self.args:
            try:
                taken = _chosen(call, self.args)
                stage.set(**recorder.setup.encoder.snapshot(dict(taken), recorder))
            except TypeError:
                pass  # the call does not fit the function, which is about to say so
            except Exception as error:  # noqa: BLE001 - see the module's promise
                recorder.hook_failed("capture_args", error)
        if self.attributes is not None:
            try:
                made = self.attributes(call)
                stage.set(**recorder.setup.encoder.snapshot(dict(made or {}), recorder))
            except Exception as error:  # noqa: BLE001 - see the module's promise
                recorder.hook_failed("attributes", error)

    def after(self, stage: StageContext, result: Any) -> None:
        """Put what the result tells into the stage's attributes."""
        try:
            if self.result:
                stage.set(result=result)
            if self.on_result is not None:
                stage.set(**dict(self.on_result(result) or {}))
        except Exception as error:  # noqa: BLE001 - see the module's promise
            stage._recorder.hook_failed("on_result", error)

    def after_stream(self, stage: StageContext, items: KeptItems) -> None:
        """Put what the items of a stream tell into the stage's attributes."""
        if items.kept and self.result and all(isinstance(item, str) for item in items.kept):
            stage.set(result="".join(items.kept))
            attrs.evolve(self, result=False).after(stage, items.kept)
        else:
            self.after(stage, items.kept)


class KeptItems:
    """The first items of a stream."""

    def __init__(self) -> None:
        self.kept: list[Any] = []
        self._characters = 0

    def add(self, item: Any) -> None:
        """Keep one more, if there is room."""
        if len(self.kept) < _MAX_KEPT_ITEMS and self._characters < _MAX_KEPT_CHARACTERS:
            self.kept.append(item)
            self._characters += len(item) if isinstance(item, (str, bytes)) else _OTHER_ITEM


def _chosen(call: Call, wanted: bool | Sequence[str]) -> list[tuple[str, Any]]:
    arguments = call.arguments
    if wanted is not True:
        return [(name, arguments[name]) for name in _names(wanted) if name in arguments]
    return [(name, value) for name, value in arguments.items() if name not in ("self", "cls")]


def _names(wanted: bool | Sequence[str]) -> Sequence[str]:
    if isinstance(wanted, bool):
        return ()
    return [wanted] if isinstance(wanted, str) else wanted


def _name_of(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__qualname__", type(function).__qualname__))
