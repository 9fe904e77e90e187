"""
Instrument the frameworks that are installed: `evalvault_sdk.instrument()`.

In:   what is installed here, or the frameworks that are named.
Out:  their stages in a tracer, and an account of what was done, which also undoes it.
Where the program starts. What is installed is imported, if the program has not done so yet.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from types import TracebackType

import attrs

from evalvault_sdk.capture.stages import Stages
from evalvault_sdk.errors import ConfigurationError, MissingDependencyError
from evalvault_sdk.log import logger, warn

#: A framework, the package by which it is found, and what instruments it: beside this module.
_FRAMEWORKS: Mapping[str, tuple[str, str, str]] = {
    "langchain": ("langchain_core", "langchain", "instrument_langchain"),
    "llama_index": ("llama_index.core", "llama_index", "instrument_llama_index"),
}


@attrs.frozen(kw_only=True)
class Instrumentation:
    """What `instrument` did. As a context manager it undoes it at the end of the block."""

    #: The frameworks that are instrumented.
    instrumented: tuple[str, ...] = ()
    #: Those that are not installed.
    missing: tuple[str, ...] = ()
    #: Those that could not be instrumented, and the kind of error.
    failed: Mapping[str, str] = attrs.field(factory=dict)
    _undo: tuple[Callable[[], None], ...] = attrs.field(default=(), repr=False)

    def undo(self) -> None:
        """Take it back. May be called again, to no effect."""
        for undo in self._undo:
            undo()

    def __enter__(self) -> Instrumentation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()

    def __str__(self) -> str:
        said = [
            f"instrumented {', '.join(self.instrumented) or 'nothing'}",
            *([f"not installed: {', '.join(self.missing)}"] if self.missing else []),
            *(
                [f"failed: {', '.join(f'{name} ({kind})' for name, kind in self.failed.items())}"]
                if self.failed
                else []
            ),
        ]
        return "; ".join(said)


def instrument(*frameworks: str, tracer: Stages | None = None) -> Instrumentation:
    """
    Record the stages of the frameworks that are installed, or of those named: `"langchain"`, `"llama_index"`.

    They are recorded with `tracer`, else with the one of `configure` (called before or after). Returns what was
    done, which `print` shows and the log has at level INFO; its `undo()` takes it back. What is instrumented already
    is not instrumented twice. Without names all that are installed are imported, which takes its time: name those
    that the program uses where its start matters.

    A web program adds `evalvault_sdk.integrations.asgi` itself, and OpenTelemetry's spans
    `evalvault_sdk.integrations.opentelemetry`: they are connected with an object of the program's.

    Raises `ConfigurationError` for a name that is none of these, and `MissingDependencyError` for one that is named and
    not installed. A framework that is found and cannot be instrumented is left alone, and a warning says so.
    """
    unknown = [name for name in frameworks if name not in _FRAMEWORKS]
    if unknown:
        raise ConfigurationError(f"cannot instrument {unknown[0]!r}: the frameworks are {', '.join(_FRAMEWORKS)}")
    instrumented: list[str] = []
    missing: list[str] = []
    failed: dict[str, str] = {}
    undo: list[Callable[[], None]] = []
    for name in frameworks or _FRAMEWORKS:
        package, module, function = _FRAMEWORKS[name]
        if not frameworks and not _is_installed(package):
            missing.append(name)
            continue
        try:
            made = getattr(importlib.import_module(f"evalvault_sdk.integrations.{module}"), function)(tracer)
        except MissingDependencyError:
            if frameworks:
                for take_back in undo:
                    take_back()
                raise
            missing.append(name)
        except Exception as error:  # noqa: BLE001 - a framework of a version that nobody has seen yet
            failed[name] = type(error).__name__
            warn("%s could not be instrumented (%s): its stages are not recorded", name, type(error).__name__)
        else:
            instrumented.append(name)
            undo.append(made.undo)
    done = Instrumentation(
        instrumented=tuple(instrumented), missing=tuple(missing), failed=failed, undo=tuple(reversed(undo))
    )
    logger().info("evalvault: instrument() has %s", done)
    return done


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # the package above it is not there
        return False
