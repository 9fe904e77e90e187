"""
Make stages of LlamaIndex's spans.

In:   the beginnings and ends of spans, and the events of model calls, as LlamaIndex's dispatcher tells them.
Out:  stages. What is plumbing has none: what runs in it is below the next one up.
In the threads and tasks of LlamaIndex. Never raises, never waits; keeps a bounded number of spans.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from inspect import BoundArguments
from typing import Any, TypeVar

from evalvault_sdk.capture.context import here
from evalvault_sdk.capture.observed import ObservedStages
from evalvault_sdk.capture.stage import StageContext
from evalvault_sdk.capture.stages import Stages
from evalvault_sdk.integrations.llama_index import reading
from evalvault_sdk.integrations.llama_index.call import CALL_EVENTS, LAST_EVENTS, Call
from evalvault_sdk.integrations.llama_index.components import (
    AGENT,
    CHAT_ENGINE,
    EMBEDDING,
    FUNCTION,
    MODEL,
    RERANKER,
    RETRIEVER,
    SYNTHESIZER,
    TOOL,
    WORKFLOW,
    Component,
    component_of,
    is_own_function,
)
from evalvault_sdk.integrations.llama_index.span import Span
from evalvault_sdk.integrations.llama_index.streams import Streams

F = TypeVar("F", bound=Callable[..., None])

#: So many spans are known at a time; the oldest is forgotten, and what begins in it later is a request of its own.
_MAX_SPANS = 50_000
#: Workflows tag their spans with what they were given; the other tags are the program's, of `instrument_tags`.
_OWN_TAGS = "llamaindex."
#: What writes the stream of a chat down, from its beginning to its end.
_CHAT_WRITERS = ("write_response_to_history", "awrite_response_to_history")


def _harmless(method: F) -> F:
    """Keep a method's errors from the host program: count them, and say of which kind they are."""

    @functools.wraps(method)
    def called(self: Spans, *arguments: Any) -> None:
        try:
            method(self, *arguments)
        except Exception as error:  # noqa: BLE001 - objects of other versions, and of the program's own making
            self._recorder.misread("LlamaIndex", error)

    return called  # type: ignore[return-value]


