"""
Record what LlamaIndex runs, as the extra `[llama-index]`.

In:   the spans and events of LlamaIndex's `instrumentation` dispatcher.
Out:  stages of a tracer; nothing of a program needs to be changed::

    from evalvault_sdk.integrations.llama_index import instrument_llama_index

    instrument_llama_index(tracer)

In the threads and tasks of LlamaIndex. Nothing here raises into them, waits, or changes a result.

| of LlamaIndex | stage type | attributes |
| --- | --- | --- |
| query engine, chat engine, workflow, step | `chain` | `query`, `answer`; a step has its function's name |
| agent | `agent` | `query`, `answer` |
| the outermost of them | `input`, below it | `query` |
| query transform, question generator, model call for a query | `query_rewrite` | `query`, `rewritten`, the model's |
| retriever | `retrieval` | `query`, `doc_ids`, `scores`, `top_k` |
| postprocessor | `rerank` | `query`, `input_count`, `output_count`, `doc_ids`, `scores`, `model` |
| synthesizer | `chain` | `query` |
| the first prompt of a request | `system_prompt` | `prompt`: the system message, or else the template |
| model call | `output` | `answer`, `citations`, `model`, `temperature`, `tokens_in` and `_out`, `finish_reason` |
| tool | `tool` | `tool_name`, `arguments`, `result` |
| embedding | `embedding` | `model`, `text_count` |

What streams lasts until its stream was read, or given up; its model call has `time_to_first_token_ms`.
`citations` are the ids of the nodes that the answer was made from, unless the model says which it cites. LlamaIndex's
`instrument_tags` are metadata of the stages inside: `with instrument_tags({"session_id": "s-1"}):`.
"""

from __future__ import annotations

import inspect
from types import TracebackType
from typing import Any

from evalvault_sdk.capture.stages import Stages
from evalvault_sdk.default import default
from evalvault_sdk.errors import MissingDependencyError
from evalvault_sdk.integrations.llama_index.spans import Spans

try:
    from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]
    from llama_index.core.instrumentation.event_handlers import BaseEventHandler
    from llama_index.core.instrumentation.events import BaseEvent
    from llama_index.core.instrumentation.span import active_span_id
    from llama_index.core.instrumentation.span_handlers import BaseSpanHandler
except ImportError as error:
    raise MissingDependencyError.for_extra("recording what LlamaIndex runs", "llama-index", error) from error

__all__ = ["LlamaIndexInstrumentation", "instrument_llama_index"]


class LlamaIndexInstrumentation:
    """What `instrument_llama_index` did; as a context manager it undoes that at the end of the block."""

    def __init__(self, stages: Stages) -> None:
        self._stages = stages
        self._spans = Spans(stages, active_span_id.get)
        self._span_handler = _SpanHandler()
        self._span_handler.owner, self._span_handler.spans = self, self._spans
        self._event_handler = _EventHandler()
        self._event_handler.spans = self._spans
        self._spans.attach()
        root = get_dispatcher()
        root.add_span_handler(self._span_handler)
        root.add_event_handler(self._event_handler)

    def undo(self) -> None:
        """Record nothing of LlamaIndex any more; what is open is recorded as `cancelled`. May be called again."""
        root = get_dispatcher()
        # New lists: another thread may be going through the old ones. By identity: handlers compare by their fields.
        root.span_handlers = [handler for handler in root.span_handlers if handler is not self._span_handler]
        root.event_handlers = [handler for handler in root.event_handlers if handler is not self._event_handler]
        self._spans.detach()

    def __enter__(self) -> LlamaIndexInstrumentation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()


def instrument_llama_index(tracer: Stages | None = None) -> LlamaIndexInstrumentation:
    """
    Record what LlamaIndex runs with `tracer`, or with the package's own (`evalvault_sdk.configure`) if None.

    From now on, in the whole process, until `undo()` of the result. Called again for the same tracer it does nothing,
    and returns the same result. Raises `MissingDependencyError` on import where llama-index-core is not installed.
    """
    stages = default if tracer is None else tracer
    for handler in get_dispatcher().span_handlers:
        if isinstance(handler, _SpanHandler) and handler.owner._stages is stages:
            owner: LlamaIndexInstrumentation = handler.owner
            return owner
    return LlamaIndexInstrumentation(stages)


class _SpanHandler(BaseSpanHandler[Any]):
    """Passes on what the dispatcher tells. LlamaIndex's own bookkeeping of spans is not wanted."""

    # Fields, not private attributes: those are slow to get at.
    owner: Any = None
    spans: Any = None

    @classmethod
    def class_name(cls) -> str:
        return "EvalVaultSpanHandler"

    def span_enter(
        self,
        id_: str,
        bound_args: inspect.BoundArguments,
        instance: Any | None = None,
        parent_id: str | None = None,
        tags: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        self.spans.enter(id_, bound_args, instance, parent_id, tags)

    def span_exit(
        self,
        id_: str,
        bound_args: inspect.BoundArguments,
        instance: Any | None = None,
        result: Any | None = None,
        **_: Any,
    ) -> None:
        self.spans.exit(id_, result)

    def span_drop(
        self,
        id_: str,
        bound_args: inspect.BoundArguments,
        instance: Any | None = None,
        err: BaseException | None = None,
        **_: Any,
    ) -> None:
        self.spans.drop(id_, err)

    def close(self) -> None:
        self.spans.close("shutdown")

    def new_span(self, *_: Any, **__: Any) -> None:
        return None

    def prepare_to_exit_span(self, *_: Any, **__: Any) -> None:
        return None

    def prepare_to_drop_span(self, *_: Any, **__: Any) -> None:
        return None


class _EventHandler(BaseEventHandler):
    """Passes on the events of model calls."""

    spans: Any = None

    @classmethod
    def class_name(cls) -> str:
        return "EvalVaultEventHandler"

    def handle(self, event: BaseEvent, **_: Any) -> None:
        self.spans.tell(event)
