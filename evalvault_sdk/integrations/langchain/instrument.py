"""
Record LangChain in a whole program, without touching its code.

In:   one call when the program starts.
Out:  a handler in every run that begins from then on, in any thread, and a `rerank` stage around every document
      compressor. Undone, nothing is left but a hook of LangChain's that finds no handler.
Callbacks and compressors run in the program's threads and tasks.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any, TypeVar

from evalvault_sdk.capture.stage import StageContext
from evalvault_sdk.capture.stages import Stages
from evalvault_sdk.default import default
from evalvault_sdk.errors import MissingDependencyError
from evalvault_sdk.integrations.langchain.content import documents_of, look
from evalvault_sdk.integrations.langchain.handler import EvalVaultCallbackHandler
from evalvault_sdk.integrations.langchain.runs import Runs

try:
    from langchain_core.documents import BaseDocumentCompressor
    from langchain_core.tracers.context import register_configure_hook
except ImportError as error:
    raise MissingDependencyError.for_extra("the integration of LangChain", "langchain", error) from error

F = TypeVar("F", bound=Callable[..., Any])

_METHODS = ("compress_documents", "acompress_documents")
_SUBCLASS_HOOK = "__pydantic_init_subclass__"
#: The compressor that is measured here, so that an inherited method which it calls is not measured again.
_compressing: ContextVar[object] = ContextVar("evalvault_compressing", default=None)


class _Installed:
    """What LangChain asks for the handler, in the manner of a context variable; but the same in all threads."""

    handler: EvalVaultCallbackHandler | None = None
    instrumentation: LangChainInstrumentation | None = None
    is_hooked = False

    def get(self) -> EvalVaultCallbackHandler | None:
        """Return the handler for a run that begins."""
        return self.handler


_installed = _Installed()


class LangChainInstrumentation:
    """What `instrument_langchain` did. `undo()` takes it back; as a with-block, leaving does."""

    def __init__(self, tracer: Stages) -> None:
        self._tracer = tracer
        self._wrapped: list[tuple[type, str, Any]] = []

    def undo(self) -> None:
        """Record no run that begins from now on. May be called again, to no effect."""
        if _installed.instrumentation is self:
            _installed.handler = _installed.instrumentation = None
            _unwrap(self._wrapped)

    def __enter__(self) -> LangChainInstrumentation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()


def instrument_langchain(tracer: Stages | None = None) -> LangChainInstrumentation:
    """
    Record every run of LangChain and LangGraph in this process, and every document compressor as `rerank`.

    `tracer` is who records; without, it is the package's own (`evalvault_sdk.configure`). Called again with the same
    tracer it changes nothing; with another one, that takes the place of the first. Where an `EvalVaultCallbackHandler`
    is given to a call, that records the call, and no run is recorded twice.
    """
    tracer = default if tracer is None else tracer
    current = _installed.instrumentation
    if current is not None:
        if current._tracer is tracer:
            return current
        current.undo()
    made = LangChainInstrumentation(tracer)
    if not _installed.is_hooked:
        _installed.is_hooked = True
        register_configure_hook(_installed, inheritable=True, handle_class=EvalVaultCallbackHandler)  # type: ignore[arg-type]
    _installed.handler, _installed.instrumentation = EvalVaultCallbackHandler(tracer), made
    _wrap_subclasses(BaseDocumentCompressor, made._wrapped)

    def wrap_new(cls: type[Any], /, **_: Any) -> None:
        if _installed.instrumentation is made:
            _wrap(cls, made._wrapped)

    setattr(BaseDocumentCompressor, _SUBCLASS_HOOK, classmethod(wrap_new))
    return made


# -- compressors: they have no callbacks ---------------------------------------------------------------


def _wrap_subclasses(cls: type[Any], wrapped: list[tuple[type, str, Any]]) -> None:
    for subclass in cls.__subclasses__():
        _wrap(subclass, wrapped)
        _wrap_subclasses(subclass, wrapped)


def _wrap(cls: type, wrapped: list[tuple[type, str, Any]]) -> None:
    for name in _METHODS:
        method = vars(cls).get(name)
        if inspect.isfunction(method) and not hasattr(method, "_evalvault_wraps"):
            wrapped.append((cls, name, method))
            setattr(cls, name, _measured(method))


def _unwrap(wrapped: list[tuple[type, str, Any]]) -> None:
    if _SUBCLASS_HOOK in vars(BaseDocumentCompressor):
        delattr(BaseDocumentCompressor, _SUBCLASS_HOOK)
    while wrapped:
        cls, name, method = wrapped.pop()
        if getattr(vars(cls).get(name), "_evalvault_wraps", None) is method:  # else another one has wrapped it since
            setattr(cls, name, method)


def _measured(method: F) -> F:
    @functools.wraps(method)
    def compress(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _rerank(self, args, kwargs) as stage:
            result = method(self, *args, **kwargs)
            _kept(stage, result)
            return result

    @functools.wraps(method)
    async def acompress(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _rerank(self, args, kwargs) as stage:
            result = await method(self, *args, **kwargs)
            _kept(stage, result)
            return result

    measured: Any = acompress if inspect.iscoroutinefunction(method) else compress
    measured._evalvault_wraps = method
    return measured  # type: ignore[no-any-return]


@contextmanager
def _rerank(compressor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[StageContext | None]:
    """Measure a compression: below the retriever that its callbacks come from, else below what it runs in."""
    handler = _installed.handler
    stage = (
        None if handler is None or _compressing.get() is compressor else _stage(handler.runs, compressor, args, kwargs)
    )
    if stage is None:
        yield None
        return
    before = _compressing.get()
    _compressing.set(compressor)
    try:
        with stage:
            yield stage
    finally:
        _compressing.set(before)  # no token: a coroutine may be closed in another context


def _stage(runs: Runs, compressor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StageContext | None:
    try:
        given = {**dict(zip(("documents", "query", "callbacks"), args, strict=False)), **kwargs}
        key = look(given.get("callbacks"), "parent_run_id")
        run = runs.get(key)
        if run is not None:
            run.reranked = True
        attributes = {"query": given.get("query"), "input_count": _count(given.get("documents"))}
        top_k = look(compressor, "top_n")
        if top_k is not None:
            attributes["top_k"] = top_k
        return runs.tracer.stage(
            "rerank", stage_name=type(compressor).__name__, parent=runs.observed.get(key), attributes=attributes
        )
    except Exception as error:  # noqa: BLE001 - the host program must not feel our faults
        runs.recorder.misread("a document compressor of LangChain", error)
        return None


def _kept(stage: StageContext | None, result: Any) -> None:
    if stage is not None:
        try:
            stage.set(output_count=_count(result), **documents_of(result))
        except Exception as error:  # noqa: BLE001 - see above
            stage._recorder.misread("a document compressor of LangChain", error)


def _count(found: Any) -> int | None:
    return len(found) if isinstance(found, Sized) else None