class Spans:
    """The spans that LlamaIndex has open, and their stages. `active` returns the id of the one the code runs in."""

    def __init__(self, stages: Stages, active: Callable[[], str | None]) -> None:
        self._recorder = stages._recorder
        self._active = active
        self.observed = ObservedStages(stages, self._stage_here)
        self._spans: dict[str, Span] = {}
        self._streams: Streams[Span] = Streams(self._stream_ended)
        self._recorder.add_source(self)

    def __len__(self) -> int:
        """How many are known."""
        return len(self._spans)

    def attach(self) -> None:
        """Let the program's own stages find those of LlamaIndex that they run in."""
        self.observed.attach()

    def detach(self) -> None:
        """Undo `attach`, and end what is open as `cancelled`."""
        self.observed.detach()
        self.close("undone")

    def close(self, why: str) -> None:
        """End all that is open as `cancelled`."""
        self._spans.clear()
        self.observed.close(why)

    def _stage_here(self) -> str | None:
        span = self._spans.get(self._active() or "")
        return None if span is None else span.stage_id

    # -- what the dispatcher tells -------------------------------------------------------------------

    @_harmless
    def enter(
        self, id_: str, bound: BoundArguments, instance: Any, parent_id: str | None, tags: Mapping[str, Any] | None
    ) -> None:
        """Begin a span: the call of a method of `instance`, or of a function if that is None."""
        if not self._recorder.enabled:
            return
        component = component_of(instance)
        span = Span(id_, self._parent(parent_id, component))
        if tags:
            span.tags = {name: tag for name, tag in tags.items() if not name.startswith(_OWN_TAGS)}
        self._keep(span)
        arguments = bound.arguments
        if component is MODEL:
            if span.method in MODEL.methods:
                self._begin_call(span, instance, arguments)
            else:
                span.template = arguments.get("prompt") or span.template
        elif component is not None and span.method in component.methods:
            if component is span.component and (component.is_one_call or span.instance == id(instance)):
                return
            span.component, span.instance = component, id(instance)
            name = reading.tool_name(instance) if component is TOOL else type(instance).__name__
            self._begin(span, component.stage_type, name, _given(component, instance, arguments))
            if component is CHAT_ENGINE and not (hasattr(instance, "_retriever") or hasattr(instance, "_query_engine")):
                span.sources = []
            elif component is SYNTHESIZER:
                span.sources = reading.ids_of(arguments.get("additional_source_nodes") or arguments.get("nodes"))
        else:
            run = span.parent
            is_step = run is not None and run.method == "run" and run.component in (WORKFLOW, AGENT)
            if (component is None or is_step) and is_own_function(instance, span.name, is_step):
                self._begin_function(span, arguments, run if is_step else None)

    @_harmless
    def exit(self, id_: str, result: Any) -> None:
        """End a span that returned."""
        span = self._spans.get(id_)
        if span is None:
            return
        if not span.has_stage:
            # A call that tells of itself inside another one goes on telling as long as it streams.
            if not (span.call is not None and span.call.told_by == id_ and self._streams.follow(result, span)):
                self._leave(span, None)
            return
        span.is_waiting = True  # before the stream is looked at: another thread may be at its end already
        if not self._streams.follow(result, span):
            # Of a run that failed some versions tell only that it has no result.
            failures = span.failures.values() if result is None else ()
            try:
                self._note_result(span, result)
            finally:
                self._end(span, next((error for _, error in failures), None))

    @_harmless
    def drop(self, id_: str, error: BaseException | None) -> None:
        """End a span that raised."""
        span = self._spans.get(id_)
        if span is not None:
            (self._end if span.has_stage else self._leave)(span, error)

    @_harmless
    def tell(self, event: Any) -> None:
        """Take note of an event."""
        name = type(event).__name__
        if name not in _EVENTS or (span := self._spans.get(event.span_id)) is None:
            return
        if name in CALL_EVENTS:
            if span.call is not None:
                self._tell_call(span.call, span.id, name, event)
        elif name == _CANCELLED:
            if span.has_stage and (stage := self.observed.get(span.id)) is not None:
                _cancel(stage, event.reason)
        else:
            self._end_chat(span, getattr(event, "exception", None))

    def _tell_call(self, call: Call, span_id: str, name: str, event: Any) -> None:
        try:
            call.tell(span_id, name, event)
        finally:
            if name in LAST_EVENTS and call.told_by == span_id:
                called = self._spans.get(call.span_id or "")
                if called is not None and called.is_waiting:
                    self._end(called, getattr(event, "exception", None))

    # -- what begins ---------------------------------------------------------------------------------

    def _parent(self, parent_id: str | None, component: Component | None) -> Span | None:
        parent = self._spans.get(parent_id) if parent_id is not None else None
        if component is MODEL:
            # A stream may make its call when it is read, wherever that is.
            reading_from = self._streams.reading()
            if reading_from is not None and (parent is None or not parent.is_inside(reading_from)):
                return reading_from
        return parent

    def _keep(self, span: Span) -> None:
        self._spans[span.id] = span
        if len(self._spans) > _MAX_SPANS:
            with contextlib.suppress(KeyError, RuntimeError):  # another thread was at it
                del self._spans[next(iter(self._spans))]

    def _begin(self, span: Span, stage_type: str, stage_name: str, attributes: dict[str, Any]) -> StageContext | None:
        is_root = span.stage_id is None
        if is_root:
            span.request = {}
        stage = self.observed.begin(
            span.id, span.stage_id, stage_type, stage_name=stage_name, attributes=attributes, metadata=span.tags
        )
        span.stage_id = span.id
        span.call = span.template = None
        query = attributes.get("query")
        if is_root and query is not None and span.component is not None and span.component.takes_requests:
            self._note(span, "input", {"query": query})
        return stage

    def _begin_function(self, span: Span, arguments: Mapping[str, Any], run: Span | None) -> None:
        """Begin the stage of a function of the program's own, or of a step, which may be tried again."""
        span.component = FUNCTION
        stage = self._begin(span, FUNCTION.stage_type, span.method, {})
        if stage is not None and run is not None:
            span.task = span.method, id(arguments.get("ev"))
            stage.attempt = 1 + run.failures[span.task][0] if span.task in run.failures else 1

    def _begin_call(self, span: Span, model: Any, arguments: Mapping[str, Any]) -> None:
        around = span.component
        if around is MODEL:
            return
        if around is not None and around.absorbs_calls:
            stage = None if span.stage_id is None else self.observed.get(span.stage_id)
            span.component, span.call = MODEL, None
            if stage is not None:
                span.call = Call(model, stage, None)
            return
        above = span.parent if span.stage_id is not None else None
        is_whole_request = above is None and ((scope := here()) is None or scope.stage_id is None)
        stage_type = _type_of_call(span)
        attributes: dict[str, Any] = {}
        prompt = None
        if stage_type == MODEL.stage_type:
            prompt = self._prompt(span, model, arguments)
            if sources := span.known_sources:
                attributes["citations"] = sources
        elif span.stage_id is not None and (asking := self.observed.get(span.stage_id)) is not None:
            attributes["query"] = asking.attributes.get("query")
        if prompt is not None and above is not None:
            self._note(above, "system_prompt", {"prompt": prompt})
        span.component = MODEL
        stage = self._begin(span, stage_type, type(model).__name__, attributes)
        if stage is None:
            return
        if prompt is not None and above is None:
            self._note(span, "system_prompt", {"prompt": prompt})
        if is_whole_request and (question := reading.asked(arguments)) is not None:
            self._note(span, "input", {"query": question})
        span.call = Call(model, stage, span.id)

    def _prompt(self, span: Span, model: Any, arguments: Mapping[str, Any]) -> str | None:
        """Return the prompt of a request, the first time."""
        if "prompt" in span.request:
            return None
        prompt = reading.prompt_of(arguments.get("messages"))
        if prompt is None and span.template is not None:
            prompt = reading.template_of(span.template, model)
        if prompt is not None:
            span.request["prompt"] = True
        return prompt

    def _note(self, above: Span, stage_type: str, attributes: dict[str, Any]) -> None:
        """Record a stage that takes no time."""
        key = (above.id, stage_type)
        self.observed.begin(key, above.stage_id, stage_type, attributes=attributes, metadata=above.tags)
        self.observed.end(key)

    # -- what ends -----------------------------------------------------------------------------------

    @_harmless
    def _stream_ended(self, span: Span, error: BaseException | None) -> None:
        if not span.has_stage:
            self._spans.pop(span.id, None)
        elif span.is_waiting:
            if isinstance(error, GeneratorExit) and (span.answer is not None or not _tells_its_end(span)):
                error = None  # it was collected, but after it gave the whole answer; or nobody can say
            self._end(span, error)

    def _leave(self, span: Span, error: BaseException | None) -> None:
        """Forget a span without a stage."""
        self._spans.pop(span.id, None)
        if span.method in _CHAT_WRITERS:
            self._end_chat(span, error)

    def _end_chat(self, writer: Span, error: BaseException | None) -> None:
        """End the chat whose stream was written down."""
        above = writer.enclosing
        if above is not None and above.is_waiting:
            self._end(above, error)

    def _end(self, span: Span, error: BaseException | None) -> None:
        """Record the stage of a span."""
        self._spans.pop(span.id, None)
        span.is_waiting = False
        stage = self.observed.get(span.id)
        if stage is None:
            return
        call, above = span.call, span.parent
        if call is not None:
            while above is not None and stage.stage_type == MODEL.stage_type:
                above.answer, above = call.answer, above.parent
        elif span.answer is not None and span.component is not None and span.component.takes_requests:
            stage.attributes.setdefault("answer", span.answer)
        if span.task is not None and span.parent is not None:
            failures = span.parent.failures
            count, _ = failures.pop(span.task, (0, None))
            if error is not None:
                failures[span.task] = count + 1, error
        if type(error).__name__ == _CANCELLATION:
            _cancel(stage, _CANCELLATION)
            error = None
        self.observed.end(span.id, error)

    def _note_result(self, span: Span, result: Any) -> None:
        """Add to a stage what came out of it."""
        stage = self.observed.get(span.id)
        component = span.component
        if stage is None or component is None:
            return
        if component is RETRIEVER or component is RERANKER:
            stage.set(**reading.found(result))
            if component is RERANKER:
                stage.set(output_count=reading.count_of(result))
            sources, above = reading.ids_of(result), span.parent
            while above is not None:
                above.sources, above = sources, above.parent
        elif component is TOOL:
            answer = reading.answer_of(result)
            stage.set(result=answer)
            if getattr(result, "is_error", False):
                stage.fail(str(answer), kind="ToolError")
        elif stage.stage_type == "query_rewrite" and component is not MODEL:
            stage.set(rewritten=reading.rewritten(result))
        elif component.takes_requests:
            answer = reading.answer_of(result)
            if answer is not None and answer != "":  # a chat may have streamed already, and not have put it together
                stage.set(answer=answer)


