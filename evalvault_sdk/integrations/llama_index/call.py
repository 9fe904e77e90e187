"""
A call of a model: what its events tell.

In:   the events of LlamaIndex, with the span that each is told by.
Out:  attributes of the stage that the call is, or that it is a part of; word of its end.
In the thread or task that calls the model, or that reads its stream.
"""

from __future__ import annotations

from typing import Any

from evalvault_sdk.capture.clock import clock
from evalvault_sdk.capture.stage import StageContext
from evalvault_sdk.integrations.llama_index import reading

_BEGAN = ("LLMChatStartEvent", "LLMCompletionStartEvent")
_GAVE = ("LLMChatInProgressEvent", "LLMCompletionInProgressEvent")
_ENDED = ("LLMChatEndEvent", "LLMCompletionEndEvent")
#: What the last event of a call is called, and what any is.
LAST_EVENTS = frozenset({*_ENDED, "ExceptionEvent"})
CALL_EVENTS = frozenset({*_BEGAN, *_GAVE, *LAST_EVENTS})


class Call:
    """
    A model call. `span_id` is that of its span, if it has a stage of its own; else `stage` is that of what makes the
    call for its own ends, as a reranker does.
    """

    __slots__ = ("_model", "answer", "span_id", "stage", "told_by")

    def __init__(self, model: Any, stage: StageContext, span_id: str | None) -> None:
        self._model = model
        self.stage = stage
        self.span_id = span_id
        #: The span that events are taken from: a call of one interface may be one of another inside.
        self.told_by: str | None = None
        self.answer: Any = None

    def tell(self, span_id: str, name: str, event: Any) -> None:
        """Take note of an event called `name`."""
        if self.told_by is None and name in _BEGAN:
            self.told_by = span_id
            self.stage.set(**reading.call_begun(event, self._model))
        elif self.told_by == span_id and name in _GAVE:
            self._note_first_token()
        elif self.told_by == span_id and name in _ENDED:
            self._note_answer(event)

    def _note_first_token(self) -> None:
        stage = self.stage
        if self.span_id is not None and "time_to_first_token_ms" not in stage.attributes:
            waited_ns = clock.perf_counter_ns() - stage._started_perf_ns
            stage.set(time_to_first_token_ms=waited_ns / 1_000_000)

    def _note_answer(self, event: Any) -> None:
        stage = self.stage
        self.answer, attributes = reading.call_ended(event)
        if self.span_id is None:  # one of several, perhaps
            for name in ("tokens_in", "tokens_out"):
                if name in attributes:
                    attributes[name] += stage.attributes.get(name, 0)
        elif self.answer is not None:
            attributes["answer" if stage.stage_type == "output" else "rewritten"] = self.answer
        stage.set(**attributes)