#: Told before the reader of a chat gets its end: whoever has read it finds it recorded.
_CHAT_EVENTS = ("StreamChatEndEvent", "StreamChatErrorEvent")
#: Told by newer workflows, whose spans then end as if all were well; and what those of older ones end with.
_CANCELLED = "SpanCancelledEvent"
_CANCELLATION = "WorkflowCancelledByUser"
_EVENTS = frozenset({*CALL_EVENTS, *_CHAT_EVENTS, _CANCELLED})


def _given(component: Component, instance: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of what a component was given."""
    if component is EMBEDDING:
        texts = arguments.get("texts")
        return {**reading.named_model(instance), "text_count": 1 if texts is None else reading.count_of(texts)}
    if component is TOOL:
        return {"tool_name": reading.tool_name(instance), "arguments": reading.tool_arguments(arguments)}
    query = reading.query_of(arguments)
    attributes: dict[str, Any] = {} if query is None else {"query": query}
    if component is RETRIEVER:
        attributes.update(reading.retriever(instance))
    elif component is RERANKER:
        attributes.update(reading.named_model(instance), input_count=reading.count_of(arguments.get("nodes")))
    return attributes


def _cancel(stage: StageContext, by: str) -> None:
    stage.status = "cancelled"
    stage.set(cancelled_by=by)


def _tells_its_end(span: Span) -> bool:
    """Whether there is word of the end of a span's stream, so that one without was not read to its end."""
    if span.component is MODEL:
        return span.call is not None and span.call.told_by is not None
    return span.component is SYNTHESIZER or (span.component is not None and span.component.takes_requests)


def _type_of_call(span: Span) -> str:
    """Return whether a model call makes a query or an answer: a chat that has found nothing yet makes a query."""
    around = span.enclosing
    makes_query = span.component is RETRIEVER or (
        around is not None and around.component is CHAT_ENGINE and around.sources is None
    )
    return "query_rewrite" if makes_query else MODEL.stage_type
